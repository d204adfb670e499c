"""PolaFormer++ b0–b5: presets, backbone with classifier, registration with timm.

Data flow: image → stem → four stages of blocks, with a downsampling after each of the first three → head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import (  # timm re-exports them without __all__
    DropPath,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    to_2tuple,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polaformer import weights
from polaformer.attention import GatedAttention, PolarityAttention, Rotary, SoftmaxAttention
from polaformer.layers import DepthwiseConv, Downsample, FeedForward, Stem
from polaformer.rotary import rotary_embedding

MLP_RATIO = 3.5
TOTAL_STRIDE = 32
POOL_TYPES = ("avg", "max", "avgmax", "")  # "" does not pool

torch.fx.wrap("_channels_last")  # leaves of a traced graph: they need the sizes of the image at run time
torch.fx.wrap("rotary_embedding")


@dataclass(frozen=True)
class Preset:
    """Hyperparameters that differ among b0–b5; tuples hold one value per stage."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    drop_path: float  # rate of the last block; rates rise linearly from 0
    head_hidden_size: int  # channels between the last stage and the classifier
    layer_scale: tuple[float, float, float, float]  # initial values


ONES, SMALL = (1.0,) * 4, (1e-6,) * 4
PRESETS = {
    "polaformerpp_b0": Preset((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), 0.1, 2048, ONES),
    "polaformerpp_b1": Preset((32, 64, 192, 384), (2, 2, 4, 2), (1, 2, 6, 12), 0.1, 2048, ONES),
    "polaformerpp_b2": Preset((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 0.1, 2048, ONES),
    "polaformerpp_b3": Preset((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 0.15, 2048, ONES),
    "polaformerpp_b4": Preset((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), 0.4, 2048, (1.0, 1.0, 1e-6, 1e-6)),
    "polaformerpp_b5": Preset((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 0.55, 2560, SMALL),
}


class Block(nn.Module):
    """Residual block of positional convolution, attention and feed-forward: (B, height, width, C) → the same shape.

    The two LayerScale parameters γ have one value per channel. They are four-dimensional because the official recipe
    decays them, and exempts only one-dimensional parameters from weight decay.
    """

    def __init__(self, attention: GatedAttention, channels: int, layer_scale: float, drop_path: float) -> None:
        super().__init__()
        self.pos = DepthwiseConv(channels, 3)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = attention
        self.gamma_1 = nn.Parameter(torch.full((1, 1, 1, channels), layer_scale))
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.ffn = FeedForward(channels, int(MLP_RATIO * channels))
        self.gamma_2 = nn.Parameter(torch.full((1, 1, 1, channels), layer_scale))
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Apply the three residual branches; rotary: see `Rotary`."""
        x = self.pos(x, x)
        x = x + self.drop_path1(self.gamma_1 * self.attn(self.norm1(x), rotary))
        out: Tensor = x + self.drop_path2(self.gamma_2 * self.ffn(self.norm2(x)))
        return out


class Stage(nn.Module):
    """Blocks of one resolution and width; the model calls `downsample` between this stage and the next."""

    def __init__(self, preset: Preset, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        channels, heads = preset.channels[stage], preset.heads[stage]
        attention = PolarityAttention if stage < 2 else SoftmaxAttention
        self.uses_rotary = attention is SoftmaxAttention
        self.head_dim = channels // heads
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            Block(attention(channels, heads), channels, preset.layer_scale[stage], drop_path)
            for drop_path in drop_paths
        )
        self.features = nn.Identity()  # names the output for torch.fx, to which `downsample` is the stage's last module
        last = stage == len(preset.channels) - 1
        self.downsample = nn.Identity() if last else Downsample(channels, preset.channels[stage + 1])

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks: (B, C, height, width) in channels-last memory → the same."""
        x = x.permute(0, 2, 3, 1)
        rotary: Rotary = None
        if self.uses_rotary:
            rotary = rotary_embedding(x.shape[1], x.shape[2], self.head_dim, x)
        for block in self.blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            # torch.jit does not declare is_scripting as exported
            if recompute and not torch.jit.is_scripting():
                x = checkpoint(block, x, rotary, use_reentrant=False)
            else:
                x = block(x, rotary)
        out: Tensor = self.features(x.permute(0, 3, 1, 2))
        return out


class PolaFormerPP(nn.Module):
    """Backbone with classifier and the methods that timm expects of a model.

    drop_path_rate: None means the preset's. num_classes: 0 gives pooled features (B, preset.head_hidden_size).
    global_pool: one of POOL_TYPES; "" gives unpooled logits or features (B, …, h / 32, w / 32).
    img_size: side, or height and width, for timm to record; the model still accepts every size.
    Raises ValueError, before anything is allocated, for another pooling, an image size that is not a multiple of 32,
    or an output_stride other than 32.
    """

    def __init__(
        self,
        preset: Preset,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_path_rate: float | None = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        output_stride: int = TOTAL_STRIDE,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if img_size is not None:
            _check_size(*to_2tuple(img_size))
        if output_stride != TOTAL_STRIDE:
            raise ValueError(f"output_stride {output_stride} is not offered; leave it out: it is {TOTAL_STRIDE}")
        self.global_pool = _pooling(global_pool)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features: int = preset.channels[-1]
        self.head_hidden_size: int = preset.head_hidden_size
        rate = preset.drop_path if drop_path_rate is None else drop_path_rate
        drop_paths: list[Any] = calculate_drop_path_rates(rate, list(preset.depths), stagewise=True)
        self.stem = Stem(in_chans, preset.channels[0])
        self.stages = nn.ModuleList(Stage(preset, stage, drop_paths[stage]) for stage in range(4))
        feature_info: list[dict[str, Any]] = [
            {"num_chs": channels, "reduction": 4 << stage, "module": f"stages.{stage}.features"}
            for stage, channels in enumerate(preset.channels)
        ]
        self.feature_info = feature_info
        self.proj: nn.Module = nn.Conv2d(preset.channels[-1], preset.head_hidden_size, 1)
        self.norm: nn.Module = nn.BatchNorm2d(preset.head_hidden_size)
        self.act: nn.Module = nn.SiLU()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.apply(_initialise)
        # torch leaves this function unannotated
        self.register_load_state_dict_pre_hook(weights.remap_official_hook)  # type: ignore[no-untyped-call]
        if device is not None or dtype is not None:
            self.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, h, w), h and w multiples of 32 → logits (B, num_classes).

        Without pooling, logits of every position: (B, num_classes, h / 32, w / 32).
        Raises ValueError for another size, naming the two nearest that work.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last stage's features: images (B, in_chans, h, w) → (B, C, h / 32, w / 32)."""
        x = self.stem(_channels_last(x))
        for stage in self.stages:
            # torch's stub: attributes of modules may be tensors
            x = stage.downsample(stage(x))  # type: ignore[operator]
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the outputs (B, C, h / reduction, w / reduction) of the stages in `indices`: the last n, or all.

        Outputs are those of each stage's last block. There is no final norm, so `norm` has no effect.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt} is not offered; use NCHW")
        taken, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        x = self.stem(_channels_last(x))
        intermediates = []
        for number, stage in enumerate(stages):
            x = stage(x)
            if number in taken:
                intermediates.append(x)
            if number < len(stages) - 1:
                # torch's stub: attributes of modules may be tensors
                x = stage.downsample(x)  # type: ignore[operator]
        return intermediates if intermediates_only else (x, intermediates)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last stage's features to logits (B, num_classes), or to the classifier's input if `pre_logits`."""
        x = self.global_pool(self.act(self.norm(self.proj(x))))
        if pre_logits:
            return x
        logits: Tensor = self.head(self.head_drop(x).movedim(1, -1))  # without pooling, channels are not the last axis
        return logits.movedim(-1, 1)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that the stages in `indices` do not need, as timm defines; return non-negative indices."""
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.stages[-1].downsample = nn.Identity()
        if prune_head or last < 3:  # the head needs the last stage's channels
            self.proj = self.norm = self.act = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """Last linear layer, or an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last linear layer, and the pooling unless it is None; 0 classes remove the layer."""
        if global_pool is not None:
            self.global_pool = _pooling(global_pool)
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.stem.parameters())
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            _initialise_convolution(self.head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for timm's layer-wise learning rates; `coarse` groups by stage."""
        blocks = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.downsample", MATCH_PREV_GROUP),  # the depth of the previous block
            (r"^(?:proj|norm)\.", MATCH_PREV_GROUP),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the inputs of blocks for backward and recompute the rest."""
        for stage in self.stages:
            # torch's stub: attributes of modules are tensors or modules
            stage.grad_checkpointing = enable  # type: ignore[assignment]


def _initialise(module: nn.Module) -> None:
    """Initialise convolutions; linear layers and norms keep PyTorch's defaults."""
    if isinstance(module, nn.Conv2d):
        _initialise_convolution(module)


def _initialise_convolution(module: nn.Conv2d | nn.Linear) -> None:
    """Initialise a convolution, or the classifier, which is a 1×1 convolution in the official model."""
    trunc_normal_(module.weight, std=0.02)
    assert module.bias is not None
    nn.init.zeros_(module.bias)


def _pooling(global_pool: str) -> nn.Module:
    if global_pool not in POOL_TYPES:
        offered = ", ".join(repr(name) for name in POOL_TYPES)
        raise ValueError(f"global_pool {global_pool!r} is not offered; use one of {offered}")
    return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))


def _channels_last(images: Tensor) -> Tensor:
    """Copy images (B, in_chans, h, w) to channels-last memory; raise ValueError for a size that does not work."""
    _check_size(images.shape[-2], images.shape[-1])
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # torch.vmap does not support memory formats


def _check_size(height: int, width: int, multiple: int = TOTAL_STRIDE) -> None:
    for name, length in (("height", height), ("width", width)):
        if length % multiple != 0 or length == 0:
            below = max(length // multiple, 1) * multiple
            raise ValueError(
                f"image {name} {length} is not a multiple of {multiple}; use {below} or {below + multiple}"
            )


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PolaFormerPP:
    """Build a model or its `features_only` wrapper as timm requests."""
    if kwargs.get("feature_cls") in ("list", "dict"):
        raise ValueError(f"feature_cls {kwargs['feature_cls']} is not offered; use getter (the default), fx or hook")
    model: PolaFormerPP = build_model_with_cfg(
        PolaFormerPP,
        variant,
        pretrained,
        pretrained_filter_fn=weights.checkpoint_filter_fn,
        preset=PRESETS[variant],
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )
    if kwargs.get("features_only"):
        # torch leaves this function unannotated
        model.register_load_state_dict_pre_hook(weights.remap_features_only_hook)  # type: ignore[no-untyped-call]
    return model


# How timm preprocesses images for these models; there are no weights to download.
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": False,
            "pool_size": (7, 7),
            "crop_pct": 224 / 256,
            "crop_mode": "squash",
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "stem.0",
            "classifier": "head",
        }
        for name in PRESETS
    }
)


@register_model
def polaformerpp_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolaFormer++ b0; kwargs as in `PolaFormerPP`."""
    return _create("polaformerpp_b0", pretrained, **kwargs)


@register_model
def polaformerpp_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolaFormer++ b1; kwargs as in `PolaFormerPP`."""
    return _create("polaformerpp_b1", pretrained, **kwargs)


@register_model
def polaformerpp_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolaFormer++ b2; kwargs as in `PolaFormerPP`."""
    return _create("polaformerpp_b2", pretrained, **kwargs)


@register_model
def polaformerpp_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolaFormer++ b3; kwargs as in `PolaFormerPP`."""
    return _create("polaformerpp_b3", pretrained, **kwargs)


@register_model
def polaformerpp_b4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolaFormer++ b4; kwargs as in `PolaFormerPP`."""
    return _create("polaformerpp_b4", pretrained, **kwargs)


@register_model
def polaformerpp_b5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PolaFormer++ b5; kwargs as in `PolaFormerPP`."""
    return _create("polaformerpp_b5", pretrained, **kwargs)

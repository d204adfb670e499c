"""Weights in and out: the names of official checkpoints, strict loading, safetensors.

`Model.load_state_dict` (and so timm's `checkpoint_path`) accepts both naming schemes through the hooks below.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import load_state_dict as read_state_dict
from torch import Tensor, nn

from polaformer.layers import rotary_angles

#: Our name → the official one, applied in this order; everything else bears the same name.
_OFFICIAL_NAMES = (
    (re.compile(r"^stem\."), "patch_embed.proj."),
    (re.compile(r"^stages\."), "layers."),
    (re.compile(r"\.(norm[12])\."), r".\1.norm."),
    (re.compile(r"^(layers\.[23]\..*)\.qkvg\."), r"\1.qkvo."),
    (re.compile(r"\.same_logits$"), ".s1"),
    (re.compile(r"\.opposite_logits$"), ".s2"),
)
_OFFICIAL_MARK = "patch_embed."
_ANGLES = re.compile(r"^layers\.\d\.RoPE(_linear)?\.angle$")
_HEAD = ("proj.", "norm.", "head.")


def official_name(name: str) -> str:
    """The name that the official implementation gives to this entry of our state dict."""
    for ours, theirs in _OFFICIAL_NAMES:
        name = ours.sub(theirs, name)
    return name


def from_official(official: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names and in our shapes (they keep axes of length one that we do not).

    wanted: the model's own state dict. Raises RuntimeError, as load_state_dict does, with the file's own names of
    all entries that are missing, unexpected or of another shape, and of rotary angles that are not this model's.
    """
    remaining, converted, faults = dict(official), {}, []
    for ours, theirs in ((name, official_name(name)) for name in wanted):
        value = remaining.pop(theirs, None)
        if value is None:
            if not ours.endswith("num_batches_tracked"):  # absent from old files; nothing is computed from it
                faults.append(f"missing {theirs}")
        elif _essential_shape(value) != _essential_shape(wanted[ours]):
            faults.append(f"{theirs} is {tuple(value.shape)}, the model needs {tuple(wanted[ours].shape)}")
        else:
            converted[ours] = value.reshape(wanted[ours].shape)
    for name, value in remaining.items():
        faults += _compare_angles(name, value) if _ANGLES.match(name) else [f"unexpected {name}"]
    if faults:
        raise RuntimeError(f"the official checkpoint does not fit this model: {'; '.join(faults)}")
    return converted


def load_weights(model: nn.Module, path: str | Path, new_head: bool = False) -> None:
    """Loads an official `.pth` or our safetensors strictly; EMA weights win where a file holds both.

    new_head: keep the model's own, freshly drawn classifier instead of the file's, for another set of classes.
    Raises FileNotFoundError, or RuntimeError naming every missing, unexpected or misshapen entry.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; give an official .pth or a .safetensors file")
    try:
        state = read_state_dict(str(path))
    except SafetensorError as error:
        raise RuntimeError(f"{path} is not a safetensors file ({error}); copy or export it again") from error
    if new_head:
        state |= {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    model.load_state_dict(state)


def save_weights(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes a state dict of ours as safetensors, in contiguous CPU memory."""
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path, dict(metadata))


def accept_official(model: nn.Module, state: dict[str, Tensor], prefix: str, *_hook_arguments) -> None:
    """A load_state_dict pre-hook: puts an official state dict under our names, leaves ours alone."""
    theirs = {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
    if any(name.startswith(_OFFICIAL_MARK) for name in theirs):
        official = {name: state.pop(full_name) for name, full_name in theirs.items()}
        for name, value in from_official(official, model.state_dict()).items():
            state[prefix + name] = value


def accept_classifier(features: nn.Module, state: dict[str, Tensor], *_hook_arguments) -> None:
    """The same for timm's `features_only` wrapper: takes a whole model's weights and leaves out what was pruned."""
    if any(name.startswith("model.") for name in state):
        return
    kept = len(features.model.stages)
    pruned = (*_HEAD, *(f"{name}.{stage}." for name in ("stages", "layers") for stage in range(kept, 4)))
    last = tuple(f"{name}.{kept - 1}.downsample." for name in ("stages", "layers"))
    whole = dict(state)
    state.clear()
    state |= {f"model.{name}": value for name, value in whole.items() if not name.startswith(pruned + last)}


def _essential_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(length for length in tensor.shape if length != 1)


def _compare_angles(name: str, angles: Tensor) -> list[str]:
    """Official buffers hold each angle twice, in place; they carry no information beyond their length."""
    expected = rotary_angles(2 * angles.numel()).repeat_interleave(2)
    if angles.numel() % 2 == 0 and torch.allclose(angles.flatten().float(), expected, rtol=1e-4):
        return []
    return [f"{name} holds other angles than this model's"]

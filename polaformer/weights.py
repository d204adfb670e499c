"""Weights in and out: the names of official checkpoints, strict loading, safetensors.

`Model.load_state_dict` (and so timm's `checkpoint_path`) accepts both naming schemes through the hooks below, timm's
`pretrained=True` through its filter of state dicts.
"""

import re
from collections.abc import Iterable, Mapping
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
_PART = re.compile(r"layers\.\d\.(downsample\.)?|[^.]+\.?")  # what timm prunes or keeps as one, by official names
_PRUNABLE = {"proj.", "norm.", "head."} | {
    f"layers.{stage}.{part}" for stage in range(4) for part in ("", "downsample.")
}
_COUNTER = "num_batches_tracked"  # absent from old files; nothing is computed from it
_CLASSIFIER = "head."
_FIRST_CONVOLUTION = "stem.0.weight"


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
            if not ours.endswith(_COUNTER):
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
    if _is_official(theirs):
        official = {name: state.pop(full_name) for name, full_name in theirs.items()}
        for name, value in from_official(official, model.state_dict()).items():
            state[prefix + name] = value


def accept_whole_model(features: nn.Module, state: dict[str, Tensor], *_hook_arguments) -> None:
    """The same for timm's `features_only` wrappers: takes a whole model's weights, leaves out what was pruned."""
    own = features.state_dict()
    prefix = next(iter(own)).split(".")[0] + "."  # "model.", or another name by the kind of wrapper
    if any(name.startswith(prefix) for name in state):
        return
    own = {name.removeprefix(prefix): value for name, value in own.items()}
    pruned = _PRUNABLE - {_part(name) for name in own}
    kept = {name: value for name, value in state.items() if _part(name) not in pruned}
    if _is_official(kept):
        kept = from_official(kept, own)
    state.clear()
    state |= {prefix + name: value for name, value in kept.items()}


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter for `pretrained=True`: a state dict under our names, for timm to fit to classes and channels.

    model: the whole model to load into. Raises RuntimeError for entries that are missing or unexpected; classifier
    and first convolution are left to timm, which adapts or drops them.
    """
    classifier = {name: value for name, value in state.items() if name.startswith(_CLASSIFIER)}
    rest = {name: value for name, value in state.items() if name not in classifier}
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(_CLASSIFIER)}
    if _is_official(rest):
        first = rest.get(official_name(_FIRST_CONVOLUTION))
        if first is not None:
            wanted[_FIRST_CONVOLUTION] = first
        classifier = {name: value.flatten(1) if value.dim() > 1 else value for name, value in classifier.items()}
        return from_official(rest, wanted) | classifier
    faults = [f"missing {name}" for name in wanted if name not in rest and not name.endswith(_COUNTER)]
    faults += [f"unexpected {name}" for name in rest if name not in wanted]
    if faults:
        raise RuntimeError(f"the weights do not fit this model: {'; '.join(faults)}")
    return rest | classifier


def _is_official(names: Iterable[str]) -> bool:
    return any(name.startswith(_OFFICIAL_MARK) for name in names)


def _part(name: str) -> str:
    return _PART.match(official_name(name))[0]


def _essential_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(length for length in tensor.shape if length != 1)


def _compare_angles(name: str, angles: Tensor) -> list[str]:
    """Official buffers hold each angle twice, in place; they carry no information beyond their length."""
    expected = rotary_angles(2 * angles.numel()).repeat_interleave(2)
    if angles.numel() % 2 == 0 and torch.allclose(angles.flatten().float(), expected, rtol=1e-4):
        return []
    return [f"{name} holds other angles than this model's"]

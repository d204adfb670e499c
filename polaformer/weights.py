"""Loading and saving of weights: remapping of official checkpoints, strict loading, safetensors.

`PolaFormerPP.load_state_dict`, and with it timm's `checkpoint_path`, accepts our names and the official ones through
the pre-hooks below; timm's `pretrained=True` through `checkpoint_filter_fn`.
"""

import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from polaformer.rotary import rotary_frequencies

#: Our name → the official one, applied in this order; all other names are the same.
_OFFICIAL_NAMES = (
    (re.compile(r"^stem\."), "patch_embed.proj."),
    (re.compile(r"^stages\."), "layers."),
    (re.compile(r"\.(norm[12])\."), r".\1.norm."),
    (re.compile(r"^(layers\.[23]\..*)\.qkvg\."), r"\1.qkvo."),
    (re.compile(r"\.same_logits$"), ".s1"),
    (re.compile(r"\.opposite_logits$"), ".s2"),
)
_OFFICIAL_PREFIX = "patch_embed."
_ROTARY_BUFFERS = re.compile(r"^layers\.\d\.RoPE(_linear)?\.angle$")
_PART = re.compile(r"layers\.\d\.(downsample\.)?|[^.]+\.?")  # units that timm prunes as a whole, by official names
_STAGES = tuple(f"layers.{stage}." for stage in range(4))
_PRUNABLE = {"proj.", "norm.", "head.", *_STAGES, *(f"{stage}downsample." for stage in _STAGES)}
_COUNTER = "num_batches_tracked"  # absent from old files; not used in computation
_CLASSIFIER = "head."
_FIRST_CONVOLUTION = "stem.0.weight"
_STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order of preference


def official_name(name: str) -> str:
    """Map a name of our state dict to the official implementation's."""
    for ours, theirs in _OFFICIAL_NAMES:
        name = ours.sub(theirs, name)
    return name


def remap_official(official: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape an official state dict to ours, which drops axes of length one.

    wanted: the model's own state dict. Raises RuntimeError, as load_state_dict does, listing by official name every
    entry that is missing, unexpected or of another shape, and rotary buffers that differ from this model's angles.
    """
    remaining, converted, faults = dict(official), dict[str, Tensor](), list[str]()
    for ours, theirs in ((name, official_name(name)) for name in wanted):
        value = remaining.pop(theirs, None)
        if value is None:
            if not ours.endswith(_COUNTER):
                faults.append(f"missing {theirs}")
        elif _squeezed_shape(value) != _squeezed_shape(wanted[ours]):
            faults.append(f"{theirs} is {tuple(value.shape)}, the model needs {tuple(wanted[ours].shape)}")
        else:
            converted[ours] = value.reshape(wanted[ours].shape)
    for name, value in remaining.items():
        faults += _check_rotary_buffer(name, value) if _ROTARY_BUFFERS.match(name) else [f"unexpected {name}"]
    if faults:
        raise RuntimeError(f"the official checkpoint does not fit this model: {'; '.join(faults)}")
    return converted


def load_weights(model: nn.Module, path: str | Path, new_head: bool = False) -> None:
    """Load an official `.pth` or our safetensors strictly; EMA weights are preferred where a file holds both.

    new_head: keep the model's freshly initialised classifier instead of the file's, for another set of classes.
    Raises FileNotFoundError; ValueError if the file holds no state dict that can be read safely; RuntimeError that
    names every missing, unexpected or misshapen entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give an official .pth or a .safetensors file")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    if new_head:
        state |= {name: value for name, value in model.state_dict().items() if name.startswith(_CLASSIFIER)}
    model.load_state_dict(state)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, TypeError, RuntimeError) as error:  # those that are none: a shape that PyTorch cannot have
        reason = str(error).splitlines()[0].encode("ascii", "backslashreplace").decode()
        raise ValueError(f"{path} is not a safetensors file ({reason}); copy or export it again") from error


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict from a file of torch.save.

    Objects of other packages beside it, such as configurations or numpy scalars, are read as stubs: none of their code
    is imported or run.
    """
    _check_container(path)
    unsafe_globals: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            unsafe_globals.update(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        checkpoint = _load_with_stubs(path, unsafe_globals)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # on a damaged file the unpickler may raise anything
        if unsafe_globals:
            raise ValueError(
                f"{path} holds objects of {_shorten(unsafe_globals)}, which cannot be left out;"
                " save the model's state_dict() alone, with torch.save, where it was trained"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else "its end is missing"
        raise ValueError(
            f"{path} is truncated, or no checkpoint of torch.save ({reason}); copy or download it again"
        ) from error
    return _pick_state(checkpoint, path, unsafe_globals)


def _load_with_stubs(path: Path, unsafe_globals: set[str]) -> object:
    """Call torch.load with stubs for the classes in `unsafe_globals`; add those that the unpickler reports."""
    while True:
        stubs: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
            (_NumpyStub if name.startswith("numpy.") else _Stub, name) for name in unsafe_globals
        ]
        try:
            with torch.serialization.safe_globals(stubs):
                return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            reported = re.search(r"GLOBAL (\S+)", str(error))
            name = reported and (reported[1] if "." in reported[1] else f"builtins.{reported[1]}")
            if name is None or name in unsafe_globals:
                raise
            unsafe_globals.add(name)


def _check_container(path: Path) -> None:
    """Raise ValueError unless a file starts and ends as torch.save writes it."""
    with path.open("rb") as file:
        start = file.read(24)
    if not start:
        raise ValueError(f"{path} is empty; copy or download it again")
    if start.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is truncated after {path.stat().st_size:,} bytes; copy or download it again")
    elif not start.startswith(b"\x80"):  # a pickle, as torch.save wrote before PyTorch 1.6
        raise ValueError(
            f"{path} is not a checkpoint: it begins with {start.decode(errors='replace')!r};"
            " download the file itself, not a page about it, under its own name"
        )


class _Stub:
    """Stand-in for a class of another package: unpickles as a dict, which the weights-only unpickler can fill."""

    # a dict takes the place of the instance
    def __new__(cls, *_arguments: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()


class _NumpyStub:
    """Stand-in for a class of numpy, whose pickled state is a tuple; discards it."""

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, _state: tuple[object, ...]) -> None:
        pass


def _pick_state(checkpoint: object, path: Path, unsafe_globals: set[str]) -> dict[str, Tensor]:
    """Find the state dict in what torch.load returned; raise ValueError if there is none, or not only tensors."""
    state = checkpoint
    if isinstance(checkpoint, dict):
        state = next((checkpoint[key] for key in _STATE_DICT_KEYS if checkpoint.get(key) is not None), checkpoint)
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        instead = f" but objects of {_shorten(unsafe_globals)}" if unsafe_globals else ""
        raise ValueError(f"{path} holds no state dict{instead}; save the model's state_dict() with torch.save")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path} holds no tensor under {name}, but {type(value).__name__};"
                " save the model's state_dict() alone, with torch.save"
            )
    cleaned: dict[str, Tensor] = clean_state_dict(state)
    return cleaned


def _shorten(classes: set[str]) -> str:
    shown = ", ".join(sorted(classes)[:3])
    return f"{shown} and {len(classes) - 3} more" if len(classes) > 3 else shown


def save_weights(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write one of our state dicts as safetensors, with `metadata` in the file's header."""
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, path, dict(metadata))


def remap_official_hook(model: nn.Module, state: dict[str, Tensor], prefix: str, *_hook_arguments: object) -> None:
    """Pre-hook of load_state_dict: rename an official state dict in place, leave one of ours unchanged."""
    theirs = {name.removeprefix(prefix): name for name in state if name.startswith(prefix)}
    if _is_official(theirs):
        official = {name: state.pop(full_name) for name, full_name in theirs.items()}
        for name, value in remap_official(official, model.state_dict()).items():
            state[prefix + name] = value


def remap_features_only_hook(features: nn.Module, state: dict[str, Tensor], *_hook_arguments: object) -> None:
    """Pre-hook for timm's `features_only` wrappers: accept a whole model's weights, drop those of pruned layers."""
    names = features.state_dict()
    prefix = next(iter(names)).split(".")[0] + "."  # "model.", or another name in other kinds of wrapper
    if any(name.startswith(prefix) for name in state):
        return
    own = {name.removeprefix(prefix): value for name, value in names.items()}
    pruned = _PRUNABLE - {_part(name) for name in own}
    kept = {name: value for name, value in state.items() if _part(name) not in pruned}
    if _is_official(kept):
        kept = remap_official(kept, own)
    state.clear()
    state |= {prefix + name: value for name, value in kept.items()}


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a state dict for timm's `pretrained=True`, which then adapts it to other classes and channels.

    model: the whole model to load into. Raises RuntimeError for entries that are missing or unexpected, except for
    the classifier and the shape of the first convolution, which timm adapts or drops.
    """
    classifier = {name: value for name, value in state.items() if name.startswith(_CLASSIFIER)}
    rest = {name: value for name, value in state.items() if name not in classifier}
    wanted = {name: value for name, value in model.state_dict().items() if not name.startswith(_CLASSIFIER)}
    if _is_official(rest):
        first = rest.get(official_name(_FIRST_CONVOLUTION))
        if first is not None:
            wanted[_FIRST_CONVOLUTION] = first
        classifier = {name: value.flatten(1) if value.dim() > 1 else value for name, value in classifier.items()}
        return remap_official(rest, wanted) | classifier
    faults = [f"missing {name}" for name in wanted if name not in rest and not name.endswith(_COUNTER)]
    faults += [f"unexpected {name}" for name in rest if name not in wanted]
    if faults:
        raise RuntimeError(f"the weights do not fit this model: {'; '.join(faults)}")
    return rest | classifier


def _is_official(names: Iterable[str]) -> bool:
    return any(name.startswith(_OFFICIAL_PREFIX) for name in names)


def _part(name: str) -> str:
    matched = _PART.match(official_name(name))
    assert matched is not None
    return matched[0]


def _squeezed_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(length for length in tensor.shape if length != 1)


def _check_rotary_buffer(name: str, angles: Tensor) -> list[str]:
    """Compare an official rotary buffer, which holds every frequency twice in succession, with this model's."""
    expected = rotary_frequencies(2 * angles.numel()).repeat_interleave(2)
    if angles.numel() % 2 == 0 and torch.allclose(angles.flatten().float(), expected, rtol=1e-4):
        return []
    return [f"{name} holds other angles than this model's"]

"""Differences between two checkpoints: tensors, read one by one, and fields of the run state."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic_core import from_json
from torch import Tensor

from dataio.files import escape_unprintable, read_small_file
from launch.checkpoint.layout import EMA_NAME, MODEL_NAME, MOMENT_NAMES, STATE_NAME
from launch.checkpoint.tensor_file import TensorFile


class TensorDiff(NamedTuple):
    """How a tensor differs between two files: in its numbers, or, by `fault`, in more than those."""

    name: str
    max_abs: float  # largest absolute difference; nan if one side has NaN or an infinity
    relative_error: float  # ‖a - b‖ / ‖a‖ over the whole tensor; inf if a is zero
    fault: str | None = None
    counts: bool = False  # whether these are integers: BatchNorm's steps


class FileDiff(NamedTuple):
    """The tensors of a file that differ, the worst first, and the number of those that are bit-identical."""

    name: str
    equal: int
    tensors: list[TensorDiff]


def diff_tensors(a: Path, b: Path) -> Iterator[FileDiff]:
    """Yield the differences of each file of tensors that one of the checkpoints has.

    Raises ValueError or OSError if a file cannot be read.
    """
    for name in (MODEL_NAME, EMA_NAME, *MOMENT_NAMES.values()):
        if (a / name).exists() and (b / name).exists():
            yield _diff_files(TensorFile(a / name), TensorFile(b / name))
        elif (a / name).exists() or (b / name).exists():
            side = "A" if (a / name).exists() else "B"
            yield FileDiff(name, 0, [TensorDiff("all tensors", 0.0, 0.0, f"only {side} has this file")])


def diff_states(a: Path, b: Path) -> list[tuple[str, str, str]]:
    """Return (field, value in A, value in B) of all fields of the run states that differ.

    Raises ValueError or OSError if one cannot be read. States of other versions can be.
    """
    ours, theirs = _flat_state(a / STATE_NAME), _flat_state(b / STATE_NAME)
    names = sorted(ours.keys() | theirs.keys(), key=[*ours, *theirs].index)
    shown = [(escape_unprintable(name), ours.get(name, "absent"), theirs.get(name, "absent")) for name in names]
    return [(name, old, new) for name, old, new in shown if old != new]


def _diff_files(a: TensorFile, b: TensorFile) -> FileDiff:
    names = sorted(a.header.keys() | b.header.keys())
    found = [_diff_tensor(name, a, b) for name in names]
    differing = [tensor for tensor in found if tensor is not None]
    return FileDiff(a.path.name, len(names) - len(differing), sorted(differing, key=_badness, reverse=True))


def _badness(tensor: TensorDiff) -> tuple[bool, bool, bool, float]:
    """Return what tensors are sorted by: other names and shapes, then NaN, then the relative error; counters last."""
    is_nan = tensor.max_abs != tensor.max_abs
    return tensor.fault is not None, not tensor.counts, is_nan, 0.0 if is_nan else tensor.relative_error


def _diff_tensor(name: str, a: TensorFile, b: TensorFile) -> TensorDiff | None:
    """Return how a tensor differs, None if it is bit-identical."""
    ours, theirs = a.header.get(name), b.header.get(name)
    if ours == theirs:
        return _diff_values(name, a.read(name), b.read(name))
    if ours is None or theirs is None:
        fault = "only in B" if ours is None else "only in A"
    else:
        fault = f"{ours} in A, {theirs} in B"
    return TensorDiff(name, 0.0, 0.0, fault)


def _diff_values(name: str, a: Tensor, b: Tensor) -> TensorDiff | None:
    if a.numel() == 0 or a.view(-1).view(torch.uint8).equal(b.view(-1).view(torch.uint8)):
        return None
    before, after = a.double(), b.double()
    difference, norm = after - before, float(torch.linalg.vector_norm(before))
    distance = float(torch.linalg.vector_norm(difference))
    relative_error = distance / norm if norm else (float("inf") if distance else 0.0)
    return TensorDiff(name, float(difference.abs().max()), relative_error, counts=not a.is_floating_point())


def _flat_state(path: Path) -> dict[str, str]:
    """Return the fields of a state.json, nested ones with dots in their names, as JSON."""
    try:
        state = from_json(read_small_file(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({escape_unprintable(error)})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no fields")
    return dict(_flatten(state, ""))


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict) and not prefix:
            yield from _flatten(value, f"{name}.")
        else:
            yield f"{prefix}{name}", escape_unprintable(json.dumps(value))

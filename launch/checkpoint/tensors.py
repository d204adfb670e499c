"""Parameters and optimizer state of an engine by name, whatever the number of ranks and the ZeRO stage.

DeepSpeed flattens the parameters of each group and divides the result among the ranks (stages 1 and 2), or divides
each parameter (stage 3). Here a rank's part of a parameter is a *fragment*: a view of the optimizer's memory. Saving
adds the fragments of all ranks up to whole tensors on one rank; loading copies a part of whole tensors into the
fragments. So a state that was read out of any engine fits any other of the same model.

DeepSpeed's own functions for this (safe_get_full_optimizer_state and so on) take a collective for each tensor, know no
state before the first step, and no stage 0. The attributes used here are those of the pinned version.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataio.files import escape_unprintable
from launch.checkpoint.layout import EMA_NAME, MODEL_NAME, MOMENT_NAMES
from launch.checkpoint.tensor_file import TensorFile, describe
from launch.distributed import raise_on_all_ranks
from launch.ema import ModelEma
from launch.engine import Engine

STEP = "step"  # name of the number of steps beside a moment's tensors
_BUCKET_NUMEL = 1 << 24  # elements that are gathered in one collective


class _Fragment(NamedTuple):
    start: int  # index of its first element in the flattened parameter
    values: Tensor  # (n,) float32, a view of the optimizer's memory


class TensorSpec(NamedTuple):
    """Shape and type of a tensor in a checkpoint."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.shape.numel() * self.dtype.itemsize


def tensor_specs(engine: Engine, ema: ModelEma) -> dict[str, dict[str, TensorSpec]]:
    """Return the tensors of each file of a checkpoint: file → name → shape and type."""
    state_dict = {name: TensorSpec(value.shape, value.dtype) for name, value in ema.module.state_dict().items()}
    moment = {name: TensorSpec(shape, torch.float32) for name, shape in _shapes(engine).items()}
    moment[STEP] = TensorSpec(torch.Size(), torch.float32)
    return {MODEL_NAME: state_dict, EMA_NAME: state_dict} | dict.fromkeys(MOMENT_NAMES.values(), moment)


def gather_model(engine: Engine, writer: int, destination: Mapping[str, Tensor]) -> None:
    """Copy every parameter and buffer to the tensor of its name in `destination`, on rank `writer`.

    Every rank calls it.
    """
    sharded = engine.zero_optimization_stage() == 3
    if sharded:
        _gather_fragments(engine, None, writer, destination)
    if dist.get_rank() == writer:
        parameters = _parameters(engine)
        for name, value in engine.module.state_dict().items():
            if not (sharded and name in parameters):
                destination[name].copy_(value, non_blocking=True)


def gather_moment(engine: Engine, moment: str, writer: int, destination: Mapping[str, Tensor]) -> None:
    """Copy one of AdamW's moments of every parameter to `destination`, on rank `writer`. Every rank calls it.

    Moments are zeros before the first step. The number of steps is copied to `destination[STEP]`, of shape ().
    """
    _gather_fragments(engine, moment, writer, destination)
    if dist.get_rank() == writer:
        state = _adamw(engine).state.get(_partitions(engine)[0], {})
        destination[STEP].copy_(state.get(STEP, torch.zeros(())), non_blocking=True)


def load(checkpoint: Path, engine: Engine, ema: ModelEma) -> None:
    """Load a checkpoint into the engine and the EMA. Every rank calls it.

    Raises RunError on every rank: before anything is changed, if a file cannot be read or has other tensors; and later,
    if DeepSpeed's layout is not the expected one.
    """
    with raise_on_all_ranks():
        files = {name: _read(checkpoint / name, specs) for name, specs in tensor_specs(engine, ema).items()}
    with _writable_parameters(engine):
        engine.module.load_state_dict(files[MODEL_NAME])
    with raise_on_all_ranks():
        _load_fragments(engine, None, files[MODEL_NAME])
        _check_layout(engine)
    ema.module.load_state_dict(files[EMA_NAME])
    state = _adamw(engine).state
    for moment, name in MOMENT_NAMES.items():
        for partition in _partitions(engine):
            step = files[name][STEP].to(partition.device, copy=True)
            state[partition] |= {STEP: step, moment: torch.zeros_like(partition)}
        _load_fragments(engine, moment, files[name])


def _read(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
    """Return a file's tensors, on the host; they are read from disk when they are used.

    Raises RuntimeError if the file cannot be read, or names, shapes or types are not those of `specs`.
    """
    try:
        file = TensorFile(path)
    except (ValueError, OSError) as error:
        raise RuntimeError(f"{error}; remove this checkpoint to resume from an older one") from error
    expected = {name: describe(str(spec.dtype).removeprefix("torch."), spec.shape) for name, spec in specs.items()}
    found = file.header
    if wrong := [name for name in sorted(specs.keys() | found.keys()) if expected.get(name) != found.get(name)]:
        name = wrong[0]
        raise RuntimeError(
            f"{path} does not fit this model: {escape_unprintable(name)} is {found.get(name, 'absent')} there and"
            f" {expected.get(name, 'absent')} here" + (f", {len(wrong) - 1} more differ" if len(wrong) > 1 else "")
        )
    return {name: file.read(name) for name in specs}


def _gather_fragments(engine: Engine, moment: str | None, writer: int, destination: Mapping[str, Tensor]) -> None:
    """Put the fragments of all ranks together in `destination`, on rank `writer`; zeros where there are none."""
    parameters, shapes = _parameters(engine), _shapes(engine)
    if engine.zero_optimization_stage() == 0 or dist.get_world_size() == 1:  # each fragment is a whole parameter
        for name in shapes if dist.get_rank() == writer else ():
            fragment = _fragment(engine, parameters[name], moment)
            values = fragment.values if fragment else torch.zeros(shapes[name].numel())
            destination[name].view(-1).copy_(values, non_blocking=True)
        return
    for names in _buckets(shapes):
        sizes = [shapes[name].numel() for name in names]
        flat = torch.zeros(sum(sizes), device=next(iter(parameters.values())).device)
        for name, part in zip(names, flat.split(sizes), strict=True):
            if fragment := _fragment(engine, parameters[name], moment):
                part[fragment.start :][: len(fragment.values)] = fragment.values
        # All ranks but one add zeros to an element; as integers, since a sum of floats would lose the sign of -0.
        dist.reduce(flat.view(torch.int32), writer)
        if dist.get_rank() == writer:
            for name, part in zip(names, flat.split(sizes), strict=True):
                destination[name].copy_(part.view(shapes[name]), non_blocking=True)


def _load_fragments(engine: Engine, moment: str | None, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in _parameters(engine).items():
            if fragment := _fragment(engine, parameter, moment):
                fragment.values.copy_(tensors[name].flatten()[fragment.start :][: len(fragment.values)])


def _buckets(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """Divide the names into runs of about _BUCKET_NUMEL elements."""
    names: list[str] = []
    numel = 0
    for name, shape in shapes.items():
        names.append(name)
        numel += shape.numel()
        if numel >= _BUCKET_NUMEL:
            yield names
            names, numel = [], 0
    if names:
        yield names


def _parameters(engine: Engine) -> dict[str, nn.Parameter]:
    return dict(engine.module.named_parameters())


def _shapes(engine: Engine) -> dict[str, torch.Size]:
    """Return the shape of each parameter by name, unsharded."""
    return {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in _parameters(engine).items()}


def _adamw(engine: Engine) -> torch.optim.Optimizer:
    """Return PyTorch's optimizer, which ZeRO's wraps."""
    optimizer: Any = engine.optimizer
    wrapped: torch.optim.Optimizer = optimizer.optimizer if engine.zero_optimization_stage() > 0 else optimizer
    return wrapped


def _partitions(engine: Engine) -> list[Tensor]:
    """Return the tensors that this rank's AdamW updates: the parameters, or flat parts of their float32 copies."""
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(_parameters(engine).values())
    return list(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)


def _fragment(engine: Engine, parameter: nn.Parameter, moment: str | None) -> _Fragment | None:
    """Return this rank's fragment of a parameter (None), or of its moment; None if it has none, or no moment yet."""
    optimizer: Any = engine.optimizer
    zero: Any = parameter  # with DeepSpeed's attributes
    stage = engine.zero_optimization_stage()
    if stage == 0:
        partition, offset, start, numel = parameter, 0, 0, parameter.numel()
    elif stage == 3:
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        partition, start = optimizer.fp32_partitioned_groups_flat[group], dist.get_rank() * padded
        numel = min(padded, zero.ds_numel - start)
    elif (mapping := zero._hp_mapping) is None:
        return None
    else:
        partition = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        offset, start = mapping.hp_fragment_address.start, mapping.lp_fragment_address.start
        numel = mapping.hp_fragment_address.numel
    values = partition if moment is None else _adamw(engine).state.get(partition, {}).get(moment)
    if values is None or numel <= 0:  # stage 3 gives ranks beyond a small parameter's end nothing but padding
        return None
    part = values.data.view(-1)[offset : offset + numel]
    if len(part) != numel:
        raise RuntimeError(
            f"DeepSpeed holds {len(part)} elements of a parameter where {numel} are expected; use the pinned version,"
            " and leave out the deepspeed section"
        )
    return _Fragment(start, part)


def _check_layout(engine: Engine) -> None:
    """Raise RuntimeError if the optimizer's copy of the parameters is not, part by part, what the model computes with.

    Both were just loaded, the one by fragments and the other by names.
    """
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_stage() not in (1, 2):
        return
    for copies, partition in zip(
        optimizer.parallel_partitioned_bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
    ):
        loaded = copies[dist.get_rank()].to(partition)
        if not torch.equal(loaded.view(torch.int32), partition.data.view(torch.int32)):  # as integers: NaN equals NaN
            raise RuntimeError("DeepSpeed divides parameters in another way than expected; use the pinned version")


def _writable_parameters(engine: Engine) -> contextlib.AbstractContextManager:
    """Return a context in which `engine.module` holds unsharded parameters; rank 0's become everybody's at its end."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0)

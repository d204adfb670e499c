"""Checkpoints written in the background while the training goes on.

Saving has two parts. The training thread gathers the tensors and copies them to the host: that is all that a step waits
for. A thread of each rank then writes, hashes and publishes them. One rank writes one of the four files of tensors
(with fewer ranks, some write several), so all files are the same whatever the number of ranks.
"""

import errno
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dataio.files import sync
from launch.checkpoint import layout
from launch.checkpoint.layout import EMA_NAME, MODEL_NAME, MOMENT_NAMES, STATE_NAME, RunState
from launch.checkpoint.tensors import TensorSpec, gather_model, gather_moment, tensor_specs
from launch.distributed import RunError, broadcast_object, gather_objects, raise_on_all_ranks
from launch.ema import ModelEma
from launch.engine import Engine

_TENSOR_FILES = (MODEL_NAME, EMA_NAME, *MOMENT_NAMES.values())
_NICE = 10  # of the writing thread: 19 is the lowest priority, 0 the usual one
_FILES_AT_A_TIME = 2  # one is hashed while the next is written
_ALIGNMENT = 64  # bytes, of each tensor in host memory
_SMALL_FILES_BYTES = 2**20  # more than the JSON files of a checkpoint and the headers of its tensors take


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay on disk beside the best: the `keep` newest, and milestones by their completed steps."""

    keep: int
    is_milestone: Callable[[int], bool] = lambda steps: False


class CheckpointWriter:
    """Writes checkpoints of a run below `folder`, at most one at a time. Every rank has one and calls every method.

    metadata: for the headers of model.safetensors and ema.safetensors.
    check_lock: raises RuntimeError if another run has locked the run's folder.
    timeout: for which a thread waits for those of other ranks; None is PyTorch's default.
    Attributes are `saved`, the run state of the newest checkpoint or of the run's start; `begun_step`, the completed
    steps of the last checkpoint that was begun; `warnings`, on rank 0 a line for each checkpoint for which the disk had
    no space, or whose pointers could not be written; and `not_finite`, which after `wait` says what was not finite in
    the state that was begun to be saved last, and which is therefore no checkpoint; None if all was.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        ema: ModelEma,
        initial_state: RunState,
        metadata: Mapping[str, str],
        retention: Retention,
        check_lock: Callable[[], None] = lambda: None,
        timeout: timedelta | None = None,
    ) -> None:
        self.saved, self.begun_step, self.warnings = initial_state, initial_state.step, list[str]()
        self.not_finite: str | None = None
        self._folder, self._engine, self._ema = folder, engine, ema
        self._metadata, self._retention, self._check_lock = dict(metadata), retention, check_lock
        self._device = next(ema.module.parameters()).device
        self._files = {
            file: _allocate(specs, pin_memory=self._device.type == "cuda")
            for file, specs in tensor_specs(engine, ema).items()
            if _writer_of(file) == dist.get_rank()
        }
        # The threads' own group: collectives of one group must not overlap.
        self._group = dist.new_group(backend="gloo", timeout=timeout) if dist.get_world_size() > 1 else None
        self._executor = ThreadPoolExecutor(1, "checkpoint", _start_thread, (self._device,))
        self._pending: Future[None] | None = None
        self._began = time.monotonic()

    @property
    def seconds_since_save(self) -> float:
        """Time since the last checkpoint was begun, or the writer was made."""
        return time.monotonic() - self._began

    def save(self, state: RunState, top1: float = 0.0) -> None:
        """Begin a checkpoint of the current tensors; `best` will name it if no earlier one has a better top-1.

        top1: the EMA's accuracy in percent; 0 if it was not evaluated. state.best_top1 is ignored.
        Waits for the checkpoint before, and raises as `wait` does.
        """
        self.wait()
        self.not_finite = None
        self._began, self.begun_step = time.monotonic(), state.step
        is_best = top1 > self.saved.best_top1
        state = replace(state, best_top1=max(top1, self.saved.best_top1))
        self._copy_tensors()
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if copied is not None:
            copied.record()
        self._pending = self._executor.submit(self._write, state, is_best, copied)

    def rewind(self, state: RunState) -> None:
        """Take a checkpoint that the run goes back to for the newest one. None is being written."""
        self.saved, self.begun_step, self.not_finite = state, state.step, None

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the last save made no checkpoint: `wait` will raise, or `not_finite` is set."""
        if self._pending is None or not self._pending.done():
            return False
        return self._pending.exception() is not None or self.not_finite is not None

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is on disk.

        Raises RunError on every rank if it cannot be written. That there is no space is only a warning.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the thread; a checkpoint that cannot be written is given up silently, if `wait` was not called."""
        self._executor.shutdown()

    def _copy_tensors(self) -> None:
        rank, files = dist.get_rank(), self._files
        gather_model(self._engine, _writer_of(MODEL_NAME), files.get(MODEL_NAME, {}))
        if rank == _writer_of(EMA_NAME):
            for name, value in self._ema.module.state_dict().items():
                files[EMA_NAME][name].copy_(value, non_blocking=True)
        for moment, file in MOMENT_NAMES.items():
            gather_moment(self._engine, moment, _writer_of(file), files.get(file, {}))

    def _write(self, state: RunState, is_best: bool, copied: torch.cuda.Event | None) -> None:
        """Write, hash and publish the copied tensors. Runs in the thread of every rank."""
        is_rank_zero = dist.get_rank() == 0
        # The random suffix keeps a process that was frozen meanwhile from writing into the same folder.
        suffix = broadcast_object(secrets.token_hex(4), self._group)
        staging = layout.staging_folder(self._folder, state.step, suffix)
        try:
            with raise_on_all_ranks(self._group):
                if copied is not None:
                    copied.synchronize()
                not_finite = _find_not_finite(self._files)
            if found := [name for name in gather_objects(not_finite, self._group) if name is not None]:
                self.not_finite = found[0]
                return
            with raise_on_all_ranks(self._group):
                if is_rank_zero:
                    self._begin(staging)
            pool = ThreadPoolExecutor(_FILES_AT_A_TIME, "checkpoint", _start_thread, (self._device,))
            with raise_on_all_ranks(self._group), pool:
                written = pool.map(self._write_file, (staging / name for name in self._files))
                entries = dict(zip(self._files, written, strict=True))
            entries = {name: entry for part in gather_objects(entries, self._group) for name, entry in part.items()}
            with raise_on_all_ranks(self._group):
                if is_rank_zero:
                    self._finish(staging, entries, state, is_best)
        except RunError as error:
            self._give_up(staging, error)
        else:
            self.saved = state

    def _begin(self, staging: Path) -> None:
        self._check_lock()
        self._folder.mkdir(exist_ok=True)
        layout.remove_leftovers(self._folder)
        if shutil.disk_usage(self._folder).free < expected_bytes(self._ema):
            raise _DiskError("no space", errno.ENOSPC)
        staging.mkdir()

    def _write_file(self, path: Path) -> dict[str, Any]:
        """Write a file of tensors and wait until it is on disk; return its entry in the manifest."""
        try:
            save_file(self._files[path.name], path, self._metadata if path.name in (MODEL_NAME, EMA_NAME) else None)
        except SafetensorError as error:
            found = re.search(r"\(os error (\d+)\)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise _DiskError(f"{path.name}: {os.strerror(number)}", number) from error
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes its files readable for their owner only
        sync(path)
        return layout.describe_file(path)

    def _finish(self, staging: Path, entries: dict[str, dict[str, Any]], state: RunState, is_best: bool) -> None:
        if missing := [name for name in _TENSOR_FILES if not (staging / name).is_file()]:
            raise RuntimeError(
                f"{staging} lacks {', '.join(missing)}, which another rank has written; put the run's output folder on"
                " a file system that all nodes share"
            )
        layout.write_state(staging, state)
        sync(staging / STATE_NAME)
        self._check_lock()
        saved = layout.publish(staging, entries | {STATE_NAME: layout.describe_file(staging / STATE_NAME)})
        actions = [partial(layout.write_pointer, saved, layout.BEST)] if is_best else []
        actions += [
            partial(layout.write_pointer, saved, layout.LATEST),
            partial(layout.prune, saved, self._retention.keep, self._retention.is_milestone),
        ]
        for action in actions:
            try:
                action()
            except OSError as error:  # the checkpoint itself is complete
                text = f"{saved} is written, but its pointers or older checkpoints are not in order: {error}"
                self.warnings.append(text)

    def _give_up(self, staging: Path, error: RunError) -> None:
        """Remove what was written. Raises RunError unless the disk has no space, which adds a warning."""
        fault = None
        if dist.get_rank() == 0:
            fault = _describe_failure(staging, self._ema, str(error).splitlines()[0], error.disk_full)
            shutil.rmtree(staging, ignore_errors=True)
            if error.disk_full:
                self.warnings.append(fault)
        fault = broadcast_object(fault, self._group)
        if not error.disk_full:
            raise RunError(fault) from error


def check_disk_space(folder: Path, ema: ModelEma) -> None:
    """Raise RuntimeError if the disk of an existing folder has no space for one more checkpoint of such a model."""
    free, needed = shutil.disk_usage(folder).free, expected_bytes(ema)
    if free < needed:
        raise RuntimeError(
            f"no space for a checkpoint in {folder}: it needs {_mib(needed)}, {_mib(free)} are free; make room, or"
            " choose an output on a larger disk"
        )


class _DiskError(RuntimeError):
    """A file could not be written; `errno` is the system's reason, as of OSError."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.errno = number


def expected_bytes(ema: ModelEma) -> int:
    """Return how many bytes a checkpoint takes, or a little more: weights, EMA and AdamW's two moments."""
    return 4 * sum(value.nbytes for value in ema.module.state_dict().values()) + _SMALL_FILES_BYTES


def _describe_failure(staging: Path, ema: ModelEma, reason: str, disk_full: bool) -> str:
    """Describe a checkpoint that could not be written, with its files still in `staging`."""
    failed = f"cannot write the checkpoint {layout.target_of(staging).name} in {staging.parent} ({reason})"
    try:
        free = shutil.disk_usage(staging.parent).free + sum(path.stat().st_size for path in staging.glob("*"))
        found = layout.list_checkpoints(staging.parent)
    except OSError:  # the folder is gone
        return failed
    newest = found[-1].name if found else "none"
    if not disk_full:
        return f"{failed}. The newest is {newest}; mend that, and the same command goes on from there"
    return f"{failed}: it needs {_mib(expected_bytes(ema))}, {_mib(free)} are free. The newest is {newest}"


def _start_thread(device: torch.device) -> None:
    """Prepare a thread of a writer: with this rank's device, and at a lower priority than training."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    thread = threading.get_native_id()
    with suppress(OSError):  # raising it may be forbidden
        os.setpriority(os.PRIO_PROCESS, thread, max(_NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def _writer_of(file: str) -> int:
    """Return the rank that writes a file of tensors; the writers are spread over all ranks."""
    return _TENSOR_FILES.index(file) * dist.get_world_size() // len(_TENSOR_FILES)


def _allocate(specs: Mapping[str, TensorSpec], pin_memory: bool) -> dict[str, Tensor]:
    """Return host memory for the tensors of a file, by name: views of one block."""
    sizes = [-(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT for spec in specs.values()]
    block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pin_memory)
    return {
        name: part[: spec.nbytes].view(spec.dtype).view(spec.shape)
        for (name, spec), part in zip(specs.items(), block.split(sizes), strict=True)
    }


def _find_not_finite(files: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Say which tensor has a NaN or an infinity: `head.bias in model.safetensors is not finite`; None if none has."""
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
                return f"{name} in {file} is not finite"
    return None


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"

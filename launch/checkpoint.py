"""Checkpoints that are whole or absent: written aside, described by hashes, then renamed into place.

    RUN/checkpoints/step-00001200/   manifest.json       bytes and sha256 of every other file
                                     state.json          RunState
                                     model.safetensors   weights, for evaluation and export
                                     ema.safetensors     their moving average
                                     engine/             DeepSpeed's files: what a resumed run loads
    RUN/checkpoints/latest, best     each the name of a checkpoint

A resumed run takes the newest checkpoint whose files are what its manifest says. DeepSpeed's files are pickles: resume
from runs that you trust; the two safetensors are safe to load for anybody.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from dataio.files import atomic_write, sha256_of, sync
from launch.distributed import RunError, broadcast_object, raise_on_all_ranks
from launch.ema import ModelEma
from launch.engine import gathered_parameters, preserved_hyperparameters
from polaformer.weights import load_weights, save_weights

MANIFEST_NAME, STATE_NAME = "manifest.json", "state.json"
MODEL_NAME, EMA_NAME = "model.safetensors", "ema.safetensors"
POINTERS = LATEST, BEST = "latest", "best"
_ENGINE_TAG = "engine"
_SMALL_FILES_BYTES = 2**20  # of a checkpoint, and more
_CHECKPOINT = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class RunState:
    """What goes on in a resumed run besides tensors; `step` counts completed steps."""

    step: int
    model: str
    num_classes: int
    world_size: int
    zero_stage: int
    loader: dict[str, Any]
    best_top1: float  # percent, the better of weights and EMA, over all saved evaluations

    def check_compatible(self, other: "RunState") -> None:
        """Raises ValueError if a run that is set up as `other` cannot go on from this state."""
        for name, words in (
            ("model", "model"),
            ("num_classes", "number of classes"),
            ("world_size", "number of ranks"),
            ("zero_stage", "ZeRO stage"),
        ):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"the run's checkpoint has {words} {ours}, this start has {theirs};"
                    f" start it with {ours}, or choose another output folder for a new run"
                )


def save(
    folder: Path,
    engine,
    ema: ModelEma,
    state: RunState,
    metadata: dict[str, str],
    check_lock: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a checkpoint below `folder` and points `latest` to it; every rank calls it. Returns its folder.

    metadata: for the headers of the safetensors. check_lock: raises RuntimeError if the run's folder is another's.
    Raises RunError on every rank if some rank's files cannot be written or are not there, and says so if the disk is
    full. What was there stays, and nothing is left of the new one.
    """
    target = folder / f"step-{state.step:08d}"
    staging = folder / f".{target.name}-{broadcast_object(secrets.token_hex(4))}"  # no process that wakes up has it too
    rank = dist.get_rank()
    with raise_on_all_ranks():
        if rank == 0:
            check_lock()
            folder.mkdir(exist_ok=True)
            _remove_leftovers(folder)
            check_disk_space(folder, ema)
            (staging / _ENGINE_TAG).mkdir(parents=True)
    try:
        _write(staging, engine, ema, state, metadata)
    except RunError as error:
        with raise_on_all_ranks():
            if rank == 0:
                fault = _write_failure_message(staging, ema, str(error).splitlines()[0])
                shutil.rmtree(staging, ignore_errors=True)
                raise RuntimeError(fault) from error
    with raise_on_all_ranks():  # by now every rank's files are there
        if rank == 0:
            _require_files(staging, state)
            check_lock()
            _publish(staging, target)
    return target


def check_disk_space(folder: Path, ema: ModelEma) -> None:
    """Raises RuntimeError if the disk of an existing folder cannot hold one more checkpoint of such a model."""
    free, needed = shutil.disk_usage(folder).free, _expected_bytes(ema)
    if free < needed:
        raise RuntimeError(
            f"no space for a checkpoint in {folder}: it needs {_mib(needed)}, {_mib(free)} are free; make room, or"
            " choose an output on a larger disk"
        )


def mark_best_and_prune(saved: Path, is_best: bool, keep: int) -> None:
    """Lets `best` name the checkpoint just saved if it is; keeps the `keep` newest up to it, and the best one.

    Later ones are of a future that this run did not come from: it passed them over because they were damaged.
    """
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            if is_best:
                atomic_write(saved.parent / BEST, f"{saved.name}\n".encode())
            _remove_others(saved, keep)


def load(checkpoint: Path, engine, ema: ModelEma) -> None:
    """Puts a checkpoint back into the engine and the average; every rank calls it. Raises RunError on every rank."""
    with raise_on_all_ranks(), preserved_hyperparameters(engine):
        path, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE_TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint}; start from an older checkpoint")
        load_weights(ema.module, checkpoint / EMA_NAME)


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, if there is any checkpoint, and what is wrong with newer ones.

    Raises ValueError if there are checkpoints and none is whole: going on would start from nothing, over them.
    """
    faults = []
    for checkpoint in reversed(_checkpoints(folder)):
        fault = find_corruption(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(fault)
    if faults:
        raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}. Move the folder away to start anew")
    return None, faults


def check_pointers(folder: Path) -> None:
    """Raises ValueError if `best` or `latest` has become a folder, as which some programs copy what a name leads to."""
    for pointer in (folder / name for name in POINTERS):
        if pointer.is_dir() and not pointer.is_symlink():
            raise ValueError(
                f"{pointer} is a folder, where a run keeps a file with the name of a checkpoint; move it away"
            )


def read_state(checkpoint: Path) -> RunState:
    """Raises ValueError if it is not of this version."""
    try:
        return RunState(**json.loads((checkpoint / STATE_NAME).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{checkpoint / STATE_NAME} is of another version ({error}); go on with the one that wrote it"
        ) from error


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one, or what is left of one."""
    return _CHECKPOINT.fullmatch(path.name) is not None or (path / MANIFEST_NAME).is_file()


def resolve_pointer(pointer: Path) -> Path:
    """The checkpoint that `best` or `latest` names. Raises ValueError or FileNotFoundError if it names none."""
    name = pointer.read_bytes()[:100].decode(errors="replace").strip()
    there = ", ".join(path.name for path in _checkpoints(pointer.parent)) or "none"
    if not _CHECKPOINT.fullmatch(name):
        raise ValueError(f"{pointer} holds {name!r} instead of the name of a checkpoint; there are: {there}")
    if not (pointer.parent / name).is_dir():
        raise FileNotFoundError(f"{pointer} names {name}, which is not there; there are: {there}")
    return pointer.parent / name


def find_corruption(checkpoint: Path) -> str | None:
    """The first thing in which a checkpoint's files differ from its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST_NAME).read_text())
        if missing := {MODEL_NAME, EMA_NAME, STATE_NAME}.difference(files):
            return f"{checkpoint / MANIFEST_NAME} does not name {', '.join(sorted(missing))}"
        for name, expected in files.items():
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256_of(path) != expected["sha256"]:
                return f"{path} is not what was written (its sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint} cannot be read ({error})"
    return None


def _write(staging: Path, engine, ema: ModelEma, state: RunState, metadata: dict[str, str]) -> None:
    """All files, the manifest last. Every rank calls it. Raises RunError on every rank if one cannot write its own."""
    rank = dist.get_rank()
    with raise_on_all_ranks(), _with_os_error_reason(staging, ema), _deferred_write_errors(engine.checkpoint_engine):
        engine.save_checkpoint(str(staging), tag=_ENGINE_TAG, save_latest=False)
    with raise_on_all_ranks(), gathered_parameters(engine), _with_os_error_reason(staging, ema):
        if rank == 0:
            save_weights(engine.module.state_dict(), staging / MODEL_NAME, metadata)
            save_weights(ema.module.state_dict(), staging / EMA_NAME, metadata)
            (staging / STATE_NAME).write_text(json.dumps(asdict(state), indent=1))
            for name in (MODEL_NAME, EMA_NAME):  # which safetensors lets nobody but their owner read
                shutil.copymode(staging / STATE_NAME, staging / name)
            _write_manifest(staging)


@contextmanager
def _deferred_write_errors(files) -> Iterator[None]:
    """Inside, a file that DeepSpeed's `files` cannot write ends nothing; the first fault is raised at the end.

    Otherwise the rank that met it would leave the others in the barriers of save_checkpoint.
    """
    faults, save = [], files.save

    def try_to_save(state_dict: dict[str, Any], path: str) -> None:
        try:
            save(state_dict, path)
        except (OSError, RuntimeError) as error:
            faults.append(error)

    files.save = try_to_save
    try:
        yield
    finally:
        files.save = save
    if faults:
        raise faults[0]


@contextmanager
def _with_os_error_reason(staging: Path, ema: ModelEma) -> Iterator[None]:
    """Raises RuntimeError in one line where writing fails inside.

    torch and safetensors keep the system's reason to themselves ("unexpected pos"): it is asked for as much again.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        if not isinstance(error, OSError):
            try:
                with open(staging / f".probe-{dist.get_rank()}", "wb") as probe:
                    os.posix_fallocate(probe.fileno(), 0, _expected_bytes(ema))
            except OSError as found:
                reason = found.strerror
        raise RuntimeError(reason) from error


def _write_failure_message(staging: Path, ema: ModelEma, reason: str) -> str:
    """What is said of a checkpoint that could not be written, while its files are there."""
    needed, free = _expected_bytes(ema), shutil.disk_usage(staging).free
    free += sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    found = _checkpoints(staging.parent)
    return (
        f"cannot write a checkpoint in {staging.parent}: {reason}; it needs {_mib(needed)}, {_mib(free)} are free. Make"
        f" room and start again: the run goes on from {found[-1].name if found else 'its beginning'}"
    )


def _expected_bytes(ema: ModelEma) -> int:
    """About what a checkpoint takes.

    Weights three times (ours, their average, DeepSpeed's), AdamW's two moments, and ZeRO's copy for the optimizer.
    """
    return 6 * sum(value.nbytes for value in ema.module.state_dict().values()) + _SMALL_FILES_BYTES


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _remove_leftovers(folder: Path) -> None:
    """What a killed run was writing or removing."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir())


def _require_files(staging: Path, state: RunState) -> None:
    """Raises RuntimeError unless every rank's part of the optimizer's state is among the files."""
    parts = len(list((staging / _ENGINE_TAG).glob("*optim_states.pt")))
    if state.zero_stage > 0 and parts != state.world_size:
        raise RuntimeError(
            f"{staging} holds the optimizer's state of {parts} ranks out of {state.world_size}; put the run's output folder"
            " on a file system that all nodes share"
        )


def _write_manifest(staging: Path) -> None:
    """Describes what is there, and waits until all of it is on disk."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
    for path in (*files, staging / MANIFEST_NAME, staging / _ENGINE_TAG, staging):
        sync(path)


def _publish(staging: Path, target: Path) -> None:
    if target.exists():  # a broken one of the same step, which the run resumed before
        shutil.rmtree(target)
    staging.rename(target)
    sync(target.parent)
    atomic_write(target.parent / LATEST, f"{target.name}\n".encode())


def _remove_others(saved: Path, keep: int) -> None:
    checkpoints, best = _checkpoints(saved.parent), saved.parent / BEST
    kept = [path.name for path in checkpoints if path.name <= saved.name][-keep:]
    if best.is_file():
        kept.append(best.read_text(errors="replace").strip())
    for path in checkpoints:
        if path.name not in kept:
            doomed = path.with_name(f".{path.name}")  # so that a killed removal leaves no half checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)  # what somebody reads on NFS goes with the leftovers later

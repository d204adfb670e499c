"""Atomic checkpoints: written to a hidden folder, hashed, then renamed into place.

    RUN/checkpoints/step-00001200/   manifest.json       bytes and sha256 of every other file
                                     state.json          RunState
                                     model.safetensors   weights, for evaluation and export
                                     ema.safetensors     their exponential moving average
                                     engine/             DeepSpeed's files, which a resumed run loads
    RUN/checkpoints/latest, best     text files, each with the name of a checkpoint

A run resumes from the newest checkpoint whose files match its manifest. DeepSpeed's files are pickles, so resume only
runs that you trust; the two safetensors files are safe to load.
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
from launch.engine import CheckpointEngine, Engine, gathered_parameters, preserved_hyperparameters
from polaformer.weights import load_weights, save_weights

MANIFEST_NAME, STATE_NAME = "manifest.json", "state.json"
MODEL_NAME, EMA_NAME = "model.safetensors", "ema.safetensors"
POINTERS = LATEST, BEST = "latest", "best"
_ENGINE_TAG = "engine"
_SMALL_FILES_BYTES = 2**20  # more than the JSON files of a checkpoint take
_CHECKPOINT = re.compile(r"step-(\d{8})")
#: Attributes of RunState → their keys in state.json, which are those of the first version.
_KEYS_ON_DISK = {"num_classes": "classes", "world_size": "ranks"}


@dataclass(frozen=True)
class RunState:
    """The state of a run besides its tensors, as a resumed run needs it."""

    step: int  # completed steps
    model: str
    num_classes: int
    world_size: int
    zero_stage: int
    loader: dict[str, Any]
    best_top1: float  # percent, the better of weights and EMA, over all saved evaluations
    evaluation_due: bool = False  # the run stopped before or in the evaluation after `step`

    def check_compatible(self, other: "RunState") -> None:
        """Raise ValueError if a run whose initial state is `other` cannot resume from this state."""
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
    engine: Engine,
    ema: ModelEma,
    state: RunState,
    metadata: dict[str, str],
    check_lock: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint below `folder`, point `latest` to it and return its folder. Every rank calls it.

    metadata: for the headers of the safetensors files.
    check_lock: raises RuntimeError if another run has locked the run's folder.
    Raises RunError on every rank if some rank's files cannot be written or are missing, with the disk's free space if
    that is the reason. Earlier checkpoints stay, and no part of the new one is left.
    """
    target = folder / folder_name(state.step)
    # The random suffix keeps a process that was frozen meanwhile from writing into the same folder.
    staging = folder / f".{target.name}-{broadcast_object(secrets.token_hex(4))}"
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


def folder_name(step: int) -> str:
    """Return the name of the checkpoint after so many completed steps."""
    return f"step-{step:08d}"


def check_disk_space(folder: Path, ema: ModelEma) -> None:
    """Raise RuntimeError if the disk of an existing folder has no space for one more checkpoint of such a model."""
    free, needed = shutil.disk_usage(folder).free, _expected_bytes(ema)
    if free < needed:
        raise RuntimeError(
            f"no space for a checkpoint in {folder}: it needs {_mib(needed)}, {_mib(free)} are free; make room, or"
            " choose an output on a larger disk"
        )


def mark_best_and_prune(saved: Path, is_best: bool, keep: int) -> None:
    """Point `best` to the checkpoint just saved if it is, and remove all but the `keep` newest and the best one.

    Checkpoints of later steps are removed too: the run passed them over as corrupt when it resumed.
    """
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            if is_best:
                atomic_write(saved.parent / BEST, f"{saved.name}\n".encode())
            _remove_others(saved, keep)


def load(checkpoint: Path, engine: Engine, ema: ModelEma) -> None:
    """Load a checkpoint into the engine and the EMA. Every rank calls it. Raises RunError on every rank."""
    with raise_on_all_ranks(), preserved_hyperparameters(engine):
        path, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE_TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint}; start from an older checkpoint")
        load_weights(ema.module, checkpoint / EMA_NAME)


def find_newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, None if there are none at all, and the faults of newer ones.

    Raises ValueError if there are checkpoints and all are corrupt: the run would start over on top of them.
    """
    faults: list[str] = []
    for checkpoint in reversed(_checkpoints(folder)):
        fault = find_corruption(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(fault)
    if faults:
        raise ValueError(
            f"no checkpoint in {folder} is intact: {'; '.join(faults)}. Move the folder away to start over"
        )
    return None, faults


def check_pointers(folder: Path) -> None:
    """Raise ValueError if `best` or `latest` is a folder, as after a copy by a program that follows names."""
    for pointer in (folder / name for name in POINTERS):
        if pointer.is_dir() and not pointer.is_symlink():
            raise ValueError(
                f"{pointer} is a folder, where a run keeps a file with the name of a checkpoint; move it away"
            )


def read_state(checkpoint: Path) -> RunState:
    """Return the run state of a checkpoint. Raises ValueError if another version wrote it."""
    try:
        on_disk = json.loads((checkpoint / STATE_NAME).read_text())
        names = {key: name for name, key in _KEYS_ON_DISK.items()}
        return RunState(**{names.get(key, key): value for key, value in on_disk.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint / STATE_NAME} is of another version ({error}); resume with the one that wrote it"
        ) from error


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, renamed or damaged ones included."""
    return _CHECKPOINT.fullmatch(path.name) is not None or (path / MANIFEST_NAME).is_file()


def resolve_pointer(pointer: Path) -> Path:
    """Return the checkpoint that `best` or `latest` names. Raises ValueError or FileNotFoundError if it names none."""
    name = pointer.read_bytes()[:100].decode(errors="replace").strip()
    there = ", ".join(path.name for path in _checkpoints(pointer.parent)) or "none"
    if not _CHECKPOINT.fullmatch(name):
        raise ValueError(f"{pointer} holds {name!r} instead of the name of a checkpoint; there are: {there}")
    if not (pointer.parent / name).is_dir():
        raise FileNotFoundError(f"{pointer} names {name}, which is not there; there are: {there}")
    return pointer.parent / name


def find_corruption(checkpoint: Path) -> str | None:
    """Return the first difference between a checkpoint's files and its manifest, None if there is none."""
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


def _write(staging: Path, engine: Engine, ema: ModelEma, state: RunState, metadata: dict[str, str]) -> None:
    """Write all files, the manifest last. Every rank calls it. Raises RunError on every rank if one cannot write."""
    rank = dist.get_rank()
    with raise_on_all_ranks(), _with_os_error_reason(staging, ema), _deferred_write_errors(engine.checkpoint_engine):
        engine.save_checkpoint(str(staging), tag=_ENGINE_TAG, save_latest=False)
    with raise_on_all_ranks(), gathered_parameters(engine), _with_os_error_reason(staging, ema):
        if rank == 0:
            save_weights(engine.module.state_dict(), staging / MODEL_NAME, metadata)
            save_weights(ema.module.state_dict(), staging / EMA_NAME, metadata)
            on_disk = {_KEYS_ON_DISK.get(name, name): value for name, value in asdict(state).items()}
            (staging / STATE_NAME).write_text(json.dumps(on_disk, indent=1))
            for name in (MODEL_NAME, EMA_NAME):  # safetensors makes its files readable for their owner only
                shutil.copymode(staging / STATE_NAME, staging / name)
            _write_manifest(staging)


@contextmanager
def _deferred_write_errors(writer: CheckpointEngine) -> Iterator[None]:
    """Collect errors of DeepSpeed's `writer` inside the block, and raise the first of them at its end.

    A rank that raised at once would leave the others waiting in the barriers of save_checkpoint.
    """
    faults: list[Exception] = []
    save = writer.save

    def try_to_save(state_dict: dict[str, Any], path: str) -> None:
        try:
            save(state_dict, path)
        except (OSError, RuntimeError) as error:
            faults.append(error)

    writer.save = try_to_save  # type: ignore[method-assign]
    try:
        yield
    finally:
        writer.save = save  # type: ignore[method-assign]
    if faults:
        raise faults[0]


@contextmanager
def _with_os_error_reason(staging: Path, ema: ModelEma) -> Iterator[None]:
    """Turn a failed write inside the block into a RuntimeError with the operating system's reason, in one line.

    torch and safetensors drop that reason ("unexpected pos"), so it is provoked again: by allocating as many bytes.
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
    """Describe a checkpoint that could not be written, with its files still in `staging`."""
    needed, free = _expected_bytes(ema), shutil.disk_usage(staging).free
    free += sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    found = _checkpoints(staging.parent)
    return (
        f"cannot write a checkpoint in {staging.parent}: {reason}; it needs {_mib(needed)}, {_mib(free)} are free. Make"
        f" room and start again: the run resumes from {found[-1].name if found else 'its beginning'}"
    )


def _expected_bytes(ema: ModelEma) -> int:
    """Return about how many bytes a checkpoint takes.

    The weights three times (ours, the EMA, DeepSpeed's), AdamW's two moments, and ZeRO's float32 copy of the weights.
    """
    return 6 * sum(value.nbytes for value in ema.module.state_dict().values()) + _SMALL_FILES_BYTES


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir())


def _require_files(staging: Path, state: RunState) -> None:
    """Raise RuntimeError unless every rank's part of the optimizer's state is among the files."""
    parts = len(list((staging / _ENGINE_TAG).glob("*optim_states.pt")))
    if state.zero_stage > 0 and parts != state.world_size:
        raise RuntimeError(
            f"{staging} holds the optimizer's state of {parts} ranks out of {state.world_size}; put the run's output"
            " folder on a file system that all nodes share"
        )


def _write_manifest(staging: Path) -> None:
    """Write the manifest of the files in `staging`, and sync all of them to disk."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
    for path in (*files, staging / MANIFEST_NAME, staging / _ENGINE_TAG, staging):
        sync(path)


def _publish(staging: Path, target: Path) -> None:
    if target.exists():  # a corrupt one of the same step, which the run passed over when it resumed
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
            hidden = path.with_name(f".{path.name}")  # a removal that is killed leaves no half checkpoint
            path.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)  # files that are open on NFS go with the leftovers later

"""The files of a run's checkpoints, without their tensors: names, manifest, run state, pointers.

    RUN/checkpoints/step-00001200/   manifest.json            bytes and sha256 of every other file
                                     state.json               RunState
                                     model.safetensors        parameters and buffers
                                     ema.safetensors          their exponential moving average
                                     exp_avg.safetensors      AdamW's first moment of each parameter, and its step
                                     exp_avg_sq.safetensors   its second moment, and the same step
    RUN/checkpoints/latest, best     text files, each with the name of a checkpoint

A run resumes from the newest checkpoint whose files match its manifest. All tensors are whole and have names, so it
fits any number of ranks and any ZeRO stage; no file can execute code.
"""

import importlib
import json
import re
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from dataio.files import atomic_write, escape_unprintable, read_small_file, sha256_of, sync
from dataio.loader_state import LoaderState

MANIFEST_NAME, STATE_NAME = "manifest.json", "state.json"
MODEL_NAME, EMA_NAME = "model.safetensors", "ema.safetensors"
MOMENT_NAMES = {"exp_avg": "exp_avg.safetensors", "exp_avg_sq": "exp_avg_sq.safetensors"}  # of AdamW
POINTERS = LATEST, BEST = "latest", "best"
_OLD_STATE = "engine"  # folder of the optimizer's state until version 0.1.0
_REMOVED, _REPLACED = "removed", "replaced"  # suffixes of hidden checkpoints
_CHECKPOINT = re.compile(r"step-([0-9]{8})")
_FILE_NAME = re.compile(r"[\w+-][\w.+-]*(/[\w+-][\w.+-]*)*", re.ASCII)  # in a manifest: inside the checkpoint
_NAME_LENGTH = 255  # at most


class _ManifestEntry(TypedDict):
    bytes: int
    sha256: str


def _our_version() -> str:
    """Return the version of this code; its import takes seconds, which reading a checkpoint does not need."""
    return str(importlib.import_module("polaformer").__version__)


class GuardState(TypedDict):
    """What `launch.guard` knows of the steps before a checkpoint, which decides about those that follow."""

    losses: list[Annotated[float, Field(allow_inf_nan=False)]]  # of the last good steps, over all ranks
    in_a_row: list[Annotated[int, Field(ge=0)]]  # numbers, from 0, of the bad steps since then


@dataclass(frozen=True)
class RunState:
    """The state of a run besides its tensors, as a resumed run needs it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # of read_state

    step: Annotated[int, Field(ge=0)]  # completed steps
    model: str
    num_classes: Annotated[int, Field(ge=1)]
    world_size: Annotated[int, Field(ge=1, lt=2**31)]  # when it was saved, as zero_stage; a run resumes with any other
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    loader: LoaderState
    best_top1: Annotated[float, Field(ge=0, le=100)]  # percent, of the EMA, over all evaluations with a checkpoint
    norm_group: Annotated[int, Field(ge=1)]  # samples over which BatchNorm takes its statistics
    evaluation_due: bool = False  # the run was stopped before an evaluation at this step
    epoch: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # completed, for people: nothing depends on it
    guard: GuardState = field(default_factory=lambda: GuardState(losses=[], in_a_row=[]))
    version: str = field(default_factory=_our_version)

    def check_compatible(self, other: "RunState") -> None:
        """Raise ValueError if a run whose initial state is `other` cannot resume from this state."""
        for name, words in (("model", "model"), ("num_classes", "number of classes")):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"the run's checkpoint has {words} {ours}, this start has {theirs};"
                    f" start it with {ours}, or choose another output folder for a new run"
                )


def find_newest(folder: Path, needed: str | None = None, last_step: int | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, None if there are none at all, and the faults of newer ones.

    needed: as of `find_corruption`. last_step: ignore checkpoints of more completed steps.
    Raises ValueError if there are checkpoints and all are corrupt: a run would start over on top of them.
    """
    faults: list[str] = []
    candidates = set(list_checkpoints(folder))
    with suppress(OSError, ValueError):  # that a pointer is missing or damaged says nothing of the checkpoints
        candidates.add(read_pointer(folder / LATEST))
    for checkpoint in sorted(candidates, reverse=True):
        if last_step is not None and step_of(checkpoint) > last_step:
            continue
        fault = find_corruption(checkpoint, needed=needed)
        if fault is None:
            return checkpoint, faults
        faults.append(fault)
    if faults:
        remedy = ". Move the folder away to start over" if needed is None else ""
        raise ValueError(f"no checkpoint in {folder} is intact: {'; '.join(faults)}{remedy}")
    return None, faults


def list_checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoints in a folder, corrupt ones included, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if has_step_name(path) and path.is_dir())


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after `step` completed steps."""
    return f"step-{step:08d}"


def has_step_name(checkpoint: Path) -> bool:
    """Return whether a folder's name is that of a checkpoint; a copy may have any other."""
    return _CHECKPOINT.fullmatch(checkpoint.name) is not None


def step_of(checkpoint: Path) -> int:
    """Return the number of completed steps that a checkpoint's name states, if it has such a name."""
    return int(checkpoint.name.removeprefix("step-"))


def check_pointers(folder: Path) -> None:
    """Raise ValueError if `best` or `latest` is a folder, as after a copy by a program that follows names."""
    for pointer in (folder / name for name in POINTERS):
        if pointer.is_dir() and not pointer.is_symlink():
            raise ValueError(
                f"{pointer} is a folder, where a run keeps a file with the name of a checkpoint; move it away"
            )


def read_state(checkpoint: Path) -> RunState:
    """Return the run state of a checkpoint. Raises ValueError if a run of this version cannot resume from it."""
    if is_of_old_version(checkpoint):
        raise ValueError(describe_old_version(checkpoint))
    path = checkpoint / STATE_NAME
    try:
        state = TypeAdapter(RunState).validate_json(read_small_file(path))
    except ValidationError as error:
        raise ValueError(
            f"{path} is of another version, or damaged ({first_fault(error)}); resume with the version that wrote it"
        ) from error
    position = state.step * state.loader["global_batch"]
    if state.loader["samples_seen"] != position or (has_step_name(checkpoint) and state.step != step_of(checkpoint)):
        raise ValueError(
            f"{path} is of another checkpoint, or damaged (step {state.step}, {state.loader['samples_seen']} samples in"
            f" batches of {state.loader['global_batch']}); remove this checkpoint to resume from an older one"
        )
    return state


def is_of_old_version(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written by version 0.1.0."""
    return (checkpoint / _OLD_STATE).is_dir() and not (checkpoint / MOMENT_NAMES["exp_avg"]).exists()


def describe_old_version(checkpoint: Path) -> str:
    """Return what can be done with a checkpoint that was written by version 0.1.0."""
    return (
        f"{checkpoint} was written by version 0.1.0, with the optimizer's state as pickles of DeepSpeed; resume with"
        f" that version, or start a new run in another output folder from its weights, with"
        f" model.weights={checkpoint / MODEL_NAME}"
    )


def first_fault(error: ValidationError) -> str:
    """Return where the first fault of a file is, and what."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return f"{escape_unprintable(where)}: {escape_unprintable(first['msg'])}"


def write_state(checkpoint: Path, state: RunState) -> None:
    """Write the run state of a checkpoint."""
    (checkpoint / STATE_NAME).write_text(json.dumps(asdict(state), indent=1))


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, renamed or damaged ones included."""
    return has_step_name(path) or (path / MANIFEST_NAME).is_file()


def resolve_pointer(pointer: Path) -> Path:
    """Return the checkpoint that `best` or `latest` names. Raises ValueError or FileNotFoundError if it names none."""
    checkpoint = read_pointer(pointer)
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{pointer} names {checkpoint.name}, which is not there; {_list_names(pointer.parent)}")
    return checkpoint


def read_pointer(pointer: Path) -> Path:
    """Return the path that `best` or `latest` leads to, whether there is a checkpoint or not.

    Raises ValueError if the file does not hold the name of a checkpoint, OSError if it cannot be read.
    """
    name = read_small_file(pointer)[:100].decode(errors="replace").strip()
    if not _CHECKPOINT.fullmatch(name):
        raise ValueError(f"{pointer} holds {name!r} instead of the name of a checkpoint; {_list_names(pointer.parent)}")
    return pointer.parent / name


def _list_names(folder: Path) -> str:
    return f"there are: {', '.join(path.name for path in list_checkpoints(folder)) or 'none'}"


def find_corruption(checkpoint: Path, verify: bool = True, needed: str | None = None) -> str | None:
    """Return the first difference between a checkpoint's files and its manifest, None if there is none.

    verify: hash the files; otherwise only their presence and sizes are compared. needed: name of the only file to
    compare; None compares all.
    """
    if not checkpoint.exists():
        return f"{checkpoint} is not there"
    try:
        files = _read_manifest(checkpoint / MANIFEST_NAME)
        files = {name: entry for name, entry in files.items() if needed in (None, name)}
        for name, expected in files.items():
            found = (checkpoint / name).stat()
            if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
                return f"{checkpoint / name} is not a file"
            if found.st_size != expected["bytes"]:
                return f"{checkpoint / name} has {found.st_size} bytes instead of {expected['bytes']}"
            if found.st_size == 0:  # none of ours; in /proc it may be a file that waits for ever
                return f"{checkpoint / name} is empty"
        with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
            hashes = pool.map(sha256_of, (checkpoint / name for name in files if verify))
            for name, sha256 in zip(files, hashes, strict=False):
                if sha256 != files[name]["sha256"]:
                    return f"{checkpoint / name} is not what was written (its sha256 differs)"
    except OSError as error:
        return f"{checkpoint} cannot be read ({error})"
    except ValueError as error:
        return str(error)
    return None


def _read_manifest(path: Path) -> dict[str, _ManifestEntry]:
    """Return a manifest's entries by name of file. Raises ValueError if it is damaged or lacks a file."""
    schema = TypeAdapter(dict[str, _ManifestEntry], config=ConfigDict(strict=True))
    try:
        files = schema.validate_json(read_small_file(path))
    except ValidationError as error:
        raise ValueError(f"{path} cannot be read ({first_fault(error)})") from error
    if strange := [name for name in files if len(name) > _NAME_LENGTH or not _FILE_NAME.fullmatch(name)]:
        raise ValueError(f"{path} names {escape_unprintable(strange[0])}, which is no file of a checkpoint")
    required = {MODEL_NAME, EMA_NAME, STATE_NAME}
    if not any(name.startswith(f"{_OLD_STATE}/") for name in files):
        required |= set(MOMENT_NAMES.values())
    if missing := required.difference(files):
        raise ValueError(f"{path} does not name {', '.join(sorted(missing))}")
    return files


def describe_file(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def publish(staging: Path, entries: dict[str, dict[str, Any]]) -> Path:
    """Turn a complete hidden folder into a checkpoint; return its path.

    entries: those of the manifest, by name of file.
    """
    manifest = staging / MANIFEST_NAME
    manifest.write_text(json.dumps(dict(sorted(entries.items())), indent=1))
    sync(manifest)
    sync(staging)
    target = target_of(staging)
    # One of the same step is corrupt, so the run passed it over when it resumed, or was saved before its evaluation.
    replaced = _hide(target, _REPLACED) if target.exists() else None
    try:
        staging.rename(target)
    except OSError:
        restore_replaced(target.parent)
        raise
    sync(target.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return target


def write_pointer(checkpoint: Path, pointer: str) -> None:
    """Let `best` or `latest` name a checkpoint."""
    atomic_write(checkpoint.parent / pointer, f"{checkpoint.name}\n".encode())


def staging_folder(folder: Path, step: int, suffix: str) -> Path:
    """Return the hidden folder in which a checkpoint is written until `publish`."""
    return folder / f".{checkpoint_name(step)}.{suffix}"


def target_of(staging: Path) -> Path:
    """Return the checkpoint that a hidden folder of `staging_folder` will be, or another hidden one was."""
    return staging.with_name(staging.name[1:].partition(".")[0])


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a process that is killed meanwhile leaves no part of it under its name."""
    shutil.rmtree(
        _hide(checkpoint, _REMOVED), ignore_errors=True
    )  # files that are open on NFS go with the leftovers later


def remove_newer(checkpoint: Path) -> None:
    """Remove the checkpoints of more steps, the newest first, which a run has gone back from, and pointers to them.

    `latest` leads to this one. There is no `best` until a checkpoint has a better score than all up to this one.
    """
    folder = checkpoint.parent
    for pointer in POINTERS:
        with suppress(FileNotFoundError, ValueError):
            if step_of(resolve_pointer(folder / pointer)) > step_of(checkpoint):
                (folder / pointer).unlink()
    for other in reversed(list_checkpoints(folder)):
        if step_of(other) > step_of(checkpoint):
            remove(other)
    if not (folder / LATEST).exists():  # a full disk has space now
        write_pointer(checkpoint, LATEST)


def restore_replaced(folder: Path) -> None:
    """Give a checkpoint its name back if the run ended before the one that was to replace it got that name."""
    for hidden in folder.glob(f".step-*.{_REPLACED}"):
        if not target_of(hidden).exists():
            hidden.rename(target_of(hidden))


def _hide(checkpoint: Path, suffix: str) -> Path:
    """Rename a checkpoint so that `remove_leftovers` finds it; return its path."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.{suffix}")
    if hidden.exists():
        shutil.rmtree(hidden, ignore_errors=True)
    return checkpoint.rename(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing or removing."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def prune(saved: Path, keep: int, is_milestone: Callable[[int], bool]) -> None:
    """Remove all checkpoints but the `keep` newest, the best, and milestones, by their numbers of completed steps.

    Checkpoints of later steps than `saved`, the newest, are removed too: the run passed them over as corrupt when it
    resumed.
    """
    earlier = [path for path in list_checkpoints(saved.parent) if path.name <= saved.name]
    kept = {path.name for path in earlier[-keep:]} | {path.name for path in earlier if is_milestone(step_of(path))}
    best = saved.parent / BEST
    if best.is_file():
        kept.add(best.read_text(errors="replace").strip())
    for path in list_checkpoints(saved.parent):
        if path.name not in kept:
            remove(path)

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
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dataio.files import sha256_of, sync
from launch.averages import MovingAverage
from launch.distributed import together
from launch.engine import full_parameters, kept_settings
from polaformer.weights import load_weights, save_weights

MANIFEST_NAME, STATE_NAME = "manifest.json", "state.json"
MODEL_NAME, EMA_NAME = "model.safetensors", "ema.safetensors"
_ENGINE_TAG = "engine"
_CHECKPOINT = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class RunState:
    """What goes on in a resumed run besides tensors; `step` counts completed steps."""

    step: int
    model: str
    classes: int
    ranks: int
    zero_stage: int
    loader: dict[str, Any]
    best_top1: float  # percent, the better of weights and EMA, over all saved evaluations

    def check_continues(self, other: "RunState") -> None:
        """Raises ValueError if a run that is set up as `other` cannot go on from this state."""
        for name, words in (
            ("model", "model"),
            ("classes", "number of classes"),
            ("ranks", "number of ranks"),
            ("zero_stage", "ZeRO stage"),
        ):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"the run's checkpoint has {words} {ours}, this start has {theirs};"
                    f" start it with {ours}, or choose another output folder for a new run"
                )


def save(folder: Path, engine, average: MovingAverage, state: RunState, metadata: dict[str, str]) -> Path:
    """Writes a checkpoint below `folder` and points `latest` to it; every rank calls it. Returns its folder.

    metadata: for the headers of the safetensors. Raises Refusal on every rank if rank 0's files cannot be written or
    another rank's are not there; what DeepSpeed raises for a rank's own file ends that rank. What was there stays.
    """
    target = folder / f"step-{state.step:08d}"
    staging = folder / f".{target.name}"
    rank = dist.get_rank()
    with together():
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
            staging.mkdir(parents=True)
    engine.save_checkpoint(str(staging), tag=_ENGINE_TAG, save_latest=False)
    with together(), full_parameters(engine):
        if rank == 0:
            save_weights(engine.module.state_dict(), staging / MODEL_NAME, metadata)
            save_weights(average.module.state_dict(), staging / EMA_NAME, metadata)
            (staging / STATE_NAME).write_text(json.dumps(asdict(state), indent=1))
    with together():  # by now every rank's files are there
        if rank == 0:
            _require_files(staging, state)
            _publish(staging, target)
    return target


def retain(saved: Path, is_best: bool, keep: int) -> None:
    """Lets `best` name the checkpoint just saved if it is; keeps the `keep` newest up to it, and the best one.

    Later ones are of a future that this run did not come from: it passed them over because they were damaged.
    """
    with together():
        if dist.get_rank() == 0:
            if is_best:
                _point(saved.parent / "best", saved.name)
            _remove_others(saved, keep)


def load(checkpoint: Path, engine, average: MovingAverage) -> None:
    """Puts a checkpoint back into the engine and the average; every rank calls it. Raises Refusal on every rank."""
    with together(), kept_settings(engine):
        path, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE_TAG)
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {checkpoint}; start from an older checkpoint")
        load_weights(average.module, checkpoint / EMA_NAME)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, if there is any checkpoint, and what is wrong with newer ones.

    Raises ValueError if there are checkpoints and none is whole: going on would start from nothing, over them.
    """
    faults = []
    for checkpoint in reversed(_checkpoints(folder)):
        fault = find_fault(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(fault)
    if faults:
        raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}. Move the folder away to start anew")
    return None, faults


def read_state(checkpoint: Path) -> RunState:
    return RunState(**json.loads((checkpoint / STATE_NAME).read_text()))


def find_fault(checkpoint: Path) -> str | None:
    """The first thing in which a checkpoint's files differ from its manifest."""
    try:
        files = json.loads((checkpoint / MANIFEST_NAME).read_text())
        for name, expected in files.items():
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256_of(path) != expected["sha256"]:
                return f"{path} is not what was written (its sha256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint} cannot be read ({error})"
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _CHECKPOINT.fullmatch(path.name))


def _require_files(staging: Path, state: RunState) -> None:
    """Raises RuntimeError unless every rank's part of the optimizer's state is among the files."""
    parts = len(list((staging / _ENGINE_TAG).glob("*optim_states.pt")))
    if state.zero_stage > 0 and parts != state.ranks:
        raise RuntimeError(
            f"{staging} holds the optimizer's state of {parts} ranks out of {state.ranks}; put the run's output folder"
            " on a file system that all nodes share"
        )


def _publish(staging: Path, target: Path) -> None:
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    manifest = {
        str(path.relative_to(staging)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1))
    for path in (*files, staging / MANIFEST_NAME, staging / _ENGINE_TAG, staging):
        sync(path)
    if target.exists():  # a broken one of the same step, which the run resumed before
        shutil.rmtree(target)
    staging.rename(target)
    sync(target.parent)
    _point(target.parent / "latest", target.name)


def _remove_others(saved: Path, keep: int) -> None:
    checkpoints, best = _checkpoints(saved.parent), saved.parent / "best"
    kept = [path.name for path in checkpoints if path.name <= saved.name][-keep:]
    if best.is_file():
        kept.append(best.read_text().strip())
    for path in checkpoints:
        if path.name not in kept:
            doomed = path.with_name(f".{path.name}")  # so that a killed removal leaves no half checkpoint
            path.rename(doomed)
            shutil.rmtree(doomed)


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_name(f".{pointer.name}")
    temporary.write_text(f"{name}\n")
    sync(temporary)
    temporary.replace(pointer)
    sync(pointer.parent)

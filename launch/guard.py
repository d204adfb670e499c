"""Guards against bad steps: those with a loss or gradient that is not finite, and spikes of the loss.

A step that is not finite on one rank is skipped on all: parameters, moments, EMA and BatchNorm's statistics stay as
they were, and the next step follows. A spike is detected one step late; its update stays. A checkpoint that is due
waits for the end of the bad steps; only that of a stop or of the run's end does not. After `guard.max_bad_steps` in a
row the run goes back to the newest checkpoint from before them, and skips these steps from there on. It does so again
only if it has got further meanwhile.

What a guard knows of earlier steps is saved with a checkpoint, so kills and stops do not change which steps are bad.
"""

import json
import math
import os
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from dataio.files import append, atomic_write, read_small_file
from dataio.manifest import Manifest
from launch.batchnorm import GroupBatchNorm2d
from launch.checkpoint.layout import GuardState, first_fault
from launch.config import Config
from launch.distributed import RunError, broadcast_object, gather_objects
from launch.monitor import Monitor

BAD_STEPS_NAME, STATE_NAME = "bad_steps.jsonl", "guard.json"
_SIGMAS_PER_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


@dataclass(frozen=True)
class TrainedStep:
    """What a rank has computed in a step.

    samples: rows of the manifest. losses: scalars on the device, one for each micro-step; none if the step was not to
    be trained on. applied: whether the weights were updated, the same on all ranks.
    """

    number: int  # from 0
    samples: npt.NDArray[np.int64]
    losses: list[Tensor]
    applied: bool

    @property
    def loss(self) -> Tensor | None:
        """Mean loss of the micro-steps, a scalar on the device; None if there are none."""
        return torch.stack(self.losses).mean() if self.losses else None


class Guard:
    """Finds and reports bad steps, and says when there are too many. Every rank has one, with the same findings.

    In the run's folder, BAD_STEPS_NAME names the samples of bad steps, and STATE_NAME lets a restarted run skip the
    same steps. first_step: the completed steps of the start; if there are any, `restore` follows.
    Attributes are `count`, of the bad steps since the start; `in_a_row`, the numbers of those since the last good one;
    and `skipped`, those of the steps that are not to be trained on.
    """

    def __init__(self, config: Config, manifest: Manifest, monitor: Monitor, model: nn.Module, first_step: int) -> None:
        options, folder = config.guard, config.output
        self._config, self._options, self._manifest, self._monitor = config, options, manifest, monitor
        self._norms = [module for module in model.modules() if isinstance(module, GroupBatchNorm2d)]
        self._path, self._state_path = folder / BAD_STEPS_NAME, folder / STATE_NAME
        window = 0 if options.spike_sigmas is None else options.spike_window
        self._losses: deque[float] = deque(maxlen=window)  # of good steps, over all ranks
        self._previous: TrainedStep | None = None  # whose loss over all ranks is not known yet
        self._has_spikes = False
        self.count = 0
        self.in_a_row: list[int] = []
        self._went_back_at: int | None = None
        self.skipped = set[int]()
        state = broadcast_object(self._read_state() if first_step and dist.get_rank() == 0 else None)
        if state is not None:
            self.skipped.update(state.skipped)
            # Else the run has got further, or begins from an older checkpoint than it went back to.
            if state.to <= first_step <= state.at:
                self._went_back_at = state.at

    def state(self) -> GuardState:
        """Return what `restore` needs after the last step, whose loss has been judged."""
        return GuardState(losses=list(self._losses), in_a_row=list(self.in_a_row))

    def restore(self, state: GuardState) -> None:
        """Go on after the checkpoint with this state."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self.in_a_row = list(state["in_a_row"])

    def spread_non_finite(self, loss: Tensor) -> Tensor:
        """Return the loss of a micro-step, with gradients that are NaN if it or a sum of BatchNorm's is not finite.

        Gradients are added over the ranks, so the optimizer then skips the step on all of them.
        """
        sums = nn.utils.get_total_norm([norm.sums for norm in self._norms])
        return loss * (1 + 0 * (loss.detach() + sums))

    def check(self, step: TrainedStep, previous_loss: float) -> bool:
        """Take in a step; return whether the run has to go back. Waits for the device only if a step is bad.

        previous_loss: of the step before, the mean over all ranks.
        """
        self.judge(previous_loss)
        self._previous = step
        if step.losses and not step.applied:
            self._report(step, "is skipped")
        return len(self.in_a_row) >= self._options.max_bad_steps

    def judge(self, loss: float) -> None:
        """Take in the loss of the last step, the mean over all ranks, unless that was done before."""
        step, self._previous = self._previous, None
        if step is None or not step.applied:
            return
        if self._is_spike(loss):
            self._has_spikes = True
            self._report(step, f"has a loss of {loss:.4g}, a spike")
            return
        self.in_a_row.clear()
        self._losses.append(loss)
        if self._went_back_at is not None and step.number > self._went_back_at:
            self._went_back_at = None

    def go_back(self, at: int, to: int | None, fault: str | None = None) -> None:
        """Note that the run goes back in step `at`, counted from 0, to `to` completed ones, and skips the bad steps.

        fault: what is wrong, by default the bad steps.
        Raises RunError on every rank if the run has not got further since it went back last, or `to` is None: there is
        no checkpoint.
        """
        fault = fault or f"the last {len(self.in_a_row)} steps were bad"
        if to is None or self._went_back_at is not None:
            tried = "and there is no checkpoint from before that to go back to"
            if to is not None:
                tried = f"although the run had gone back before step {at + 1} and skipped {len(self.skipped)} steps"
            raise RunError(f"{fault}, {tried}; {self._advice()}. The samples of bad steps are in {self._path}")
        skipping = f", and skips {len(self.in_a_row)} steps from there on" if self.in_a_row else ""
        self._monitor.log(f"{fault}: the run goes back to step {to}{skipping}")
        self._went_back_at, self._previous = at, None
        self.skipped |= set(self.in_a_row)
        self.in_a_row.clear()

    def report_going_back(self, at: int, to: int) -> None:
        """Write STATE_NAME, and again what was removed with the metrics of the steps after `to`. As `go_back`.

        A run that is killed before meets the bad steps again, and goes back again.
        """
        self._monitor.scalars(to, {"guard/bad_steps": self.count, "guard/went_back": 1})
        if dist.get_rank() != 0:
            return
        try:
            atomic_write(self._state_path, json.dumps(asdict(_State(at, to, sorted(self.skipped)))).encode())
        except OSError as error:
            self._monitor.warn(
                f"cannot write {self._state_path}: {error.strerror}; training goes on, but when the run is restarted,"
                " it meets the bad steps again"
            )

    @property
    def is_checkpoint_safe(self) -> bool:
        """Whether the last steps were good, and beyond those from which the run has gone back."""
        return not self.in_a_row and self._went_back_at is None

    def _advice(self) -> str:
        """Return what to try against bad steps, by what the configuration has not tried."""
        norm = "set" if self._config.optimizer.max_grad_norm is None else "lower"
        remedies = ["lower optimizer.lr", f"{norm} optimizer.max_grad_norm"]
        if self._config.engine.precision == "bf16":
            remedies.append("set engine.precision=fp32")
        if self._has_spikes:
            remedies.append("raise guard.spike_sigmas")
        return (
            f"try to {', '.join(remedies)}; where the weights are spoilt already, remove the newest checkpoints first"
        )

    def _is_spike(self, loss: float) -> bool:
        """Return whether a loss is far above those of the good steps before, once these fill the window."""
        sigmas = self._options.spike_sigmas
        if sigmas is None or len(self._losses) < self._options.spike_window:
            return False
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(value - median) for value in self._losses)
        return loss > median + sigmas * _SIGMAS_PER_MAD * deviation

    def _report(self, step: TrainedStep, what: str) -> None:
        """Count a bad step, print it, and write the samples of the ranks with a loss that is not finite, or of all."""
        self.in_a_row.append(step.number)
        self.count += 1
        loss = float("nan" if step.loss is None else step.loss)
        samples = [self._manifest.describe(row) for row in step.samples]
        records: list[dict[str, Any]] = gather_objects(
            {"step": step.number + 1, "rank": dist.get_rank(), "loss": str(loss), "samples": samples}
        )
        if faulty := [record for record in records if not math.isfinite(float(record["loss"]))]:
            what += ": the loss is " + ", ".join(f"{record['loss']} on rank {record['rank']}" for record in faulty)
        elif not step.applied:
            what += ": the gradient is not finite"
        self._monitor.scalars(step.number + 1, {"guard/bad_steps": self.count})
        if dist.get_rank() == 0:
            self._monitor.warn(
                f"step {step.number + 1} {what}; bad steps in a row: {len(self.in_a_row)}; samples: {self._path}"
            )
            lines = "".join(json.dumps(record) + "\n" for record in faulty or records)
            try:
                _append_lines(self._path, lines.encode())
            except OSError as error:
                self._monitor.warn(f"cannot write to {self._path}: {error.strerror}; training goes on")

    def _read_state(self) -> "_State | None":
        """Return what the last start that went back has left; None if none did, or the file is damaged."""
        try:
            return TypeAdapter(_State).validate_json(read_small_file(self._state_path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            fault = first_fault(error) if isinstance(error, ValidationError) else error
            self._monitor.warn(f"{self._state_path} cannot be read ({fault}); the steps that it names are not skipped")
            return None


@dataclass(frozen=True)
class _State:
    """What a restarted run needs to know of the last time it went back, with steps counted from 0."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    at: Annotated[int, Field(ge=0)]  # the step in which the run went back
    to: Annotated[int, Field(ge=0)]  # the completed steps of the checkpoint
    skipped: list[Annotated[int, Field(ge=0)]]


def _append_lines(path: Path, lines: bytes) -> None:
    """Append all of these lines to a file, or none if there is no space; a line that was cut off there stays alone."""
    with open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            lines = lines if file.read(1) == b"\n" else b"\n" + lines
        append(file, lines)

"""Guards against bad steps: those with a loss or gradient that is not finite, and spikes of the loss.

A step that is not finite on one rank is skipped on all: parameters, moments, EMA and BatchNorm's statistics stay as
they were, and the next step follows. A spike is known one step later, so it has changed the weights. After
`guard.max_bad_steps` in a row the run goes back to its last checkpoint, once, and skips these steps from there on.
"""

import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataio.manifest import Manifest
from launch.batchnorm import GroupBatchNorm2d
from launch.config import GuardSection
from launch.distributed import RunError, gather_objects
from launch.monitor import Monitor

BAD_STEPS_NAME = "bad_steps.jsonl"
_SIGMAS_PER_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


def spread_non_finite(loss: Tensor, model: nn.Module) -> Tensor:
    """Return the loss of a micro-step, with gradients that are NaN if it or a sum of BatchNorm's is not finite.

    Gradients are added over the ranks, so the optimizer then skips the step on all of them.
    """
    sums = [module.sums for module in model.modules() if isinstance(module, GroupBatchNorm2d)]
    return loss * (1 + 0 * (loss.detach() + nn.utils.get_total_norm(sums)))


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

    folder: of the run, in which BAD_STEPS_NAME names the samples of bad steps.
    Attributes are `in_a_row`, the numbers of the bad steps since the last good one; and `skipped`, those of the steps
    that are not to be trained on.
    """

    def __init__(self, options: GuardSection, folder: Path, manifest: Manifest, monitor: Monitor) -> None:
        self._options, self._manifest, self._monitor = options, manifest, monitor
        self._path = folder / BAD_STEPS_NAME
        self._losses: deque[float] = deque(maxlen=options.spike_window)  # of good steps, over all ranks
        self._previous: TrainedStep | None = None
        self._count = 0  # of bad steps since the start
        self._went_back_to: int | None = None
        self.in_a_row: list[int] = []
        self.skipped: set[int] = set()

    def check(self, step: TrainedStep, previous_loss: float) -> bool:
        """Take in a step; return whether the run has to go back. Waits for the device only if a step is bad.

        previous_loss: of the step before, the mean over all ranks; NaN if it is not known.
        """
        previous, self._previous = self._previous, step
        if previous is not None and previous.applied:
            if self._is_spike(previous_loss):
                self._report(previous, f"has a loss of {previous_loss:.4g}, a spike")
            else:
                self.in_a_row.clear()
                if math.isfinite(previous_loss):
                    self._losses.append(previous_loss)
        if step.losses and not step.applied:
            self._report(step, "is skipped")
        return len(self.in_a_row) >= self._options.max_bad_steps

    def go_back(self, step: int | None) -> None:
        """Note that the run goes on from `step` completed steps, and skips the bad steps from there on.

        Raises RunError on every rank if it has gone back before, or step is None: there is no checkpoint.
        """
        found = f"the last {len(self.in_a_row)} steps were bad"
        if step is None:
            tried = "and there is no checkpoint from before them to go back to"
        elif self._went_back_to is not None:
            tried = f"although the run had gone back to step {self._went_back_to} and skipped {len(self.skipped)} steps"
        else:
            self._monitor.log(f"{found}: back to step {step}; from there on, their samples are skipped")
            self._went_back_to, self._previous = step, None
            self.skipped = set(self.in_a_row)
            self.in_a_row.clear()
            return
        raise RunError(
            f"{found}, {tried}; lower optimizer.lr or optimizer.max_grad_norm, or set engine.precision=fp32, and start"
            f" again from the last checkpoint. The samples of these steps are in {self._path}"
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
        self._count += 1
        loss = float("nan" if step.loss is None else step.loss)
        samples = [self._manifest.describe(row) for row in step.samples]
        records: list[dict[str, Any]] = gather_objects(
            {"step": step.number + 1, "rank": dist.get_rank(), "loss": str(loss), "samples": samples}
        )
        if faulty := [record for record in records if not math.isfinite(float(record["loss"]))]:
            what += ": the loss is " + ", ".join(f"{record['loss']} on rank {record['rank']}" for record in faulty)
        elif not step.applied:
            what += ": the gradient is not finite"
        self._monitor.scalars(step.number + 1, {"guard/bad_steps": self._count})
        if dist.get_rank() == 0:
            self._monitor.warn(
                f"step {step.number + 1} {what}; bad steps in a row: {len(self.in_a_row)}; samples: {self._path}"
            )
            try:
                with open(self._path, "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(record) + "\n" for record in faulty or records)
            except OSError as error:
                self._monitor.warn(f"cannot write to {self._path}: {error.strerror}; training goes on")

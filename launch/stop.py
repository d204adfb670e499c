"""Stops of a run before its end, on which all ranks agree without waiting: by a signal, or the time limit.

Each rank has a vector of flags, one for each reason, and its loss. In a step they travel with BatchNorm's statistics
(`sync_batchnorm_buffers`); in an evaluation, which has no collective of its own, they take a small all-reduce a batch.
Their sums go to pinned memory and are read one step or batch later, when they have long arrived. All ranks read the
same sums at the same point, so all stop there. interrupt.py receives the signals.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dataio.loader import Batch, EvalLoader
from launch.distributed import gather_objects
from launch.host_copy import HostCopy
from launch.interrupt import STOP_SIGNALS, StopSignals
from launch.run_lock import start_ticks

TIME_LIMIT = "checkpoint.stop_after_minutes"
REASONS = (*(number.name for number in STOP_SIGNALS), TIME_LIMIT)


class Stopped(Exception):
    """Raised on every rank to leave the start-up or an evaluation of a run; its text is the reason."""


class Agreed(NamedTuple):
    """What all ranks know of each other after a step: the same on all of them."""

    reason: str | None  # to stop: one of REASONS, the first that some rank has; None to go on
    save_due: bool  # rank 0's clock says so
    save_failed: bool  # on some rank
    loss: float  # mean over the ranks; NaN after an evaluation's batch


class StopAgreement:
    """One rank's part in the agreement on a stop, and on checkpoints. Every rank has one, and makes the same calls.

    stop_after_minutes: the time limit since the start of the process; rank 0's clock decides.
    """

    def __init__(self, signals: StopSignals, device: torch.device, stop_after_minutes: float | None = None) -> None:
        self._signals, self._device = signals, device
        self._deadline = float("inf")
        self._decides = dist.get_rank() == 0
        if stop_after_minutes is not None and self._decides:
            self._deadline = time.monotonic() - process_age_seconds() + 60 * stop_after_minutes
        self._sums = HostCopy(torch.tensor([0.0] * (len(REASONS) + 2) + [math.nan]), device)

    def flags(self, save_due: bool = False, save_failed: bool = False, loss: Tensor | None = None) -> Tensor:
        """Return what this rank tells the others, to be summed over the ranks: (len(REASONS) + 3,) float32.

        save_due: whether a checkpoint is due by the clock; rank 0's decides. save_failed: on this rank. loss: a scalar
        on the device, where the result is too; None is NaN.
        """
        reason = self._signals.received or (TIME_LIMIT if time.monotonic() >= self._deadline else None)
        flags = torch.zeros(len(REASONS) + 3, device=self._device)
        for index, flag in enumerate([*(name == reason for name in REASONS), save_due and self._decides, save_failed]):
            if flag:
                flags[index].fill_(1)  # a kernel: an assignment would copy from the host, and wait
        flags[-1].fill_(math.nan) if loss is None else flags[-1].copy_(loss)
        return flags

    def exchange(self, sums: Tensor) -> Agreed:
        """Return the agreement of the last call, and start to copy `sums` (of all ranks' flags) to the host."""
        agreed = self._read()
        self._sums.start(sums)
        return agreed

    def latest(self) -> Agreed:
        """Return the agreement of the last step; waits until it has arrived. A later `exchange` returns it again."""
        return self._read()

    def polled(self, batches: EvalLoader, beat: Callable[[], None] = lambda: None) -> Iterator[Batch]:
        """Yield this rank's batches of an evaluation, and agree on a stop after each; ranks may have unequal numbers.

        beat: called before each agreement, equally often on all ranks.
        Raises Stopped on every rank, after the same batch.
        """
        polls = torch.tensor(len(batches), device=self._device)
        dist.all_reduce(polls, dist.ReduceOp.MAX)
        missing = int(polls) - len(batches)
        for batch in batches:
            yield batch
            beat()
            self._poll()
        for _ in range(missing):
            beat()
            self._poll()

    def check(self) -> None:
        """Raise Stopped on every rank if one has received a signal, without a delay. For start-up.

        The time limit does not count there: a start makes at least one step.
        """
        for reason in gather_objects(self._signals.received):
            if reason:
                raise Stopped(reason)

    def _poll(self) -> None:
        flags = self.flags()
        dist.all_reduce(flags)
        if reason := self.exchange(flags).reason:
            raise Stopped(reason)

    def _read(self) -> Agreed:
        *counts, save_due, save_failed, loss = self._sums.read().tolist()
        reasons = (reason for reason, count in zip(REASONS, counts, strict=True) if count)
        return Agreed(next(reasons, None), bool(save_due), bool(save_failed), loss / dist.get_world_size())


def process_age_seconds() -> float:
    """Return for how long this process exists, its imports included; 0 if /proc is hidden."""
    ticks = start_ticks(os.getpid())
    if ticks is None:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")

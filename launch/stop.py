"""Stops of a run before its end: all ranks agree on one, by a signal or the time limit, without waiting for each other.

Each rank has a vector of flags, one for each reason. In a step the flags travel with BatchNorm's statistics
(`sync_batchnorm_buffers`); in an evaluation, which has no collective of its own, they take a small all-reduce a batch.
Their sums go to pinned memory and are read one step or batch later, when they have long arrived. All ranks read the
same sums at the same point, so all stop there. interrupt.py receives the signals.
"""

import os
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from dataio.loader import Batch, EvalLoader
from launch.interrupt import STOP_SIGNALS, StopSignals
from launch.run_lock import start_ticks

TIME_LIMIT = "checkpoint.stop_after_minutes"
REASONS = (*(number.name for number in STOP_SIGNALS), TIME_LIMIT)


class Stopped(Exception):
    """Raised on every rank to leave the start-up or an evaluation of a run; its text is the reason."""


class StopAgreement:
    """One rank's part in the agreement on a stop. Every rank has one, and makes the same calls.

    A returned reason is one of REASONS, the first that some rank has; None means to go on.
    stop_after_minutes: the time limit since the start of the process; rank 0's clock decides.
    """

    def __init__(self, signals: StopSignals, device: torch.device, stop_after_minutes: float | None = None) -> None:
        self._signals, self._device = signals, device
        self._deadline = float("inf")
        if stop_after_minutes is not None and dist.get_rank() == 0:
            self._deadline = time.monotonic() - process_age_seconds() + 60 * stop_after_minutes
        on_gpu = device.type == "cuda"
        self._sums = torch.zeros(len(REASONS), pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None

    def flags(self) -> Tensor:
        """Return this rank's flags, to be summed over the ranks: (len(REASONS),) float32 on the device."""
        flags = torch.zeros(len(REASONS), device=self._device)
        reason = self._signals.received or (TIME_LIMIT if time.monotonic() >= self._deadline else None)
        if reason:
            flags[REASONS.index(reason)].fill_(1)  # a kernel: an assignment would copy from the host, and wait
        return flags

    def exchange(self, sums: Tensor) -> str | None:
        """Return the reason in the sums of the last call, and start to copy `sums` (all ranks' flags) to the host."""
        reason = self._read()
        self._sums.copy_(sums, non_blocking=True)
        if self._copied:
            self._copied.record()
        return reason

    def polled(self, batches: EvalLoader) -> Iterator[Batch]:
        """Yield this rank's batches of an evaluation, and agree on a stop after each; ranks may have unequal numbers.

        Raises Stopped on every rank, after the same batch.
        """
        polls = torch.tensor(len(batches), device=self._device)
        dist.all_reduce(polls, dist.ReduceOp.MAX)
        missing = int(polls) - len(batches)
        for batch in batches:
            yield batch
            self._poll()
        for _ in range(missing):
            self._poll()

    def check(self) -> None:
        """Raise Stopped on every rank if one has received a signal, without a delay. For start-up.

        The time limit does not count there: a start makes at least one step.
        """
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, self._signals.received)
        if received := [reason for reason in reasons if reason]:
            raise Stopped(received[0])

    def _poll(self) -> None:
        flags = self.flags()
        dist.all_reduce(flags)
        if reason := self.exchange(flags):
            raise Stopped(reason)

    def _read(self) -> str | None:
        if self._copied:
            self._copied.synchronize()  # of the step before: it has happened, or is about to
        counts = zip(REASONS, self._sums.tolist(), strict=True)
        return next((reason for reason, count in counts if count), None)


def process_age_seconds() -> float:
    """Return for how long this process exists, its imports included; 0 if /proc is hidden."""
    ticks = start_ticks(os.getpid())
    if ticks is None:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")

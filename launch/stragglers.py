"""Stragglers: the rank for whose own work the others wait, and when to warn of it.

All ranks end a step together, since they wait for each other in its collectives, so the time of a step does not tell
which one is slow. Each rank therefore times the part of a step that waits for no other.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

_WARN_OVER_MEDIAN = 1.5
_WARN_INTERVALS = 3  # in a row with the same slowest rank; one alone may be a hiccup, such as of compilation


class WorkTimer:
    """The time of this rank's own work: of blocks in which it waits for no other rank.

    on_gpu: time them on the current stream, by events that are read when `take` is called. A wait for data then counts
    as far as the GPU has nothing else to do.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu, self._seconds = on_gpu, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside the block; one that raises is left out."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Return the seconds since the last call. Waits until the GPU has come to the end of the last block."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._events, self._seconds = [], 0.0
        return seconds


class SlowestRank(NamedTuple):
    """The rank whose own work took longest, and how many times as long as the median over all ranks."""

    rank: int
    over_median: float


def find_slowest(seconds: Sequence[float]) -> SlowestRank | None:
    """Return the slowest rank by the time of each one's own work; None if there is one rank, or nothing was timed."""
    median = statistics.median_low(seconds)  # of two ranks the faster, not a mean with the slow one
    if len(seconds) == 1 or median == 0:
        return None
    rank = max(range(len(seconds)), key=seconds.__getitem__)
    return SlowestRank(rank, seconds[rank] / median)


class StragglerAlarm:
    """Decides on warnings: of a rank that is much slower for several intervals in a row, once until it is another."""

    def __init__(self) -> None:
        self._rank: int | None = None  # that is much slower
        self._intervals = 0  # for so long
        self._warned: int | None = None

    def is_due(self, slowest: SlowestRank) -> bool:
        """Return whether to warn, after another interval."""
        rank = slowest.rank if slowest.over_median >= _WARN_OVER_MEDIAN else None
        self._intervals = self._intervals + 1 if rank == self._rank else 1
        self._rank = rank
        if rank is None or rank == self._warned or self._intervals < _WARN_INTERVALS:
            return False
        self._warned = rank
        return True

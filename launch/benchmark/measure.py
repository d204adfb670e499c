"""Quantiles, timing, memory and a device's peak rates: the measuring types that all benchmarks share.

Competing calls are timed in turn, so that a clock or a neighbour that changes affects all of them alike.
"""

import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

PASSES = ("forward", "backward", "both")
MIN_ROUNDS, MAX_ROUNDS = 5, 200
_L2_FLUSH_BYTES = 1 << 30  # several times the L2 cache of any GPU, and read for longer than a launch takes the host
_COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
_LONGEST_REASON = 400  # characters


@dataclass(frozen=True)
class Quantiles:
    """Median, and the quantiles 0.2 and 0.8, of a number of repetitions."""

    median: float
    low: float
    high: float
    repetitions: int


def quantiles(values: Sequence[float]) -> Quantiles:
    """Quantiles of measured values."""
    low, median, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return Quantiles(median, low, high, len(values))


@dataclass(frozen=True)
class Trial:
    """One timed run of a command or a loader."""

    seconds: float
    cpu_seconds: float  # CPU time of the process with its threads and the processes that it started
    labels: tuple[int, ...] = ()  # images of each class in a loader's epoch


def cpu_seconds() -> float:
    """CPU time so far of this process and of those of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def rotate_order(names: Sequence[Any], first: int) -> list[Any]:
    """Rotate `names` so that number `first` comes first; over the rounds each one does."""
    return [*names[first:], *names[:first]]


def times_faster_than(seconds: Mapping[str, Sequence[float]], name: str) -> dict[str, dict[str, float]]:
    """By competitor of `name`: quantiles of the ratios of its seconds to those of `name` in the same round.

    seconds: of each round, by competitor.
    """
    return {
        other: asdict(quantiles([a / b for a, b in zip(theirs, seconds[name], strict=True)]))
        for other, theirs in seconds.items()
        if other != name
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def describe_error(error: Exception) -> str:
    """Describe an error in one line of bounded length."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    message = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]  # advice for PyTorch's developers follows
    line = " ".join(f"{type(error).__name__}: {message}".split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} …"


class Benchmarked(Protocol):
    """A forward pass that keeps what its backward pass needs."""

    def forward(self) -> Tensor:
        """Compute the output."""

    def backward(self, out: Tensor) -> Any:
        """Compute the gradients."""


class Clock:
    """Timer of a device: CUDA events on a GPU, wall time on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._flushing = torch.zeros(_L2_FLUSH_BYTES // 4 if self._is_cuda else 0, device=device)
        self._sum = torch.zeros((), device=device)

    def time(self, run: Callable[[], Any], repetitions: int) -> list[float]:
        """Seconds of each repetition, each with a cold L2 cache."""
        intervals = []
        for _ in range(repetitions):
            began = self._begin()
            run()
            intervals.append((began, self._mark()))
        return self._seconds(intervals)

    def time_back_to_back(self, run: Callable[[], Any], repetitions: int) -> list[float]:
        """Seconds of each repetition, one right after the other; a GPU's waits for the host count."""
        marks = [self._mark()]
        for _ in range(repetitions):
            run()
            marks.append(self._mark())
        return self._seconds(list(zip(marks, marks[1:], strict=False)))

    def time_interleaved(self, calls: Sequence[Benchmarked], rounds: int) -> list[dict[str, list[float]]]:
        """For each call the seconds of each round, by pass; a round runs every call once, with a cold L2 cache."""
        intervals: list[list[tuple[Any, Any]]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, own in zip(calls, intervals, strict=True):
                began = self._begin()
                out = call.forward()
                own.append((began, self._mark()))
                began = self._begin()
                call.backward(out)
                own.append((began, self._mark()))
                del out
        times = []
        for own in intervals:
            seconds = self._seconds(own)
            forward, backward = seconds[::2], seconds[1::2]
            both = [a + b for a, b in zip(forward, backward, strict=True)]
            times.append(dict(zip(PASSES, (forward, backward, both), strict=True)))
        return times

    def _begin(self) -> Any:
        if self._is_cuda:
            # Evicts from the L2 cache what was there, by reading: lines that were written would still have to go to
            # memory while the clock runs. Meanwhile the host gets ahead of the GPU: launches are not what is measured.
            torch.sum(self._flushing, dim=0, out=self._sum)
        return self._mark()

    def _mark(self) -> Any:
        if not self._is_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, intervals: list[tuple[Any, Any]]) -> list[float]:
        if not self._is_cuda:
            return [ended - began for began, ended in intervals]
        torch.cuda.synchronize()
        return [began.elapsed_time(ended) / 1000 for began, ended in intervals]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds_within(seconds: float, one_round: float) -> int:
    """Count the rounds that take about so many seconds, within MIN_ROUNDS and MAX_ROUNDS."""
    return int(min(max(seconds / one_round, MIN_ROUNDS), MAX_ROUNDS))


def quiet_profile(activities: Sequence[ProfilerActivity], **options: Any) -> profile:
    """PyTorch's profiler without its complaints about a missing driver."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    return profile(activities=activities, acc_events=True, **options)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of tensors and workspaces while `run` runs, beyond what was allocated at its start.

    On the CPU from the profiler's allocations: memory that a library takes past PyTorch's allocator is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with quiet_profile([ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()  # what it returns lives until the profile ends
    del kept
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())  # stable: simultaneous ones stay in their order
    return int(np.cumsum([0, *(event.nbytes() for event in events)]).max())


@dataclass(frozen=True)
class DevicePeaks:
    """Measured peak rates of a device: bytes per second of a copy, operations per second of matrix products."""

    copy: Quantiles
    products: dict[torch.dtype, Quantiles]


def copy_bandwidth(clock: Clock, device: torch.device) -> Quantiles:
    """Bytes per second that a large copy reads and writes."""
    source = torch.zeros(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return _rate(clock, lambda: target.copy_(source), 2 * source.numel())


def matmul_throughput(clock: Clock, device: torch.device, dtype: torch.dtype) -> Quantiles:
    """Operations per second of a large square matrix product; a multiply-add counts as two."""
    size = _MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    target = torch.empty_like(a)
    return _rate(clock, lambda: torch.mm(a, b, out=target), 2 * size**3)


def _rate(clock: Clock, run: Callable[[], Any], amount: int) -> Quantiles:
    run()
    [once] = clock.time(run, 1)
    return quantiles([amount / seconds for seconds in clock.time(run, rounds_within(1.0, once))])


def free_bytes() -> int:
    """Memory that this process can still take: what the machine has left, or its control group, if less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    [free] = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    try:
        [own] = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
        folder = Path("/sys/fs/cgroup", own.lstrip("/"))
        limit = (folder / "memory.max").read_text().strip()
        used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["anon"]
    except (OSError, ValueError, KeyError):  # no control groups, or those of the first version
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))

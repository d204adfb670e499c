"""One shape's contest: who has room, who runs, and the turns that they take.

implementations.py says who they are, measure.py how they are timed; kernel.py holds the contests and reports them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from launch.benchmark.check import Errors, check
from launch.benchmark.implementations import (
    AttentionCall,
    Inputs,
    Shape,
    flops,
    get_implementation,
    input_bytes,
    make_inputs,
    predict_bytes,
)
from launch.benchmark.measure import (
    Clock,
    Quantiles,
    copy_bandwidth,
    free_bytes,
    matmul_throughput,
    peak_bytes,
    quantiles,
    rounds_within,
)

_SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True)
class Settings:
    """seconds: about so long for each shape; limit: a implementation may take so many seconds for forward and backward."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    seconds: float
    limit: float


@dataclass(frozen=True)
class DevicePeaks:
    """What the device can do at best: bytes per second of a copy, operations per second of products by dtype."""

    copy: Quantiles
    products: dict[torch.dtype, Quantiles]


@dataclass(frozen=True)
class Result:
    """One implementation on one shape: its times and memory, or why there are none."""

    implementation: str
    shape: Shape
    dtype: torch.dtype
    skipped: str | None = None
    seconds: dict[str, Quantiles] | None = None  # by pass
    peak_extra_bytes: dict[str, int] | None = None  # of "forward" and "both"; outputs and gradients count


class _Skipped(Exception):
    """Why a implementation is not measured."""


class KernelBenchmark:
    """Measures the device when it is made, then shape after shape; remembers where ours could not be checked."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._clock = Clock(settings.device)
        products = {dtype: matmul_throughput(self._clock, settings.device, dtype) for dtype in settings.dtypes}
        self.peaks = DevicePeaks(copy_bandwidth(self._clock, settings.device), products)
        self._unchecked: dict[tuple[Shape, torch.dtype], str] = {}

    def check_ours(self, shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, Errors]] | str:
        """The errors of ours, or why they are not known; then `run` will not time it either.

        Raises WrongResult if ours is wrong.
        """
        try:
            self._require_room("ours", shape, dtype)
            self._require_room("eager", replace(shape, batch=1), dtype)
            return check(get_implementation("ours"), shape, dtype, self.settings.device)
        except (_Skipped, RuntimeError) as error:
            reason = self._unchecked[shape, dtype] = f"not checked: {_reason('ours', error)}"
        return reason

    def run(self, shape: Shape, implementations: Sequence[str]) -> list[Result]:
        """A result for every implementation in every dtype."""
        torch.compiler.reset()  # or after some shapes it would run what it should compile
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()
        results: list[Result] = []
        calls: dict[int, AttentionCall] = {}  # by place among the results
        one_round = 0.0
        for dtype in self.settings.dtypes:
            inputs: list[Inputs] = []  # made by the first implementation that has room, and shared
            for implementation in implementations:
                result = Result(implementation, shape, dtype)
                try:
                    self._require_room(implementation, shape, dtype)
                    call, seconds, peaks = self._warm_up(implementation, shape, dtype, inputs)
                except (_Skipped, RuntimeError) as error:
                    results.append(replace(result, skipped=_reason(implementation, error)))
                    continue
                one_round += seconds
                calls[len(results)] = call
                results.append(replace(result, peak_extra_bytes=peaks))
        if calls:
            rounds = rounds_within(self.settings.seconds, one_round)
            times = self._clock.time_interleaved(list(calls.values()), rounds)
            for place, own in zip(calls, times, strict=True):
                seconds = {name: quantiles(values) for name, values in own.items()}
                results[place] = replace(results[place], seconds=seconds)
        return results

    def _require_room(self, implementation: str, shape: Shape, dtype: torch.dtype) -> None:
        """Raises _Skipped if a implementation must exceed the time limit, or the memory where that would end the process."""
        if implementation == "ours" and (shape, dtype) in self._unchecked:
            raise _Skipped(self._unchecked[shape, dtype])
        least, limit = flops(implementation, shape)["both"] / self.peaks.products[dtype].median, self.settings.limit
        if least > limit:
            raise _Skipped(f"its products alone take {least:.3g} s at the measured rate, more than --limit {limit:g}")
        if self.settings.device.type == "cpu":  # a GPU's allocator says itself when it is full
            needed = input_bytes(shape, dtype) + predict_bytes(implementation, shape, dtype, self.settings.device)
            free = free_bytes()
            if needed > _SHARE_OF_FREE_MEMORY * free:
                raise _Skipped(f"needs about {needed / 1e9:.3g} GB of memory; {free / 1e9:.3g} GB are free")

    def _warm_up(
        self, implementation: str, shape: Shape, dtype: torch.dtype, inputs: list[Inputs]
    ) -> tuple[AttentionCall, float, dict[str, int]]:
        """The call, ready; seconds of forward and backward; peak memory. Raises _Skipped if that is too long."""
        if not inputs:
            inputs.append(make_inputs(shape, dtype, self.settings.device))
        call = AttentionCall(get_implementation(implementation), inputs[0])
        if implementation == "compiled" or self.settings.device.type == "cuda":
            call.both()  # compiles, loads kernels: the limit is not for that
        [times] = self._clock.time_interleaved([call], 1)
        [seconds] = times["both"]
        if seconds > self.settings.limit:
            raise _Skipped(f"took {seconds:.3g} s, more than --limit {self.settings.limit:g}")
        peaks = {name: peak_bytes(getattr(call, name), self.settings.device) for name in ("forward", "both")}
        return call, seconds, peaks


def _reason(implementation: str, error: Exception) -> str:
    """In one line. What ails ours is no reason to go on, unless it is memory: raises the error then."""
    if isinstance(error, _Skipped):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    if implementation == "ours":
        raise error
    message = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]  # advice for PyTorch's developers follows
    return " ".join(f"{type(error).__name__}: {message}".split())

"""One shape's contest: who has room, who runs, and the turns that they take.

contenders.py says who they are, measure.py how they are timed; kernel.py holds the contests and reports them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from launch.benchmark.check import Errors, check
from launch.benchmark.contenders import (
    Entrant,
    Inputs,
    Shape,
    flops,
    implementation,
    input_bytes,
    make_inputs,
    predict_bytes,
)
from launch.benchmark.measure import (
    Clock,
    Spread,
    copy_rate,
    free_bytes,
    peak_bytes,
    product_rate,
    rounds_within,
    spread,
)

_SHARE_OF_FREE_MEMORY = 0.8


@dataclass(frozen=True)
class Rules:
    """seconds: about so long for each shape; limit: a contender may take so many seconds for forward and backward."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    seconds: float
    limit: float


@dataclass(frozen=True)
class Rates:
    """What the device can do at best: bytes per second of a copy, operations per second of products by dtype."""

    copy: Spread
    products: dict[torch.dtype, Spread]


@dataclass(frozen=True)
class Result:
    """One contender on one shape: its times and memory, or why there are none."""

    contender: str
    shape: Shape
    dtype: torch.dtype
    skipped: str | None = None
    seconds: dict[str, Spread] | None = None  # by pass
    peak_extra_bytes: dict[str, int] | None = None  # of "forward" and "both"; outputs and gradients count


class _Skipped(Exception):
    """Why a contender is not measured."""


class Contest:
    """Measures the device when it is made, then shape after shape; remembers where ours could not be checked."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._clock = Clock(rules.device)
        products = {dtype: product_rate(self._clock, rules.device, dtype) for dtype in rules.dtypes}
        self.rates = Rates(copy_rate(self._clock, rules.device), products)
        self._unchecked: dict[tuple[Shape, torch.dtype], str] = {}

    def check_ours(self, shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, Errors]] | str:
        """The errors of ours, or why they are not known; then `run` will not time it either.

        Raises WrongResult if ours is wrong.
        """
        try:
            self._require_room("ours", shape, dtype)
            self._require_room("eager", replace(shape, batch=1), dtype)
            return check(implementation("ours"), shape, dtype, self.rules.device)
        except (_Skipped, RuntimeError) as error:
            reason = self._unchecked[shape, dtype] = f"not checked: {_reason('ours', error)}"
        return reason

    def run(self, shape: Shape, contenders: Sequence[str]) -> list[Result]:
        """A result for every contender in every dtype."""
        torch.compiler.reset()  # or after some shapes it would run what it should compile
        if self.rules.device.type == "cuda":
            torch.cuda.empty_cache()
        results: list[Result] = []
        racing: dict[int, Entrant] = {}  # by place among the results
        one_round = 0.0
        for dtype in self.rules.dtypes:
            inputs: list[Inputs] = []  # made by the first contender that has room, and shared
            for contender in contenders:
                result = Result(contender, shape, dtype)
                try:
                    self._require_room(contender, shape, dtype)
                    entrant, seconds, peaks = self._warm_up(contender, shape, dtype, inputs)
                except (_Skipped, RuntimeError) as error:
                    results.append(replace(result, skipped=_reason(contender, error)))
                    continue
                one_round += seconds
                racing[len(results)] = entrant
                results.append(replace(result, peak_extra_bytes=peaks))
        if racing:
            rounds = rounds_within(self.rules.seconds, one_round)
            times = self._clock.race(list(racing.values()), rounds)
            for place, own in zip(racing, times, strict=True):
                seconds = {name: spread(values) for name, values in own.items()}
                results[place] = replace(results[place], seconds=seconds)
        return results

    def _require_room(self, contender: str, shape: Shape, dtype: torch.dtype) -> None:
        """Raises _Skipped if a contender must exceed the time limit, or the memory where that would end the process."""
        if contender == "ours" and (shape, dtype) in self._unchecked:
            raise _Skipped(self._unchecked[shape, dtype])
        least, limit = flops(contender, shape)["both"] / self.rates.products[dtype].median, self.rules.limit
        if least > limit:
            raise _Skipped(f"its products alone take {least:.3g} s at the measured rate, more than --limit {limit:g}")
        if self.rules.device.type == "cpu":  # a GPU's allocator says itself when it is full
            needed = input_bytes(shape, dtype) + predict_bytes(contender, shape, dtype, self.rules.device)
            free = free_bytes()
            if needed > _SHARE_OF_FREE_MEMORY * free:
                raise _Skipped(f"needs about {needed / 1e9:.3g} GB of memory; {free / 1e9:.3g} GB are free")

    def _warm_up(
        self, contender: str, shape: Shape, dtype: torch.dtype, inputs: list[Inputs]
    ) -> tuple[Entrant, float, dict[str, int]]:
        """The entrant, ready; seconds of forward and backward; peak memory. Raises _Skipped if that is too long."""
        if not inputs:
            inputs.append(make_inputs(shape, dtype, self.rules.device))
        entrant = Entrant(implementation(contender), inputs[0])
        if contender == "compiled" or self.rules.device.type == "cuda":
            entrant.both()  # compiles, loads kernels: the limit is not for that
        [times] = self._clock.race([entrant], 1)
        [seconds] = times["both"]
        if seconds > self.rules.limit:
            raise _Skipped(f"took {seconds:.3g} s, more than --limit {self.rules.limit:g}")
        peaks = {name: peak_bytes(getattr(entrant, name), self.rules.device) for name in ("forward", "both")}
        return entrant, seconds, peaks


def _reason(contender: str, error: Exception) -> str:
    """In one line. What ails ours is no reason to go on, unless it is memory: raises the error then."""
    if isinstance(error, _Skipped):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    if contender == "ours":
        raise error
    message = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]  # advice for PyTorch's developers follows
    return " ".join(f"{type(error).__name__}: {message}".split())

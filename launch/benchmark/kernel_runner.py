"""Implementations of polarity attention on one shape: their inputs, correctness, memory and interleaved times.

kernel.py runs shape after shape and reports. Axes: B batch, H heads, N = height·width tokens, D head dimension,
C = H·D channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.benchmark.measure import (
    Clock,
    DevicePeaks,
    Quantiles,
    copy_bandwidth,
    describe_error,
    dtype_name,
    free_bytes,
    matmul_throughput,
    peak_bytes,
    quantiles,
    rounds_within,
)
from launch.benchmark.shapes import Shape
from polaformer import PRESETS, ops, reference
from polaformer.model import TOTAL_STRIDE

Attention = Callable[..., Tensor]  # arguments: q, k, v, same logits, opposite logits, height, width
IMPLEMENTATIONS = ("ours", "eager", "compiled", "sdpa")
_SHARE_OF_FREE_MEMORY = 0.8

#: Allowed error of each tensor as a multiple of eager's in the same dtype, on top of TOLERANCE_FLOOR of the exact size.
TOLERANCE_FACTORS = {"out": 2, "grad_q": 3, "grad_k": 3, "grad_v": 3, "grad_same_logits": 3, "grad_opposite_logits": 3}
#: In float32 it is nearly all that is allowed: tensor cores truncate their sums where eager PyTorch rounds, so that our
#: outputs were off by up to 21 epsilons on an H200 with 256 features, the most there are.
TOLERANCE_FLOOR = 24 * torch.finfo(torch.float32).eps
#: Measures of a tensor's size, by name.
SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda x: x.abs().max(),  # shows one wrong token
    "root mean square": lambda x: x.square().mean().sqrt(),  # shows a small error everywhere
}


# Implementations and their inputs.


def model_shapes(resolutions: Sequence[int], batches: Sequence[int]) -> list[Shape]:
    """Shapes of b4's and b5's stages with polarity attention (both have the same) at these square resolutions."""
    preset = PRESETS["polaformerpp_b5"]
    shapes = []
    for resolution in resolutions:
        for stage in range(2):
            heads, side = preset.heads[stage], resolution // (4 << stage)
            shapes += [Shape(batch, heads, side, side, preset.channels[stage] // heads) for batch in batches]
    return shapes


def check_resolutions(resolutions: Sequence[int]) -> None:
    """Raise ValueError if one of --resolutions, in pixels, is no size that the models take."""
    for resolution in resolutions:
        if resolution < 1 or resolution % TOTAL_STRIDE:
            raise ValueError(f"--resolutions names {resolution}; give multiples of {TOTAL_STRIDE}, as the models need")


def implementation_of_ours(device: torch.device) -> str:
    """Kind of code that the operators of `ops` run on a device: "compiled kernel" or "reference"."""
    return "compiled kernel" if ops.has_compiled_kernels(device.type) else "reference"


def describe_checks(report: Mapping[str, Any]) -> str:
    """Say what ours is, and on how many shapes and dtypes a report found it right; or why nothing was checked."""
    checks = report["checks"]
    if not checks:
        return "nothing was checked, as ours is not among --implementations"
    right = sum("errors" in entry for entry in checks)
    unchecked = f" ({len(checks) - right} not checked, see below)" if right < len(checks) else ""
    kind = report["implementation_of_ours"]
    return f"ours is the {kind}, right on {right} of {len(checks)} shapes and dtypes{unchecked}"


def get_implementation(name: str) -> Attention:
    """Look up an implementation by name. "compiled" compiles for the first shape that it is called with."""
    if name == "compiled":
        return torch.compile(reference.eager_polarity_attention, dynamic=False, fullgraph=True)
    return {"ours": ops.polarity_attention, "eager": reference.eager_polarity_attention, "sdpa": _softmax_attention}[
        name
    ]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, _same: Tensor, _opposite: Tensor, _h: int, _w: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def flops(implementation: str, shape: Shape) -> dict[str, int]:
    """Operations of an implementation's matrix products, by pass."""
    if implementation == "sdpa":
        forward, backward = (count * shape.elements * shape.tokens for count in (4, 10))
    else:
        forward, backward = (count * shape.elements * shape.head_dim for count in (8, 20))
    return {"forward": forward, "backward": backward, "both": forward + backward}


@dataclass(frozen=True)
class Inputs:
    """q, k, v: (B, H, N, D) views of one (B, N, 4C) projection, as in the model; logits: (H, 2D) float32."""

    tensors: tuple[Tensor, ...]  # q, k, v, same logits, opposite logits
    grad_out: Tensor  # (B, H, N, D), in memory (B, N, H, D)
    size: tuple[int, int]  # height, width


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw normally distributed inputs from a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=dtype)

    def heads_first(x: Tensor) -> Tensor:
        return x.unflatten(-1, (shape.heads, shape.head_dim)).transpose(1, 2)

    channels = shape.heads * shape.head_dim
    projection = draw(shape.batch, shape.tokens, 4 * channels, dtype=dtype)
    views = [heads_first(part) for part in projection.chunk(4, dim=-1)[:3]]
    logits = [draw(shape.heads, 2 * shape.head_dim, dtype=torch.float32) for _ in range(2)]
    grad_out = heads_first(draw(shape.batch, shape.tokens, channels, dtype=dtype))
    tensors = tuple(x.detach().requires_grad_() for x in (*views, *logits))
    return Inputs(tensors, grad_out, (shape.height, shape.width))


@dataclass(frozen=True)
class AttentionCall:
    """An implementation bound to its inputs; a `Clock` times its passes."""

    attention: Attention
    inputs: Inputs

    def forward(self) -> Tensor:
        """Compute the output, (B, H, N, D)."""
        return self.attention(*self.inputs.tensors, *self.inputs.size)

    def backward(self, out: Tensor) -> tuple[Any, ...]:
        """Compute the gradients of q, k, v and the logits, None for what is not used."""
        return torch.autograd.grad(out, self.inputs.tensors, self.inputs.grad_out, allow_unused=True)

    def both(self) -> tuple[Any, ...]:
        """Compute the gradients, after a forward pass."""
        return self.backward(self.forward())

    def results(self) -> list[Tensor]:
        """Compute the output and the gradients."""
        out = self.forward()
        return [out.detach(), *self.backward(out)]


def call_ours(shape: Shape, dtype: torch.dtype, device: torch.device) -> AttentionCall:
    """Bind ours to the inputs of `make_inputs`."""
    return AttentionCall(get_implementation("ours"), make_inputs(shape, dtype, device))


# Correctness.


class WrongResult(Exception):
    """An implementation does not compute what the reference computes, so that its time means nothing."""


@dataclass(frozen=True)
class Errors:
    """Errors of one tensor, as shares of the exact values' size."""

    ours: float
    eager: float
    allowed: float

    @property
    def exceed(self) -> bool:
        """Whether ours is larger than allowed, or NaN."""
        return not self.ours <= self.allowed < float("inf")


def check(attention: Attention, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Errors]]:
    """Errors of the last image, as `find_errors` returns them. Raises WrongResult if one is larger than allowed."""
    errors = find_errors(attention, shape, dtype, device)
    for name, sizes in errors.items():
        for size, found in sizes.items():
            if found.exceed:
                raise WrongResult(
                    f"{name} of {shape} in {dtype_name(dtype)} is wrong: {size} error {found.ours:.1e},"
                    f" that of eager {found.eager:.1e}; nothing was timed, run the tests of polaformer first"
                )
    return errors


def find_errors(
    attention: Attention, shape: Shape, dtype: torch.dtype, device: torch.device, image: int = -1
) -> dict[str, dict[str, Errors]]:
    """Errors of one image's output and gradients against the reference in float64: by tensor, then by size.

    The whole batch is computed, as when it is timed. The gradients of all other images are zero, so that those of the
    logits are that image's too.
    """
    inputs = make_inputs(shape, dtype, device)
    image %= shape.batch
    chosen = slice(image, image + 1)
    inputs.grad_out[:image] = 0
    inputs.grad_out[image + 1 :] = 0
    alone = Inputs(
        tuple(x.detach()[chosen].requires_grad_() for x in inputs.tensors[:3]) + inputs.tensors[3:],
        inputs.grad_out[chosen],
        inputs.size,
    )
    ours = AttentionCall(attention, inputs).results()
    ours = [x[chosen] for x in ours[:4]] + ours[4:]  # the logits' gradients have no batch
    eager = AttentionCall(reference.eager_polarity_attention, alone).results()
    return {
        name: {size: _errors(of, own, other, exact, TOLERANCE_FACTORS[name]) for size, of in SIZES.items()}
        for name, own, other, exact in zip(TOLERANCE_FACTORS, ours, eager, _exact(alone), strict=True)
    }


def _exact(inputs: Inputs) -> list[Tensor]:
    """Output and gradients in float64, without autograd, which would keep a hundred times the inputs."""
    with torch.no_grad():
        q, k, v, same, opposite = tensors = tuple(x.double() for x in inputs.tensors)
        out, state, key_mean, key_shift = reference.forward(q, k, v, same, opposite, *inputs.size)
        saved = state, key_mean, key_shift
        return [out, *reference.backward(inputs.grad_out.double(), tensors, saved, *inputs.size)]


def _errors(size: Callable[[Tensor], Tensor], ours: Tensor, eager: Tensor, exact: Tensor, factor: int) -> Errors:
    scale = size(exact)
    share_ours, share_eager = ((size(x.double() - exact) / scale).item() for x in (ours, eager))
    return Errors(share_ours, share_eager, factor * share_eager + TOLERANCE_FLOOR)


# Memory and time.


def predict_bytes(implementation: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """Predicted memory of forward and backward without their inputs, from what one piece of one image needs.

    Compilation does not need more than eager execution, which stands in for it. Softmax attention counts as linear:
    PyTorch's has no matrix of N².
    """
    piece = replace(shape, batch=1, height=min(shape.height, max(1, 4096 // shape.width)))
    attention = get_implementation("eager" if implementation == "compiled" else implementation)
    peak = peak_bytes(AttentionCall(attention, make_inputs(piece, dtype, device)).both, device)
    return peak * shape.elements // piece.elements


@dataclass(frozen=True)
class Settings:
    """Device and dtypes; seconds: to measure a shape, about; limit: seconds that forward and backward may take."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    seconds: float
    limit: float


@dataclass(frozen=True)
class Result:
    """Times and memory of one implementation on one shape, or why there are none."""

    implementation: str
    shape: Shape
    dtype: torch.dtype
    skipped: str | None = None
    seconds: dict[str, Quantiles] = field(default_factory=dict)  # by pass
    peak_extra_bytes: dict[str, int] = field(default_factory=dict)  # for "forward" and "both", outputs included


class _Skipped(Exception):
    """The reason for which an implementation is not measured."""


class KernelBenchmark:
    """Runner of all shapes on a device, whose peak rates it measures when it is made."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._clock = Clock(settings.device)
        products = {dtype: matmul_throughput(self._clock, settings.device, dtype) for dtype in settings.dtypes}
        self.peaks = DevicePeaks(copy_bandwidth(self._clock, settings.device), products)
        self._unchecked: dict[tuple[Shape, torch.dtype], str] = {}

    def check_ours(self, shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, Errors]] | str:
        """Compute the errors of ours, or the reason why they are unknown; then `run` will not time it either.

        Raises WrongResult if ours is wrong.
        """
        try:
            self._require_room("ours", shape, dtype)
            self._require_room("eager", replace(shape, batch=1), dtype)
            return check(get_implementation("ours"), shape, dtype, self.settings.device)
        except (_Skipped, RuntimeError) as error:
            reason = self._unchecked[shape, dtype] = f"not checked: {skip_reason('ours', error)}"
        return reason

    def run(self, shape: Shape, implementations: Sequence[str]) -> list[Result]:
        """Measure every implementation in every dtype."""
        torch.compiler.reset()  # or after some shapes it would run what it should compile
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()
        results: list[Result] = []
        calls: dict[int, AttentionCall] = {}  # by index in the results
        one_round = 0.0
        for dtype in self.settings.dtypes:
            inputs: list[Inputs] = []  # made by the first implementation that has room, and shared
            for implementation in implementations:
                result = Result(implementation, shape, dtype)
                try:
                    self._require_room(implementation, shape, dtype)
                    call, seconds, peaks = self._warm_up(implementation, shape, dtype, inputs)
                except (_Skipped, RuntimeError) as error:
                    results.append(replace(result, skipped=skip_reason(implementation, error)))
                    continue
                one_round += seconds
                calls[len(results)] = call
                results.append(replace(result, peak_extra_bytes=peaks))
        if calls:
            rounds = rounds_within(self.settings.seconds, one_round)
            times = self._clock.time_interleaved(list(calls.values()), rounds)
            for index, own in zip(calls, times, strict=True):
                by_pass = {name: quantiles(values) for name, values in own.items()}
                results[index] = replace(results[index], seconds=by_pass)
        return results

    def _require_room(self, implementation: str, shape: Shape, dtype: torch.dtype) -> None:
        """Raise _Skipped if an implementation is bound to exceed the time limit, or main memory on the CPU."""
        if implementation == "ours" and (shape, dtype) in self._unchecked:
            raise _Skipped(self._unchecked[shape, dtype])
        least, limit = flops(implementation, shape)["both"] / self.peaks.products[dtype].median, self.settings.limit
        if least > limit:
            raise _Skipped(f"its products alone take {least:.3g} s at the measured rate, more than --limit {limit:g}")
        if self.settings.device.type == "cpu":  # a GPU's allocator says itself when it is full
            of_inputs = 5 * shape.elements * dtype.itemsize  # the projection and the output's gradient
            needed, free = of_inputs + predict_bytes(implementation, shape, dtype, self.settings.device), free_bytes()
            if needed > _SHARE_OF_FREE_MEMORY * free:
                raise _Skipped(f"needs about {needed / 1e9:.3g} GB of memory; {free / 1e9:.3g} GB are free")

    def _warm_up(
        self, implementation: str, shape: Shape, dtype: torch.dtype, inputs: list[Inputs]
    ) -> tuple[AttentionCall, float, dict[str, int]]:
        """Return a warm call, its seconds and its peak memory. Raises _Skipped if it takes too long."""
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


def skip_reason(implementation: str, error: Exception) -> str:
    """Describe the error in one line. Raises it instead if ours failed, unless for lack of memory."""
    if isinstance(error, _Skipped):
        return str(error)
    reason = describe_error(error)
    if implementation == "ours" and reason != "out of memory":
        raise error
    return reason

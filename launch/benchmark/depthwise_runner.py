"""Implementations of the models' depthwise convolutions on one shape: their inputs, correctness and interleaved times.

depthwise.py runs shape after shape and reports. Axes: B batch, C channels; activations are square.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.benchmark.kernel_runner import SIZES, WrongResult, skip_reason
from launch.benchmark.measure import Clock, dtype_name, rounds_within
from polaformer import PRESETS, ops
from polaformer.model import MLP_RATIO

IMPLEMENTATIONS = ("ours", "channels-last", "nchw", "compiled")
#: Allowed errors, as shares of the exact values' size; the keys are the dtypes that can be measured.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_TENSORS = ("out", "grad_x", "grad_weight", "grad_bias", "grad_residual")

Times = dict[str, list[float]]  # by pass: the seconds of each round


@dataclass(frozen=True)
class Convolution:
    """Depthwise convolution of a (B, side, side, C) activation plus a residual; written B,SIDExSIDE,C,KxK.

    As in the models, 3×3 adds its input, and 5×5 another tensor.
    """

    batch: int
    side: int
    channels: int
    kernel_size: int

    def __str__(self) -> str:
        return f"{self.batch},{self.side}x{self.side},{self.channels},{self.kernel_size}x{self.kernel_size}"

    @property
    def adds_input(self) -> bool:
        """Whether the residual is the input."""
        return self.kernel_size == 3

    def floor_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes of the activations and their gradients that every implementation reads or writes, by pass."""
        activation = self.batch * self.side**2 * self.channels * dtype.itemsize
        forward, backward = (2 if self.adds_input else 3) * activation, 3 * activation
        return {"forward": forward, "backward": backward, "both": forward + backward}


def parse_convolution(text: str) -> Convolution:
    """Parse a shape. Raises ValueError if it is not of the form B,SIDExSIDE,C,KxK, or is none that models have."""
    found = re.fullmatch(r"([1-9]\d*),([1-9]\d*)x\2,([1-9]\d*),([35])x\4", text)
    if not found:
        raise ValueError(f"shape {text!r} is not B,SIDExSIDE,C,KxK with K = 3 or 5; write for example 8,56x56,96,3x3")
    return Convolution(*map(int, found.groups()))


def model_convolutions(model: str, resolution: int, batch: int) -> dict[Convolution, int]:
    """Depthwise convolutions of a model at a square resolution in pixels, and how often each occurs."""
    preset = PRESETS[model]
    occurrences = {}
    for stage, (channels, depth) in enumerate(zip(preset.channels, preset.depths, strict=True)):
        side = resolution // (4 << stage)
        for width, kernel_size in ((channels, 3), (channels, 5), (int(MLP_RATIO * channels), 3)):  # pos, lepe, dwconv
            occurrences[Convolution(batch, side, width, kernel_size)] = depth
    return occurrences


# Implementations and their inputs.


@dataclass(frozen=True)
class Inputs:
    """x, residual, grad_out: activations in one memory layout; weight: (C, 1, k, k); bias: (C).

    The residual may be x itself.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    grad_out: Tensor

    @property
    def differentiated(self) -> tuple[Tensor, ...]:
        """The tensors that have a gradient, each once."""
        tensors = (self.x, self.weight, self.bias)
        return tensors if self.residual is self.x else (*tensors, self.residual)

    def convert(self, change: Callable[[Tensor], Tensor], weight_dtype: torch.dtype) -> "Inputs":
        """Change the activations, and cast weight and bias."""
        x = _leaf(change(self.x))
        residual = x if self.residual is self.x else _leaf(change(self.residual))
        weight, bias = (_leaf(parameter.to(weight_dtype)) for parameter in (self.weight, self.bias))
        return Inputs(x, weight, bias, residual, change(self.grad_out))


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def make_inputs(shape: Convolution, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw normally distributed (B, side, side, C) activations, weight and bias in float32, from a fixed seed."""
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    channels, activation = shape.channels, (shape.batch, shape.side, shape.side, shape.channels)
    weight, bias = _leaf(draw(channels, 1, shape.kernel_size, shape.kernel_size)), _leaf(draw(channels))
    grad_out = draw(activation, dtype=dtype)
    if shape.adds_input:
        x = residual = _leaf(draw(activation, dtype=dtype))
    else:
        x = _leaf(draw(*activation[:3], 4 * channels, dtype=dtype)[..., 2 * channels : 3 * channels])
        residual = _leaf(draw(activation, dtype=dtype))
    return Inputs(x, weight, bias, residual, grad_out)


def convolve_nchw(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """PyTorch's convolution of (B, C, height, width), plus the residual."""
    return residual + F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def convolve_channels_last(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """PyTorch's convolution of (B, height, width, C), seen as a channels-last image, plus the residual."""
    return convolve_nchw(_to_nchw(x), weight, bias, _to_nchw(residual)).permute(0, 2, 3, 1)


def _to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class ConvolutionCall:
    """An implementation bound to its inputs; a `Clock` times its passes."""

    convolve: Callable[..., Tensor]  # arguments: x, weight, bias, residual
    inputs: Inputs

    def forward(self) -> Tensor:
        """Compute the output, in the layout of x."""
        return self.convolve(self.inputs.x, self.inputs.weight, self.inputs.bias, self.inputs.residual)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Compute the gradients of `Inputs.differentiated`."""
        return torch.autograd.grad(out, self.inputs.differentiated, self.inputs.grad_out)

    def results(self) -> list[Tensor]:
        """Compute the output and the gradients."""
        out = self.forward()
        return [out.detach(), *self.backward(out)]


def bind(implementation: str, inputs: Inputs) -> ConvolutionCall:
    """Bind an implementation to inputs as `make_inputs` draws them. "compiled" compiles when it is first called."""
    if implementation == "ours":
        return ConvolutionCall(ops.depthwise_conv2d, inputs)
    if implementation == "nchw":
        return ConvolutionCall(convolve_nchw, inputs.convert(lambda x: _to_nchw(x).contiguous(), inputs.x.dtype))
    convolve = convolve_channels_last
    if implementation == "compiled":
        convolve = torch.compile(convolve, dynamic=False, fullgraph=True)
    return ConvolutionCall(convolve, inputs.convert(lambda x: x, inputs.x.dtype))


# Correctness and time.


@dataclass(frozen=True)
class Settings:
    """What to measure of each shape; seconds: for each dtype, about."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    implementations: tuple[str, ...]
    seconds: float


def find_errors(shape: Convolution, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, float]]:
    """Errors of our output and gradients against PyTorch in float64, as shares of their size: by tensor, then by size.

    Raises WrongResult if one is larger than the dtype allows.
    """
    inputs = make_inputs(shape, dtype, device)
    ours = bind("ours", inputs).results()
    reference = ConvolutionCall(convolve_channels_last, inputs.convert(torch.Tensor.double, torch.float64))
    with torch.backends.cudnn.flags(enabled=False):  # which has fast kernels for lower precision alone
        exact = reference.results()
    errors = {
        name: {size: (of(own.double() - true) / of(true)).item() for size, of in SIZES.items()}
        for name, own, true in zip(_TENSORS, ours, exact, strict=False)  # there may be no grad_residual
    }
    for name, sizes in errors.items():
        for size, error in sizes.items():
            if not error <= TOLERANCES[dtype]:  # NaN too
                raise WrongResult(
                    f"{name} of {shape} in {dtype_name(dtype)} is wrong: {size} error {error:.1e}, allowed"
                    f" {TOLERANCES[dtype]:.1e}; nothing was timed, run the tests of polaformer first"
                )
    return errors


def time_shape(
    shape: Convolution, dtype: torch.dtype, settings: Settings, clock: Clock, skipped: Mapping[str, str]
) -> dict[str, Times | str]:
    """By implementation: its seconds, or the reason why there are none. skipped: such reasons that are known before."""
    torch.compiler.reset()  # or after some shapes it would run what it should compile
    found: dict[str, Times | str] = {}
    calls = {}
    for name in settings.implementations:
        if name in skipped:
            found[name] = skipped[name]
            continue
        try:
            call = bind(name, make_inputs(shape, dtype, settings.device))
            call.results()  # compiles, loads kernels, lets cuDNN choose
        except RuntimeError as error:
            found[name] = skip_reason(name, error)
        else:
            found[name], calls[name] = {}, call
    competing = list(calls.values())
    if competing:
        one_round = sum(own["both"][0] for own in clock.time_interleaved(competing, 1))
        times = clock.time_interleaved(competing, rounds_within(settings.seconds, one_round))
        found.update(zip(calls, times, strict=True))
    return found

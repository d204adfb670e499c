"""The proof, before anything is timed, that an implementation computes what the reference computes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.benchmark.implementations import Attention, AttentionCall, Inputs, Shape, make_inputs
from polaformer import reference

#: An error may be so many times that of eager in the same dtype, plus `TOLERANCE_FLOOR` of the exact values' own size.
TOLERANCE_FACTORS = {"out": 2, "grad_q": 3, "grad_k": 3, "grad_v": 3, "grad_same_logits": 3, "grad_opposite_logits": 3}
TOLERANCE_FLOOR = 16 * torch.finfo(torch.float32).eps
_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda x: x.abs().max(),  # one wrong token shows here
    "root mean square": lambda x: x.square().mean().sqrt(),  # and a little wrong everywhere here
}


class WrongResult(Exception):
    """An implementation does not compute what the reference computes; its time means nothing."""


@dataclass(frozen=True)
class Errors:
    """Of one tensor, as shares of the exact values' size."""

    ours: float
    eager: float
    allowed: float

    @property
    def exceed(self) -> bool:
        return not self.ours <= self.allowed < float("inf")  # NaN exceeds, too


def check(attention: Attention, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Errors]]:
    """The errors of the last image. Raises WrongResult if one exceeds what `TOLERANCE_FACTORS` and `TOLERANCE_FLOOR` allow."""
    errors = find_errors(attention, shape, dtype, device)
    for name, sizes in errors.items():
        for size, found in sizes.items():
            if found.exceed:
                raise WrongResult(
                    f"{name} of {shape} in {str(dtype).removeprefix('torch.')} is wrong: {size} error {found.ours:.1e},"
                    f" that of eager {found.eager:.1e}; nothing was timed, run the tests of polaformer first"
                )
    return errors


def find_errors(
    attention: Attention, shape: Shape, dtype: torch.dtype, device: torch.device, image: int = -1
) -> dict[str, dict[str, Errors]]:
    """Errors of one image's output and gradients against the reference in float64: by tensor, then by size.

    The whole batch is computed, as it will be when it is timed. The gradients of all other images are zero, so that
    those of the logits are that image's too.
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
    ours = _compute(attention, inputs)
    ours = [x[chosen] for x in ours[:4]] + ours[4:]  # the logits' gradients have no batch
    computed = zip(
        TOLERANCE_FACTORS, ours, _compute(reference.eager_polarity_attention, alone), _exact(alone), strict=True
    )
    return {
        name: {size: _errors(of, own, eager, exact, TOLERANCE_FACTORS[name]) for size, of in _SIZES.items()}
        for name, own, eager, exact in computed
    }


def _compute(attention: Attention, inputs: Inputs) -> list[Tensor]:
    call = AttentionCall(attention, inputs)
    out = call.forward()
    return [out.detach(), *call.backward(out)]


def _exact(inputs: Inputs) -> list[Tensor]:
    """Output and gradients in float64, without autograd, which would keep a hundred times the inputs."""
    with torch.no_grad():
        tensors = tuple(x.double() for x in inputs.tensors)
        out, *saved = reference.forward(*tensors, *inputs.size)
        return [out, *reference.backward(inputs.grad_out.double(), tensors, tuple(saved), *inputs.size)]


def _errors(size: Callable[[Tensor], Tensor], ours: Tensor, eager: Tensor, exact: Tensor, factor: int) -> Errors:
    scale = size(exact)
    share_ours, share_eager = ((size(x.double() - exact) / scale).item() for x in (ours, eager))
    return Errors(share_ours, share_eager, factor * share_eager + TOLERANCE_FLOOR)

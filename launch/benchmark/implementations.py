"""Who takes part in the kernel benchmark, and on what.

Axes: B batch, H heads, N = height·width tokens, D head dimension, C = H·D channels.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.benchmark.measure import peak_bytes
from polaformer import PRESETS, ops, reference

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
IMPLEMENTATIONS = ("ours", "eager", "compiled", "sdpa")
#: Elements per token and head that no implementation can leave unread or unwritten: q, k, v → out; those and the
#: gradient of out → gradients of q, k, v.
MIN_TRAFFIC_ELEMENTS = {"forward": 4, "backward": 7, "both": 11}


@dataclass(frozen=True)
class Shape:
    """What one call computes; written B,H,HEIGHTxWIDTH,D."""

    batch: int
    heads: int
    height: int
    width: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch},{self.heads},{self.height}x{self.width},{self.head_dim}"

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def elements(self) -> int:
        """Of q; k, v and the output have as many."""
        return self.batch * self.heads * self.tokens * self.head_dim


def parse_shape(text: str) -> Shape:
    """The shape that `text` writes. Raises ValueError if it writes none."""
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*x[1-9]\d*,[1-9]\d*", text):
        raise ValueError(f"shape {text!r} is not B,H,HEIGHTxWIDTH,D; write for example 8,1,56x56,96")
    shape = Shape(*(int(number) for number in re.split("[,x]", text)))
    if shape.head_dim % 2:
        raise ValueError(
            f"shape {text} has an odd head dimension {shape.head_dim}; polarity attention needs an even one"
        )
    return shape


def model_shapes(resolutions: Sequence[int], batches: Sequence[int]) -> list[Shape]:
    """Those of b4's and b5's stages with polarity attention (both have the same), images of so many pixels a side."""
    preset = PRESETS["polaformerpp_b5"]
    shapes = []
    for resolution in resolutions:
        for stage in range(2):
            heads, side = preset.heads[stage], resolution // (4 << stage)
            shapes += [Shape(batch, heads, side, side, preset.channels[stage] // heads) for batch in batches]
    return shapes


def get_implementation(implementation: str) -> Attention:
    """The function that a implementation is. After it was given a shape, "compiled" is compiled for that one alone."""
    if implementation == "compiled":
        return torch.compile(reference.eager_polarity_attention, dynamic=False, fullgraph=True)
    return {"ours": ops.polarity_attention, "eager": reference.eager_polarity_attention, "sdpa": _softmax_attention}[
        implementation
    ]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, _same: Tensor, _opposite: Tensor, _h: int, _w: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def flops(implementation: str, shape: Shape) -> dict[str, int]:
    """Operations of a contender's matrix products, by pass."""
    if implementation == "sdpa":
        forward, backward = (count * shape.elements * shape.tokens for count in (4, 10))
    else:
        forward, backward = (count * shape.elements * shape.head_dim for count in (8, 20))
    return {"forward": forward, "backward": backward, "both": forward + backward}


@dataclass(frozen=True)
class Inputs:
    """q, k, v: (B, H, N, D) views of one (B, N, 4C) projection, as in the model; logits: (H, 2D) float32."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    grad_out: Tensor  # (B, H, N, D), in memory (B, N, H, D)
    size: tuple[int, int]  # height, width


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Normally distributed inputs, the same ones every time."""
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
    """An implementation with its inputs: one of the contestants that a clock times."""

    attention: Attention
    inputs: Inputs

    def forward(self) -> Tensor:
        return self.attention(*self.inputs.tensors, *self.inputs.size)

    def backward(self, out: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k, v and the logits, None for what is not used."""
        return torch.autograd.grad(out, self.inputs.tensors, self.inputs.grad_out, allow_unused=True)

    def both(self) -> tuple[Tensor | None, ...]:
        return self.backward(self.forward())


def input_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Memory of `make_inputs`: the projection and the output's gradient."""
    return 5 * shape.elements * dtype.itemsize


def predict_bytes(implementation: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    """Memory that forward and backward will need, their inputs aside, from what one piece of one image needs.

    Compilation does not need more than eager execution, which stands in for it. Softmax attention counts as linear:
    PyTorch's has no matrix of N².
    """
    piece = replace(shape, batch=1, height=min(shape.height, max(1, 4096 // shape.width)))
    attention = get_implementation("eager" if implementation == "compiled" else implementation)
    peak = peak_bytes(AttentionCall(attention, make_inputs(piece, dtype, device)).both, device)
    return peak * shape.elements // piece.elements

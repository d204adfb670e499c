"""The two attentions of PolaFormer++: polarity (stages 1, 2; linear in the tokens) and softmax (stages 3, 4).

Axes: B batch, H heads, N = height·width tokens, D head width, C = H·D channels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from polaformer import ops
from polaformer.layers import DepthwiseConv, rotate

Rotary = Tensor | None  # layers.rotary_turns for width D; polarity attention needs none


class GatedAttention(nn.Module):
    """What both share: one projection to q, k, v and gate, a local 5×5 convolution of v, a gated output.

    The gate is not activated. Subclasses say how tokens mix:
    `mix(q, k, v, size, rotary)` with q, k, v (B, H, N, D) and size (height, width) → (B, H, N, D).
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkvg = nn.Linear(channels, 4 * channels)
        self.lepe = DepthwiseConv(channels, 5)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x: (B, height, width, C) → the same."""
        height, width = x.shape[1:3]
        q, k, v, gate = self.qkvg(x).chunk(4, dim=-1)
        heads = (rearrange(part, "b y x (h d) -> b h (y x) d", h=self.heads) for part in (q, k, v))  # views
        mixed = self.mix(*heads, (height, width), rotary)
        mixed = rearrange(mixed, "b h (y x) d -> b y x (h d)", y=height)
        return self.proj((mixed + self.lepe(v)) * gate)


class PolarityAttention(GatedAttention):
    """Linear attention of same-sign and opposite-sign features; learns one logit per head, flow and feature."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        features = 2 * channels // heads
        self.same_logits = nn.Parameter(torch.zeros(heads, features))
        self.opposite_logits = nn.Parameter(torch.zeros(heads, features))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int], rotary: Rotary) -> Tensor:
        return ops.polarity_attention(q, k, v, self.same_logits, self.opposite_logits, *size)


class SoftmaxAttention(GatedAttention):
    """Softmax attention of rotated queries and keys."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int], rotary: Rotary) -> Tensor:
        return F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v)

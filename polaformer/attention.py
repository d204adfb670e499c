"""The two attentions of PolaFormer++: polarity (stages 1, 2; linear in the tokens) and softmax (stages 3, 4).

Axes: B batch, H heads, N = height·width tokens, D head dimension, C = H·D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polaformer.layers import DepthwiseConv, apply_rotary
from polaformer.ops import polarity_attention

Rotary = Tensor | None  # layers.rotary_embedding of D features; polarity attention needs none

torch.fx.wrap("polarity_attention")  # one node of a traced graph


class GatedAttention(nn.Module):
    """What both share: one projection to q, k, v and gate, a local 5×5 convolution of v, a gated output.

    The gate is not activated. Subclasses say how tokens mix:
    `attend(q, k, v, height, width, rotary)` with q, k, v (B, H, N, D) → (B, H, N, D).
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkvg = nn.Linear(channels, 4 * channels)
        self.lepe = DepthwiseConv(channels, 5)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """x: (B, height, width, C) → the same."""
        height, width = x.shape[1], x.shape[2]
        q, k, v, gate = self.qkvg(x).chunk(4, dim=-1)
        attended = self.attend(self.split_heads(q), self.split_heads(k), self.split_heads(v), height, width, rotary)
        attended = attended.transpose(1, 2).flatten(2).unflatten(1, (height, width))
        return self.proj((attended + self.lepe(v)) * gate)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, height, width, C) → a view (B, H, N, D)."""
        return x.unflatten(-1, (self.heads, -1)).flatten(1, 2).transpose(1, 2)


class PolarityAttention(GatedAttention):
    """Linear attention of same-sign and opposite-sign features; learns one logit per head, flow and feature."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        features = 2 * channels // heads
        self.same_logits = nn.Parameter(torch.zeros(heads, features))
        self.opposite_logits = nn.Parameter(torch.zeros(heads, features))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, rotary: Rotary) -> Tensor:
        return polarity_attention(q, k, v, self.same_logits, self.opposite_logits, height, width)


class SoftmaxAttention(GatedAttention):
    """Softmax attention of rotated queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, rotary: Rotary) -> Tensor:
        assert rotary is not None  # TorchScript needs to be told
        return F.scaled_dot_product_attention(apply_rotary(q, rotary), apply_rotary(k, rotary), v)

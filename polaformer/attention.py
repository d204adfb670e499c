"""The two attentions of PolaFormer++: polarity in stages 1 and 2, linear in N, and softmax in stages 3 and 4.

Axes: B batch, H heads, N = height·width tokens, D head dimension, C = H·D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polaformer.layers import DepthwiseConv
from polaformer.ops import polarity_attention
from polaformer.rotary import apply_rotary

Rotary = Tensor | None  # rotary.rotary_embedding of D features; None for polarity attention, which builds its own

torch.fx.wrap("polarity_attention")  # stays one node of a traced graph


class GatedAttention(nn.Module):
    """Base of both attentions: one projection to q, k, v and gate, a 5×5 depthwise convolution of v, a gated output.

    out = proj((attend(q, k, v) + lepe(v)) ⊙ gate), without an activation of the gate. Subclasses implement `attend`.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkvg = nn.Linear(channels, 4 * channels)
        self.lepe = DepthwiseConv(channels, 5)  # locally-enhanced positional encoding (LePE) of the values
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Attend over all tokens of x: (B, height, width, C) → the same shape."""
        height, width = x.shape[1], x.shape[2]
        q, k, v, gate = self.qkvg(x).chunk(4, dim=-1)
        attended = self.attend(self.split_heads(q), self.split_heads(k), self.split_heads(v), height, width, rotary)
        attended = attended.transpose(1, 2).flatten(2)
        # torch leaves this function unannotated
        attended = attended.unflatten(1, (height, width))  # type: ignore[no-untyped-call]
        out: Tensor = self.proj(self.lepe(v, attended) * gate)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, rotary: Rotary) -> Tensor:
        """Mix the tokens: q, k, v (B, H, N, D) → (B, H, N, D)."""
        raise NotImplementedError

    def split_heads(self, x: Tensor) -> Tensor:
        """View (B, height, width, C) as (B, H, N, D)."""
        # torch leaves this function unannotated
        heads: Tensor = x.unflatten(-1, (self.heads, -1))  # type: ignore[no-untyped-call]
        return heads.flatten(1, 2).transpose(1, 2)


class PolarityAttention(GatedAttention):
    """Linear attention of same-sign and opposite-sign features, with one learned logit per head, flow and feature."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads)
        features = 2 * channels // heads
        self.same_logits = nn.Parameter(torch.zeros(heads, features))
        self.opposite_logits = nn.Parameter(torch.zeros(heads, features))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, rotary: Rotary) -> Tensor:
        """Polarity attention; `rotary` is not used."""
        return polarity_attention(q, k, v, self.same_logits, self.opposite_logits, height, width)


class SoftmaxAttention(GatedAttention):
    """Softmax attention of rotary-embedded queries and keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int, rotary: Rotary) -> Tensor:
        """Scaled dot-product attention with rotary position embedding."""
        assert rotary is not None  # narrows the type for TorchScript
        return F.scaled_dot_product_attention(apply_rotary(q, rotary), apply_rotary(k, rotary), v)

"""Polarity attention in plain PyTorch: the oracle that every kernel is compared with, and the fallback for none.

Axes: B batch, H heads, N = height·width tokens (row-major), D head width, F = 2·D features.
"""

import torch
from torch import Tensor

from polaformer.layers import rotary_turns, rotate

EPSILON = 1e-6


def check_inputs(q: Tensor, k: Tensor, v: Tensor, logits: tuple[Tensor, Tensor], height: int, width: int) -> None:
    """Raises ValueError unless the shapes and dtypes are those that `polarity_attention` describes."""
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape (B, H, N, D)"
        )
    _, heads, tokens, head_width = q.shape
    if tokens != height * width:
        raise ValueError(f"{tokens} tokens are not height {height} × width {width}; pass the image's own size")
    if head_width % 2:
        raise ValueError(f"head width {head_width} is odd; the two flows need an even one")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    for name, logit in zip(("same_logits", "opposite_logits"), logits, strict=True):
        if logit.shape != (heads, 2 * head_width):
            raise ValueError(f"{name} has shape {tuple(logit.shape)}, needs (H, 2D) = ({heads}, {2 * head_width})")


def polarity_attention(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> Tensor:
    """Polarity-aware linear attention of PolaFormer++; differentiable by autograd.

    q, k, v: (B, H, N, D), any strides, any floating dtype; logits: (H, 2D). Returns (B, H, N, D) in q's dtype.
    Computes in float32, or in float64 if q is float64; autocast does not reach inside.
    Raises ValueError if N != height * width, D is odd, or shapes or dtypes disagree.
    """
    check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    return forward(q, k, v, same_logits, opposite_logits, height, width)[0].to(q.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention and what its backward needs: out (B, H, N, D), state S (B, H, 2D, D), key_mean m (B, H, 2D)."""
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (_widen(x) for x in (q, k, v))
        turns = rotary_turns(height, width, 2 * q.shape[-1], q)
        key_features = torch.expm1(_poles(k))
        key_mean = key_features.mean(dim=-2)
        state = rotate(key_features, turns).mT @ v / (height * width)

        halves = []
        for logits, state_half, swap in _flows(same_logits, opposite_logits, state):
            query_features = torch.expm1(_poles(q, swap) * _temperature(logits, q))
            normalizer = query_features @ key_mean.unsqueeze(-1) + EPSILON  # the denominator is not rotated
            halves.append(rotate(query_features, turns) @ state_half / normalizer)
        return torch.cat(halves, dim=-1), state, key_mean


def backward(grad_out: Tensor, inputs: tuple[Tensor, ...], saved: tuple[Tensor, Tensor], height: int, width: int):
    """Gradients of q, k, v, same_logits, opposite_logits, each in the compute dtype and in its input's shape.

    inputs: those five tensors; saved: (state, key_mean) of `forward`. Features are computed again, not kept.
    Writing u for grad/normalizer, the gradient of a rotated query feature is S u, and that of the normalizer
    needs no output: −(rotated features · S u) / normalizer.
    """
    q, k, v, same_logits, opposite_logits = inputs
    state, key_mean = saved
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, grad_out = (_widen(x) for x in (q, k, v, grad_out))
        turns = rotary_turns(height, width, 2 * q.shape[-1], q)
        grad_q, grad_key_mean = torch.zeros_like(q), torch.zeros_like(key_mean)
        grad_logits, grad_state = [], []
        flows = _flows(same_logits, opposite_logits, state)
        for (logits, state_half, swap), grad_half in zip(flows, grad_out.chunk(2, dim=-1), strict=True):
            poles, temperature = _poles(q, swap), _temperature(logits, q)
            features = torch.expm1(poles * temperature)
            rotated = rotate(features, turns)
            normalizer = features @ key_mean.unsqueeze(-1) + EPSILON
            u = grad_half / normalizer
            grad_rotated = u @ state_half.mT
            grad_normalizer = -(rotated * grad_rotated).sum(-1, keepdim=True) / normalizer
            grad_state.append(rotated.mT @ u)
            grad_key_mean += (grad_normalizer * features).sum(-2)
            grad_features = rotate(grad_rotated, turns.conj_physical()) + grad_normalizer * key_mean.unsqueeze(-2)
            grad_exponent = grad_features * (features + 1)
            grad_logits.append((grad_exponent * poles).sum((0, 2)) * _logistic_slope(temperature))
            grad_q += _join_poles(grad_exponent * temperature, q, swap)

        key_features = torch.expm1(_poles(k))
        grad_state = torch.cat(grad_state, dim=-1) / (height * width)
        grad_v = rotate(key_features, turns) @ grad_state
        grad_features = rotate(v @ grad_state.mT, turns.conj_physical()) + grad_key_mean.unsqueeze(-2) / (
            height * width
        )
        grad_k = _join_poles(grad_features * (key_features + 1), k)
    return grad_q, grad_k, grad_v, *grad_logits


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _poles(x: Tensor, swap: bool = False) -> Tensor:
    """[x⁺; x⁻], or [x⁻; x⁺] for the opposite flow: (…, D) → (…, 2D)."""
    positive, negative = x.relu(), (-x).relu()
    return torch.cat((negative, positive) if swap else (positive, negative), dim=-1)


def _join_poles(grad: Tensor, x: Tensor, swap: bool = False) -> Tensor:
    """The gradient of x from that of `_poles(x, swap)`: (…, 2D) → (…, D)."""
    first, second = (grad * _poles(x.sign(), swap)).chunk(2, dim=-1)
    return second - first if swap else first - second


def _temperature(logits: Tensor, like: Tensor) -> Tensor:
    return logits.to(like.dtype).sigmoid().unsqueeze(-2)  # (H, 1, 2D)


def _logistic_slope(temperature: Tensor) -> Tensor:
    return (temperature * (1 - temperature)).squeeze(-2)


def _flows(same_logits: Tensor, opposite_logits: Tensor, state: Tensor):
    """The two flows: logits, their half of the state's columns, whether the query's poles swap."""
    same_state, opposite_state = state.chunk(2, dim=-1)
    return (same_logits, same_state, False), (opposite_logits, opposite_state, True)

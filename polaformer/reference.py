"""Our operators in plain PyTorch: the oracle for every kernel, and the fallback where no kernel runs.

Polarity attention, and at the end depthwise convolution. Axes: B batch, H heads, N = height·width tokens (row-major),
D head dimension, 2D features in D rotated pairs.

**Formulas** (PolaFormer, ICLR 2025, arXiv:2501.15061, with the features of PolaFormer++). Per head, with x⁺ = relu(x),
x⁻ = relu(−x), concatenation [·; ·] along features, R the rotary embedding, σ the logistic function, learned logits s₁
and s₂, and ⊘ the division of rows:

    φ_k = expm1([k⁺; k⁻])        m = mean of φ_k over tokens        S = R(φ_k)ᵀ v / N
    same-sign flow:      φ = expm1([q⁺; q⁻] ⊙ σ(s₁))    out[:, :D/2] = R(φ) S[:, :D/2] ⊘ (φ m + ε)
    opposite-sign flow:  φ = expm1([q⁻; q⁺] ⊙ σ(s₂))    out[:, D/2:] = R(φ) S[:, D/2:] ⊘ (φ m + ε)

**Exact shift.** Features e^x − 1 overflow float32 for x > 88, although the output does not: it is a quotient in which
any factor of a query's features cancels, and any factor of a row of S (or of the two rows that the rotation mixes) can
be moved to the query. So each pair of key features is stored as e^(x − c) − e^(−c), where c is the excess of the pair's
largest exponent over MAX_UNSHIFTED_EXPONENT; the query features of a token as e^(x + c − C) − e^(c − C), where C is the
excess of the flow's largest x + c; and the token's ε as ε · e^(−C). Up to MAX_UNSHIFTED_EXPONENT, c and C are 0 and the
formulas are the paper's. Gradients grow like 1/z² where the normalizer z vanishes beside the features; two bounds,
inactive everywhere else, keep them finite.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import is_autocast_available

from polaformer.rotary import apply_rotary, rotary_embedding

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPSILON = 1e-6
MAX_UNSHIFTED_EXPONENT = 20.0  # e^40, times values and summed over a million tokens, is far below float32's maximum
MIN_GRADIENT_NORMALIZER = 1e-8  # lower bound of the shifted normalizer in gradients
MAX_NORMALIZER_GRADIENT = 1e25


def check_inputs(q: Tensor, k: Tensor, v: Tensor, logits: tuple[Tensor, Tensor], height: int, width: int) -> None:
    """Check shapes, dtypes and devices as described in `polarity_attention`; raise ValueError if they are wrong.

    csrc/checks.h repeats these checks for callers of the compiled operators.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape (B, H, N, D)"
        )
    _, heads, tokens, head_dim = q.shape
    if height < 0 or width < 0 or tokens != height * width:
        raise ValueError(f"{tokens} tokens are not height {height} × width {width}; pass the image's own size")
    if head_dim % 2:
        raise ValueError(f"head dimension {head_dim} is odd; the two flows need an even one")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    named = {"q": q, "k": k, "v": v, "same_logits": logits[0], "opposite_logits": logits[1]}
    for name, logit in list(named.items())[3:]:
        if logit.shape != (heads, 2 * head_dim):
            raise ValueError(f"{name} has shape {tuple(logit.shape)}, needs (H, 2D) = ({heads}, {2 * head_dim})")
    for name, x in named.items():
        _check_tensor(name, x, q)


def check_saved(grad_out: Tensor, q: Tensor, saved: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raise ValueError unless grad_out is like q, and `saved` like state, key_mean and key_shift of `forward`."""
    if grad_out.shape != q.shape or grad_out.dtype != q.dtype:
        raise ValueError(
            f"grad_out is {tuple(grad_out.shape)} in {grad_out.dtype}, q {tuple(q.shape)} in {q.dtype}; they must agree"
        )
    _check_tensor("grad_out", grad_out, q)
    for name, x, shape in zip(("state", "key_mean", "key_shift"), saved, saved_shapes(q), strict=True):
        dtype = compute_dtype(q)
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(
                f"{name} is {tuple(x.shape)} in {x.dtype}, needs {shape} in {dtype}; pass on what forward gave"
            )
        _check_tensor(name, x, q)


def saved_shapes(q: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of state (B, H, 2D, D), key_mean (B, H, 2D) and key_shift (B, H, D) for q (B, H, N, D)."""
    batch, heads, _, head_dim = q.shape
    return (batch, heads, 2 * head_dim, head_dim), (batch, heads, 2 * head_dim), (batch, heads, head_dim)


def compute_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(q.dtype, torch.float32)


def _check_tensor(name: str, x: Tensor, first: Tensor, first_name: str = "q") -> None:
    if x.dtype not in DTYPES or x.layout != torch.strided:
        raise ValueError(
            f"{name} is {x.dtype}, {x.layout}; pass a dense tensor of float64, float32, bfloat16 or float16"
        )
    if x.device != first.device:
        raise ValueError(f"{name} is on {x.device}, {first_name} on {first.device}; move them to one device")


def polarity_attention(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> Tensor:
    """Polarity-aware linear attention of PolaFormer++ (formulas above); differentiable by autograd.

    q, k, v: (B, H, N, D), any strides, any floating dtype; logits: (H, 2D). Returns (B, H, N, D) in q's dtype.
    Computes in float32, or in float64 if q is float64, even under autocast. Finite for finite inputs.
    Raises ValueError if N != height * width, D is odd, or shapes or dtypes disagree.
    """
    check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    return forward(q, k, v, same_logits, opposite_logits, height, width)[0]


def eager_polarity_attention(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> Tensor:
    """Baseline: the paper's formulas in q's own dtype without the shift, as an eager PyTorch model computes them.

    Signature of `polarity_attention`. Benchmarks report times, and low-precision tests bound errors, relative to it.
    """
    rotary = rotary_embedding(height, width, 2 * q.shape[-1], q)
    key_features = torch.expm1(_split_polarity(k))
    key_mean = key_features.mean(dim=-2, keepdim=True)
    state = apply_rotary(key_features, rotary).mT @ (v / (height * width))
    halves = []
    for logits, state_half, swap in _flows(same_logits, opposite_logits, state):
        query_features = torch.expm1(_split_polarity(q, swap) * logits.to(q.dtype).sigmoid().unsqueeze(-2))
        normalizer = query_features @ key_mean.mT + EPSILON
        halves.append(apply_rotary(query_features, rotary) @ state_half / normalizer)
    return torch.cat(halves, dim=-1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention and the tensors that its backward needs: (out, state, key_mean, key_shift).

    out: (B, H, N, D) in q's dtype. state S: (B, H, 2D, D), key_mean m: (B, H, 2D), both shifted, and key_shift c:
    (B, H, D), one per pair of features; all three in the compute dtype.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = q.dtype
        q, k, v = (_to_compute_dtype(x) for x in (q, k, v))
        rotary = rotary_embedding(height, width, 2 * q.shape[-1], q)
        key_exponents = _split_polarity(k)
        key_shift = _required_shift(_pair_maxima(key_exponents.detach()).amax(dim=-2))
        key_features = _shifted_features(key_exponents, _per_feature(key_shift).unsqueeze(-2))
        key_mean = key_features.mean(dim=-2)
        state = apply_rotary(key_features, rotary).mT @ v / (height * width)

        halves = []
        for logits, state_half, swap in _flows(same_logits, opposite_logits, state):
            features, _, normalizer = _query_features(q, logits, swap, key_mean, key_shift)
            halves.append(apply_rotary(features, rotary) @ state_half / normalizer)
        out = torch.cat(halves, dim=-1)
        largest = torch.finfo(dtype).max
        return out.clamp(-largest, largest).to(dtype), state, key_mean, key_shift


def backward(
    grad_out: Tensor, inputs: tuple[Tensor, ...], saved: tuple[Tensor, Tensor, Tensor], height: int, width: int
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, same_logits, opposite_logits, each in the compute dtype and in its input's shape.

    inputs: those five tensors; saved: (state, key_mean, key_shift) of `forward`. Features are recomputed. With
    u = grad_out / z, the gradient of a rotated query feature is S u, and that of the normalizer z is
    −(rotated features · S u) / z, without the output.
    """
    q, k, v, same_logits, opposite_logits = inputs
    state, key_mean, key_shift = saved
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, grad_out = (_to_compute_dtype(x) for x in (q, k, v, grad_out))
        rotary = rotary_embedding(height, width, 2 * q.shape[-1], q)
        grad_q, grad_key_mean = torch.zeros_like(q), torch.zeros_like(key_mean)
        grad_logits: list[Tensor] = []
        grad_state_halves: list[Tensor] = []
        flows = _flows(same_logits, opposite_logits, state)
        for (logits, state_half, swap), grad_half in zip(flows, grad_out.chunk(2, dim=-1), strict=True):
            parts, temperature = _split_polarity(q, swap), _temperature(logits, q)
            features, shift, normalizer = _query_features(q, logits, swap, key_mean, key_shift)
            rotated = apply_rotary(features, rotary)
            normalizer = normalizer.clamp(min=MIN_GRADIENT_NORMALIZER)
            u = grad_half / normalizer
            grad_rotated = u @ state_half.mT
            grad_normalizer = -(rotated * grad_rotated).sum(-1, keepdim=True) / normalizer
            grad_normalizer = grad_normalizer.clamp(-MAX_NORMALIZER_GRADIENT, MAX_NORMALIZER_GRADIENT)
            grad_state_halves.append(rotated.mT @ u)
            # not in place: vmap may map one operand alone
            grad_key_mean = grad_key_mean + (grad_normalizer * features).sum(-2)
            grad_features = apply_rotary(grad_rotated, rotary.conj_physical())
            grad_features = grad_features + grad_normalizer * key_mean.unsqueeze(-2)
            grad_exponent = grad_features * _slope(parts * temperature, shift)
            grad_temperature = torch.where(parts > 0, grad_exponent * parts, 0)
            grad_logits.append(grad_temperature.sum((0, 2)) * _logistic_slope(temperature))
            grad_q = grad_q + _merge_polarity(grad_exponent * temperature, q, swap)

        exponents, shift = _split_polarity(k), _per_feature(key_shift).unsqueeze(-2)
        grad_state = torch.cat(grad_state_halves, dim=-1) / (height * width)
        grad_v = apply_rotary(_shifted_features(exponents, shift), rotary) @ grad_state
        grad_features = apply_rotary(v @ grad_state.mT, rotary.conj_physical())
        grad_features = grad_features + grad_key_mean.unsqueeze(-2) / (height * width)
        grad_k = _merge_polarity(grad_features * _slope(exponents, shift), k)
    return grad_q, grad_k, grad_v, *grad_logits


def _query_features(
    q: Tensor, logits: Tensor, swap: bool, key_mean: Tensor, key_shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query features of one flow (B, H, N, 2D), their shifts (same shape), the normalizer (B, H, N, 1)."""
    exponents = _split_polarity(q, swap) * _temperature(logits, q)
    key_shift = _per_feature(key_shift).unsqueeze(-2)
    largest = torch.where(exponents > 0, exponents.detach() + key_shift, 0).amax(dim=-1, keepdim=True)
    token_shift = _required_shift(largest)
    # the clamp acts only where the part, and so the feature, is 0
    shift = (token_shift - key_shift).clamp(min=-MAX_UNSHIFTED_EXPONENT)
    features = _shifted_features(exponents, shift)
    epsilon = (EPSILON * torch.exp(-token_shift)).clamp(min=torch.finfo(torch.float32).tiny)
    return features, shift, features @ key_mean.unsqueeze(-1) + epsilon


def _shifted_features(exponents: Tensor, shift: Tensor) -> Tensor:
    """Return e^(x − shift) − e^(−shift), without cancellation for small x and without overflow for large x."""
    small, large = exponents.clamp(max=MAX_UNSHIFTED_EXPONENT), exponents.clamp(min=MAX_UNSHIFTED_EXPONENT)
    beyond = torch.exp(large - shift) - torch.exp(MAX_UNSHIFTED_EXPONENT - shift)
    return torch.expm1(small) * torch.exp(-shift) + torch.where(exponents > MAX_UNSHIFTED_EXPONENT, beyond, 0)


def _slope(exponents: Tensor, shift: Tensor) -> Tensor:
    """Differentiate `_shifted_features`. Where a part is 0 the value is finite and must be masked by the caller."""
    return torch.exp(exponents - shift)


def _required_shift(largest: Tensor) -> Tensor:
    """Excess over MAX_UNSHIFTED_EXPONENT."""
    return (largest - MAX_UNSHIFTED_EXPONENT).clamp(min=0)


def _pair_maxima(exponents: Tensor) -> Tensor:
    # torch leaves this function unannotated
    pairs: Tensor = exponents.unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    return pairs.amax(dim=-1)  # (…, 2D) → (…, D)


def _per_feature(pairs: Tensor) -> Tensor:
    return pairs.repeat_interleave(2, dim=-1)  # (…, D) → (…, 2D)


def _to_compute_dtype(x: Tensor) -> Tensor:
    """Cast to the compute dtype, with a last stride of 1: pairs are viewed as complex numbers."""
    x = x.to(compute_dtype(x))
    return x if x.stride(-1) == 1 else x.contiguous()


def _split_polarity(x: Tensor, swap: bool = False) -> Tensor:
    """Return [x⁺; x⁻], or [x⁻; x⁺] for the opposite-sign flow: (…, D) → (…, 2D)."""
    positive, negative = x.relu(), (-x).relu()
    return torch.cat((negative, positive) if swap else (positive, negative), dim=-1)


def _merge_polarity(grad: Tensor, x: Tensor, swap: bool = False) -> Tensor:
    """Backward of `_split_polarity(x, swap)`: (…, 2D) → (…, D)."""
    first, second = torch.where(_split_polarity(x, swap) > 0, grad, 0).chunk(2, dim=-1)
    return second - first if swap else first - second


def _temperature(logits: Tensor, like: Tensor) -> Tensor:
    return logits.to(like.dtype).sigmoid().unsqueeze(-2)  # (H, 1, 2D)


def _logistic_slope(temperature: Tensor) -> Tensor:
    return (temperature * (1 - temperature)).squeeze(-2)


def _flows(same_logits: Tensor, opposite_logits: Tensor, state: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Per flow: its logits, its half of the state's columns, whether the query's two parts swap."""
    return zip((same_logits, opposite_logits), state.chunk(2, dim=-1), (False, True), strict=True)


def check_depthwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, adds_input: bool) -> None:
    """Check shapes, dtypes and devices of `depthwise_conv2d`; raise ValueError if they are wrong.

    csrc/checks.h repeats these checks for callers of the compiled operators.
    """
    _check_depthwise_sizes(x, weight)
    channels = x.shape[3]
    if bias.shape != (channels,) or bias.dtype != weight.dtype:
        raise ValueError(
            f"bias is {tuple(bias.shape)} in {bias.dtype}, needs (C) = ({channels}) in weight's {weight.dtype}"
        )
    _check_tensor("bias", bias, x, "x")
    if residual is not None:
        if adds_input:
            raise ValueError("either a residual or the input is added, not both")
        _check_like_x("residual", residual, x)


def check_depthwise_gradient(grad_out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Check the arguments of `depthwise_conv2d_backward`; raise ValueError if they are wrong."""
    _check_depthwise_sizes(x, weight)
    _check_like_x("grad_out", grad_out, x)


def _check_depthwise_sizes(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x {tuple(x.shape)} must have four dimensions (B, height, width, C)")
    channels, shape = x.shape[3], tuple(weight.shape)
    if len(shape) != 4 or shape[:2] != (channels, 1) or shape[2] != shape[3] or shape[2] % 2 == 0 or shape[2] >= 1024:
        raise ValueError(
            f"weight {shape} must be (C, 1, k, k) = ({channels}, 1, k, k) with an odd k below 1024, as"
            f" nn.Conv2d(C, C, k, groups=C) has it; C is the last size of x {tuple(x.shape)}: where that is NCHW, pass"
            " x.permute(0, 2, 3, 1)"
        )
    _check_tensor("x", x, x, "x")
    _check_tensor("weight", weight, x, "x")


def _check_like_x(name: str, other: Tensor, x: Tensor) -> None:
    if other.shape != x.shape or other.dtype != x.dtype:
        raise ValueError(
            f"{name} is {tuple(other.shape)} in {other.dtype}, x {tuple(x.shape)} in {x.dtype}; they must agree"
        )
    _check_tensor(name, other, x, "x")


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, adds_input: bool = False
) -> Tensor:
    """Depthwise convolution plus residual by PyTorch's own operator, in x's dtype; arguments as in `polaformer.ops`.

    adds_input: x is the residual.
    """
    check_depthwise(x, weight, bias, residual, adds_input)
    residual = x if adds_input else residual
    out, padding, channels = torch.zeros_like(x), weight.shape[-1] // 2, weight.shape[0]
    if x.numel():
        images, weight, bias = x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype)
        with _without_autocast(x):
            out = F.conv2d(images, weight, bias, padding=padding, groups=channels).permute(0, 2, 3, 1)
    return out if residual is None else residual + out


def depthwise_conv2d_backward(grad_out: Tensor, x: Tensor, weight: Tensor, adds_input: bool) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias in their dtypes; grad_out is that of the residual, unless x is the residual."""
    check_depthwise_gradient(grad_out, x, weight)
    channels, padding = weight.shape[0], [weight.shape[-1] // 2] * 2
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(channels)
    images, grads = x.permute(0, 3, 1, 2), grad_out.permute(0, 3, 1, 2)
    sizes = [channels], [1, 1], padding, [1, 1], False, [0, 0], channels
    with _without_autocast(x):
        results = torch.ops.aten.convolution_backward(grads, images, weight.to(x.dtype), *sizes, [True] * 3)
    grad_x, grad_weight, grad_bias = results[0].permute(0, 2, 3, 1), *(grad.to(weight.dtype) for grad in results[1:])
    return grad_x + grad_out if adds_input else grad_x, grad_weight, grad_bias


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    device_type = x.device.type
    return torch.autocast(device_type, enabled=False) if is_autocast_available(device_type) else nullcontext()

"""Axial rotary position embedding of tokens on a grid."""

import torch
from torch import Tensor


def rotary_frequencies(features: int) -> Tensor:
    """Angular frequency of each rotated pair: (features / 4,) float32, from 1 down to 1e-4."""
    return 1 / 10000.0 ** torch.linspace(0, 1, features // 4, dtype=torch.float32)


def rotary_embedding(height: int, width: int, features: int, like: Tensor) -> Tensor:
    """Axial rotary embedding as complex numbers of modulus one: (height·width, features / 2), one column per pair.

    The first half of the pairs rotates by the token's row, the second half by its column. On the device of `like`, in
    complex64, or complex128 if `like` is float64; the frequencies are float32 values either way.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    frequencies = rotary_frequencies(features).to(like.device, dtype)
    rows = torch.arange(height, device=like.device, dtype=dtype)[:, None] * frequencies
    columns = torch.arange(width, device=like.device, dtype=dtype)[:, None] * frequencies
    angles = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1)
    return torch.polar(torch.ones_like(angles), angles).flatten(0, 1)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last axis: x (…, N, F), rotary (N, F / 2) → (…, N, F) in x's dtype.

    Computed in the embedding's precision as one complex product, which on a CPU takes a tenth of the time of the four
    real ones. Invert it by `rotary.conj_physical()`: the lazy `conj()` is dropped by torch.compile inside
    an operator.
    """
    wide = x.to(rotary.real.dtype)
    # torch leaves this function unannotated
    pairs = wide.unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    return torch.view_as_real(torch.view_as_complex(pairs) * rotary).flatten(-2).to(x.dtype)

"""The CUDA kernels' own source, run on emulated threads, against the reference in float64."""

import pytest
import torch

from polaformer import reference

NAMES = ("out", "q", "k", "v", "same_logits", "opposite_logits")
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 5e-6}


def make_inputs(shape, dtype, scale=1.0):
    """q, k, v as views of one (B, N, 4C) projection, and logits; scale multiplies q and k."""
    batch, heads, tokens, head_width = shape
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(batch, tokens, 4, heads, head_width, generator=generator)
    projection[:, :, :2] *= scale
    views = [part.transpose(1, 2) for part in projection.to(dtype).unbind(2)[:3]]
    return [*views, *(torch.randn(heads, 2 * head_width, generator=generator) for _ in range(2))]


def exact(inputs, size, grad_out):
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out = reference.polarity_attention(*wide, *size)
    return [x.detach() for x in (out, *torch.autograd.grad(out, wide, grad_out.double()))]


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("batch", "heads", "size", "head_width"),
    [
        (2, 2, (7, 9), 32),
        (1, 2, (9, 13), 64),
        (1, 1, (14, 14), 96),
        (1, 1, (5, 13), 128),
        (2, 3, (3, 5), 6),
        (1, 1, (1, 1), 2),
        (1, 1, (12, 40), 98),
    ],
)
def test_equals_reference(emulate, batch, heads, size, head_width, dtype):
    inputs = make_inputs((batch, heads, size[0] * size[1], head_width), dtype)
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = emulate(inputs, size, grad_out)
    for name, actual, wanted in zip(NAMES, (found.out, *found.grads), exact(inputs, size, grad_out), strict=True):
        of_order_one = wanted.norm() + 0.1 * wanted.numel() ** 0.5
        print(name, float((actual.double() - wanted).norm() / of_order_one))
        assert (actual.double() - wanted).norm() < LIMITS[dtype] * of_order_one, name

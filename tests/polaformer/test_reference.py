"""The reference against vectors of the official implementation, its gradients against finite differences."""

import pytest
import torch

from polaformer import reference

VECTORS = ["attention_D32_H3_5x4", "attention_D64_H2_7x9", "attention_D96_H1_14x14"]
INPUTS = ("q", "k", "v", "s1", "s2")


def attention_inputs(arrays: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays[name]).to(dtype).requires_grad_() for name in INPUTS]


def random_inputs(batch=2, heads=2, height=3, width=5, head_dim=8, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, height * width, head_dim)] * 3 + [(heads, 2 * head_dim)] * 2
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("vector", VECTORS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_golden(golden, relative_error, vector, dtype, tolerance):
    arrays = golden(vector)
    inputs = attention_inputs(arrays, dtype)
    out = reference.polarity_attention(*inputs, *map(int, arrays["hw"]))
    grads = torch.autograd.grad(out, inputs, torch.from_numpy(arrays["grad_out"]).to(dtype))
    assert relative_error(out, arrays["out"]) < tolerance
    for name, grad in zip(INPUTS, grads, strict=True):
        assert relative_error(grad, arrays[f"d{name}"]) < tolerance, name


@pytest.mark.slow
def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *inputs: reference.polarity_attention(*inputs, 3, 5), random_inputs())


def test_backward_equals_autograd(relative_error):
    inputs = random_inputs()
    out, *saved = reference.forward(*inputs, 3, 5)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    expected = torch.autograd.grad(out, inputs, grad_out)
    for actual, wanted in zip(reference.backward(grad_out, tuple(inputs), tuple(saved), 3, 5), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(relative_error, dtype):
    inputs = [x.detach().to(dtype) for x in random_inputs()]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must have no effect
        out = reference.polarity_attention(*inputs, 3, 5)
    assert out.dtype == dtype
    exact = reference.polarity_attention(*(x.double() for x in inputs), 3, 5)
    assert relative_error(out, exact) < torch.finfo(dtype).eps


def test_small_features_keep_precision(relative_error):
    inputs = [x.detach() * scale for x, scale in zip(random_inputs(), (1e-3, 1e-3, 1, 1, 1), strict=True)]
    out = reference.polarity_attention(*(x.bfloat16() for x in inputs), 3, 5)
    exact = reference.polarity_attention(*(x.bfloat16().double() for x in inputs), 3, 5)
    assert relative_error(out, exact) < 4e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [x[0], x[1][:, :, 1:], *x[2:]], "must have one shape"),
        (lambda x: [*(t[:, :, :-1] for t in x[:3]), *x[3:]], "14 tokens are not height 3 × width 5"),
        (lambda x: [*(t[..., :-1] for t in x[:3]), *x[3:]], "head dimension 7 is odd"),
        (lambda x: [x[0].float(), *x[1:]], "cast them to one"),
        (lambda x: [*x[:3], x[3][:, :-1], x[4]], r"same_logits has shape \(2, 15\), needs \(H, 2D\) = \(2, 16\)"),
    ],
)
def test_wrong_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        reference.polarity_attention(*change(random_inputs()), 3, 5)

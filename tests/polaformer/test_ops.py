"""The operator: what PyTorch may assume of it, and that it computes what the reference computes."""

import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polaformer import ops, reference

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
    ),
]


def projected_inputs(shape, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
    """q, k, v as the model passes them: strided views of one (B, N, 4C) projection; then the logits."""
    batch, heads, tokens, head_width = shape
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(batch, tokens, 4 * heads * head_width, generator=generator).to(device, dtype)
    parts = projection.chunk(4, dim=-1)[:3]
    views = [part.unflatten(-1, (heads, head_width)).transpose(1, 2) for part in parts]
    logits = [torch.randn(heads, 2 * head_width, generator=generator).to(device) for _ in range(2)]
    return [x.detach().requires_grad_() for x in (*views, *logits)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    inputs = projected_inputs((2, 3, 12, 8), dtype, device)
    torch.library.opcheck(torch.ops.polaformer.polarity_attention.default, (*inputs, 3, 4))
    out, *saved = torch.ops.polaformer.polarity_attention(*inputs, 3, 4)
    saved = [x.detach() for x in (*inputs, *saved)]
    torch.library.opcheck(
        torch.ops.polaformer.polarity_attention_backward.default, (torch.ones_like(out), *saved, 3, 4)
    )


def test_the_reference_is_an_operator_that_says_why_once(monkeypatch):
    """The CUDA kernels call it for what they do not serve: float64 in silence, the rest with its reason."""
    inputs = projected_inputs((2, 3, 12, 8), torch.bfloat16)
    monkeypatch.setattr(ops, "_say_once", functools.cache(ops._say_once.__wrapped__))
    arguments = (*inputs, 3, 4, "no GPU of that kind")
    with pytest.warns(UserWarning, match="polarity attention runs in plain PyTorch: no GPU of that kind"):
        torch.ops.polaformer.reference(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, *saved = torch.ops.polaformer.reference(*arguments)
    torch.testing.assert_close(out, reference.polarity_attention(*inputs, 3, 4))
    grads = torch.ops.polaformer.reference_backward(torch.ones_like(out), *inputs, *saved, 3, 4, "")
    expected = torch.autograd.grad(reference.polarity_attention(*inputs, 3, 4).sum(), inputs)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0.03, atol=1e-3)  # of bf16


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    head_width=st.sampled_from([2, 6, 32, 96]),
)
def test_equals_reference(device, batch, heads, height, width, head_width):
    inputs = projected_inputs((batch, heads, height * width, head_width), torch.float64, device)
    expected = reference.polarity_attention(*inputs, height, width)
    grad_out = torch.randn_like(expected)
    out = ops.polarity_attention(*inputs, height, width)
    torch.testing.assert_close(out, expected)
    actual_grads = torch.autograd.grad(out, inputs, grad_out)
    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected, inputs, grad_out), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_keeps_nothing_larger_than_its_inputs():
    inputs = projected_inputs((2, 2, 64, 8))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.polarity_attention(*inputs, 8, 8)
    shapes = sorted(tuple(x.shape) for x in kept)
    assert shapes == sorted([(2, 2, 64, 8)] * 3 + [(2, 16)] * 2 + [(2, 2, 16, 8), (2, 2, 16), (2, 2, 8)])


def test_output_joins_heads_without_a_copy():
    out = ops.polarity_attention(*projected_inputs((2, 3, 12, 8)), 3, 4)
    assert out.transpose(1, 2).is_contiguous()


def test_compiles_to_one_graph():
    inputs = projected_inputs((1, 2, 12, 8))
    compiled = torch.compile(lambda *x: ops.polarity_attention(*x, 3, 4).sin(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), ops.polarity_attention(*inputs, 3, 4).sin())


def test_flops():
    inputs = projected_inputs((2, 3, 12, 8))
    with FlopCounterMode(display=False) as counter:
        ops.polarity_attention(*inputs, 3, 4).sum().backward()
    assert counter.get_total_flops() == (8 + 20) * 2 * 3 * 12 * 8**2


def test_wrong_inputs_are_refused_before_dispatch():
    with pytest.raises(ValueError, match="12 tokens are not height 3 × width 5"):
        ops.polarity_attention(*projected_inputs((1, 1, 12, 8)), 3, 5)

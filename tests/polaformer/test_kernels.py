"""The compiled kernels against the reference in float64, for every device, dtype, shape and layout."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from polaformer import ops, reference

LOW_PRECISION = [torch.bfloat16, torch.float16]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
    ),
]
NAMES = ("out", "q", "k", "v", "same_logits", "opposite_logits")


@pytest.fixture(params=DEVICES, scope="session")
def device(request) -> str:
    assert ops.has_compiled_kernels(request.param), ops.kernels_unavailable_reason(request.param)
    return request.param


def make_inputs(shape, dtype, device="cpu", scale=1.0, seed=0) -> list[torch.Tensor]:
    """q, k, v as views of one (B, N, 4C) projection, and logits; scale multiplies q and k."""
    batch, heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(batch, tokens, 4, heads, head_dim, generator=generator)
    projection[:, :, :2] *= scale
    views = [part.transpose(1, 2) for part in projection.to(device, dtype).unbind(2)[:3]]
    logits = [torch.randn(heads, 2 * head_dim, generator=generator).to(device) for _ in range(2)]
    return [x.detach().requires_grad_() for x in (*views, *logits)]


def results(function, inputs, height, width, grad_out=None) -> dict[str, torch.Tensor]:
    """The output and all gradients, in float64 on the CPU."""
    out = function(*inputs, height, width)
    if grad_out is None:
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, grad_out.to(out))
    return {name: x.detach().double().cpu() for name, x in zip(NAMES, (out, *grads), strict=True)}


def exact_results(inputs, height, width) -> dict[str, torch.Tensor]:
    wide = [x.detach().double().cpu().requires_grad_() for x in inputs]
    return results(reference.polarity_attention, wide, height, width)


def errors(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Root mean square of the difference, relative to that of the exact values."""
    return {name: float((actual[name] - exact[name]).norm() / (exact[name].norm() + 1e-30)) for name in NAMES}


@pytest.mark.parametrize("vector", ["attention_D32_H3_5x4", "attention_D64_H2_7x9", "attention_D96_H1_14x14"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_golden(golden, relative_error, device, vector, dtype, tolerance):
    arrays = golden(vector)
    as_input = lambda array: torch.from_numpy(array).to(device, dtype)  # noqa: E731
    inputs = [as_input(arrays[name]).requires_grad_() for name in ("q", "k", "v", "s1", "s2")]
    out = ops.polarity_attention(*inputs, *map(int, arrays["hw"]))
    grads = torch.autograd.grad(out, inputs, as_input(arrays["grad_out"]))
    assert relative_error(out.cpu(), arrays["out"]) < tolerance
    for name, grad in zip(("dq", "dk", "dv", "ds1", "ds2"), grads, strict=True):
        assert relative_error(grad.cpu(), arrays[name]) < tolerance, name


@pytest.mark.parametrize("size", [(7, 9), (113, 1), (33, 31)])
@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_float32_accuracy(device, size, head_dim):
    inputs = make_inputs((2, 2, size[0] * size[1], head_dim), torch.float32, device)
    for name, error in errors(results(ops.polarity_attention, inputs, *size), exact_results(inputs, *size)).items():
        assert error < 2e-6, name


@pytest.mark.parametrize("size", [(7, 9), (113, 1), (33, 31)])
@pytest.mark.parametrize("head_dim", [32, 64, 96])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_against_eager(device, dtype, size, head_dim):
    """At most twice the error of the eager formulas in that dtype, three times for gradients."""
    inputs = make_inputs((2, 2, size[0] * size[1], head_dim), dtype, device)
    exact = exact_results(inputs, *size)
    eager = errors(results(reference.eager_polarity_attention, inputs, *size), exact)
    ours = errors(results(ops.polarity_attention, inputs, *size), exact)
    for name in NAMES:
        assert ours[name] <= (2 if name == "out" else 3) * eager[name], name


@settings(max_examples=40)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["projection", "contiguous", "transposed", "every second", "expanded"]),
)
@example(  # a token whose features meet no key's: its normalizer is epsilon alone
    batch=2, heads=1, height=1, width=3, head_dim=2, dtype=torch.float64, layout="projection"
)
def test_any_shape_layout_and_dtype(device, batch, heads, height, width, head_dim, dtype, layout):
    inputs = make_inputs((batch, heads, height * width, head_dim), dtype, device)
    arranged = {
        "projection": lambda x: x,
        "contiguous": lambda x: x.contiguous(),
        "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
        "expanded": lambda x: x[:, :, :1].expand(-1, -1, height * width, -1),
    }[layout]
    inputs = [arranged(x.detach()).requires_grad_() for x in inputs[:3]] + inputs[3:]
    actual, exact = results(ops.polarity_attention, inputs, height, width), exact_results(inputs, height, width)
    if batch == 0:
        assert all(actual[name].shape == exact[name].shape for name in NAMES)
        assert not actual["same_logits"].any()
        return
    # Where normalizers are small every implementation loses digits: the eager formulas show how many.
    eager = results(reference.eager_polarity_attention, inputs, height, width)
    rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-12)
    for name in NAMES:
        assert actual[name].isfinite().all(), name
        lost = (eager[name] - exact[name]).abs().mean().nan_to_num(nan=torch.inf)  # float16 may lose them all
        allowed = 5 * lost + 20 * rounding * (exact[name].abs().mean() + 0.1)
        assert (actual[name] - exact[name]).abs().mean() <= allowed, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [20, 100, 1e4])
@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_exponents_of_any_size(device, dtype, largest, which):
    """Exact outputs and gradients for queries and keys whose features overflow float32."""
    shape, size = (2, 2, 63, 32), (7, 9)
    inputs = make_inputs(shape, torch.float64)
    with torch.no_grad():
        for index, name in ((0, "q"), (1, "k")):
            if which in (name, "both"):  # every feature and sign has the same largest value, so that none dominates
                inputs[index].copy_(inputs[index].sign() * (largest - inputs[index].abs()))
    inputs = [x.detach().to(device, dtype if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(inputs)]
    actual, exact = results(ops.polarity_attention, inputs, *size), exact_results(inputs, *size)
    eps = torch.finfo(dtype).eps
    # e^x amplifies the rounding of x · temperature, a relative error of half an ulp, by x
    tolerance = 8 * eps + 8 * torch.finfo(torch.float32).eps * largest
    for name in NAMES:
        assert actual[name].isfinite().all(), name
        scale = exact[name].norm() + exact[name].numel() ** 0.5  # a flow's logits may have zero gradients
        assert (actual[name] - exact[name]).norm() < tolerance * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("largest", [20, 100, 1e4])
def test_finite_for_any_finite_input(device, dtype, largest):
    """Exponents far apart, vanishing normalizers: no infinity or NaN, and exact outputs where representable."""
    inputs = make_inputs((2, 2, 63, 32), dtype, device, scale=largest / 4)
    actual, exact = results(ops.polarity_attention, inputs, 7, 9), exact_results(inputs, 7, 9)
    assert all(x.isfinite().all() for x in actual.values())
    limit = torch.finfo(dtype).max
    representable = exact["out"].abs() < limit / 4
    assert representable.double().mean() > 0.5
    difference = (actual["out"] - exact["out"]).abs() / (exact["out"].abs() + 1)
    assert difference[representable].quantile(0.9) < 8 * torch.finfo(dtype).eps + 1e-6 * largest


def test_zero_normalizers(device):
    """q = (1, 0), k = (0, 1): queries and keys share no nonzero feature, but do after rotation."""
    q, k = torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 6, 4)
    q[..., 0], k[..., 1] = 1, 1
    v = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    inputs = [x.to(device).requires_grad_() for x in (q, k, v, torch.zeros(1, 8), torch.zeros(1, 8))]
    actual, exact = results(ops.polarity_attention, inputs, 2, 3), exact_results(inputs, 2, 3)
    assert exact["out"].abs().max() > 1e4  # divided by epsilon alone
    for name, error in errors(actual, exact).items():
        assert error < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_memory_is_not_read(device, dtype):
    inputs = make_inputs((3, 2, 77, 48), dtype, device)
    expected = results(ops.polarity_attention, inputs, 7, 11)
    torch.use_deterministic_algorithms(True)  # fills the memory of at::empty with NaN
    try:
        actual = results(ops.polarity_attention, inputs, 7, 11)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_runs(device, dtype):
    """Also for other numbers of threads: the 3,136 tokens of three heads are split into several tasks."""
    inputs = make_inputs((1, 3, 3136, 32), dtype, device)
    first = results(ops.polarity_attention, inputs, 56, 56)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        again = results(ops.polarity_attention, inputs, 56, 56)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_offsets_beyond_32_bits(device):
    """The second image is more than 2³¹ elements after the first; the memory between is never touched."""
    shape, apart = (2, 1, 12, 32), 2**31 + 64
    storage = torch.empty(apart + 3 * 12 * 32, dtype=torch.bfloat16, device=device)
    small = make_inputs(shape, torch.bfloat16, device)
    far = []
    for index in range(3):
        view = storage.as_strided(shape, (apart, 0, 32, 1), storage_offset=index * 12 * 32)
        far.append(view.copy_(small[index].detach()).requires_grad_())
    expected = results(ops.polarity_attention, small, 3, 4)
    actual = results(ops.polarity_attention, [*far, *small[3:]], 3, 4)
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_forward_and_backward(device, dtype):
    """Peak memory beyond inputs, output and gradients: at most an eighth of eager's."""
    shape = (2, 1, 3136, 96)
    inputs = make_inputs(shape, dtype, device)
    unavoidable = 4 * np.prod(shape) * inputs[0].element_size()

    def peak(function) -> int:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function(*inputs, 56, 56).sum().backward()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(function(*inputs, 56, 56), inputs, torch.ones(shape, dtype=dtype))
        changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        return int(np.cumsum([event.nbytes() for event in sorted(changes, key=lambda e: e.start_ns())]).max())

    assert peak(ops.polarity_attention) - unavoidable <= (peak(reference.eager_polarity_attention) - unavoidable) / 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_own_stream():
    inputs = [x.detach() for x in make_inputs((2, 2, 196, 64), torch.bfloat16, "cuda")]
    expected = ops.polarity_attention(*inputs, 14, 14)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        inputs_late = [x.clone() for x in inputs]
        on_stream = ops.polarity_attention(*inputs_late, 14, 14)
    torch.cuda.synchronize()
    assert torch.equal(on_stream, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.skipif(
    "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ,
    reason="without PyTorch's caching allocator, as under compute-sanitizer, a capture cannot allocate",
)
def test_cuda_graph():
    """Captured after the warm-up on a side stream that PyTorch requires; replayed with other values."""
    inputs = [x.detach() for x in make_inputs((2, 2, 196, 64), torch.bfloat16, "cuda")]
    warming = torch.cuda.Stream()
    warming.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming):
        for _ in range(3):
            ops.polarity_attention(*inputs, 14, 14)
    torch.cuda.current_stream().wait_stream(warming)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = ops.polarity_attention(*inputs, 14, 14)
    others = make_inputs((2, 2, 196, 64), torch.bfloat16, "cuda", seed=1)
    for x, other in zip(inputs, others, strict=True):
        x.copy_(other.detach())
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(replayed, ops.polarity_attention(*inputs, 14, 14))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_lower_cpu_capabilities(capability):
    """Kernels of lower instruction sets, and bfloat16 without a bfloat16 GEMM, in a separate process.

    Golden vectors are excluded: PyTorch's linspace, from which the rotary frequencies come, differs there by one ulp.
    """
    selection = "low_precision or any_shape or exponents or zero_normalizers or uninitialised"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-m", "pytest", "-q", "-k", f"({selection}) and cpu", "-p", "no:cacheprovider", __file__]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout


@pytest.mark.slow
def test_fallback_to_reference_warns_once():
    code = (
        "import torch, polaformer.ops as ops; x = torch.ones(1, 1, 4, 2); s = torch.zeros(1, 4)\n"
        "for _ in range(2): ops.polarity_attention(x, x, x, s, s, 2, 2)\n"
        "assert not ops.has_compiled_kernels('cpu')"
    )
    environment = os.environ | {"POLAFORMER_KERNELS": "none"}
    finished = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("polarity attention runs in plain PyTorch: no compiled kernels for cpu") == 1


def test_has_compiled_kernels_knows_two_devices():
    with pytest.raises(KeyError):
        ops.has_compiled_kernels("tpu")

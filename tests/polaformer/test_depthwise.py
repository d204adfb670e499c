"""Depthwise convolution: PyTorch's contracts, and kernels against PyTorch's own convolution in float64."""

import functools
import os
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from polaformer import ops

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
    ),
]
OPERATOR = torch.ops.polaformer.depthwise_conv2d
BACKWARD = torch.ops.polaformer.depthwise_conv2d_backward
RESIDUALS = ("none", "input", "other")
NAMES = ("out", "x", "weight", "bias", "residual")


@pytest.fixture(params=DEVICES, scope="session")
def device(request) -> str:
    return request.param


def make_inputs(shape, kernel_size=3, dtype=torch.float32, device="cpu", residual="none", seed=0):
    """x, weight, bias and residual; weight and bias are float32, or float64 if x is."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
    wide = dtype if dtype == torch.float64 else torch.float32
    x = draw(*shape).to(device, dtype).requires_grad_()
    weight = (draw(shape[3], 1, kernel_size, kernel_size) / kernel_size).to(device, wide).requires_grad_()
    bias = draw(shape[3]).to(device, wide).requires_grad_()
    other = draw(*shape).to(device, dtype).requires_grad_()
    return x, weight, bias, {"none": None, "input": x, "other": other}[residual]


def convolve(x, weight, bias, residual):
    """The same by PyTorch."""
    images, channels = x.permute(0, 3, 1, 2), weight.shape[0]
    out = F.conv2d(images, weight, bias, padding=weight.shape[2] // 2, groups=channels).permute(0, 2, 3, 1)
    return out if residual is None else residual + out


def results(function, inputs, grad_out) -> dict[str, torch.Tensor]:
    """The output and all gradients, in float64 on the CPU."""
    x, weight, bias, residual = inputs
    out = function(*inputs)
    wanted = [x, weight, bias, *([] if residual is None or residual is x else [residual])]
    grads = torch.autograd.grad(out, wanted, grad_out.to(out))
    return {name: value.detach().double().cpu() for name, value in zip(NAMES, (out, *grads), strict=False)}


def exact_results(inputs, grad_out) -> dict[str, torch.Tensor]:
    x, weight, bias, residual = inputs
    wide = [value.detach().double().cpu().requires_grad_() for value in (x, weight, bias)]
    other = residual.detach().double().cpu().requires_grad_() if residual is not None else None
    return results(convolve, (*wide, wide[0] if residual is x else other), grad_out)


def has_kernel(x, weight) -> bool:
    """Whether a kernel computes the convolution, so that gradients of weights are not rounded to the dtype of x."""
    on_any_gpu = x.dtype != torch.float64 and x.shape[3] * x.element_size() % 16 == 0 and x.shape[2] <= 56
    served = weight.shape[2] in (3, 5) and (x.device.type == "cpu" or on_any_gpu)
    return served and ops.has_compiled_kernels(x.device.type)


def served_channels(channels, device) -> int:
    """As many channels, or a few more, as the kernels of a device serve in every dtype."""
    return channels if device == "cpu" else -(-channels // 8) * 8


def check(inputs) -> None:
    """Compare output and gradients with float64, and what computed them with `has_kernel`."""
    x, weight = inputs[:2]
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad_out = grad_out.to(x.dtype).double()  # the same numbers for both
    full_precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # of PyTorch's convolution on GPUs
    with mock.patch.object(ops, "_warn_once") as warned, full_precision:
        actual, exact = results(ops.depthwise_conv2d, inputs, grad_out), exact_results(inputs, grad_out)
    served = has_kernel(x, weight)
    if x.numel() and x.dtype != torch.float64:  # PyTorch computes float64 without a warning
        assert warned.called != served
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert value.shape == exact[name].shape
        of_weight = name in ("weight", "bias") and x.dtype != torch.float64
        eps = torch.finfo(torch.float32 if of_weight and served else x.dtype).eps
        scale = exact[name].norm() + exact[name].numel() ** 0.5
        terms = x[..., 0].numel() if name in ("weight", "bias") else 1  # of its sum
        factor = 4 if served or x.device.type == "cpu" else 16  # PyTorch's algorithms on GPUs vary
        assert (value - exact[name]).norm() <= factor * eps * max(1, terms) ** 0.5 * scale, name


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [48, 44])  # 44 have no kernel in 16 bits on GPUs
def test_equals_pytorch(device, channels, dtype, kernel_size, residual):
    check(make_inputs((2, 9, 16, channels), kernel_size, dtype, device, residual))


def test_sizes_without_kernels_warn_once(device, monkeypatch):
    monkeypatch.setattr(ops, "_warn_once", functools.cache(ops._warn_once.__wrapped__))
    inputs = make_inputs((2, 9, 16, 8), 7, device=device)
    reason = "the kernels serve 3×3 and 5×5" if ops.has_compiled_kernels(device) else "no compiled kernels"
    with pytest.warns(UserWarning, match=f"depthwise convolution runs in plain PyTorch: {reason}") as warned:
        ops.depthwise_conv2d(*inputs)
    assert warned[0].filename == __file__  # the caller's, not ours or PyTorch's
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.depthwise_conv2d(*inputs)


@settings(max_examples=80)
@given(
    shape=st.tuples(
        st.integers(0, 3),
        st.integers(1, 16),
        st.integers(1, 16),
        st.integers(1, 300) | st.integers(1, 38).map(lambda n: 8 * n),
    ),
    kernel_size=st.sampled_from([3, 5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    residual=st.sampled_from(RESIDUALS),
    layout=st.sampled_from(["contiguous", "slice", "channels first", "every second", "expanded"]),
)
@example(shape=(96, 1, 1, 200), kernel_size=5, dtype=torch.float32, residual="input", layout="contiguous")
@example(shape=(2, 57, 3, 40), kernel_size=3, dtype=torch.float32, residual="other", layout="slice")
def test_any_shape_layout_and_dtype(device, shape, kernel_size, dtype, residual, layout):
    x, weight, bias, other = make_inputs(shape, kernel_size, dtype, device, residual)
    arranged = {
        "contiguous": lambda: x,
        "slice": lambda: torch.cat((x, x, x), dim=3)[..., shape[3] : 2 * shape[3]],  # as v of the projection
        "channels first": lambda: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "every second": lambda: x.repeat_interleave(2, dim=3)[..., ::2],
        "expanded": lambda: x[:, :1].expand(shape),
    }[layout]()
    arranged = arranged.detach().requires_grad_()
    inputs = (arranged, weight, bias, arranged if residual == "input" else other)
    assert ops.depthwise_conv2d(*inputs).is_contiguous()
    check(inputs)


def test_a_bias_is_required():
    x, weight, _, _ = make_inputs((2, 3, 4, 8))
    with pytest.raises(ValueError, match=r"bias is None; pass torch.zeros\(C\)"):
        ops.depthwise_conv2d(x, weight, None)


@pytest.mark.parametrize("shape", [(0, 3, 3, 8), (2, 0, 3, 8), (2, 3, 0, 8), (2, 3, 3, 0)])
def test_no_elements(device, shape):
    """PyTorch's own convolution refuses some of these."""
    x, weight, bias, residual = make_inputs(shape, device=device, residual="other")
    out = ops.depthwise_conv2d(x, weight, bias, residual)
    assert out.shape == shape
    grads = torch.autograd.grad(out.sum(), (x, weight, bias, residual))
    assert [grad.shape for grad in grads] == [x.shape, weight.shape, bias.shape, residual.shape]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("shape", [(8, 56, 56, 96), (64, 7, 7, 64)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_sums_over_many_positions_are_accurate(device, shape, kernel_size):
    """Images with a mean: the sums of weights' gradients grow with the number of positions."""
    x, weight, bias, _ = make_inputs(shape, kernel_size, device=device)
    with torch.no_grad():
        x += 1
    grad_out = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    actual = results(ops.depthwise_conv2d, (x, weight, bias, None), grad_out)
    exact = exact_results((x, weight, bias, None), grad_out)
    for name, value in actual.items():
        assert (value - exact[name]).norm() < 2e-6 * exact[name].norm(), name


def test_a_residual_of_its_own_value_costs_no_sum_in_backward():
    """`residual=x` is fused: the gradient of x is one output of the operator."""
    x, weight, bias, _ = make_inputs((2, 4, 4, 16))
    out = ops.depthwise_conv2d(x, weight, bias, x)
    assert out.grad_fn is not None
    assert [edge is not None and edge[0] is not None for edge in out.grad_fn.next_functions].count(True) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_opcheck(device, dtype, residual):
    x, weight, bias, other = make_inputs((2, 3, 4, 8), 3, dtype, device, residual)
    adds_input = other is x
    torch.library.opcheck(OPERATOR.default, (x, weight, bias, None if adds_input else other, adds_input))
    arguments = (torch.ones_like(x), x.detach(), weight.detach(), adds_input)
    torch.library.opcheck(BACKWARD.default, arguments)


def test_saves_its_input_and_weight_alone():
    inputs, kept = make_inputs((2, 4, 4, 16), residual="other"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.depthwise_conv2d(*inputs)
    assert sorted(tuple(x.shape) for x in kept) == [(2, 4, 4, 16), (16, 1, 3, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_identical_runs(device, dtype):
    """Also for other numbers of threads, and where vectors overlap on CPUs."""
    inputs = make_inputs((3, 28, 28, served_channels(205, device)), 5, dtype, device, "input")
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    first, threads = results(ops.depthwise_conv2d, inputs, grad_out), torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        again = results(ops.depthwise_conv2d, inputs, grad_out)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uninitialised_memory_is_not_read(device, dtype):
    inputs = make_inputs((3, 9, 16, served_channels(77, device)), 5, dtype, device, "other")
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    expected = results(ops.depthwise_conv2d, inputs, grad_out)
    torch.use_deterministic_algorithms(True)  # fills the memory of at::empty with NaN
    try:
        actual = results(ops.depthwise_conv2d, inputs, grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_reach_their_neighbours_alone(device, dtype, value):
    x, weight, bias, _ = make_inputs((1, 7, 9, served_channels(20, device)), 3, dtype, device)
    with torch.no_grad():
        x[0, 3, 4, 5] = value
    out = ops.depthwise_conv2d(x, weight, bias)
    expected = convolve(x.double(), weight.double(), bias.double(), None)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isfinite().logical_not().sum() == 9


def test_bfloat16_rounds_to_nearest_even():
    """Every bfloat16 number comes out as it is, and sums between two of them go to the even one."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(torch.bfloat16).view(64, 1, 1, 1024)  # images of one pixel: no neighbours
    weight, bias = torch.zeros(1024, 1, 3, 3), torch.zeros(1024)
    weight[:, 0, 1, 1] = 1
    out = ops.depthwise_conv2d(numbers, weight, bias)
    assert torch.equal(out.isnan(), numbers.isnan())
    assert torch.equal(out.nan_to_num(), numbers.nan_to_num())
    halves = ((bits.to(torch.int32) << 16) | 0x8000).view(torch.float32)
    nothing = torch.zeros(1, 1, 1, 2**16, dtype=torch.bfloat16)
    out = ops.depthwise_conv2d(nothing, torch.zeros(2**16, 1, 3, 3), halves).flatten()
    assert torch.equal(out.isnan(), halves.isnan())
    assert torch.equal(out.nan_to_num(), halves.to(torch.bfloat16).nan_to_num())


def test_memory_of_backward_is_that_of_its_results():
    """Beside the gradients: sums of the weights' gradients, at most 1 % of the input, and the kernel by taps."""
    shape = (8, 28, 28, 192)
    x, weight, _, _ = make_inputs(shape, 5)
    arguments = torch.ones(shape), x.detach(), weight.detach(), True
    with torch.profiler.profile(profile_memory=True) as profile:
        BACKWARD(*arguments)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak = total = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    kernel = 26 * 192 * 4
    per_thread = torch.get_num_threads() * 26 * (128 + 16) * 4
    assert peak <= 1.01 * x.numel() * 4 + 4 * kernel + per_thread


def test_compiles_to_one_graph(device):
    inputs = make_inputs((1, 4, 4, 8), device=device, residual="input")
    function = lambda x, weight, bias: ops.depthwise_conv2d(x, weight, bias, x).sin()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs[:3]), function(*inputs[:3]))


def test_flops():
    x, weight, bias, _ = make_inputs((2, 4, 5, 8), 3)
    with FlopCounterMode(display=False) as counter:
        ops.depthwise_conv2d(x, weight, bias, x).sum().backward()
    assert counter.get_total_flops() == (2 + 4) * 9 * 2 * 4 * 5 * 8


@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_frozen_weights_cost_the_gradient_of_the_input_alone(device, residual, kernel_size):
    inputs = make_inputs((2, 4, 5, 8), kernel_size, torch.float64, device, residual)
    x, weight, bias, other = inputs
    wanted = [x] if other is None or other is x else [x, other]
    grad_out = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    expected = torch.autograd.grad(ops.depthwise_conv2d(*inputs), wanted, grad_out)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    out = ops.depthwise_conv2d(*inputs)
    with FlopCounterMode(display=False) as counter:
        grads = torch.autograd.grad(out, wanted, grad_out)
    assert counter.get_total_flops() == 2 * kernel_size**2 * 2 * 4 * 5 * 8
    torch.testing.assert_close(grads, expected)
    function = lambda x: ops.depthwise_conv2d(x, weight, bias, x if residual == "input" else None)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, x)


def test_frozen_weights_in_a_compiled_graph(device):
    x, weight, bias, _ = make_inputs((1, 4, 4, 8), device=device)
    function = lambda x: ops.depthwise_conv2d(x, weight.detach(), bias.detach(), x).sin()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    of_both = [torch.autograd.grad(run(x).sum(), x) for run in (compiled, function)]
    torch.testing.assert_close(*of_both)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_second_derivatives(device, residual):
    x, weight, bias, other = make_inputs((1, 3, 4, 2), 3, torch.float64, device, residual)
    if residual == "other":
        inputs, function = (x, weight, bias, other), ops.depthwise_conv2d
    else:
        inputs = (x, weight, bias)
        function = lambda x, w, b: ops.depthwise_conv2d(x, w, b, x if residual == "input" else None)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("in_dims", [(0, None, None, 0), (None, 0, 0, None), (3, 1, None, None), (4, 0, 1, 2)])
@pytest.mark.filterwarnings("error")  # vmap's fallback would warn
def test_vmap_and_per_sample_gradients(device, in_dims):
    plain, calls = [x.detach() for x in make_inputs((2, 3, 4, 5), 3, torch.float64, device, "other")], 3
    arguments = [
        x if dim is None else torch.randn(*x.shape[:dim], calls, *x.shape[dim:], dtype=x.dtype, device=device)
        for x, dim in zip(plain, in_dims, strict=True)
    ]
    select = lambda call: [x if d is None else x.select(d, call) for x, d in zip(arguments, in_dims, strict=True)]  # noqa: E731
    mapped = torch.vmap(ops.depthwise_conv2d, in_dims)(*arguments)
    torch.testing.assert_close(mapped, torch.stack([ops.depthwise_conv2d(*select(call)) for call in range(calls)]))
    loss = lambda *x: ops.depthwise_conv2d(*x).square().sum()  # noqa: E731
    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), in_dims)(*arguments)
    for call in range(calls):
        alone = [x.clone().requires_grad_() for x in select(call)]
        for grad, expected in zip(grads, torch.autograd.grad(loss(*alone), alone), strict=True):
            torch.testing.assert_close(grad[call], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"x": x["x"][0]}, "x .* must have four dimensions"),
        (lambda x: {"weight": x["weight"][:2]}, r"weight .* must be \(C, 1, k, k\) = \(8, 1, k, k\)"),
        (lambda x: {"weight": x["weight"][..., :2]}, r"weight .* must be \(C, 1, k, k\)"),
        (lambda x: {"weight": x["weight"][..., :2, :2]}, "with an odd k"),
        (
            lambda x: {"weight": x["weight"].expand(8, 8, 3, 3)},
            r"weight \W8, 8, 3, 3\W .*, as nn.Conv2d\(C, C, k, groups=C\) has it",
        ),
        (
            lambda x: {"x": x["x"].permute(0, 3, 1, 2)},
            r"C is the last size of x \W2, 8, 3, 4\W: where that is NCHW, pass x.permute\(0, 2, 3, 1\)",
        ),
        (lambda x: {"bias": x["bias"][:2]}, r"bias is .*, needs \(C\) = \(8\)"),
        (lambda x: {"bias": x["bias"].double()}, r"bias is .*, needs \(C\) = \(8\) in weight's"),
        (lambda x: {"residual": x["x"][:1]}, "residual is .*; they must agree"),
        (lambda x: {"residual": x["x"].double()}, "residual is .*; they must agree"),
        (lambda x: {"residual": x["x"], "adds_input": True}, "either a residual or the input is added, not both"),
        (lambda x: {"x": x["x"].int()}, "x is .*; pass a dense tensor of float64, float32"),
        (lambda x: {"weight": x["weight"].int(), "bias": x["bias"].int()}, "weight is .*; pass a dense tensor"),
    ],
)
@pytest.mark.parametrize("meta", [False, True])
def test_wrong_arguments(device, change, message, meta):
    x, weight, bias, _ = make_inputs((2, 3, 4, 8), device=device)
    arguments = {"x": x, "weight": weight, "bias": bias, "residual": None, "adds_input": False}
    arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    arguments |= change(arguments)
    if meta:
        arguments = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        OPERATOR(*arguments.values())


def test_wrong_gradients(device):
    x, weight, _, _ = (None if x is None else x.detach() for x in make_inputs((2, 3, 4, 8), device=device))
    for wrong in (x[:1], x.double()):
        with pytest.raises(ValueError, match="grad_out is .*; they must agree"):
            BACKWARD(wrong, x, weight, False)


def test_autocast_leaves_it_alone(device):
    """Its sums are float32 anyway, so it computes in the dtype of its input."""
    inputs = make_inputs((2, 4, 4, 8), device=device, residual="input")
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ops.depthwise_conv2d(*inputs)
    assert torch.equal(out, ops.depthwise_conv2d(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{"ATEN_CPU_CAPABILITY": "avx2"}, {"ATEN_CPU_CAPABILITY": "default"}, {"POLAFORMER_KERNELS": "none"}],
    ids=["avx2", "baseline", "PyTorch"],
)
def test_other_implementations(variables):
    """Kernels of lower instruction sets, and none, in a separate process."""
    names = "any_shape or accurate or uninitialised or finite or nearest"
    selection = (
        f"not cuda and ({'equals or any_shape or elements or vmap' if 'POLAFORMER_KERNELS' in variables else names})"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-k", selection, "-p", "no:cacheprovider", __file__]
    finished = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    assert " passed" in finished.stdout

"""The operator: PyTorch's contracts (opcheck, autograd, vmap, compile, export), and equality with the reference."""

import functools
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import polaformer  # noqa: F401 (registers the models)
from polaformer import ops, reference
from polaformer.model import PRESETS, PolaFormerPP

ROOT = Path(__file__).parents[2]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
    ),
]


def projected_inputs(shape, dtype=torch.float32, device="cpu", seed=0) -> list[torch.Tensor]:
    """q, k, v as strided views of one (B, N, 4C) projection, as the model passes them, and the logits."""
    batch, heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(batch, tokens, 4 * heads * head_dim, generator=generator).to(device, dtype)
    parts = projection.chunk(4, dim=-1)[:3]
    views = [part.unflatten(-1, (heads, head_dim)).transpose(1, 2) for part in parts]
    logits = [torch.randn(heads, 2 * head_dim, generator=generator).to(device) for _ in range(2)]
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


class _Zeros(TorchDispatchMode):
    """Records the sizes of tensors of zeros that are made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operator, _types, arguments=(), keywords=None):
        result = operator(*arguments, **(keywords or {}))
        if operator.overloadpacket in (torch.ops.aten.zeros, torch.ops.aten.zeros_like, torch.ops.aten.new_zeros):
            self.sizes.append(tuple(result.shape))
        return result


def test_backward_makes_no_gradients_of_saved_outputs():
    inputs = projected_inputs((2, 3, 12, 8))
    out, *saved = torch.ops.polaformer.polarity_attention(*inputs, 3, 4)
    grad_out = torch.ones_like(out)
    with _Zeros() as zeros:
        torch.autograd.grad(out, inputs, grad_out)
    assert not {tuple(x.shape) for x in saved} & set(zeros.sizes)


def test_an_output_without_gradient_gives_none_to_the_inputs():
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x.sum()

        @staticmethod
        def backward(_ctx, _grad):
            return None

    inputs = projected_inputs((2, 3, 12, 8))
    out = Stop.apply(ops.polarity_attention(*inputs, 3, 4))
    assert torch.autograd.grad(out, inputs, allow_unused=True) == (None,) * len(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_with_symbolic_sizes_are_laid_out_as_real_ones(dtype):
    """torch.compile trusts these strides and dtypes when it compiles for any batch."""
    attention = torch.ops.polaformer.polarity_attention, (*projected_inputs((5, 3, 12, 8), dtype), 3, 4)
    images, generator = torch.randn(5, 3, 4, 16).to(dtype), torch.Generator().manual_seed(0)
    parameters = torch.randn(8, 1, 3, 3, generator=generator), torch.randn(8, generator=generator)
    convolution = torch.ops.polaformer.depthwise_conv2d, (images[..., 8:], *parameters, None, True)
    for operator, arguments in (attention, convolution):
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            symbolic = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
            assert isinstance(symbolic[0].shape[0], torch.SymInt)
            fake = operator(*symbolic)
        real = operator(*arguments)
        for traced, computed in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (fake, real)), strict=True):
            assert traced.dtype == computed.dtype
            assert [int(stride) for stride in traced.stride()] == list(computed.stride())


def test_reference_operator_warns_once(monkeypatch):
    """The CUDA binding calls it for unsupported inputs: float64 silently, others with a reason."""
    inputs = projected_inputs((2, 3, 12, 8), torch.bfloat16)
    monkeypatch.setattr(ops, "_warn_once", functools.cache(ops._warn_once.__wrapped__))
    arguments = (*inputs, 3, 4, "no GPU of that kind")
    with pytest.warns(UserWarning, match="polarity attention runs in plain PyTorch: no GPU of that kind") as warned:
        torch.ops.polaformer.reference(*arguments)
    assert warned[0].filename == __file__
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
    head_dim=st.sampled_from([2, 6, 32, 96]),
)
def test_equals_reference(device, batch, heads, height, width, head_dim):
    inputs = projected_inputs((batch, heads, height * width, head_dim), torch.float64, device)
    expected = reference.polarity_attention(*inputs, height, width)
    grad_out = torch.randn_like(expected)
    out = ops.polarity_attention(*inputs, height, width)
    torch.testing.assert_close(out, expected)
    actual_grads = torch.autograd.grad(out, inputs, grad_out)
    for actual, wanted in zip(actual_grads, torch.autograd.grad(expected, inputs, grad_out), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_saves_nothing_larger_than_its_inputs():
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


def test_one_graph_for_every_size():
    """A model compiled with dynamic sizes serves ten further sizes without recompilation."""
    model, graphs, counts = timm.create_model("polaformerpp_b0", num_classes=10).eval(), [], []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=count)
    with torch.no_grad():
        for side in range(64, 64 + 11 * 32, 32):
            images = torch.randn(2, 3, side, side + 32)
            torch.testing.assert_close(compiled(images), model(images))
            counts.append(len(graphs))
    assert counts == counts[:1] * 11


def test_exports_for_every_size():
    model, dim = timm.create_model("polaformerpp_b0", num_classes=10).eval(), torch.export.Dim
    sizes = {0: dim("batch"), 2: 32 * dim("rows", min=1, max=64), 3: 32 * dim("columns", min=1, max=64)}
    exported = torch.export.export(model, (torch.randn(2, 3, 96, 128),), dynamic_shapes=(sizes,)).module()
    for shape in ((3, 3, 64, 64), (1, 3, 128, 96), (2, 3, 224, 192)):
        images = torch.randn(shape)
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_runs_at_other_sizes(tmp_path):
    """A model with one block a stage: the exporter takes seconds for each, and they are alike."""
    preset = replace(PRESETS["polaformerpp_b0"], depths=(1, 1, 1, 1))
    model, dim = PolaFormerPP(preset, num_classes=10).eval(), torch.export.Dim
    sizes = {0: dim("batch"), 2: 32 * dim("rows", min=1, max=64), 3: 32 * dim("columns", min=1, max=64)}
    path = tmp_path / "model.onnx"
    import onnxruntime  # imported here: the other tests run without it

    torch.onnx.export(model, (torch.randn(2, 3, 96, 64),), path, dynamo=True, dynamic_shapes=(sizes,))
    session = onnxruntime.InferenceSession(path)
    for shape in ((2, 3, 96, 64), (1, 3, 32, 128)):
        images = torch.randn(shape)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # tracing warns about every Python number
def test_a_traced_model_serves_its_size_and_refuses_others():
    model, images = timm.create_model("polaformerpp_b0", num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    traced = torch.jit.trace(model, images)
    torch.testing.assert_close(traced(images[:1]), model(images[:1]))
    for side, tokens in ((32, 64), (128, 1024)):
        with pytest.raises(RuntimeError, match=f"{tokens} tokens are not height 16 × width 16"):
            traced(torch.randn(1, 3, side, side))


def test_script_and_fx():
    inputs = projected_inputs((1, 2, 12, 8))
    expected = ops.polarity_attention(*inputs, 3, 4)
    scripted = torch.jit.script(raw_attention)
    torch.testing.assert_close(scripted(*inputs, 3, 4), expected)
    with pytest.raises(RuntimeError, match="12 tokens are not height 3 × width 5"):
        scripted(*inputs, 3, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(ops.polarity_attention)(*inputs, 3, 4), expected)


def raw_attention(q, k, v, same_logits, opposite_logits, height: int, width: int):
    return torch.ops.polaformer.polarity_attention(q, k, v, same_logits, opposite_logits, height, width)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives(device):
    inputs = [x.detach().double().requires_grad_() for x in projected_inputs((1, 2, 6, 4), device=device)]
    assert torch.autograd.gradgradcheck(lambda *x: ops.polarity_attention(*x, 2, 3), inputs)


def test_third_derivatives():
    q, *others = projected_inputs((1, 1, 3, 4), torch.float64)

    def second(q):
        first = torch.autograd.grad(ops.polarity_attention(q, *others, 1, 3).square().sum(), q, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), q, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, [q])


@pytest.mark.parametrize("device", DEVICES)
def test_torch_func_differentiates_twice(device):
    q, *others = (x.detach() for x in projected_inputs((2, 2, 6, 4), torch.float64, device))

    def hessian(operator, function):
        loss = lambda q: operator(q, *others, 2, 3).square().sum()  # noqa: E731
        return function(function(loss))(q)

    expected = torch.autograd.functional.hessian(
        lambda q: reference.polarity_attention(q, *others, 2, 3).square().sum(), q
    )
    torch.testing.assert_close(hessian(ops.polarity_attention, torch.func.jacrev), expected)
    with torch.no_grad():  # torch.func overrides the caller's mode
        torch.testing.assert_close(hessian(ops.polarity_attention, torch.func.jacrev), expected)


def dual_tangent(function, x):
    """The derivative of a function in the direction of ones, by dual numbers."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def loss_gradient(function):
    return torch.func.grad(lambda x: function(x).square().sum())


FORWARD_MODE = {
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "dual": dual_tangent,
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "jvp of grad": lambda function, x: torch.func.jvp(loss_gradient(function), (x,), (torch.ones_like(x),))[1],
    "hessian": lambda function, x: torch.func.hessian(lambda x: function(x).square().sum())(x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused_at_every_level(device, name, frozen):
    """An outer level of forward mode must not lose its tangents: derivatives would be 0."""
    q, *others = (x.detach() for x in projected_inputs((1, 2, 4, 4), torch.float64, device))
    x, weight, bias = (torch.randn(size, dtype=q.dtype, device=device) for size in ((1, 2, 2, 4), (4, 1, 3, 3), (4,)))
    weight.requires_grad_(not frozen)
    functions = {
        "polarity_attention": lambda module: lambda q: module.polarity_attention(q, *others, 2, 2),
        "depthwise_conv2d": lambda module: lambda x: module.depthwise_conv2d(x, weight, bias),
    }
    for operator, of_module in functions.items():
        at = q if operator == "polarity_attention" else x
        with pytest.raises(
            NotImplementedError, match=r"polaformer.ops has no forward-mode derivatives .*; use reverse"
        ):
            FORWARD_MODE[name](of_module(ops), at)
        assert FORWARD_MODE[name](of_module(reference), at).any()  # as the message says


def test_second_derivatives_of_mapped_logits():
    """vmap over logits alone, with shared queries, keys and values."""
    q, k, v, *logits = (x.detach().double() for x in projected_inputs((1, 1, 6, 2)))
    many = torch.randn(3, *logits[0].shape, dtype=torch.float64)
    loss = lambda same, operator: operator(q, k, v, same, logits[1], 2, 3).square().sum()  # noqa: E731
    hessians = torch.vmap(torch.func.jacrev(torch.func.jacrev(lambda x: loss(x, ops.polarity_attention))))(many)
    for same, hessian in zip(many, hessians, strict=True):
        expected = torch.autograd.functional.hessian(lambda x: loss(x, reference.polarity_attention), same)
        torch.testing.assert_close(hessian, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_dims", [(0, 0, 0, None, None), (2, None, 0, None, 0), (None, None, None, 0, 1)])
@pytest.mark.filterwarnings("error")  # vmap's fallback would warn
def test_vmap_and_per_sample_gradients(device, in_dims):
    """vmap over any subset of arguments, per-sample gradients, and gradients through vmap."""
    plain, calls = [x.detach() for x in projected_inputs((2, 3, 6, 4), torch.float64, device)], 5
    arguments = [
        x if dim is None else torch.randn(*x.shape[:dim], calls, *x.shape[dim:], dtype=x.dtype, device=device)
        for x, dim in zip(plain, in_dims, strict=True)
    ]
    attend = lambda *x: ops.polarity_attention(*x, 2, 3)  # noqa: E731
    loss = lambda *x: attend(*x).square().sum()  # noqa: E731
    select = lambda call: [x if d is None else x.select(d, call) for x, d in zip(arguments, in_dims, strict=True)]  # noqa: E731
    torch.testing.assert_close(
        torch.vmap(attend, in_dims)(*arguments), torch.stack([attend(*select(call)) for call in range(calls)])
    )
    every = tuple(range(5))
    of_each = torch.vmap(torch.func.grad(loss, argnums=every), in_dims)(*arguments)
    for call in range(calls):
        alone = [x.clone().requires_grad_() for x in select(call)]
        for grad, expected in zip(of_each, torch.autograd.grad(loss(*alone), alone), strict=True):
            torch.testing.assert_close(grad[call], expected)
    together = torch.func.grad(lambda *x: torch.vmap(loss, in_dims)(*x).sum(), argnums=every)(*arguments)
    for grad, of_calls, dim in zip(together, of_each, in_dims, strict=True):
        torch.testing.assert_close(grad, of_calls.sum(0) if dim is None else of_calls.movedim(0, dim))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["polarity_attention", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {"q": x["q"][0]}, "must have one shape"),
        (lambda x: {"k": x["k"][:, :, 1:]}, "must have one shape"),
        (lambda x: {"height": 16, "width": 16}, "12 tokens are not height 16 × width 16"),
        (lambda x: {"height": -3, "width": -4}, "12 tokens are not height -3 × width -4"),
        (lambda x: {"height": 2**62, "width": 2**62}, "12 tokens are not height"),
        (lambda x: {name: x[name][..., :7] for name in "qkv"}, "head dimension 7 is odd"),
        (lambda x: {"v": x["v"].double()}, "cast them to one"),
        (lambda x: {name: x[name].int() for name in "qkv"}, "q is .*; pass a dense tensor of float64, float32"),
        (lambda x: {"opposite_logits": x["opposite_logits"][:1]}, r"opposite_logits has shape .*, needs \(H, 2D\) = "),
        (lambda x: {"same_logits": x["same_logits"].to(torch.complex64)}, "same_logits is .*; pass a dense tensor"),
    ],
)
def test_wrong_arguments_of_the_raw_operators(device, name, change, message):
    names = ("q", "k", "v", "same_logits", "opposite_logits")
    arguments = dict(zip(names, (x.detach() for x in projected_inputs((2, 3, 12, 8), device=device)), strict=True))
    arguments |= {"height": 3, "width": 4}
    reason = [""] if name == "reference" else []
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.polaformer, name)(*(arguments | change(arguments)).values(), *reason)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["polarity_attention_backward", "reference_backward"])
@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda x: x[:1], "grad_out is .* they must agree"),
        (0, lambda x: x.double(), "grad_out is .* they must agree"),
        (1, lambda x: x[..., :4], "must have one shape"),
        (6, lambda x: x[:, :, :8], "state is .*; pass on what forward gave"),
        (6, lambda x: x.double(), "state is .*; pass on what forward gave"),
        (7, lambda x: x[..., None], "key_mean is .*; pass on what forward gave"),
        (8, lambda x: x.half(), "key_shift is .*; pass on what forward gave"),
    ],
)
def test_wrong_arguments_of_the_raw_gradient(device, name, number, change, message):
    inputs = [x.detach() for x in projected_inputs((2, 3, 12, 8), device=device)]
    out, *saved = torch.ops.polaformer.polarity_attention(*inputs, 3, 4)
    arguments = [torch.ones_like(out), *inputs, *saved]
    arguments[number] = change(arguments[number])
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.polaformer, name)(*arguments, 3, 4, *([""] if name == "reference_backward" else []))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_four_thousand_random_calls(device, tmp_path):
    """Every call raises or returns the right result; on the CPU under the address sanitizer, where available."""
    environment = dict(os.environ)
    if device == "cpu" and Path(find_library("libasan.so")).is_absolute():
        environment |= build_sanitized(tmp_path)
    script = Path(__file__).with_name("fuzz_operators.py")
    command = [sys.executable, "-W", "ignore", script, device, "0", "4000"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, f"exit {finished.returncode}: {finished.stderr[-4000:]}"
    counts = json.loads(finished.stdout)
    assert sum(counts.values()) == 4000
    assert len(counts) == 12  # each of the six operators refused some and computed some
    assert min(counts.values()) > 150


def build_sanitized(folder: Path) -> dict[str, str]:
    """Build the CPU kernels with the address sanitizer into a copy of polaformer; return its environment variables."""
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    compiler = folder / "compiler"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -fsanitize=address -g1 -O0\n')  # -O3 takes ten times as long
    compiler.chmod(0o755)
    environment = os.environ | {"POLAFORMER_KERNELS": "cpu", "CXX": str(compiler)}
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    for file in (ROOT / "polaformer").glob("*.py"):
        shutil.copy(file, folder / "polaformer")
    return {
        "LD_PRELOAD": f"{find_library('libasan.so')} {find_library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "PYTHONPATH": str(folder),
    }


def find_library(name: str) -> str:
    """Path of the compiler's own library, or the bare name if it has none."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.check_output(command, text=True).strip()

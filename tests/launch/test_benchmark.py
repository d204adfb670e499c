"""The kernel benchmark on tiny shapes: its report, its check of correctness, what it skips, its memory figures."""

import re
from functools import partial

import pytest
import torch

from launch.benchmark import kernel, kernel_runner, measure
from launch.benchmark.kernel_runner import AttentionCall, WrongResult, check, make_inputs, model_shapes
from launch.benchmark.shapes import Shape, parse_shape
from polaformer import ops, reference

CPU = torch.device("cpu")
BRIEF = ("--seconds", "0.01", "--limit", "1e9")  # however long it takes: nobody is left out
SMALL = ("--shapes", "2,2,5x7,16", "1,1,8x8,8", *BRIEF)
BASELINES = ("eager", "sdpa")

pytestmark = pytest.mark.usefixtures("small_peak_measurements")


@pytest.fixture
def run(run_benchmark, tmp_path):
    """Returns a function: arguments → (exit status, report, stdout, stderr)."""
    return partial(run_benchmark, kernel, tmp_path / "report" / "kernel.json")


@pytest.fixture(scope="module")
def measured(device, run_benchmark, small_peak_measurements, tmp_path_factory):
    """(device, report, table) of ours and its baselines on two shapes in two dtypes, and of growth."""
    path = tmp_path_factory.mktemp("measured") / "new" / "kernel.json"
    options = ("--device", device, "--dtype", "float32", "bfloat16", "--growth", "8", "4")
    status, report, table, _ = run_benchmark(kernel, path, *SMALL, *options, "--implementations", "ours", *BASELINES)
    assert status == 0
    return device, report, table


def perturbed(change):
    """Ours with its output changed, and the gradients that follow from that."""
    right = ops.polarity_attention
    return lambda *inputs: change(right(*inputs))


class OneTokenWithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):
        return k.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1, 0, grad[-1, 0].abs().amax(-1).argmax()] = 0
        return grad


def one_wrong_token(out):
    changed = torch.zeros_like(out)
    changed[-1, -1, 17] = 0.02 * out.detach().abs().max()
    return out + changed


def test_a_report(measured):
    device, report, table = measured
    assert report["benchmark"] == "kernel"
    assert report["device"]["type"] == device
    assert report["threads"] == torch.get_num_threads()
    assert report["implementation_of_ours"] == ("compiled kernel" if ops.has_compiled_kernels(device) else "reference")
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", report["commit"])
    assert [entry["shape"] for entry in report["growth"][::2]] == [
        f"{kernel._GROWTH_BATCH[device]},1,{side}x{side},96" for side in (4, 8)
    ]
    assert len(report["checks"]) == 2 * 4
    assert all("errors" in entry for entry in report["checks"])
    entries = [(entry["shape"], entry["dtype"], entry["contender"]) for entry in report["results"]]
    assert entries == [
        (shape, dtype, name)
        for shape in SMALL[1:3]
        for dtype in ("float32", "bfloat16")
        for name in ("ours", *BASELINES)
    ]
    for shape, dtype, name in entries:
        assert re.search(rf"^ *{shape} +{dtype} +{name} +\d", table, re.MULTILINE)


def test_figures_are_consistent(measured):
    _, report, _ = measured
    by_key = {(entry["shape"], entry["dtype"], entry["contender"]): entry for entry in report["results"]}
    for (text, dtype, implementation), entry in by_key.items():
        shape = parse_shape(text)
        floor = shape.batch * shape.heads * shape.tokens * shape.head_dim * {"float32": 4, "bfloat16": 2}[dtype]
        for name, elements in (("forward", 4), ("backward", 7), ("both", 11)):
            numbers = entry["passes"][name]
            seconds = numbers["seconds"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            assert seconds["repetitions"] >= 5
            assert numbers["floor_bytes"] == elements * floor
            assert numbers["bytes_per_second"] == pytest.approx(elements * floor / seconds["median"])
            copy = report["copy_bytes_per_second"]["median"]
            assert numbers["share_of_copy_rate"] == pytest.approx(numbers["bytes_per_second"] / copy)
            products = report["product_flops_per_second"][dtype]["median"]
            share = numbers["flops"] / seconds["median"] / products
            assert numbers["share_of_product_rate"] == pytest.approx(share)
            others = {
                baseline: by_key[text, dtype, baseline]
                for baseline in ("ours", *BASELINES)
                if baseline != implementation
            }
            other_dtype = "bfloat16" if dtype == "float32" else "float32"
            others[f"{implementation} {other_dtype}"] = by_key[text, other_dtype, implementation]
            ratios = {
                baseline: other["passes"][name]["seconds"]["median"] / seconds["median"]
                for baseline, other in others.items()
            }
            assert numbers["times_faster_than"] == pytest.approx(ratios)
        peaks = entry["peak_extra_bytes"]
        assert 0 < peaks["forward"] <= peaks["both"]
        assert entry["peak_as_share_of"] == pytest.approx(
            {baseline: peaks["both"] / other["peak_extra_bytes"]["both"] for baseline, other in others.items()}
        )
    ours = by_key["2,2,5x7,16", "float32", "ours"]["passes"]
    assert [ours[name]["flops"] for name in measure.PASSES] == [n * 2 * 2 * 35 * 16**2 for n in (8, 20, 28)]
    sdpa = by_key["2,2,5x7,16", "float32", "sdpa"]["passes"]
    assert [sdpa[name]["flops"] for name in measure.PASSES] == [n * 2 * 2 * 35**2 * 16 for n in (4, 10, 14)]

    for ratio, dtype in zip(report["growth_ratios"], ("float32", "bfloat16"), strict=True):
        first, last = (entry for entry in report["growth"] if entry["dtype"] == dtype)
        assert (ratio["dtype"], ratio["tokens"]) == (dtype, 4)
        medians = [entry["passes"]["both"]["seconds"]["median"] for entry in (first, last)]
        assert ratio["seconds"] == pytest.approx(medians[1] / medians[0])
        peaks = [entry["peak_extra_bytes"]["both"] for entry in (first, last)]
        assert ratio["peak_extra_bytes"] == pytest.approx(peaks[1] / peaks[0])


def test_a_saved_report_shows_the_same_table(run, capsys, tmp_path):
    arguments = *SMALL[:2], *BRIEF, "--dtype", "float32", "--implementations", "ours", "eager", "--growth"
    _, report, table, _ = run(*arguments, "--markdown")
    assert kernel.main(["--show", str(tmp_path / "report" / "kernel.json"), "--markdown"]) == 0
    assert capsys.readouterr().out == table
    [row] = [line for line in table.splitlines() if "| ours" in line]
    faster = report["results"][0]["passes"]["both"]["times_faster_than"]["eager"]
    assert f" {faster:.2f} " in row
    assert report["growth"] == report["growth_ratios"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_correct_implementations_pass_the_check(device, dtype):
    shape = Shape(2, 2, 7, 9, 16)
    for attention in (ops.polarity_attention, reference.polarity_attention, reference.eager_polarity_attention):
        errors = check(attention, shape, dtype, torch.device(device))
        assert list(errors) == ["out", *(f"grad_{name}" for name in ("q", "k", "v", "same_logits", "opposite_logits"))]
        assert all(error.ours <= error.allowed for sizes in errors.values() for error in sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("attention", "tensor"),
    [
        (perturbed(lambda out: 1.02 * out), "out"),
        (perturbed(one_wrong_token), "out"),
        (perturbed(lambda out: out.clone().index_fill_(2, torch.tensor([5]), float("nan"))), "out"),
        (lambda q, k, *rest: ops.polarity_attention(q, OneTokenWithoutGradient.apply(k), *rest), "grad_k"),
        (lambda q, k, v, same, *rest: ops.polarity_attention(q, k, v, 0 * same + same.detach(), *rest), "grad_same_.*"),
        (lambda q, k, v, same, opposite, h, w: ops.polarity_attention(q, k, v, same, opposite, w, h), "out"),
    ],
    ids=["all a little", "one token", "NaN", "one token without gradient", "no gradient", "height and width swapped"],
)  # fmt: skip
def test_wrong_implementations_fail_the_check(attention, tensor, dtype):
    message = f"^{tensor} of 2,2,7x9,16 in {str(dtype)[6:]} is wrong: .* error .*; nothing was timed, run the tests"
    with pytest.raises(WrongResult, match=message):
        check(attention, Shape(2, 2, 7, 9, 16), dtype, CPU)


def test_nothing_is_timed_if_ours_is_wrong(run, monkeypatch):
    wrong = perturbed(lambda out: 1.02 * out)
    monkeypatch.setattr(kernel_runner.ops, "polarity_attention", wrong)
    status, report, table, errors = run(*SMALL, "--dtype", "float32")
    assert (status, report, table) == (1, None, "")
    assert "error: out of 2,2,5x7,16 in float32 is wrong" in errors
    assert "measuring" not in errors


@pytest.mark.slow
def test_without_a_compiler_other_implementations_are_measured(run):
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}):
        options = "--device", "cpu", "--dtype", "float32", "--implementations", "compiled", "eager"
        status, report, table, _ = run(*SMALL[:2], *BRIEF, *options)
    compiled, eager = report["results"]
    assert status == 0
    assert "passes" in eager
    assert "passes" not in compiled
    assert "No working C++ compiler" in compiled["skipped"]
    assert f"skipped: compiled on 2,2,5x7,16 in float32: {compiled['skipped']}\n" in table
    assert report["checks"] == report["growth"] == []  # ours does not take part


def test_implementations_that_take_too_long_are_skipped(run):
    status, report, table, _ = run(*SMALL[:2], "--dtype", "float32", "--limit", "1e-9", "--growth", "--device", "cpu")
    assert status == 0
    reasons = {entry["contender"]: entry["skipped"] for entry in report["results"]}
    assert set(reasons) == set(kernel_runner.IMPLEMENTATIONS)
    assert all("products alone take" in reason and "more than --limit 1e-09" in reason for reason in reasons.values())
    assert reasons["ours"].startswith("not checked: ")
    assert report["checks"][0]["skipped"] == reasons["ours"]
    assert "right on 0 of 1 shapes and dtypes (1 not checked, see below); times" in table
    assert reasons["sdpa"] in table


def test_shapes_that_do_not_fit_into_memory_are_skipped(run):
    """Two terabytes of inputs alone."""
    status, report, _, _ = run("--shapes", "200000,1,128x128,96", "--dtype", "float32", "--limit", "1e9", "--growth",
                               "--device", "cpu")  # fmt: skip
    assert status == 0
    for entry in report["results"]:
        assert "passes" not in entry
        assert "GB of memory; " in entry["skipped"]


@pytest.mark.parametrize("implementation", ["ours", "eager", "sdpa"])
def test_predicted_memory(implementation):
    """From a piece of one image for a batch of whole ones; what does not grow with them is counted too often."""
    shape = Shape(3, 1, 160, 64, 32)
    call = AttentionCall(kernel_runner.get_implementation(implementation), make_inputs(shape, torch.float32, CPU))
    needed = measure.peak_bytes(call.both, CPU)
    assert 0.95 * needed < kernel_runner.predict_bytes(implementation, shape, torch.float32, CPU) < 2 * needed


def test_peak_memory(device):
    x = torch.ones(1 << 20, device=device)  # 4 MiB
    assert measure.peak_bytes(lambda: x.add_(1).sum(), torch.device(device)) < 1 << 20
    assert measure.peak_bytes(lambda: (x + 1) * 2 + x, torch.device(device)) == pytest.approx(2 << 22, rel=1e-3)
    assert measure.peak_bytes(lambda: [x + 1 for _ in range(3)], torch.device(device)) == pytest.approx(
        3 << 22, rel=1e-3
    )


def test_inputs_are_views_of_one_projection():
    inputs = make_inputs(Shape(2, 3, 4, 5, 8), torch.bfloat16, CPU)
    q, k, v, same, opposite = inputs.tensors
    assert q.shape == k.shape == v.shape == inputs.grad_out.shape == (2, 3, 20, 8)
    assert q.stride() == k.stride() == v.stride() == (20 * 4 * 24, 8, 4 * 24, 1)
    assert len({x.untyped_storage().data_ptr() for x in (q, k, v)}) == 1
    assert inputs.grad_out.transpose(1, 2).is_contiguous()
    assert same.shape == opposite.shape == (3, 16)
    assert (q.dtype, same.dtype) == (torch.bfloat16, torch.float32)


def test_shapes_of_the_models():
    assert list(map(str, model_shapes([224, 1024], [8]))) == [
        *("8,1,56x56,96", "8,2,28x28,96", "8,1,256x256,96", "8,2,128x128,96")
    ]

"""The benchmark of depthwise convolutions on a tiny model: its shapes, its report, its check of correctness."""

import re
from functools import partial

import pytest
import torch

from launch.benchmark import depthwise, depthwise_runner, measure
from launch.benchmark.depthwise_runner import (
    TOLERANCES,
    Convolution,
    WrongResult,
    bind,
    find_errors,
    make_inputs,
    model_convolutions,
)
from polaformer import PRESETS, ops
from polaformer.layers import DepthwiseConv
from polaformer.model import PolaFormerPP

CPU = torch.device("cpu")
RIGHT = ops.depthwise_conv2d
TINY = ("--models", "polaformerpp_b0", "--resolutions", "32", "--batch", "2", "--seconds", "0.01")
PYTORCH = ("channels-last", "nchw")
SHAPES = ("2,8x8,32,3x3", "2,8x8,32,5x5", "2,8x8,112,3x3", "2,4x4,64,3x3")  # the first of b0's twelve

pytestmark = pytest.mark.usefixtures("small_peak_measurements")


@pytest.fixture
def run(run_benchmark, tmp_path):
    """Returns a function: arguments → (exit status, report, stdout, stderr)."""
    return partial(run_benchmark, depthwise, tmp_path / "report" / "depthwise.json")


@pytest.fixture(scope="module")
def measured(device, run_benchmark, small_peak_measurements, tmp_path_factory):
    """(device, report, table) of ours and PyTorch's in both layouts, in two dtypes and five rounds."""
    path = tmp_path_factory.mktemp("measured") / "depthwise.json"
    options = ("--device", device, "--dtype", "float32", "bfloat16", "--implementations", "ours", *PYTORCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "MAX_ROUNDS", 5)
        status, report, table, _ = run_benchmark(depthwise, path, *TINY, *options)
    assert status == 0
    return device, report, table


def test_shapes_of_b5():
    occurrences = model_convolutions("polaformerpp_b5", 224, 8)
    assert len(occurrences) == 12
    assert sum(occurrences.values()) == 114
    assert [str(shape) for shape in occurrences][::4] == ["8,56x56,96,3x3", "8,28x28,192,5x5", "8,14x14,1568,3x3"]


def test_shapes_are_those_of_the_model():
    """As (side, channels, kernel size, adds its input), each as often as the model computes it."""
    computed = []

    def record(convolution, arguments):
        x, residual = arguments
        computed.append((x.shape[1], x.shape[3], convolution.kernel_size[0], residual is x))

    with torch.device("meta"):
        model = PolaFormerPP(PRESETS["polaformerpp_b1"])
        for module in model.modules():
            if isinstance(module, DepthwiseConv):
                module.register_forward_pre_hook(record)
        model(torch.empty(1, 3, 64, 64))
    occurrences = model_convolutions("polaformerpp_b1", 64, 1)
    expected = [
        (shape.side, shape.channels, shape.kernel_size, shape.adds_input)
        for shape, times in occurrences.items()
        for _ in range(times)
    ]
    assert sorted(computed) == sorted(expected)


def test_a_report(measured):
    device, report, table = measured
    assert report["benchmark"] == "depthwise"
    assert report["device"]["type"] == device
    compiled = ops.has_compiled_kernels(device)
    assert report["implementation_of_ours"] == ("compiled kernel" if compiled else "reference")
    assert len(report["checks"]) == 12 * 2
    assert all("errors" in entry for entry in report["checks"])
    entries = [(entry["shape"], entry["dtype"], entry["contender"]) for entry in report["results"]]
    expected = [
        (shape, dtype, name) for shape in SHAPES for dtype in ("float32", "bfloat16") for name in ("ours", *PYTORCH)
    ]
    assert entries[: len(expected)] == expected
    assert len(entries) == 12 * 2 * 3
    for shape, dtype, name in entries:
        assert re.search(rf"^{shape} +{dtype} +{name} +\d", table, re.MULTILINE)
    for dtype in ("float32", "bfloat16"):
        assert re.search(rf"^polaformerpp_b0 +32 +{dtype} +24 +\d", table, re.MULTILINE)


def test_figures_are_consistent(measured):
    _, report, _ = measured
    by_key = {(entry["shape"], entry["dtype"], entry["contender"]): entry for entry in report["results"]}
    for (shape, dtype, name), entry in by_key.items():
        batch, side, _, channels, kernel_size, _ = map(int, re.split("[,x]", shape))
        activation = batch * side**2 * channels * {"float32": 4, "bfloat16": 2}[dtype]
        forward = 2 if kernel_size == 3 else 3
        for of_pass, activations in (("forward", forward), ("backward", 3), ("both", forward + 3)):
            numbers = entry["passes"][of_pass]
            seconds = numbers["seconds"]
            assert seconds["repetitions"] == 5
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            assert numbers["floor_bytes"] == activations * activation
            assert numbers["bytes_per_second"] == pytest.approx(activations * activation / seconds["median"])
            copy = report["copy_bytes_per_second"]["median"]
            assert numbers["share_of_copy_rate"] == pytest.approx(numbers["bytes_per_second"] / copy)
            ratios = numbers["times_faster_than"]
            assert set(ratios) == {"ours", *PYTORCH} - {name}
            for other, ratio in ratios.items():
                # Each bound holds in at least three of five rounds, and so for the median.
                theirs = by_key[shape, dtype, other]["passes"][of_pass]["seconds"]
                assert theirs["low"] / seconds["high"] <= 1.000001 * ratio["median"]
                assert ratio["median"] <= 1.000001 * theirs["high"] / seconds["low"]


def test_sums_over_a_model(measured):
    _, report, _ = measured
    for entry in report["models"]:
        assert (entry["model"], entry["resolution"], entry["convolutions"]) == ("polaformerpp_b0", 32, 24)
        medians = {
            (result["shape"], result["contender"]): result["passes"]["both"]["seconds"]["median"]
            for result in report["results"]
            if result["dtype"] == entry["dtype"]
        }
        names = ("ours", *PYTORCH)
        sums = {name: sum(2 * medians[shape, name] for shape in entry["occurrences"]) for name in names}
        sums["better layout"] = min(sums[name] for name in PYTORCH)
        sums["better layout by shape"] = sum(
            2 * min(medians[shape, name] for name in PYTORCH) for shape in entry["occurrences"]
        )
        assert entry["seconds"] == pytest.approx(sums)
        ours = sums.pop("ours")
        assert entry["times_faster_than"] == pytest.approx({name: other / ours for name, other in sums.items()})


def test_shapes_instead_of_models(run):
    shapes = ("1,4x4,8,5x5", "2,3x3,16,3x3")
    options = ("--device", "cpu", "--dtype", "float32", "--implementations", "ours", "nchw", "--seconds", "0.01")
    status, report, table, _ = run("--shapes", *shapes, shapes[0], *options)
    assert status == 0
    assert [entry["shape"] for entry in report["checks"]] == list(shapes)
    assert [entry["shape"] for entry in report["results"]] == [shape for shape in shapes for _ in range(2)]
    assert report["models"] == []
    assert "of a model" not in table


def test_without_ours_nothing_is_checked(run):
    options = ("--device", "cpu", "--dtype", "float32", "--implementations", "nchw", "--seconds", "0.01")
    status, report, table, _ = run("--shapes", "2,3x3,16,3x3", *options)
    assert (status, report["checks"]) == (0, [])
    assert "\nnothing was checked, as ours is not among --implementations; times are medians" in table


def test_ratios_are_of_the_same_round():
    shape, copy = Convolution(1, 2, 4, 3), measure.quantiles([1e9])
    found = {
        "ours": dict.fromkeys(measure.PASSES, [1.0, 2.0, 4.0]),
        "nchw": dict.fromkeys(measure.PASSES, [3.0, 4.0, 4.0]),
        "compiled": "no compiler",
    }
    ours, nchw, compiled = depthwise.describe(shape, torch.float32, found, copy)
    assert ours["passes"]["both"]["times_faster_than"]["nchw"]["median"] == 2  # of 3, 2 and 1
    assert nchw["passes"]["both"]["times_faster_than"].keys() == {"ours"}
    assert compiled["skipped"] == "no compiler"
    [summed] = [depthwise.sum_over_model({shape: 3}, "float32", [ours, nchw, compiled])]
    assert summed["seconds"] == {"ours": 6, "nchw": 12, "better layout": 12, "better layout by shape": 12}


def test_a_saved_report_shows_the_same_tables(run, capsys, tmp_path):
    arguments = (*TINY, "--dtype", "float32", "--implementations", "ours", "nchw")
    _, report, table, _ = run(*arguments, "--device", "cpu", "--markdown")
    assert depthwise.main(["--show", str(tmp_path / "report" / "depthwise.json"), "--markdown"]) == 0
    assert capsys.readouterr().out == table
    [row] = [line for line in table.splitlines() if line.startswith("| polaformerpp_b0 ")]
    assert f" {report['models'][0]['times_faster_than']['better layout']:.2f} " in row


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_all_implementations_compute_the_same(device, dtype, kernel_size):
    shape = Convolution(2, 5, 16, kernel_size)
    assert len(find_errors(shape, dtype, torch.device(device))) == (4 if kernel_size == 3 else 5)
    inputs = make_inputs(shape, dtype, torch.device(device))
    ours = bind("ours", inputs).results()
    for name in PYTORCH:
        results = bind(name, inputs).results()
        if name == "nchw":
            results = [x.permute(0, 2, 3, 1) if place not in (2, 3) else x for place, x in enumerate(results)]
        for own, other in zip(ours, results, strict=True):
            size = own.float().abs().max()
            assert (own.float() - other.float()).abs().max() <= 2 * TOLERANCES[dtype] * size


def perturbed(change):
    """Ours with its output changed, and the gradients that follow from that."""
    return lambda *inputs: change(RIGHT(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("convolve", "tensor"),
    [
        (perturbed(lambda out: 1.02 * out), "out"),
        (perturbed(lambda out: out.clone().index_fill_(1, torch.tensor([1]), float("nan"))), "out"),
        (lambda x, weight, bias, residual: RIGHT(x, weight, bias), "out"),
        (lambda x, weight, bias, residual: RIGHT(x, weight, bias) + residual.detach(), "grad_x"),
        (lambda x, weight, *rest: RIGHT(x, 1.02 * weight - 0.02 * weight.detach(), *rest), "grad_weight"),
        (lambda x, w, bias, residual: RIGHT(x, w, 0 * bias + bias.detach(), residual), "grad_bias"),
    ],
    ids=["all a little", "NaN", "no residual", "no gradient of the residual", "gradient of the weight", "of the bias"],
)  # fmt: skip
def test_wrong_implementations_fail_the_check(monkeypatch, convolve, tensor, dtype):
    monkeypatch.setattr(depthwise_runner.ops, "depthwise_conv2d", convolve)
    message = f"^{tensor} of 2,6x6,8,3x3 in {str(dtype)[6:]} is wrong: .* error .*, allowed .*; nothing was timed"
    with pytest.raises(WrongResult, match=message):
        find_errors(Convolution(2, 6, 8, 3), dtype, CPU)


def test_nothing_is_timed_if_ours_is_wrong(run, monkeypatch):
    monkeypatch.setattr(depthwise_runner.ops, "depthwise_conv2d", perturbed(lambda out: 1.02 * out))
    status, report, table, errors = run(*TINY, "--dtype", "float32", "--device", "cpu")
    assert (status, report, table) == (1, None, "")
    assert "error: out of 2,8x8,32,3x3 in float32 is wrong" in errors
    assert "measuring" not in errors


@pytest.mark.slow
def test_without_a_compiler_other_implementations_are_measured(run):
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}):
        options = ("--device", "cpu", "--dtype", "float32", "--implementations", "compiled", "nchw")
        status, report, table, _ = run(*TINY, *options)
    assert status == 0
    compiled, nchw = report["results"][:2]
    assert "passes" in nchw
    assert "No working C++ compiler" in compiled["skipped"]
    assert f"skipped: compiled on 2,8x8,32,3x3 in float32: {compiled['skipped']}\n" in table
    assert report["checks"] == []  # ours does not take part
    assert report["models"][0]["seconds"].keys() == {"nchw", "better layout", "better layout by shape"}
    assert report["models"][0]["times_faster_than"] == {}

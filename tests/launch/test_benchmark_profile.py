"""Profiles of a tiny shape and a tiny model: their reports, and their parts."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from launch.benchmark import measure, profiling
from launch.benchmark.profiling import Launch, Run, operators, profile_on_cpu, short_name, split_by_markers, summarize
from polaformer import ops

TINY = ("--shapes", "2,1,7x9,16", "1,2,4x4,8", "--runs", "5")

pytestmark = pytest.mark.usefixtures("small_peak_measurements")


@pytest.fixture(scope="module")
def profiled(device, small_peak_measurements, tmp_path_factory):
    """(device, report, path of its JSON) of polarity attention on two shapes."""
    path = tmp_path_factory.mktemp("profiled") / "new" / "profile.json"
    assert profiling.main([*TINY, "--device", device, "--output", str(path)]) == 0
    return device, json.loads(path.read_text()), path


@pytest.fixture(scope="module")
def model(device, tmp_path_factory):
    """(device, report, path of its JSON) of a step of b0."""
    path = tmp_path_factory.mktemp("profiled") / "model.json"
    options = ("--model", "polaformerpp_b0", "--batch", "2", "--resolution", "32", "--runs", "2")
    assert profiling.main([*options, "--device", device, "--output", str(path)]) == 0
    return device, json.loads(path.read_text()), path


def test_a_report(profiled):
    device, report, _ = profiled
    assert report["benchmark"] == "profile"
    assert report["device"]["type"] == device
    assert report["dtype"] == {"cpu": "float32", "cuda": "bfloat16"}[device]
    assert report["profiled"] == {"cpu": "operators", "cuda": "kernels"}[device]
    assert [entry["shape"] for entry in report["results"]] == ["2,1,7x9,16", "1,2,4x4,8"]
    for entry in report["results"]:
        assert sum(kernel["share"] for kernel in entry["kernels"]) == pytest.approx(1)
        assert {kernel["pass"] for kernel in entry["kernels"]} == {"forward", "backward"}
        for times in (
            *(kernel["seconds"] for kernel in entry["kernels"]),
            *(numbers[key] for numbers in entry["passes"].values() for key in ("seconds", "seconds_with_gaps")),
        ):
            assert 0 <= times["low"] <= times["median"] <= times["high"]
            assert times["repetitions"] == 5
        assert all(kernel["launches"] >= 1 for kernel in entry["kernels"])
        names = [(kernel["pass"], kernel["signature"]) for kernel in entry["kernels"]]
        assert len(names) == len(set(names))


def test_the_kernels_are_those_of_the_pass(profiled):
    device, report, _ = profiled
    if not ops.has_compiled_kernels(device):
        pytest.skip(ops.kernels_unavailable_reason(device))
    forward, backward = (
        {kernel["name"] for kernel in report["results"][0]["kernels"] if kernel["pass"] == name}
        for name in ("forward", "backward")
    )
    if device == "cuda":
        assert {"sum_keys", "attend"} <= forward
        assert {"differentiate_queries", "differentiate_keys"} <= backward
        assert not any("amax" in name or "reduce_kernel" in name for name in forward | backward)
    else:
        assert "polaformer::polarity_attention" in forward
        assert "polaformer::polarity_attention_backward" in backward - forward


def test_floor_and_copy(profiled):
    _, report, _ = profiled
    itemsize = {"float32": 4, "bfloat16": 2}[report["dtype"]]
    for entry, elements in zip(report["results"], (2 * 63 * 16, 2 * 16 * 8), strict=True):
        for name, tensors in (("forward", 4), ("backward", 7)):
            numbers = entry["passes"][name]
            assert numbers["floor_bytes"] == tensors * elements * itemsize
            rate = numbers["floor_bytes"] / numbers["seconds"]["median"]
            assert numbers["bytes_per_second"] == pytest.approx(rate)
            copy = report["copy_bytes_per_second"]["median"]
            assert numbers["share_of_copy_rate"] == pytest.approx(rate / copy)


@pytest.mark.parametrize("markdown", [(), ("--markdown",)])
def test_a_saved_report_is_shown(profiled, capsys, markdown):
    _, report, path = profiled
    assert profiling.main(["--show", str(path), *markdown]) == 0
    text = capsys.readouterr().out
    profiling.show(report, bool(markdown))
    assert capsys.readouterr().out == text
    for entry in report["results"]:
        for kernel in entry["kernels"]:
            assert re.search(rf"{kernel['pass']}[ |]+{re.escape(kernel['name'])}[ |]+\d", text)
        assert f" {1e6 * entry['passes']['forward']['seconds']['median']:.1f} (" in text


def test_a_step_of_a_model(model, capsys):
    device, report, path = model
    assert (report["model"], report["batch"], report["resolution"]) == ("polaformerpp_b0", 2, 32)
    found = report["operators"]
    assert sum(one["share"] for one in found) == pytest.approx(1)
    assert sum(one["seconds"] for one in found) == pytest.approx(report["seconds"])
    assert [one["share"] for one in found] == sorted((one["share"] for one in found), reverse=True)
    calls = {one["name"]: one["calls"] for one in found}
    assert calls["aten::_fused_adamw_"] >= 1
    if ops.has_compiled_kernels(device):
        assert calls["polaformer::polarity_attention_backward"] == 4  # two stages of two blocks
    assert profiling.main(["--show", str(path)]) == 0
    text = capsys.readouterr().out
    assert f"{1000 * report['seconds']:.4g} ms in" in text
    assert found[0]["name"] in text
    assert len(text.splitlines()) <= 40


def test_runs_of_the_cpu():
    """A linear layer is one matrix product; what `linear` itself takes is not the product's."""
    layer, x = nn.Linear(8, 8), torch.ones(4, 8)
    runs = profile_on_cpu(lambda: layer(x), 4)
    assert len(runs) == 4
    for run in runs:
        names = [launch.name for launch in run.launches]
        assert names[0] == "aten::linear"
        assert names.count("aten::addmm") == 1
        assert 0 < sum(launch.seconds for launch in run.launches) <= run.seconds_with_gaps


def test_operators_of_the_cpu():
    x = torch.ones(64, 64)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        for _ in range(3):
            (x @ x).relu_()
            x @ x
    found = {one["name"]: one for one in operators(profiler.events(), "cpu", 3)}
    assert found["aten::mm"]["calls"] == 2
    assert found["aten::relu_"]["calls"] == 1


def test_events_are_split_by_markers():
    stream = [SimpleNamespace(name=name) for name in ("early", "flush", "a", "b", "flush", "a", "flush")]
    divided = split_by_markers(stream, {"flush"})
    assert [[event.name for event in run] for run in divided] == [["a", "b"], ["a"], []]


def test_summary_of_runs():
    """The times of a kernel are added up within a run, then the median is taken."""
    runs = [Run([Launch("a", seconds), Launch("b", 1), Launch("a", 1)], 9) for seconds in (1, 2, 6)]
    a, b = summarize(runs)
    assert (a["name"], a["launches"], a["seconds"]["median"]) == ("a", 2, 3)
    assert (b["name"], b["launches"], b["seconds"]["median"]) == ("b", 1, 1)


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        (
            "void polaformer::(anonymous namespace)::attend<96>(polaformer::(anonymous namespace)::Forward)",
            "attend",
        ),
        ("void <unnamed>::differentiate_keys<__half, (int)96>(<unnamed>::Backward)", "differentiate_keys"),
        ("polaformer::combine_key_splits(polaformer::Forward)", "combine_key_splits"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >"
            "(int, at::native::FillFunctor<float>, std::array<char*, 1ul>)",
            "vectorized_elementwise_kernel FillFunctor",
        ),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", None),
        ("triton_poi_fused_add_0", None),
        ("Memset (Device)", None),
        ("Memcpy DtoD (Device -> Device)", None),
        ("aten::mm", None),
        ("autograd::engine::evaluate_function: MmBackward0", None),
    ],
)
def test_short_names(signature, name):
    assert short_name(signature) == (name or signature)


def test_profiles_survive_a_later_interrupt(tmp_path, monkeypatch):
    profile_shape, path = profiling.profile_shape, tmp_path / "profile.json"

    def end_at_the_second(shape, *rest):
        if shape.heads == 2:
            raise KeyboardInterrupt
        return profile_shape(shape, *rest)

    monkeypatch.setattr(profiling, "profile_shape", end_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        profiling.main([*TINY, "--device", "cpu", "--output", str(path)])
    assert [entry["shape"] for entry in json.loads(path.read_text())["results"]] == ["2,1,7x9,16"]


def test_a_model_that_fails(tmp_path, capsys):
    """VGG has no residual branches to drop."""
    path = tmp_path / "profile.json"
    assert profiling.main(["--model", "vgg11", "--device", "cpu", "--output", str(path)]) == 1
    error = "error: TypeError: VGG.__init__() got an unexpected keyword argument 'drop_path_rate'\n"
    assert capsys.readouterr() == ("", error)
    assert not path.exists()


def test_no_module_hides_one_of_python():
    """`python launch/benchmark` puts that folder before everything else on Python's path."""
    names = {path.stem for path in measure.Path(measure.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    assert "profiling" in names
    assert not names & sys.stdlib_module_names


def test_the_folder_starts_the_commands(command):
    finished = command("launch/benchmark", "profile", "--help")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.startswith("usage: python -m launch.benchmark profile ")

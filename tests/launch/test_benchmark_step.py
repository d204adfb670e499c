"""Training steps of tiny models: their report, models that fail, and the count of operations."""

import json

import pytest
import torch
from timm.models import VisionTransformer, register_model
from torch import nn
from torch._dynamo.utils import counters

from launch.benchmark import measure, step
from launch.benchmark.measure import describe_error
from launch.benchmark.step import Batch, count_flops, create_model, resolve_batch, train_on_noise

CPU = torch.device("cpu")
BRIEF = ("--batch", "2", "--resolution", "32", "--seconds", "0.01")

pytestmark = pytest.mark.usefixtures("small_peak_measurements")


def layers_flops(model, batch):
    """Operations of a step's linear layers and convolutions, from the layers' own outputs.

    Forward takes two for each output and weight that it is made from; so do both gradients, but there is none of the
    images.
    """
    counted = []

    def count(layer, inputs, output):
        passes = 3 if inputs[0].requires_grad else 2
        counted.append(passes * 2 * output.numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    model(torch.randn(batch.images, 3, batch.resolution, batch.resolution))
    return sum(counted)


@pytest.fixture(scope="module")
def measured(device, small_peak_measurements, tmp_path_factory):
    """(device, report, path of its JSON) of a model of ours, one that cannot be made, and one of timm's."""
    path = tmp_path_factory.mktemp("measured") / "new" / "step.json"
    names = ("polaformerpp_b0", "vgg11", "test_vit")  # VGG has no residual branches to drop
    options = ("--device", device, "--modes", "eager", "--output", str(path))
    assert step.main([*BRIEF, *options, "--models", *names]) == 0
    return device, json.loads(path.read_text()), path


def test_a_report(measured):
    device, report, path = measured
    assert report["benchmark"] == "step"
    assert report["device"]["type"] == device
    assert (report["batch"], report["resolution"]) == (2, 32)
    assert report["dtype"] == {"cpu": "float32", "cuda": "bfloat16"}[device]
    assert [(entry["model"], entry["mode"]) for entry in report["results"]] == [
        (name, "eager") for name in ("polaformerpp_b0", "vgg11", "test_vit")
    ]
    assert [file.name for file in path.parent.iterdir()] == ["step.json"]
    batch = Batch(2, 32, torch.device(device))
    for entry in report["results"][::2]:
        times, rates = entry["seconds"], entry["images_per_second"]
        assert 0 < times["low"] <= times["median"] <= times["high"]
        assert 0 < rates["low"] <= rates["median"] <= rates["high"]
        assert times["repetitions"] == rates["repetitions"] >= measure.MIN_ROUNDS
        assert 2 / times["high"] <= rates["median"] <= 2 / times["low"]
        assert entry["flops"] == count_flops(entry["model"], batch)
        model = create_model(entry["model"], 32)
        assert entry["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        rate = report["product_flops_per_second"]["median"]
        assert entry["share_of_product_rate"] == pytest.approx(entry["flops"] / times["median"] / rate)
        assert 0 < entry["loss"] < 20
        if device == "cuda":
            assert entry["peak_bytes"] > 4 * 4 * entry["parameters"]  # parameters, gradients, two moments
        else:
            assert entry["peak_bytes"] is None


def test_a_model_that_fails_is_skipped(measured):
    failed = measured[1]["results"][1]
    assert failed["skipped"] == "TypeError: VGG.__init__() got an unexpected keyword argument 'drop_path_rate'"
    assert failed.keys() == {"model", "mode", "skipped"}


def test_if_no_model_runs_the_command_fails(tmp_path, capsys):
    path = tmp_path / "step.json"
    options = ("--device", "cpu", "--models", "vgg11", "--modes", "eager", "--output", str(path))
    assert step.main([*BRIEF, *options]) == 1
    assert "skipped: vgg11, eager: TypeError: " in capsys.readouterr().out
    assert "skipped" in json.loads(path.read_text())["results"][0]


@pytest.mark.parametrize("markdown", [(), ("--markdown",)])
def test_a_saved_report_is_shown(measured, capsys, markdown):
    _, report, path = measured
    assert step.main(["--show", str(path), *markdown]) == 0
    table = capsys.readouterr().out
    step.show(report, bool(markdown))
    assert capsys.readouterr().out == table
    [row] = [line for line in table.splitlines() if "polaformerpp_b0" in line]
    entry = report["results"][0]
    assert f" {entry['images_per_second']['median']:.1f} (" in row
    assert f" {1000 * entry['seconds']['median']:.1f} (" in row
    assert row.startswith("| ") == bool(markdown)
    assert f"skipped: vgg11, eager: {report['results'][1]['skipped']}\n" in table


def test_operations_of_depthwise_convolutions():
    """PyTorch's own counter takes their gradients for those of dense ones."""
    batch = Batch(2, 64, CPU)
    model = create_model("test_convnext", 64).train()
    assert any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in model.modules())
    assert count_flops("test_convnext", batch) == layers_flops(model, batch)


def test_operations_of_softmax_attention():
    """Two products of (N, D) × (D, N) and (N, N) × (N, D) forward, four backward."""
    batch = Batch(2, 32, CPU)
    model = create_model("test_vit", 32).train()
    tokens, channels = 2 * 2 + 1, model.embed_dim
    attention = len(model.blocks) * 2 * 6 * 2 * tokens**2 * channels
    assert count_flops("test_vit", batch) == layers_flops(model, batch) + attention


def test_operations_of_ours():
    """b0 on 64 × 64 pixels: polarity attention with 32 channels a head in two stages, softmax attention in two."""
    batch = Batch(2, 64, CPU)
    model = create_model("polaformerpp_b0", 64).train()
    polarity = sum(2 * (8 + 20) * 2 * heads * tokens * 32**2 for heads, tokens in ((1, 16 * 16), (2, 8 * 8)))
    softmax = sum(2 * 12 * 2 * tokens**2 * channels for tokens, channels in ((4 * 4, 128), (2 * 2, 384)))
    assert count_flops("polaformerpp_b0", batch) == layers_flops(model, batch) + polarity + softmax


def test_a_step_trains():
    model, step = train_on_noise("polaformerpp_b0", "eager", Batch(4, 32, CPU))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    losses = [step().item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5  # it knows these four images by now
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(moved)
    assert all(parameter.grad is None for parameter in model.parameters())


@register_model
def one_block_vit(num_classes, drop_path_rate, **_of_pretrained_weights):
    """A model of timm's that is compiled in seconds; the smallest that timm has takes half a minute."""
    sizes = {"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 1}
    return VisionTransformer(num_classes=num_classes, drop_path_rate=drop_path_rate, **sizes)


@pytest.mark.slow
def test_a_compiled_model(tmp_path):
    path = tmp_path / "step.json"
    options = ("--device", "cpu", "--models", one_block_vit.__name__, "--output", str(path))
    counters.clear()
    assert step.main([*BRIEF, *options]) == 0
    eager, compiled = json.loads(path.read_text())["results"]
    assert (eager["mode"], compiled["mode"]) == ("eager", "compiled")
    assert eager["flops"] == compiled["flops"]
    assert counters["stats"]["unique_graphs"] > 0


def test_errors_in_one_line():
    assert describe_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")) == "out of memory"
    assert describe_error(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")) == "out of memory"
    assert describe_error(ValueError("a\n  b")) == "ValueError: a b"
    assert describe_error(RuntimeError("no\nSet TORCHDYNAMO_VERBOSE=1 for more")) == "RuntimeError: no"
    assert len(describe_error(RuntimeError("a" * 10000))) < 500


def test_every_default_model_exists():
    arguments = step.parse(["--device", "cpu"])
    batch = resolve_batch(arguments, arguments.models)
    assert arguments.models[0] == "polaformerpp_b5"
    assert all(count_flops(name, batch) > 1e12 for name in arguments.models)

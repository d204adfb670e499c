"""Accuracies against a plain loop over the same images, on one and on several ranks; and the command's errors."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dataio.loader import Batch
from dataio.manifest import load_manifest
from dataio.pack.packer import PackOptions, pack
from launch.evaluate import evaluate, main
from launch.find_weights import find_weights
from launch.model_metadata import make_model_metadata, read_model_metadata
from polaformer.weights import official_name, save_weights

SCORES = ("top1", "top5", "loss")


def plain_scores(model: nn.Module, folder: Path, transform) -> dict[str, float]:
    """Accuracies and loss of images that are read with PIL, prepared by timm and counted one by one."""
    manifest = load_manifest(folder)
    images = []
    for row in manifest.samples:
        with open(folder / manifest.shards[row["shard"]].name, "rb") as shard:
            shard.seek(row["offset"])
            images.append(transform(Image.open(io.BytesIO(shard.read(row["bytes"]))).convert("RGB")))
    with torch.no_grad():
        logits = model.eval()(torch.stack(images))
    top1, top5, losses = [], [], []
    for row, label in zip(logits, manifest.samples["label"].tolist(), strict=True):
        best = row.argsort(descending=True).tolist()
        top1.append(best[0] == label)
        top5.append(label in best[:5])
        losses.append(F.cross_entropy(row, torch.tensor(label)).item())
    return {"top1": 100 * np.mean(top1), "top5": 100 * np.mean(top5), "loss": np.mean(losses)}


def assert_same_scores(report: dict, expected: dict) -> None:
    """Compares accuracies exactly enough to notice a single image."""
    assert {name: report[name] for name in SCORES} == pytest.approx(expected, rel=1e-4)


def pack_resized(files: list[Path], size: int, folder: Path) -> Path:
    """Packs images at a size that evaluation does not resize, so that DALI's and PIL's pixels are equal."""
    for file in files:
        target = folder / "images" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            image.resize((size, size)).save(target)
    pack(folder / "images", folder / "packed", PackOptions())
    return folder / "packed"


@pytest.fixture
def score(no_launcher, capsys):
    """Returns a function, to be called once: arguments → exit status, report and errors of the command."""

    def run(*arguments: object) -> tuple[int, dict | None, str]:
        capsys.readouterr()
        status = main([*map(str, arguments), "--device", "cpu", "--threads", "1"])
        printed = capsys.readouterr()
        return status, json.loads(printed.out) if printed.out else None, printed.err

    return run


@pytest.fixture(scope="module")
def clothes(fashion) -> list[Path]:
    """97 images of 10 classes: not divisible by 3 ranks, nor by a batch of 7 or 32."""
    return sorted(fashion.glob("*/*.png"))[::4][:97]


@pytest.fixture(scope="module")
def val(clothes, tmp_path_factory) -> Path:
    return pack_resized(clothes, 32, tmp_path_factory.mktemp("val"))


@pytest.fixture(scope="module")
def ema(trained_run) -> Path:
    return find_weights(trained_run, "ema")


@pytest.fixture(scope="module")
def trained(ema) -> nn.Module:
    model = timm.create_model("polaformerpp_b0", num_classes=10)
    model.load_state_dict(load_file(ema))
    return model


def timms_transform(pretrained_cfg: dict, size: int):
    prepared = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
    return timm.data.create_transform(**{**prepared, "input_size": (3, size, size)})


@pytest.fixture(scope="module")
def expected(ema, trained, val) -> dict[str, float]:
    """Scores of the trained run's EMA by a plain loop."""
    scores = plain_scores(trained, val, timms_transform(read_model_metadata(ema).timm_config()["pretrained_cfg"], 32))
    assert 30 < scores["top1"] < scores["top5"], "the run must have learned something for these tests to mean it"
    return scores


def test_known_logits(alone):
    """Three batches of 3, 1 and 2 images whose logits are their pixels; the label has rank 1, 2, 6, 1, 5, 1.

    A second model turns the order of the logits round.
    """
    models = [nn.Sequential(nn.Flatten(), nn.Linear(6, 6, bias=False)) for _ in range(2)]
    nn.init.eye_(models[0][1].weight)
    models[1][1].weight.data = torch.eye(6).flip(0)
    ordered = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    labels = torch.tensor([0, 1, 5, 0, 4, 0])
    images = ordered.repeat(6, 1).view(6, 6, 1, 1)
    batches = [Batch(images[part], labels[part], labels[part].numpy(), 0) for part in (range(3), [3], range(4, 6))]
    scores, turned = evaluate(models, iter(batches), 6, "fp32")
    assert (scores["top1"], turned["top1"]) == pytest.approx((100 * 3 / 6, 100 * 1 / 6))
    assert (scores["top5"], turned["top5"]) == pytest.approx((100 * 5 / 6, 100 * 3 / 6))
    assert scores["loss"] == pytest.approx(F.cross_entropy(images.flatten(1), labels).item())
    assert turned["loss"] == pytest.approx(F.cross_entropy(images.flatten(1).flip(1), labels).item())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_keeps_its_mode_and_weights(alone, training, precision):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2)).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    model[2].register_forward_hook(lambda module, inputs, output: seen.append((module.training, output)))
    labels = torch.tensor([0, 1])
    evaluate([model], [Batch(torch.randn(2, 3, 1, 1), labels, labels.numpy(), 0)], 2, precision)
    ((mode, output),) = seen
    assert not mode
    assert output.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert not output.requires_grad
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_on_one_rank(score, trained_run, val, ema, expected, tmp_path):
    out = tmp_path / "new folder" / "scores.json"
    status, report, errors = score("--weights", trained_run, "--data", val, "--batch-size", 32, "--out", out)
    assert (status, errors) == (0, "")
    assert json.loads(out.read_text()) == report
    assert {name: report[name] for name in report.keys() - set(SCORES)} == {
        "weights": str(ema),
        "model": "polaformerpp_b0",
        "image_size": 32,
        "data": str(val),
        "samples": len(load_manifest(val)),
        "classes": 10,
        "classes_with_samples": 10,
    }
    assert_same_scores(report, expected)


@pytest.mark.parametrize(("kind", "prefix"), [("model", "eval"), ("ema", "eval_ema")])
def test_it_equals_the_runs_own_evaluation(score, trained_run, fashion_shards, kind, prefix):
    lines = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "eval/top1" in line][-1]
    _, report, _ = score("--weights", trained_run, "--data", fashion_shards / "val", "--kind", kind)
    for name in SCORES:
        assert report[name] == pytest.approx(measured[f"{prefix}/{name}"], rel=1e-4), name


def test_data_from_a_url(score, trained_run, val, expected, tmp_path):
    status, report, errors = score(
        *("--weights", trained_run, "--data", val.as_uri(), "--cache", tmp_path / "cache", "--cache-gib", 0.01)
    )
    assert (status, report["data"]) == (0, val.as_uri()), errors
    assert_same_scores(report, expected)


def test_another_image_size(score, ema, trained, clothes, tmp_path):
    packed = pack_resized(clothes[::4], 64, tmp_path)
    _, report, _ = score("--weights", ema, "--data", packed, "--image-size", 64)
    assert report["image_size"] == 64
    transform = timms_transform(read_model_metadata(ema).timm_config()["pretrained_cfg"], 64)
    assert_same_scores(report, plain_scores(trained, packed, transform))


def test_three_ranks_see_every_image_once(forked, trained_run, val, expected, tmp_path):
    command = "-m", "launch.evaluate", "--weights", trained_run, "--data", val, "--batch-size", 7, "--threads", 1
    finished = forked(3, *command, "--out", tmp_path / "scores.json")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report == json.loads((tmp_path / "scores.json").read_text())
    assert report["samples"] == len(load_manifest(val))
    assert_same_scores(report, expected)


@pytest.fixture(scope="module")
def official(clothes, tmp_path_factory) -> tuple[Path, Path, nn.Module]:
    """A checkpoint with the official names for 2 classes, a packed folder with one image of each, and the model.

    The images have 256 × 256 pixels, of which the recipe evaluates the 224 × 224 in the centre.
    """
    folder = tmp_path_factory.mktemp("official")
    files = [next(file for file in clothes if file.parent.name == name) for name in ("Bag", "Coat")]
    torch.manual_seed(0)
    model = timm.create_model("polaformerpp_b0", num_classes=2)
    state = {official_name(name): value for name, value in model.state_dict().items()}
    torch.save({"model": {}, "state_dict_ema": state}, folder / "official.pth")
    return folder / "official.pth", pack_resized(files, 256, folder), model


def test_official_weights_on_more_ranks_than_images(forked, official):
    weights, packed, model = official
    command = "-m", "launch.evaluate", "--weights", weights, "--model", "polaformerpp_b0", "--data", packed
    finished = forked(3, *command, "--threads", 1)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert (report["samples"], report["image_size"], report["top5"]) == (2, 224, 100)
    assert_same_scores(report, plain_scores(model, packed, timms_transform(model.pretrained_cfg, 224)))
    first, last = load_manifest(packed).classes
    message = (
        f"{weights} names no classes; its outputs are taken to be those of {packed}, from {first} to {last} in that"
    )
    assert finished.stderr.count(message) == 1


def test_a_report_that_cannot_be_written_is_printed(score, trained_run, val):
    status, report, errors = score("--weights", trained_run, "--data", val, "--out", "/dev/full")
    assert status == 2
    assert report["samples"] == 97
    assert errors == "error: cannot write --out /dev/full: No space left on device; the JSON is above\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-size", 33), "--image-size 33 is no size; use a multiple of 32"),
        (("--image-size", 0), "--image-size 0 is no size; use a multiple of 32"),
        (("--image-size", -32), "--image-size -32 is no size; use a multiple of 32"),
        (("--batch-size", 0), "the evaluation batch is 0; use at least 1"),
        (("--model", "polaformerpp_b1"), "{ema} is of polaformerpp_b0, not of --model polaformerpp_b1; leave --model"),
        (
            ("--data", "{photos}"),
            'class "astronaut" of {photos} is not among the 10 classes of {ema}, such as Ankle_boot',
        ),
        (("--data", "{empty}"), "no manifest.json in {empty}; write shards there with: python -m dataio.pack"),
        (("--weights", "{empty}"), "{empty} is a folder without checkpoints; give a run's folder, one of its checkp"),
        (("--weights", "{official}"), "{official} does not say which model it is of; add --model polaformerpp_b0"),
        (
            ("--weights", "{official}", "--model", "polaformerpp_b0"),
            "the official checkpoint does not fit this model: head.weight is (2, 2048), the model needs (10, 2048);",
        ),
        (("--weights", "{empty}/b4.safetensors"), "no weights at {empty}/b4.safetensors; give a run's folder, o"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(score, ema, val, official, shards, tmp_path, arguments, message):
    paths = {"ema": ema, "official": official[0], "photos": shards, "empty": tmp_path}
    given = [argument.format(**paths) if isinstance(argument, str) else argument for argument in arguments]
    status, report, errors = score("--weights", ema, "--data", val, *given)
    assert (status, report) == (2, None)
    assert errors.startswith(f"error: {message.format(**paths)}")
    assert errors.count("\n") == 1


def test_too_small_a_cache_is_an_error(score, ema, val, tmp_path):
    cache = "--cache", tmp_path / "cache", "--cache-gib", 1e-5
    status, _, errors = score("--weights", ema, "--data", val.as_uri(), *cache)
    assert status == 2
    assert errors.startswith("error: a cache of 1e-05 GiB is too small, file://")
    assert "at a time; allow it 0.01 (data.cache_gib, --cache-gib), or lower" in errors


def test_weights_with_fewer_classes_than_the_data_are_an_error(score, ema, val, tmp_path, configure):
    metadata = make_model_metadata("polaformerpp_b0", load_manifest(val).classes[:9], configure().data)
    save_weights(load_file(ema), tmp_path / "nine.safetensors", metadata.safetensors_metadata())
    status, _, errors = score("--weights", tmp_path / "nine.safetensors", "--data", val)
    assert status == 2
    assert errors.startswith(f'error: class "Trouser" of {val} is not among the 9 classes of {tmp_path}/nine.safetens')


def test_data_with_some_of_the_classes(score, ema, trained, clothes, tmp_path):
    """Validation lacks classes in the middle; labels follow the names in training."""
    names = sorted({file.parent.name for file in clothes})
    kept = [file for file in clothes if file.parent.name in (names[1], names[4], names[8])]
    packed = pack_resized(kept, 32, tmp_path)
    assert load_manifest(packed).classes == (names[1], names[4], names[8])
    status, report, errors = score("--weights", ema, "--data", packed)
    assert status == 0, errors
    assert (report["samples"], report["classes"], report["classes_with_samples"]) == (len(kept), 10, 3)
    transform = timms_transform(read_model_metadata(ema).timm_config()["pretrained_cfg"], 32)
    hits = 0
    with torch.no_grad():
        for file in kept:
            with Image.open(file) as image:
                pixels = transform(image.resize((32, 32)).convert("RGB"))[None]
            hits += names[trained.eval()(pixels).argmax().item()] == file.parent.name
    assert hits > 0
    assert report["top1"] == pytest.approx(100 * hits / len(kept))


def test_an_unknown_model(capsys):
    with pytest.raises(SystemExit):
        main(["--weights", "x", "--data", "y", "--model", "resnet50"])
    assert "invalid choice: 'resnet50' (choose from" in capsys.readouterr().err


def test_a_contradictory_environment_is_an_error(score, monkeypatch, ema, val):
    monkeypatch.setenv("RANK", "0")
    status, _, errors = score("--weights", ema, "--data", val)
    assert status == 2
    assert errors.startswith("error: LOCAL_RANK is not set although other variables of a launcher are; start the run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_an_error(no_launcher, capsys, ema, val):
    assert main(["--weights", str(ema), "--data", str(val), "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: local rank 0 has no GPU, 0 are visible to it; start one")

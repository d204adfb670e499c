"""The data benchmark on few images: that all loaders deliver the same, its report, and what it refuses."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataio.manifest import load_manifest
from dataio.shards import LocalShards
from launch.benchmark import data, data_stalls, report
from launch.benchmark.loader_processes import (
    LOADERS,
    OutputFingerprint,
    OutputMismatch,
    benchmark_loaders,
    compare,
    fingerprint,
    loader_processes,
    make_loader,
    require_tools,
    run_trial,
)
from launch.benchmark.loaders import AUGMENTATIONS, WORKLOADS, LoaderConfig, rows_by_key
from launch.benchmark.sample_images import pack_images

SMALL = ("--images", "24", "--batch", "10", "--size", "64", "--cores", "2", "--rounds", "2", "--device", "cpu")
CLASSES = 6


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """24 images in two shards."""
    folder = tmp_path_factory.mktemp("photographs")
    pack_images(folder, 24, 2)
    return folder / "packed"


@pytest.fixture(scope="module")
def config(packed) -> LoaderConfig:
    """To be had for each workload with `replace`."""
    return LoaderConfig(workload="simple", folder=packed, batch=10, size=64, cores=2, device="cpu")


def test_images(packed):
    manifest = load_manifest(packed)
    rows = manifest.samples
    assert len(manifest) == 24
    assert len(manifest.shards) % 2 == 0  # webdataset deals whole shards to two workers
    assert np.bincount(rows["label"]).tolist() == [4] * CLASSES
    assert 425 <= rows["width"].min() < 500 < rows["width"].max() <= 575
    assert 318 <= rows["height"].min() < 375 < rows["height"].max() <= 432
    shards = LocalShards(manifest)
    images = [np.asarray(Image.open(io.BytesIO(shards.read(sample)))) for sample in range(24)]
    assert len({image.tobytes() for image in images}) == 24
    assert min(image.std() for image in images) > 20  # there is something to see
    names = rows_by_key(manifest)
    assert list(names.values()) == list(range(24))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_all_loaders_deliver_the_same(config, workload):
    fingerprints = {}
    for name, workloads in LOADERS.items():
        if workload in workloads:
            uses_workers = name not in ("ours", "dali")  # whose end would take 5 s each; test_a_report has them
            config = replace(config, workload=workload, cores=0 if uses_workers else 2)
            loader = make_loader(name, config)
            fingerprints[name] = fingerprint(loader, config, 0, CLASSES)
            assert run_trial(loader, config, 1, CLASSES).labels == (4,) * CLASSES  # in the next epoch, too
    found = compare(config, fingerprints, (4,) * CLASSES)
    first = fingerprints["ours"]
    if workload == "read":
        assert len(first.digest) == 64
    elif workload in AUGMENTATIONS:
        assert first.shape == ("torch.float32", 3, 64, 64)
        assert max(found[name]["statistics"] for name in found) > 0
    else:
        assert first.levels.shape[0] == 24
        assert first.levels.std() > 20
        assert found["ours"] == {"mean_levels": 0, "largest_levels": 0}


@pytest.mark.parametrize(
    ("workload", "wrong", "message"),
    [
        ("read", {"labels": (4, 4, 3)}, r"read: dali delivers 11 images, \(4, 4, 3\) of each class, where 12"),
        ("read", {"labels": (4, 3, 5)}, r"read: dali delivers 12 images, \(4, 3, 5\) of each class, where 12"),
        ("read", {"digest": "b"}, "read: dali delivers other bytes than ours; nothing was timed"),
        (
            "simple",
            {"shape": ("torch.float64", 3, 8, 8)},
            "simple: dali delivers other images of .*float64.*, not .*32",
        ),
        ("evaluation", {"levels": np.full((2, 3), 101.0)}, "pixels than ours: mean_levels 1, allowed 0.5; nothing"),
        (
            "decode",
            {"levels": np.full((2, 3), np.nan)},
            "decode: dali delivers other pixels than ours: mean_levels n",
        ),
        ("simple", {"statistics": np.full(6, 2)}, "simple: dali delivers other .*: statistics 2, allowed 1.25"),
    ],
)
def test_different_outputs_are_refused(config, workload, wrong, message):
    right = OutputFingerprint(labels=(4, 4, 4), shape=("torch.float32", 3, 8, 8), digest="a")
    right = replace(
        right,
        levels=np.full((2, 3), 100.0) if workload in ("evaluation", "decode") else None,
        statistics=np.zeros(6) if workload == "simple" else None,
    )
    config = replace(config, workload=workload)
    compare(config, {"ours": right, "dali": right}, (4, 4, 4))
    with pytest.raises(OutputMismatch, match=message):
        compare(config, {"ours": right, "dali": replace(right, **wrong)}, (4, 4, 4))


@pytest.mark.slow
def test_processes_that_fail(config, monkeypatch):
    config = replace(config, workload="read")
    with pytest.raises(OutputMismatch, match=r"read: webdataset delivers 24 images, \(4, 4, .*, where 25, \(5, 4, 4"):
        benchmark_loaders(["webdataset"], config, (5, 4, 4, 4, 4, 4), 1)
    with loader_processes(["webdataset"], config, CLASSES) as [worker]:
        with pytest.raises(RuntimeError, match="^read: webdataset failed: TypeError: .*NoneType"):
            worker.run(None)
        worker.process.kill()
        with pytest.raises(RuntimeError, match="read: webdataset's process ended with status -?[0-9]+; free some mem"):
            worker.run(fingerprint)
    assert not worker.process.is_alive()


@pytest.fixture(scope="module")
def measured(run_benchmark, tmp_path_factory):
    """(report, table, folder) of ours and torchvision at one workload."""
    path = tmp_path_factory.mktemp("measured") / "report" / "data.json"
    arguments = "--workloads", "simple", "--loaders", "ours", "torchvision", "--models", "polaformerpp_b0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_STALL_STEPS", 1)
        patch.setattr(data_stalls, "_WARM_UP_STEPS", 0)
        patch.setattr(data_stalls, "MIN_ROUNDS", 2)
        status, report, table, errors = run_benchmark(data, path, *SMALL, *arguments)
    assert status == 0, errors
    return report, table, path.parent


@pytest.mark.slow
def test_a_report(measured):
    report, table, folder = measured
    assert report["benchmark"] == "data"
    assert report["device"]["type"] == "cpu"
    assert report["versions"].keys() >= {"torch", "webdataset", "nvidia-dali-cuda130", "pillow"}
    assert (report["cores"], report["batch"], report["size"], report["rounds"]) == (2, 10, 64, 2)
    assert report["data"]["images"] == 24
    assert "photographs" in report["data"]["description"]
    assert 425 < report["data"]["mean_width"] < 575
    entries = [(entry["work"], entry["contender"]) for entry in report["results"]]
    assert entries == [("simple", "ours"), ("simple", "torchvision")]
    for entry in report["results"]:
        assert entry["images"] == 24
        for quantity in ("images_per_second", "cpu_seconds_per_1000_images"):
            numbers = entry[quantity]
            assert 0 <= numbers["low"] <= numbers["median"] <= numbers["high"]
            assert numbers["repetitions"] == 2
        assert entry["images_per_second"]["low"] > 0
        assert 50 << 20 < entry["peak_own_bytes"] < entry["peak_resident_bytes"]
    ours, baseline = report["results"]
    there, back = ours["times_faster_than"]["torchvision"], baseline["times_faster_than"]["ours"]
    step = (there["high"] - there["low"]) / 3
    ratios = there["low"] - step, there["high"] + step  # of both rounds, between which the quantiles lie
    assert there["median"] == pytest.approx(np.mean(ratios))
    assert back["median"] == pytest.approx(np.mean([1 / ratio for ratio in ratios]))
    assert baseline["difference_to_first"]["statistics"] < 1
    assert re.search(rf"simple +torchvision .* {there['median']:.2f} ×", table)
    assert report["decoding_share"] == {}  # "decode" was left out
    with Image.open(folder / "data.png") as chart:
        assert chart.width > chart.height > 100
    assert (folder / "data.png").stat().st_size < 100_000


@pytest.mark.slow
def test_data_stalls(measured):
    report, table, _ = measured
    [entry] = report["feeding"]
    assert (entry["model"], entry["recipe"], entry["batch"]) == ("polaformerpp_b0", "rand-augment", 10)
    assert entry["share_fed"] > 0
    assert f"{100 * entry['share_fed']:.1f} %" in table
    assert "polaformerpp_b0" in table


@pytest.mark.slow
def test_a_saved_report_shows_the_same_table(measured, capsys):
    _, table, folder = measured
    assert data.main(["--show", str(folder / "data.json")]) == 0
    assert capsys.readouterr().out == table


@pytest.mark.slow
def test_workloads_are_added_to_an_earlier_report(measured):
    report, _, _ = measured
    later = report | {"results": [report["results"][0] | {"work": "read", "images": 1}], "feeding": []}
    added = data.add_to(report, later)
    assert [entry["work"] for entry in added["results"]] == ["read", "simple", "simple"]
    assert [entry["images"] for entry in added["results"]] == [1, 24, 24]
    assert added["feeding"] == report["feeding"]
    with pytest.raises(ValueError, match="--add: cores was 2 and is 3; measure all workloads again"):
        data.add_to(report, report | {"cores": 3})


def test_decoding_shares():
    results = [
        {"work": workload, "contender": name, "images_per_second": {"median": rate}}
        for workload, name, rate in (
            ("decode", "ours", 200),
            ("simple", "ours", 50),
            ("simple", "dali", 1),
            ("read", "ours", 9),
        )
    ]
    assert data.decoding_shares(results) == {"simple": 0.25}


def test_missing_libraries(monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert data.main([*SMALL, "--workloads", "simple"]) == 2
    assert capsys.readouterr().err == ("error: not installed: webdataset; install it, or choose --loaders ours dali\n")
    require_tools(["ours", "dali"])

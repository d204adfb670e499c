"""The benchmark of first batches on few samples: its packed folder, its loader state, its report."""

import numpy as np
import pytest
import torch

from dataio.augment.params import ImageOptions
from dataio.loader import TrainLoader
from dataio.manifest import load_manifest
from dataio.sampler import ShuffledSampler
from dataio.shards import LocalShards
from launch.benchmark import resume
from launch.benchmark.sample_images import pack_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """1,680 samples, of 12 images."""
    folder = tmp_path_factory.mktemp("photographs")
    return resume.replicate_samples(pack_images(folder, 12, 1), folder / "many", 1500)


def test_a_folder_of_many_samples_is_a_packed_one(many):
    """Three in each of 560 shards; what is read has the labels of the table, or it would be an error."""
    assert (len(many), len(many.shards)) == (1680, 560)
    few = load_manifest(many.folder.parent / "packed")
    for sample in (0, 1, 2, 3, 1679):
        assert LocalShards(many).read(sample) == LocalShards(few).read(sample % 3)


def test_the_state_is_that_of_a_run_after_so_many_steps(many):
    folder = many.folder
    loader = TrainLoader(load_manifest(folder), ImageOptions(image_size=32), resume._PLAN, CPU)
    for _ in range(3):
        next(loader)
    assert resume.state_at(3, folder) == loader.state()


def test_another_batch_than_the_first_is_refused(many, monkeypatch):
    monkeypatch.setattr(TrainLoader, "restore", lambda *_: None)
    with pytest.raises(RuntimeError, match="the first batch is that of position 0; its time would mean nothing"):
        resume.first_batch(many.folder, resume.state_at(7, many.folder), CPU)


@pytest.mark.slow
def test_a_report(run_benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resume, "_UNIQUE_IMAGES", 12)
    path = tmp_path / "new" / "resume.json"
    options = ("--device", "cpu", "--samples", "1200", "--step", "1000000", "--rounds", "1")
    status, report, said, _ = run_benchmark(resume, path, *options)
    assert status == 0
    fresh, resumed = (report["seconds"][kind]["median"] for kind in ("fresh", "resumed"))
    assert report["seconds_later_than_fresh"]["median"] == pytest.approx(resumed - fresh)
    assert report["state_bytes"] < 10_000
    assert report["data"]["samples"] == 1680
    assert list(report["correlation"]) == ["full", "windowed by 16 shards"]
    assert f"first batch of 128 after a fresh start: {fresh:.2f} s; after a resume at step 1,000,000, from " in said
    assert resume.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == said


def test_correlations_are_those_of_the_orders(many):
    stored, found = np.arange(1680), []
    for seed in range(3):
        for epoch in range(5):
            seen = ShuffledSampler(seed, (3,) * 560).samples_at(epoch * 1680 + stored)
            found.append(abs(((seen - 839.5) * (stored - 839.5)).sum() / ((stored - 839.5) ** 2).sum()))
    assert resume.correlations(many)["full"] == pytest.approx(max(found))

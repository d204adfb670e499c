"""The benchmark of first batches on few samples: what it starts from, what it reports, what it refuses."""

import json

import numpy as np
import pytest
import torch

from dataio.index import load_manifest
from dataio.loader import TrainLoader
from dataio.shards import ShardFiles
from dataio.views import ImageOptions
from launch.benchmark import resume
from launch.benchmark.photographs import pack_photographs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The 12 samples of a packed folder, over and over; and that one."""
    folder = tmp_path_factory.mktemp("photographs")
    few = pack_photographs(folder, 12, 2)
    return resume.multiply(few, folder / "many", 1500), few


def test_a_folder_of_many_samples_is_a_packed_one(many):
    many, few = many
    assert len(many) == 1500
    assert len(many.shards) == 125 * len(few.shards)
    for sample in (0, 11, 12, 777, 1499):
        assert ShardFiles(many).read(sample) == ShardFiles(few).read(sample % 12)
        assert many.samples["label"][sample] == few.samples["label"][sample % 12]


def test_the_state_is_that_of_a_run_which_has_come_so_far(many):
    folder = many[0].folder
    loader = TrainLoader(load_manifest(folder), ImageOptions(image_size=32), resume._PLAN, CPU)
    for _ in range(3):
        next(loader)
    assert resume.state_at(3, folder) == loader.state()


def test_another_batch_than_the_first_is_refused(many, monkeypatch):
    monkeypatch.setattr(TrainLoader, "restore", lambda *_: None)
    with pytest.raises(RuntimeError, match="the first batch is that of position 0; its time would mean nothing"):
        resume.first_batch(many[0].folder, resume.state_at(7, many[0].folder), CPU)


def test_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resume, "_PHOTOGRAPHS", 12)
    path = tmp_path / "new" / "resume.json"
    options = ("--device", "cpu", "--samples", "1200", "--step", "1000000", "--rounds", "1")
    assert resume.main([*options, "--output", str(path)]) == 0
    report, said = json.loads(path.read_text()), capsys.readouterr().out
    fresh, resumed = (report["seconds"][kind]["median"] for kind in ("fresh", "resumed"))
    assert report["seconds_later_than_fresh"]["median"] == pytest.approx(resumed - fresh)
    assert report["state_bytes"] < 10_000
    assert report["data"]["samples"] == 1200
    assert list(report["correlation"]) == ["full", "windowed by 16 shards"]
    assert f"first batch of 128 after a fresh start: {fresh:.2f} s; after a resume at step 1,000,000, from " in said
    assert resume.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == said


def test_correlations_are_those_of_the_order():
    stored = np.arange(1120)
    expected = 0.0
    for epoch in range(5):
        seen = resume.Order(0, (2,) * 560).samples_at(epoch * 1120 + stored)
        centred = seen - seen.mean()
        expected = max(expected, abs((centred * (stored - stored.mean())).sum() / (centred**2).sum()))
    assert resume.correlations(1500)["full"] == pytest.approx(expected)


@pytest.mark.parametrize(("option", "least"), [("--samples", 560), ("--step", 1), ("--rounds", 1)])
def test_numbers_that_mean_nothing(option, least, capsys):
    assert resume.main([option, "0"]) == 2
    assert f"error: {option} is 0; give {least} or more" in capsys.readouterr().err

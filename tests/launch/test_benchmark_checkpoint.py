"""The benchmark of checkpoints on a small model, and its report."""

import pytest
import torch

from launch.benchmark import checkpoint


@pytest.mark.slow
def test_a_report(run_benchmark, no_launcher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.json"
    options = "--device", "cpu", "--model", "polaformerpp_b0", "--resolution", "64", "--batch", "2", "--rounds", "1"
    status, report, said, _ = run_benchmark(checkpoint, path, *options)
    assert status == 0
    assert list(tmp_path.iterdir()) == [path], "what it wrote is removed"
    assert not torch.distributed.is_initialized()
    median = {name: entry["median"] for name, entry in report["seconds"].items()}
    assert report["save_ratio"]["median"] == pytest.approx(median["save"] / median["cp"])
    assert report["load_ratio"]["median"] == pytest.approx(median["load"] / median["cp"])
    assert report["step_ratio"]["median"] == pytest.approx(median["step while saving"] / median["step"])
    assert 0 < median["copy"] < median["save"]
    assert "a checkpoint of polaformerpp_b0: " in said
    assert checkpoint.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == said

"""The benchmark that kills a run again and again: what it counts, and a run that ends by itself."""

import json

import pytest

from launch.benchmark import goodput


@pytest.mark.slow
def test_a_report(run_benchmark, tmp_path, monkeypatch):
    """Most kills are in start-up here, on a fast machine not all."""
    monkeypatch.setattr(goodput, "_IMAGES", 12)
    path = tmp_path / "goodput.json"
    status, report, said, _ = run_benchmark(goodput, path, "--device=cpu", "--minutes=0.05", "--mtbf-seconds=0.5")
    assert status == 0
    assert report["kills"] >= 1
    assert report["seconds"] >= 3
    assert sum(report["spent"].values()) <= report["seconds"]
    assert report["goodput"] == report["spent"].get("training", 0.0) / report["seconds"]
    assert f"{report['kills']} kills of a rank of 2 in 0." in said
    assert "between starts, or killed in start-up" in said
    assert f"\ngoodput {report['goodput']:.1%}, " in said


def test_a_run_that_ends_by_itself_is_an_error(run_benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "_IMAGES", 12)
    arguments = "--device=cpu", "--world-size=1", "--mtbf-seconds=1000000", "data.val=/nowhere"
    status, report, _, errors = run_benchmark(goodput, tmp_path / "goodput.json", *arguments)
    assert (status, report) == (2, None)
    assert errors.endswith("error: the run ended by itself, with [2], after 0 kills; see above\n")


def test_a_restart_ends_with_the_first_new_step(tmp_path):
    lines = [{"step": 7, "time": 99.0}, {"step": 8, "time": 112.5}, {"step": 9, "time": 113.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert goodput._first_step_after(tmp_path, 100.0) == [112.5]
    assert goodput._first_step_after(tmp_path, 120.0) == []
    assert goodput._first_step_after(tmp_path / "nothing", 100.0) == []

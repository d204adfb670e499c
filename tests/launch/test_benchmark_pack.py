"""The packing benchmark on few images: its report, and commands that fail or lose images."""

import pytest

from launch.benchmark import pack
from launch.benchmark.measure import rotate_order
from launch.benchmark.sample_images import make_images


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "photographs"
    make_images(folder, 12, 1)
    return folder


@pytest.mark.slow
def test_a_report(run_benchmark, tmp_path, capsys):
    path = tmp_path / "new" / "pack.json"
    status, report, table, _ = run_benchmark(pack, path, "--images", 8, "--workers", 2, "--rounds", 1)
    assert status == 0
    seconds = {entry["contender"]: entry["seconds"]["median"] for entry in report["results"]}
    assert list(seconds) == list(pack.COMMANDS)
    assert report["data"]["images"] == 8
    for entry in report["results"]:
        assert entry["cpu_seconds"]["median"] > 0
        assert entry["contender"] in table
        for other, ratio in entry["times_faster_than"].items():
            assert ratio["median"] == pytest.approx(seconds[other] / seconds[entry["contender"]])
    assert pack.main(["--show", str(path), "--markdown"]) == 0
    assert "| ours, --check none " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("exit 3", "made 12 of 12"),
        ("rm $1/made/cat/000002.jpg; echo hush >&2", "made 11 of 12 images; its stderr: hush"),
    ],
)
def test_a_command_that_fails_or_loses_images(source, tmp_path, monkeypatch, script, fault):
    monkeypatch.setitem(
        pack.COMMANDS, "new", lambda source, made, _: ("sh", "-c", f"cp -r $0 $1/made; {script}", source, made[:-5])
    )
    with pytest.raises(RuntimeError, match=f"^new {fault}"):
        pack.run_trial("new", source, tmp_path, 1)


def test_rotated_orders():
    assert rotate_order(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert rotate_order(["a", "b", "c"], 2) == ["c", "a", "b"]

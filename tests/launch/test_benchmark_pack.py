"""The packing benchmark on few images: that its contenders do the same work, what it reports, what it refuses."""

import json

import pytest

from launch.benchmark import pack
from launch.benchmark.sample_images import make_images


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "photographs"
    make_images(folder, 12, 1)
    return folder


@pytest.mark.slow
def test_a_report(tmp_path, capsys):
    path = tmp_path / "new" / "pack.json"
    assert pack.main(["--images", "8", "--workers", "2", "--rounds", "1", "--output", str(path)]) == 0
    report, table = json.loads(path.read_text()), capsys.readouterr().out
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
    [("exit 3", "made 12 of 12"), ("rm $1/made/cat/000002.jpg; echo hush >&2", "made 11 of 12 images and said: hush")],
)
def test_a_contender_that_fails_or_loses_images(source, tmp_path, monkeypatch, script, fault):
    monkeypatch.setitem(
        pack.COMMANDS, "new", lambda source, made, _: ("sh", "-c", f"cp -r $0 $1/made; {script}", source, made[:-5])
    )
    with pytest.raises(RuntimeError, match=f"^new {fault}"):
        pack.run_trial("new", source, tmp_path, 1)


def test_turns_begin_anywhere():
    assert pack.rotate_order(["a", "b", "c"], 0) == ["a", "b", "c"]
    assert pack.rotate_order(["a", "b", "c"], 2) == ["c", "a", "b"]


@pytest.mark.parametrize("option", ["--images", "--workers", "--rounds"])
def test_numbers_that_mean_nothing(option, capsys):
    assert pack.main([option, "0"]) == 2
    assert f"error: {option} is 0; give a number above 0" in capsys.readouterr().err

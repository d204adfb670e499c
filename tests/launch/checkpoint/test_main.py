"""`python -m launch.checkpoint`: lists and checks the checkpoints of a real run, and compares two of them."""

import json
import os
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import polaformer
from dataio.manifest import load_manifest
from launch.checkpoint import layout
from launch.checkpoint.__main__ import main

OLDER, NEWER = "step-00000038", "step-00000075"
VERSION = re.escape(polaformer.__version__)


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A copy of the real run, which tests may damage."""
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.fixture
def printed(capsys):
    """Returns a function: arguments → exit status, lines of output, standard error."""

    def call(*arguments: object) -> tuple[int, list[str], str]:
        status = main([*map(str, arguments)])
        output = capsys.readouterr()
        return status, [" ".join(line.split()) for line in output.out.splitlines()], output.err

    return call


def rows(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("step-")]


def size_of(checkpoint: Path) -> str:
    return f"{sum(path.stat().st_size for path in checkpoint.iterdir()) / 2**20:.1f}"


def test_a_run_is_listed(run, printed):
    folder = run / "checkpoints"
    (folder / "best").write_text(f"{OLDER}\n")
    os.utime(folder / OLDER / "manifest.json", (0, 1e9))
    written = f"{datetime.fromtimestamp(1e9):%Y-%m-%d %H:%M}"
    status, lines, _ = printed(run)
    assert status == 0
    first, second = rows(lines)
    assert re.fullmatch(rf"{OLDER} best 38 2\.\d\d {size_of(folder / OLDER)} 1 1 {VERSION} {written} complete", first)
    assert re.fullmatch(rf"{NEWER} latest 75 4\.\d\d {size_of(folder / NEWER)} 1 1 {VERSION} .* complete", second)
    assert rows(printed(folder)[1]) == [first, second]
    for path, row in ((folder / "best", first), (folder / NEWER, second), (folder / "latest", second)):
        assert rows(printed(path)[1]) == [row]
    assert [row.rpartition(" ")[2] for row in rows(printed(run, "--verify")[1])] == ["intact", "intact"]


def test_the_epoch_is_that_of_the_step(trained_run, fashion_shards):
    images = len(load_manifest(fashion_shards / "train"))
    states = [layout.read_state(trained_run / "checkpoints" / name) for name in (OLDER, NEWER)]
    assert [state.epoch for state in states] == [38 * 16 / images, 75 * 16 / images]


def test_what_is_wrong_is_listed(run, printed):
    folder = run / "checkpoints"
    path = folder / OLDER / "ema.safetensors"
    with open(path, "r+b") as file:
        file.write(b"\0")
    assert printed(run)[0] == 0, "only hashing can tell"
    status, lines, _ = printed(run, "--verify")
    assert status == 1
    assert f"{path} is not what was written (its sha256 differs)" in lines
    assert [row.rpartition(" ")[2] for row in rows(lines)] == ["corrupt", "intact"]
    path.unlink()
    (folder / NEWER / "state.json").write_text("\x1b[2J{")
    (folder / "best").write_text("step-00000001\n")
    status, lines, _ = printed(run)
    assert status == 1
    assert rows(lines)[0].startswith(f"{OLDER} 38 - ")
    text = "\n".join(lines)
    assert f"{path}" in text
    assert "state.json has 5 bytes instead of" in text
    assert "best names step-00000001, which is not there" in text
    (folder / "best").unlink()
    os.mkfifo(folder / "best")
    assert f"{folder / 'best'} is not a file" in printed(run)[1]


def test_a_copy_under_another_name_is_listed_whole_or_damaged(run, printed):
    """Also one whose name begins as that of a checkpoint."""
    copy = shutil.copytree(run / "checkpoints" / OLDER, run / "step-before-the-change")
    status, lines, _ = printed(copy)
    assert (status, rows(lines)[0].split()[1], rows(lines)[0].split()[-1]) == (0, "38", "complete")
    (copy / "ema.safetensors").unlink()
    status, lines, _ = printed(copy)
    assert (status, rows(lines)[0].split()[1], rows(lines)[0].split()[-1]) == (1, "-", "corrupt")


def test_a_checkpoint_of_version_0_1_0_is_listed_with_a_remark(run, printed):
    old = run / "checkpoints" / OLDER
    (old / "engine").mkdir()
    for name in layout.MOMENT_NAMES.values():
        (old / name).rename(old / "engine" / name)
    names = ("model.safetensors", "ema.safetensors", "state.json", *(f"engine/{x}" for x in os.listdir(old / "engine")))
    (old / "manifest.json").write_text(json.dumps({name: layout.describe_file(old / name) for name in names}))
    status, lines, _ = printed(run, "--verify")
    assert status == 0
    assert re.fullmatch(rf"{OLDER} 38 - [\d.]+ - - 0\.1\.0 .* intact", rows(lines)[0])
    assert any(line.startswith(f"{old} was written by version 0.1.0") for line in lines)


def test_what_is_no_checkpoint_is_an_error(run, printed):
    folder = run / "checkpoints"
    for words, message in (
        ([run.parent], f"no checkpoints at {run.parent}; give a run's folder"),
        ([run / "nothing"], "no checkpoints at .*nothing"),
        ([run, "--diff", OLDER, "step-00000001"], f"has no checkpoint step-00000001; there are: {OLDER}, {NEWER}$"),
        ([run, "--diff", OLDER, folder], f"holds 2 checkpoints; give one of them, for example .*/checkpoints/{NEWER}$"),
    ):
        status, _, errors = printed(*words)
        assert status == 2
        assert re.search(f"^error: .*{message}", errors.strip())
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_equal_checkpoints_do_not_differ(run, printed):
    status, lines, _ = printed(run, "--diff", "latest", run / "checkpoints" / NEWER)
    assert status == 0
    assert sum(re.search(r"^\S+: (\d+) of \1 tensors are bit-identical$", line) is not None for line in lines) == 4
    assert lines[-1] == "state.json: 0 fields differ"


def test_differences_are_listed_the_worst_first(run, printed):
    folder = run / "checkpoints"
    shutil.rmtree(folder / OLDER)
    shutil.copytree(folder / NEWER, folder / OLDER)
    path = folder / OLDER / layout.MODEL_NAME
    tensors = load_file(path)
    tensors["norm.weight"][0] += 1.0
    tensors["head.bias"] *= 3
    tensors["norm.bias"][:] = float("nan")
    tensors["stem.1.num_batches_tracked"] += 1000
    tensors["new\x1b"] = tensors.pop("head.weight")
    tensors["stem.0.weight"] = tensors["stem.0.weight"].half()
    save_file(tensors, path)
    (folder / OLDER / layout.EMA_NAME).unlink()
    state = json.loads((folder / OLDER / "state.json").read_text()) | {"world_size": 8}
    (folder / OLDER / "state.json").write_text(json.dumps(state))
    status, lines, _ = printed("--diff", folder / NEWER, folder / OLDER)
    assert status == 1
    original = load_file(folder / NEWER / layout.MODEL_NAME)
    weight = torch.linalg.vector_norm(original["norm.weight"].double())
    largest = 2 * original["head.bias"].abs().max()
    table = "\n".join(lines)
    assert f"{layout.MODEL_NAME}: 220 of 227 tensors are bit-identical" in table
    order = ["norm.bias nan nan", f"head.bias {largest:.3g} 2", f"norm.weight 1 {1 / weight:.3g}"]
    assert sorted(order, key=table.index) == order
    assert table.index(order[-1]) < table.index("stem.1.num_batches_tracked 1e+03")
    assert max(map(table.index, ("head.weight only in A", "new\\x1b only in B"))) < table.index(order[0])
    assert re.search(r"stem\.0\.weight float32 \[.*\] in A, float16 \[.*\] in B", table)
    assert "all tensors only A has this file" in table
    assert "state.json: 1 fields differ" in table
    assert "world_size 1 8" in lines


def test_ten_tensors_of_a_file_are_listed_or_all(run, printed):
    _, lines, _ = printed(run, "--diff", OLDER, NEWER)
    assert sum(re.search(r"^and \d+ more, which --all lists$", line) is not None for line in lines) == 4
    _, all_lines, _ = printed(run, "--diff", OLDER, NEWER, "--all")
    assert len(all_lines) > len(lines) + 600
    assert not any("which --all lists" in line for line in all_lines)


def test_a_file_that_cannot_be_compared_is_an_error(run, printed):
    path = run / "checkpoints" / OLDER / layout.EMA_NAME
    path.unlink()
    os.mkfifo(path)
    status, _, errors = printed(run, "--diff", OLDER, NEWER)
    assert (status, errors) == (2, f"error: {path} is not a file\n")


def test_a_listing_imports_no_framework(run, command):
    """So it takes a fraction of a second."""
    code = (
        "import runpy, sys\nsys.argv = ['', sys.argv[1], '--verify']\ntry:\n    runpy.run_module('launch.checkpoint',"
    )
    code += " run_name='__main__')\nexcept SystemExit as left:\n    print(left.code, sorted(sys.modules.keys() & {"
    code += "'torch', 'timm', 'nvidia', 'deepspeed', 'numpy'}))"
    finished = command("-c", code, run)
    assert finished.stdout.splitlines()[-1] == "0 []", finished.stderr

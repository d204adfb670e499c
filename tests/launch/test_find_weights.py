"""The weights file that a path means, for everything in a run's folder, intact and damaged by copying."""

import os
import re
import shutil
from pathlib import Path

import pytest

from launch.checkpoint import layout
from launch.checkpoint.layout import EMA_NAME, MODEL_NAME
from launch.export import export
from launch.find_weights import WEIGHTS_PATH_HELP, find_weights

OLDER, NEWER = "step-00000038", "step-00000075"


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")


@pytest.mark.parametrize(("kind", "name"), [("ema", EMA_NAME), ("model", MODEL_NAME)])
def test_paths_that_name_weights(run, kind, name):
    folder = run / "checkpoints"
    (folder / layout.BEST).write_text(f"{OLDER}\n")
    newest = folder / NEWER / name
    for path in (run, folder, folder / "latest", folder / NEWER):
        assert find_weights(path, kind) == newest
    for path in (folder / "best", folder / OLDER):
        assert find_weights(path, kind) == folder / OLDER / name
    for path in (newest, folder / OLDER / EMA_NAME):
        assert find_weights(path, kind) == path


def test_an_exported_folder(run, tmp_path):
    weights = export(run, tmp_path / "export", "model")
    assert find_weights(tmp_path / "export", "ema") == weights


def test_a_moved_checkpoint(run, tmp_path):
    """Under another name, as `cp -r RUN/checkpoints/step-00000075 b0` makes it."""
    shutil.copytree(run / "checkpoints" / NEWER, tmp_path / "b0")
    assert find_weights(tmp_path / "b0", "ema") == tmp_path / "b0" / EMA_NAME


def test_best_as_a_folder_or_a_link(run):
    """As users make it to keep a checkpoint under a name of its own."""
    folder = run / "checkpoints"
    (folder / "best").unlink()
    (folder / "best").symlink_to(OLDER)
    assert find_weights(folder / "best", "ema") == folder / "best" / EMA_NAME
    (folder / "best").unlink()
    shutil.copytree(folder / OLDER, folder / "best")
    assert find_weights(folder / "best", "ema") == folder / "best" / EMA_NAME
    with pytest.raises(
        ValueError, match="best is a folder, where a run keeps a file with the name of a checkpoint; mo"
    ):
        layout.check_pointers(folder)


def test_a_corrupt_newest_checkpoint_is_passed_over_with_a_message(run, capsys):
    (run / "checkpoints" / NEWER / MODEL_NAME).unlink()
    assert find_weights(run, "model") == run / "checkpoints" / OLDER / MODEL_NAME
    printed = capsys.readouterr().err
    assert re.fullmatch(f".*{NEWER} cannot be read .*{MODEL_NAME}.*; taking {OLDER}\n", printed)
    assert find_weights(run, "ema") == run / "checkpoints" / NEWER / EMA_NAME, "which is intact"
    assert capsys.readouterr().err == ""


def leave_no_weights(run: Path) -> None:
    (run / "checkpoints" / NEWER / EMA_NAME).unlink()


def cut_weights(run: Path) -> None:
    os.truncate(run / "checkpoints" / NEWER / EMA_NAME, 1000)


def leave_no_manifest(run: Path) -> None:
    (run / "checkpoints" / NEWER / "manifest.json").unlink()


def empty_the_manifest(run: Path) -> None:
    (run / "checkpoints" / NEWER / "manifest.json").write_text("{}")


def point_nowhere(run: Path) -> None:
    (run / "checkpoints" / "best").write_text("step-00000001\n")


def point_at_nothing(run: Path) -> None:
    (run / "checkpoints" / "best").write_bytes(b"\xff\x00")


def leave_no_checkpoints(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(path)


def leave_an_empty_folder(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("damage", "named", "message"),
    [
        (
            leave_no_weights,
            f"checkpoints/{NEWER}",
            f"{NEWER} cannot be read .*{EMA_NAME}.*; give another checkpoint, or",
        ),
        (cut_weights, f"checkpoints/{NEWER}", f"{EMA_NAME} has 1000 bytes instead of [0-9]+; give another checkpoint"),
        (cut_weights, "checkpoints/latest", f"{EMA_NAME} has 1000 bytes .*; give another checkpoint, or copy this one"),
        (
            leave_no_manifest,
            f"checkpoints/{NEWER}",
            f"{NEWER} cannot be read .*manifest.json.*; give another checkpoint",
        ),
        (
            empty_the_manifest,
            f"checkpoints/{NEWER}",
            f"does not name {EMA_NAME}, exp_avg.safetensors, exp_avg_sq.safetensors, {MODEL_NAME}, state.json; give an",
        ),
        (
            point_nowhere,
            "checkpoints/best",
            f"best names step-00000001, which is not there; there are: {OLDER}, {NEWER}$",
        ),
        (
            point_at_nothing,
            "checkpoints/best",
            f"best holds .* instead of the name of a checkpoint; there are: {OLDER},",
        ),
        (leave_no_checkpoints, "", f"no checkpoint in .* is intact: .*{NEWER} is not there$"),
        (leave_an_empty_folder, "", f"is a folder without checkpoints; give {re.escape(WEIGHTS_PATH_HELP)}$"),
        (
            leave_an_empty_folder,
            "checkpoints",
            "checkpoints is a folder without checkpoints; give a run's folder, one of",
        ),
        (leave_no_checkpoints, "checkpoints/latest", f"latest names {NEWER}, which is not there; there are: none$"),
        (leave_no_checkpoints, "none.pth", f"no weights at .*none.pth; give {re.escape(WEIGHTS_PATH_HELP)}$"),
    ],
)
def test_corrupt_checkpoints_are_errors(run, damage, named, message):
    damage(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_weights(run / named, "ema")

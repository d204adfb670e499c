"""Checkpoints of a real run on disk: the newest intact one is found, corrupt ones are passed over, old ones pruned."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launch.checkpoint import layout


@pytest.fixture
def folder(trained_run, tmp_path):
    """A copy of the real run's two checkpoints, which tests may damage."""
    shutil.copytree(trained_run / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def names(folder):
    return sorted(path.name for path in folder.glob("step-*"))


def flip_a_byte(path):
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def test_latest_names_the_newest_checkpoint(folder):
    newest, faults = layout.find_newest(folder)
    assert newest.name == names(folder)[-1] == (folder / "latest").read_text().strip()
    assert faults == []


def test_the_manifest_names_every_file(folder):
    newest, _ = layout.find_newest(folder)
    files = {path.name for path in newest.iterdir()}
    assert set(json.loads((newest / layout.MANIFEST_NAME).read_text())) == files - {layout.MANIFEST_NAME}
    assert files == {
        layout.MANIFEST_NAME,
        layout.STATE_NAME,
        layout.MODEL_NAME,
        layout.EMA_NAME,
        *layout.MOMENT_NAMES.values(),
    }


def test_the_state_is_read_as_it_was_written(folder, tmp_path):
    newest, _ = layout.find_newest(folder)
    state = layout.read_state(newest)
    assert (state.num_classes, state.world_size, state.step) == (10, 1, layout.step_of(newest))
    layout.write_state(tmp_path, state)
    path = tmp_path / layout.STATE_NAME
    assert path.read_bytes() == (newest / layout.STATE_NAME).read_bytes()
    tree = json.loads(path.read_text())
    del tree["guard"]  # as older versions wrote it
    path.write_text(json.dumps(tree))
    assert layout.read_state(tmp_path) == state


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda newest: truncate(newest / "exp_avg.safetensors"), r"exp_avg\.safetensors has \d+ bytes instead of \d+"),
        (lambda newest: flip_a_byte(newest / layout.EMA_NAME), r"ema\.safetensors is not what was written"),
        (lambda newest: (newest / layout.STATE_NAME).unlink(), r"cannot be read \(.*state\.json"),
        (lambda newest: (newest / layout.MANIFEST_NAME).write_text("{"), "cannot be read"),
        (lambda newest: (newest / layout.MANIFEST_NAME).unlink(), "cannot be read"),
        (lambda newest: (newest / layout.MANIFEST_NAME).write_text("[" * 100_000), "cannot be read"),
        (lambda newest: pipe(newest / layout.EMA_NAME), r"ema\.safetensors is not a file"),
        (shutil.rmtree, r"step-\d{8} is not there"),  # which only `latest` tells
    ],
)
def test_a_corrupt_checkpoint_is_passed_over(folder, damage, message):
    older, newer = names(folder)
    damage(folder / newer)
    found, [fault] = layout.find_newest(folder)
    assert found.name == older
    assert re.search(message, fault)


def test_only_corrupt_checkpoints_are_an_error_and_none_at_all_are_not(folder, tmp_path):
    for name in names(folder):
        truncate(folder / name / layout.MODEL_NAME)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact: .*; .* Move the folder away to start over"):
        layout.find_newest(folder)
    for name in names(folder):
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact: .* is not there\. Move the folder away"):
        layout.find_newest(folder)
    assert layout.find_newest(tmp_path / "nothing") == (None, [])


def test_a_pointer_that_is_missing_or_damaged_hides_no_checkpoint(folder):
    newest = folder / names(folder)[-1]
    for content in ("step-1\n", "../step-00000001", ""):
        (folder / layout.LATEST).write_text(content)
        assert layout.find_newest(folder) == (newest, [])
    (folder / layout.LATEST).unlink()
    assert layout.find_newest(folder) == (newest, [])


def test_an_unfinished_checkpoint_is_ignored(folder):
    shutil.copytree(folder / names(folder)[-1], folder / ".step-99999999")
    newest, _ = layout.find_newest(folder)
    assert newest.name == names(folder)[-1]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=["failed", "killed"])
def test_a_checkpoint_that_is_replaced_stays_until_the_new_one_has_its_name(folder, monkeypatch, error):
    """It is the newest where a run evaluates the checkpoint of a stop, and saves it again."""
    before = names(folder)
    newest = folder / before[-1]
    entries = json.loads((newest / layout.MANIFEST_NAME).read_text())
    staging = shutil.copytree(newest, layout.staging_folder(folder, layout.step_of(newest), "0123abcd"))
    rename, inode = Path.rename, newest.stat().st_ino

    def fail(path: Path, target: Path) -> Path:
        if path == staging:
            raise error
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(error):
            layout.publish(staging, entries)
    if error is KeyboardInterrupt:
        assert names(folder) == before[:-1]
        layout.restore_replaced(folder)
    assert (names(folder), newest.stat().st_ino) == (before, inode)
    assert layout.publish(staging, entries) == newest
    assert (names(folder), newest.stat().st_ino != inode) == (before, True)
    assert not list(folder.glob(".*"))


def test_the_best_and_milestones_are_kept_besides_the_newest(folder, tmp_path):
    first, second = (folder / name for name in names(folder))
    newest = shutil.copytree(second, folder / "step-90000000")
    (folder / layout.BEST).write_text(f"{first.name}\n")
    layout.prune(newest, 1, lambda steps: steps == layout.step_of(second))
    assert names(folder) == [first.name, second.name, newest.name]
    layout.prune(newest, 1, lambda steps: False)
    assert names(folder) == [first.name, newest.name]
    (folder / layout.BEST).write_text(f"{newest.name}\n")
    layout.prune(newest, 1, lambda steps: False)
    assert names(folder) == [newest.name]
    assert not list(folder.glob(".*"))


def test_a_run_that_goes_back_has_no_best_checkpoint_until_it_is_better(folder):
    """Unless the best one stays. Scores of others are not known."""
    first, second = (folder / name for name in names(folder))
    newest = shutil.copytree(second, folder / "step-90000000")
    for best, pointers in ((first, {"best", "latest"}), (newest, {"latest"})):
        layout.write_pointer(best, layout.BEST)
        layout.write_pointer(newest, layout.LATEST)
        newest.mkdir(exist_ok=True)
        layout.remove_newer(second)
        assert names(folder) == [first.name, second.name]
        assert {pointer for pointer in layout.POINTERS if (folder / pointer).exists()} == pointers
        assert layout.resolve_pointer(folder / layout.LATEST) == second
    assert not list(folder.glob(".*"))


def test_a_corrupt_checkpoint_does_not_count_as_kept(folder):
    older, newer = names(folder)
    truncate(folder / newer / layout.MODEL_NAME)
    layout.prune(folder / older, 1, lambda steps: False)
    assert layout.find_newest(folder)[0].name == older


def test_an_incompatible_state_is_an_error(folder):
    state = layout.read_state(layout.find_newest(folder)[0])
    state.check_compatible(replace(state, step=0, best_top1=0.0, world_size=7, zero_stage=3))
    with pytest.raises(ValueError, match="has number of classes 10, this start has 12; start it with 10, or choose"):
        state.check_compatible(replace(state, num_classes=12))
    with pytest.raises(ValueError, match="has model polaformerpp_b0, this start has polaformerpp_b1"):
        state.check_compatible(replace(state, model="polaformerpp_b1"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "12"}, "step: Input should be a valid integer"),
        ({"step": -1}, "step: Input should be greater than or equal to 0"),
        ({"best_top1": None}, "best_top1: Input should be a valid number"),
        ({"loader": {}}, "loader.seed: Field required"),
        ({"guard": {"losses": [], "in_a_row": [-1]}}, "guard.in_a_row.0: Input should be greater than or equal to 0"),
        ({"surprise": 1}, "surprise: Unexpected keyword argument"),
    ],
)
def test_a_state_with_other_keys_or_types_is_an_error(folder, change, message):
    newest, _ = layout.find_newest(folder)
    path = newest / layout.STATE_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(f"{path} is of another version, or damaged ({message}")):
        layout.read_state(newest)


def test_a_state_that_is_no_json_is_an_error(tmp_path):
    for text in ("", "[]", "\xff", "[" * 100_000):
        (tmp_path / layout.STATE_NAME).write_text(text)
        with pytest.raises(ValueError, match="is of another version, or damaged"):
            layout.read_state(tmp_path)

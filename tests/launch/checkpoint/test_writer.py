"""Checkpoints of a real engine, written in the background: a failure leaves the earlier ones and nothing of the new."""

import os
import re
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from launch.checkpoint import layout, writer
from launch.distributed import RunError


def save(started, folder, step=1, top1=0.0):
    """Saves at `step`, and returns the writer when the checkpoint is on disk."""
    checkpoints = started.writer(folder)
    checkpoints.save(started.state_at(step), top1)
    checkpoints.wait()
    return checkpoints


def test_a_checkpoint_holds_the_tensors_at_the_time_of_saving(begin, tmp_path, monkeypatch):
    """The training goes on while the thread still waits to write."""
    started = begin()
    started.step()
    expected = {name: value.clone() for name, value in started.engine.module.state_dict().items()}
    may_write = threading.Event()
    write = writer.CheckpointWriter._write
    monkeypatch.setattr(writer.CheckpointWriter, "_write", lambda *words: (may_write.wait(), write(*words)))
    checkpoints = started.writer(tmp_path)
    checkpoints.save(started.state_at(1))
    started.step()
    assert not layout.list_checkpoints(tmp_path)
    may_write.set()
    checkpoints.wait()
    saved = load_file(tmp_path / "step-00000001" / layout.MODEL_NAME)
    assert saved.keys() == expected.keys()
    assert all(saved[name].equal(value) for name, value in expected.items())
    assert any(not saved[name].equal(value) for name, value in started.engine.module.state_dict().items())


def test_weights_carry_the_metadata_and_are_readable_like_other_files(begin, tmp_path):
    started = begin()
    save(started, tmp_path)
    for name in (layout.MODEL_NAME, layout.EMA_NAME):
        with safe_open(tmp_path / "step-00000001" / name, "pt") as file:
            assert file.metadata() == {"model": "b0"}
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000001").iterdir()}
    assert modes == {0o666 & ~umask}


def test_the_best_is_that_of_the_highest_top1_and_latest_is_the_newest(begin, tmp_path):
    started = begin()
    checkpoints = started.writer(tmp_path, keep=1)
    for step, top1 in ((1, 50.0), (2, 60.0), (3, 60.0), (4, 0.0)):
        checkpoints.save(started.state_at(step), top1)
    checkpoints.wait()
    assert layout.resolve_pointer(tmp_path / layout.BEST).name == "step-00000002"
    assert layout.resolve_pointer(tmp_path / layout.LATEST).name == "step-00000004"
    assert [layout.step_of(path) for path in layout.list_checkpoints(tmp_path)] == [2, 4]
    assert layout.read_state(tmp_path / "step-00000004").best_top1 == 60.0


def test_a_pointer_that_cannot_be_written_is_a_warning_and_the_rest_is_done(begin, tmp_path):
    checkpoints = begin().writer(tmp_path, keep=1)
    (tmp_path / layout.BEST).mkdir()
    (tmp_path / layout.BEST / "of a user").touch()
    for step in (1, 2):
        checkpoints.save(begin().state_at(step), 50.0 + step)
        checkpoints.wait()
    first, second = checkpoints.warnings
    assert second.startswith(f"{tmp_path}/step-00000002 is written, but its pointers or older checkpoints are not in")
    assert layout.resolve_pointer(tmp_path / layout.LATEST).name == "step-00000002"
    assert [path.name for path in layout.list_checkpoints(tmp_path)] == ["step-00000002"]


def test_a_full_disk_is_a_warning_and_the_next_save_succeeds(begin, tmp_path, no_file_larger_than):
    started = begin()
    checkpoints = save(started, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with no_file_larger_than(2**20):
        checkpoints.save(started.state_at(2), 99.0)
        checkpoints.wait()
    assert sorted(tmp_path.rglob("*")) == before
    [line] = checkpoints.warnings
    assert re.fullmatch(
        rf"cannot write the checkpoint step-00000002 in {tmp_path} \(\w+\.safetensors: File too large\): it needs"
        r" 85 MiB, [0-9,]+ MiB are free. The newest is step-00000001",
        line,
    )
    assert (checkpoints.failed, checkpoints.saved.step, checkpoints.saved.best_top1) == (False, 1, 0.0)
    checkpoints.save(started.state_at(3), 50.0)
    checkpoints.wait()
    assert layout.find_newest(tmp_path) == (tmp_path / "step-00000003", [])
    assert layout.resolve_pointer(tmp_path / layout.BEST).name == "step-00000003"


def test_a_lost_folder_is_an_error_at_the_next_save(begin, tmp_path):
    started = begin()
    (tmp_path / "run").mkdir()
    checkpoints = save(started, tmp_path / "run" / "checkpoints")
    (tmp_path / "run").rename(tmp_path / "moved")
    checkpoints.save(started.state_at(2))
    checkpoints._pending.exception()  # waits
    assert checkpoints.failed
    with pytest.raises(RunError, match=r"cannot write the checkpoint step-00000002 in .*/checkpoints \(.*No such file"):
        checkpoints.save(started.state_at(3))
    assert layout.find_newest(tmp_path / "moved" / "checkpoints") == (
        tmp_path / "moved" / "checkpoints" / "step-00000001",
        [],
    )


def test_the_required_space_is_that_of_a_checkpoint(begin, tmp_path):
    started = begin()
    save(started, tmp_path)
    taken = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert taken <= writer.expected_bytes(started.ema) < 1.02 * taken


def test_leftovers_of_killed_runs_are_removed(begin, tmp_path):
    (tmp_path / ".step-00000005.0123abcd").mkdir()
    (tmp_path / ".step-00000004").mkdir()
    save(begin(), tmp_path)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("look", [1, 2])
def test_a_lost_lock_prevents_a_checkpoint(begin, tmp_path, look):
    """Nothing is written if the first check fails, and nothing is renamed into place if the last one does."""
    looks = []

    def check_lock() -> None:
        looks.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(looks) == look:
            raise RuntimeError("no longer this run's")

    started = begin()
    checkpoints = started.writer(tmp_path, check_lock)
    checkpoints.save(started.state_at(1))
    with pytest.raises(RunError, match="no longer this run's"):
        checkpoints.wait()
    assert looks[0] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["weight", "EMA", "moment"])
def test_a_state_that_is_not_finite_is_never_a_checkpoint(begin, tmp_path, place):
    started = begin()
    started.step()
    checkpoints = save(started, tmp_path)
    tensors = {"weight": started.engine.module.head.bias, "EMA": started.ema.module.norm.running_var}
    name, file = {
        "weight": ("head.bias", layout.MODEL_NAME),
        "EMA": ("norm.running_var", layout.EMA_NAME),
        "moment": ("stem.0.0.weight", layout.MOMENT_NAMES["exp_avg"]),
    }[place]
    (adamw,) = [started.engine.optimizer.optimizer]
    moment = next(iter(adamw.state.values()))["exp_avg"]
    tensors.get(place, moment).data.view(-1)[0] = torch.inf
    checkpoints.save(started.state_at(2))
    while not checkpoints._pending.done():
        time.sleep(0.01)
    assert checkpoints.failed
    checkpoints.wait()
    assert re.fullmatch(rf"[\w.]+ in {file} is not finite", checkpoints.not_finite)
    if place != "moment":
        assert checkpoints.not_finite.startswith(name)
    assert not checkpoints.failed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert checkpoints.saved.step == 1

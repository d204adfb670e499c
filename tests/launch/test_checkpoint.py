"""Checkpoints of a real run: the newest intact one is found, corrupt ones are passed over, failed saves leave none."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launch import checkpoint
from launch.checkpoint import RunState
from launch.distributed import RunError
from launch.ema import ModelEma
from launch.engine import build_model, start_engine
from launch.plan import make_plan
from polaformer.weights import save_weights

OLD_RUN = Path(__file__).with_name("old_run")


@pytest.fixture
def folder(trained_run, tmp_path):
    """A copy of the real run's two checkpoints, which tests may damage."""
    shutil.copytree(trained_run / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


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


def optimizer_file(newest):
    return next((newest / "engine").glob("*optim_states.pt"))


def test_latest_names_the_newest_checkpoint(folder):
    newest, faults = checkpoint.find_newest(folder)
    assert newest.name == names(folder)[-1] == (folder / "latest").read_text().strip()
    assert faults == []


def test_the_manifest_names_every_file(folder):
    newest, _ = checkpoint.find_newest(folder)
    files = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert set(json.loads((newest / checkpoint.MANIFEST_NAME).read_text())) == files - {checkpoint.MANIFEST_NAME}
    assert {checkpoint.MODEL_NAME, checkpoint.EMA_NAME, checkpoint.STATE_NAME} < files


def test_the_state_has_the_keys_of_the_first_version(folder):
    """Those of old_run/state.json, which an older version wrote, and one more."""
    newest, _ = checkpoint.find_newest(folder)
    old, new = (json.loads(path.read_text()) for path in (OLD_RUN / "state.json", newest / checkpoint.STATE_NAME))
    assert list(new) == [*old, "norm_group"]
    assert (new["classes"], new["ranks"], new["step"]) == (10, 1, int(newest.name.removeprefix("step-")))
    assert set(new["loader"]) == set(old["loader"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda newest: truncate(optimizer_file(newest)), r"optim_states\.pt has \d+ bytes instead of \d+"),
        (lambda newest: flip_a_byte(newest / checkpoint.EMA_NAME), r"ema\.safetensors is not what was written"),
        (lambda newest: (newest / checkpoint.STATE_NAME).unlink(), r"cannot be read \(.*state\.json"),
        (lambda newest: (newest / checkpoint.MANIFEST_NAME).write_text("{"), "cannot be read"),
        (lambda newest: (newest / checkpoint.MANIFEST_NAME).unlink(), "cannot be read"),
    ],
)
def test_a_corrupt_checkpoint_is_passed_over(folder, damage, message):
    older, newer = names(folder)
    damage(folder / newer)
    found, [fault] = checkpoint.find_newest(folder)
    assert found.name == older
    assert re.search(message, fault)


def test_only_corrupt_checkpoints_are_an_error_and_none_at_all_are_not(folder, tmp_path):
    for name in names(folder):
        truncate(folder / name / checkpoint.MODEL_NAME)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact: .*; .* Move the folder away to start over"):
        checkpoint.find_newest(folder)
    assert checkpoint.find_newest(tmp_path / "nothing") == (None, [])


def test_an_unfinished_checkpoint_is_ignored(folder):
    shutil.copytree(folder / names(folder)[-1], folder / ".step-99999999")
    newest, _ = checkpoint.find_newest(folder)
    assert newest.name == names(folder)[-1]


def test_the_best_is_kept_besides_the_newest(alone, folder, tmp_path):
    older, newer = (folder / name for name in names(folder))
    newer.rename(tmp_path / "later")
    checkpoint.mark_best_and_prune(older, is_best=True, keep=1)
    (tmp_path / "later").rename(newer)
    newest = shutil.copytree(newer, folder / "step-90000000")
    checkpoint.mark_best_and_prune(newest, is_best=False, keep=1)
    assert names(folder) == [older.name, newest.name]
    checkpoint.mark_best_and_prune(newest, is_best=True, keep=1)
    assert names(folder) == [newest.name]
    assert not list(folder.glob(".*"))


def test_a_corrupt_checkpoint_does_not_count_as_kept(alone, folder):
    older, newer = names(folder)
    truncate(folder / newer / checkpoint.MODEL_NAME)
    checkpoint.mark_best_and_prune(folder / older, is_best=False, keep=1)
    assert checkpoint.find_newest(folder)[0].name == older


@pytest.fixture
def begin(alone, configure):
    """Returns a function: overrides → an engine, its EMA, and the state of a run after one step."""

    def start(*overrides):
        config = configure(*overrides)
        plan = make_plan(config, 0, 1)
        model = build_model(config, plan, alone)
        ema = ModelEma(model)
        state = RunState(1, "polaformerpp_b0", 10, 1, config.engine.zero_stage, {}, 0.0)
        return start_engine(config, plan, model), ema, state

    return start


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_hyperparameters_are_the_configurations_and_not_the_checkpoints(begin, tmp_path, stage):
    """A run that resumes with another clipping and weight decay uses them, whatever the optimizer was saved with."""
    staged = f"engine.zero_stage={stage}"
    engine, ema, state = begin(staged, "optimizer.max_grad_norm=1.0", "optimizer.weight_decay=0.05")
    saved = checkpoint.save(tmp_path, engine, ema, state, {})
    engine, ema, _ = begin(staged, "optimizer.max_grad_norm=0.25", "optimizer.weight_decay=0.3")
    checkpoint.load(saved, engine, ema)
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [0.0, 0.3]
    assert engine.gradient_clipping() == 0.25
    assert getattr(engine.optimizer, "clip_grad", 0.25) == 0.25


def test_missing_files_of_a_rank_are_an_error(begin, tmp_path):
    engine, ema, state = begin()
    with pytest.raises(RunError, match="holds the optimizer's state of 1 ranks out of 2; put the run's output folder"):
        checkpoint.save(tmp_path, engine, ema, replace(state, world_size=2), {})
    assert checkpoint.find_newest(tmp_path) == (None, [])


@pytest.mark.parametrize("stage", [0, 1])
def test_a_full_disk_leaves_earlier_checkpoints_intact(begin, tmp_path, no_file_larger_than, stage):
    """The earlier one stays the newest, nothing of the new one is left, and with space the engine saves again."""
    engine, ema, state = begin(f"engine.zero_stage={stage}")
    first = checkpoint.save(tmp_path, engine, ema, state, {})
    before = sorted(tmp_path.rglob("*"))
    with no_file_larger_than(2**20), pytest.raises(RunError) as error:
        checkpoint.save(tmp_path, engine, ema, replace(state, step=2), {})
    assert re.fullmatch(
        f"cannot write a checkpoint in {tmp_path}: File too large; it needs 127 MiB, [0-9,]+ MiB are free. Make room"
        " and start again: the run resumes from step-00000001",
        str(error.value),
    )
    assert sorted(tmp_path.rglob("*")) == before
    assert checkpoint.find_newest(tmp_path) == (first, [])
    second = checkpoint.save(tmp_path, engine, ema, replace(state, step=2), {})
    assert checkpoint.find_newest(tmp_path) == (second, [])


def test_a_failed_safetensors_write_has_the_systems_reason(begin, tmp_path, no_file_larger_than):
    _, ema, _ = begin()
    with (
        no_file_larger_than(2**20),
        pytest.raises(RuntimeError, match="^File too large$"),
        checkpoint._with_os_error_reason(tmp_path, ema),
    ):
        save_weights(ema.module.state_dict(), tmp_path / "model.safetensors", {})


def test_the_required_space_is_that_of_a_checkpoint(begin, folder):
    saved, _ = checkpoint.find_newest(folder)
    taken = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    _, ema, _ = begin()
    assert taken <= checkpoint._expected_bytes(ema) < 1.02 * taken


def test_leftovers_of_killed_runs_are_removed(begin, folder):
    (folder / ".step-00000005-0123abcd" / "engine").mkdir(parents=True)
    (folder / ".step-00000004").mkdir()
    engine, ema, state = begin()
    checkpoint.save(folder, engine, ema, state, {})
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("look", [1, 2])
def test_a_lost_lock_prevents_a_checkpoint(begin, tmp_path, look):
    """Nothing is written if the first check fails, and nothing is renamed into place if the last one does."""
    looks = []

    def check_lock() -> None:
        looks.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(looks) == look:
            raise RuntimeError("no longer this run's")

    with pytest.raises(RunError, match="^no longer this run's$"):
        checkpoint.save(tmp_path, *begin(), {}, check_lock)
    assert looks[0] == []
    assert checkpoint.find_newest(tmp_path) == (None, [])
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_weights_have_the_permissions_of_other_files(begin, tmp_path):
    saved = checkpoint.save(tmp_path, *begin(), {})
    modes = {(saved / name).stat().st_mode & 0o777 for name in ("state.json", "model.safetensors", "ema.safetensors")}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_an_incompatible_state_is_an_error():
    state = RunState(3, "polaformerpp_b0", 10, 2, 1, {}, 50.0)
    state.check_compatible(replace(state, step=0, best_top1=0.0))
    with pytest.raises(ValueError, match="has number of classes 10, this start has 12; start it with 10, or choose"):
        state.check_compatible(replace(state, num_classes=12))
    with pytest.raises(ValueError, match="has ZeRO stage 1, this start has 3"):
        state.check_compatible(replace(state, zero_stage=3))

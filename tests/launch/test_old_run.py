"""Run folders of an older version: old_run/ has a config.yaml and a state.json as that version wrote them."""

import re
from pathlib import Path
from shutil import copytree

import pytest
import yaml

from launch.checkpoint import layout
from launch.config import dump_config, load_config, parse_config, translate_renamed_keys
from launch.run_header import diff_with_saved_config

ROOT = Path(__file__).parents[2]
OLD_RUN = Path(__file__).with_name("old_run")
#: What old_run/config.yaml sets beside configs/quickstart.yaml, with today's keys.
OVERRIDES = [
    *("output=runs/old", "data.shuffle=windowed", "data.shuffle_window_shards=4", "data.max_bad_samples=3"),
    *("data.hflip=0.25", "data.augmentation=rand-augment", "data.crop_mode=center", "data.crop_pct=0.9"),
    *("data.rand_augment={magnitude_std: 0.7, num_layers: 3, prob: 0.4}", "data.reprob=0.1"),
    *("data.mixup_group_size=64", "data.mixup_prob=0.8", "data.mixup_switch_prob=0.3"),
    *("optimizer.global_batch_size=64", "optimizer.gradient_accumulation_steps=2", "optimizer.max_grad_norm=0.5"),
    "engine.bucket_numel=1000000",
]


def test_an_old_configuration_is_translated_key_by_key():
    old = yaml.safe_load((OLD_RUN / "config.yaml").read_text())
    untouched = yaml.safe_load((OLD_RUN / "config.yaml").read_text())
    assert parse_config(translate_renamed_keys(old)) == load_config(ROOT / "configs" / "quickstart.yaml", OVERRIDES)
    assert old == untouched


def test_todays_configuration_is_translated_to_itself():
    tree = yaml.safe_load(dump_config(load_config(ROOT / "configs" / "quickstart.yaml", OVERRIDES)))
    assert translate_renamed_keys(tree) == tree


@pytest.mark.parametrize("tree", [{}, {"data": None}, {"data": "x", "optimizer": [1]}, {"data": {"rand_augment": 3}}])
def test_a_damaged_configuration_is_left_alone(tree):
    assert translate_renamed_keys(tree) == tree


def test_renamed_keys_are_not_changes():
    config = load_config(ROOT / "configs" / "quickstart.yaml", OVERRIDES)
    assert diff_with_saved_config(OLD_RUN / "config.yaml", dump_config(config)) == []


def test_changes_are_named_by_todays_keys():
    changed = ["optimizer.max_grad_norm=1", "data.crop_mode=squash"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", [*OVERRIDES, *changed])
    assert sorted(diff_with_saved_config(OLD_RUN / "config.yaml", dump_config(config))) == [
        "changed since the last start: data.crop_mode: center → squash",
        "changed since the last start: optimizer.max_grad_norm: 0.5 → 1.0",
    ]


def test_a_checkpoint_of_version_0_1_0_is_an_error_with_both_ways_on(tmp_path):
    """Its weights are read as before; the optimizer's state was pickled."""
    copytree(OLD_RUN, tmp_path / "step-00001200")
    (tmp_path / "step-00001200" / "engine").mkdir()
    weights = re.escape(str(tmp_path / "step-00001200" / "model.safetensors"))
    with pytest.raises(ValueError, match=f"was written by version 0.1.0, .* resume with that version, .*={weights}$"):
        layout.read_state(tmp_path / "step-00001200")


@pytest.mark.slow
def test_a_run_of_an_older_version_resumes_without_false_changes(forked, small_config, trained_run, tmp_path):
    """Its config.yaml is translated, then written again with today's keys."""
    run = copytree(trained_run, tmp_path / "run")
    path = run / "config.yaml"
    today = path.read_text().replace(f"output: {trained_run}", f"output: {run}")
    renamed = {"max_grad_norm": "clip", "hflip": "flip_probability", "crop_mode": "eval_resize", "num_layers": "layers"}
    old = re.sub(rf"^(\s+)({'|'.join(renamed)}):", lambda key: f"{key[1]}{renamed[key[2]]}:", today, flags=re.M)
    assert all(f" {name}:" in old for name in renamed.values())
    path.write_text(old)
    finished = forked(1, "launch/train.py", "--config", small_config, f"output={run}")
    assert finished.returncode == 0, finished.stderr
    assert f"resumes from {run}" in finished.stdout
    assert "changed since the last start" not in finished.stdout
    assert path.read_text() == today

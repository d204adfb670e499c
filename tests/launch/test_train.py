"""Training runs with real launchers: a killed run resumes, bit-identical to one that was never interrupted."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load, load_file

from dataio.pack.packer import PackOptions, pack
from launch.checkpoint import layout
from launch.config import load_config, parse_config
from launch.engine import build_model
from launch.plan import make_plan
from launch.run import compare_ema

ROOT = Path(__file__).parents[2]
RECORDED_RUN = str(Path(__file__).with_name("recorded_run.py"))
TRAIN = "launch/train.py"
STEPS = 11  # of the runs below
FINAL = f"step-{STEPS:08d}"


def kill_in_the_middle(arguments: list[str], environ: dict[str, str], folder: Path) -> Path:
    """Starts a run on 2 ranks, kills all of its processes once it has a checkpoint, and returns the newest one.

    The run waits in its fifth step, so it never writes a second checkpoint.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    with open(folder.with_suffix(".log"), "w") as log:
        process = psutil.Popen(command, cwd=ROOT, env=environ | {"HOLD_AT": str(4 * 32)}, stdout=log, stderr=log)
        try:
            while not (folder / "checkpoints" / "latest").exists():
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.02)
        finally:
            with suppress(psutil.NoSuchProcess):
                for member in (process, *process.children(recursive=True)):
                    member.kill()
            process.wait()
    newest, _ = layout.find_newest(folder / "checkpoints")
    return newest


def records(path: Path) -> dict[int, list[int]]:
    """Samples by position, over both ranks. Positions that were computed again after a kill must have the same ones."""
    seen: dict[int, list[int]] = {}
    for rank in (0, 1):
        for line in Path(f"{path}-{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert seen.setdefault(entry["position"], entry["samples"]) == entry["samples"]
    return seen


def written(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict]:
    """Losses, learning rates and accuracies of a run, without speeds."""
    return [{k: v for k, v in line.items() if k.startswith(("step", "train/", "eval"))} for line in written(folder)]


def assert_equal_tree(left, right, where: str) -> None:
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal_tree(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, pair in enumerate(zip(left, right, strict=True)):
            assert_equal_tree(*pair, f"{where}[{number}]")
    elif isinstance(left, str | int | float | bool | None):
        assert left == right, where


def test_advice_on_weights_or_ema():
    assert compare_ema(50.0, 50.0).startswith("the EMA is as good or better (50.00 % against 50.00 %): launch")
    assert compare_ema(50.01, 50.0).endswith("launch.export take them with --kind model")


@pytest.fixture(scope="module")
def runs(forked, train_arguments, torchrun, environ, small_shards, tmp_path_factory) -> dict[str, Any]:
    """The same run twice on 2 ranks: once uninterrupted, once killed and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    whole, killed = (
        [RECORDED_RUN, str(folder / f"{name}-record"), *train_arguments(small_shards, folder / name)]
        for name in ("whole", "killed")
    )
    finished = forked(2, *whole)
    assert finished.returncode == 0, finished.stderr
    resumed_from = kill_in_the_middle(killed, environ, folder / "killed")
    state = layout.read_state(resumed_from)
    assert 0 < state.step < STEPS
    finished = torchrun(2, *killed)
    assert finished.returncode == 0, finished.stderr
    assert f"resumes from {resumed_from}" in finished.stdout
    return {"whole": folder / "whole", "killed": folder / "killed", "state": state}


@pytest.mark.slow
def test_the_run_was_killed_in_mid_epoch(runs, small_shards):
    samples = json.loads((small_shards / "train" / "manifest.json").read_text())["samples"]
    assert runs["state"].loader["samples_seen"] % samples


@pytest.mark.slow
@pytest.mark.parametrize("file", [layout.MODEL_NAME, layout.EMA_NAME, *layout.MOMENT_NAMES.values()])
def test_weights_buffers_and_optimizer_state_are_bit_identical(runs, file):
    whole, killed = (load_file(runs[name] / "checkpoints" / FINAL / file) for name in ("whole", "killed"))
    assert any(name.endswith(("running_mean", "head.bias")) for name in whole)
    assert_equal_tree(whole, killed, file)


@pytest.mark.slow
def test_losses_learning_rates_and_accuracies_are_equal(runs):
    whole, killed = metrics(runs["whole"]), metrics(runs["killed"])
    assert len([line for line in whole if "train/loss" in line]) == STEPS
    assert whole == killed


@pytest.mark.slow
def test_samples_are_equal_and_each_epoch_is_whole(runs, small_shards):
    whole, killed = (records(Path(f"{runs[name]}-record")) for name in ("whole", "killed"))
    steps = {position: samples for position, samples in whole.items() if position < STEPS * 32}
    assert steps == {position: samples for position, samples in killed.items() if position < STEPS * 32}
    order = [sample for position in sorted(steps) for sample in steps[position]]
    count = json.loads((small_shards / "train" / "manifest.json").read_text())["samples"]
    assert sorted(order[:count]) == list(range(count))


@pytest.mark.slow
def test_only_the_newest_checkpoints_are_kept(runs):
    folder = runs["whole"] / "checkpoints"
    names = sorted(path.name for path in folder.glob("step-*"))
    best = (folder / "best").read_text().strip()
    assert (folder / "latest").read_text().strip() == names[-1] == FINAL
    assert best in names
    assert len(set(names) - {best}) in (2, 3)
    assert not list(folder.glob(".step*"))


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(forked, train_arguments, runs, small_shards):
    before = sorted((runs["whole"] / "checkpoints").iterdir())
    arguments = train_arguments(small_shards, runs["whole"], "optimizer.max_grad_norm=0.7")
    finished = forked(2, TRAIN, *arguments)
    assert finished.returncode == 0
    assert finished.stdout.count("changed since the last start: ") == 1
    assert "changed since the last start: optimizer.max_grad_norm: 1.0 → 0.7" in finished.stdout
    kept = parse_config(yaml.safe_load((runs["whole"] / "config.yaml").read_text()))
    assert kept == load_config(arguments[1], arguments[2:])
    assert f"trained for {STEPS} steps" in finished.stdout
    assert sorted((runs["whole"] / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_a_resumed_run_keeps_its_groups_of_batchnorm(forked, train_arguments, runs, small_shards):
    """The saved groups, of 8 samples, divide the micro-batch that is 16 now."""
    arguments = train_arguments(small_shards, runs["whole"], "optimizer.gradient_accumulation_steps=1")
    finished = forked(2, TRAIN, *arguments)
    assert finished.returncode == 0, finished.stderr
    assert "BatchNorm: statistics of groups of 8 samples" in finished.stdout
    assert "groups change" not in finished.stdout
    finished = forked(2, TRAIN, *arguments, "model.norm_group=16")
    assert finished.returncode == 0, finished.stderr
    assert "BatchNorm: statistics of groups of 16 samples" in finished.stdout
    assert finished.stdout.count("BatchNorm's groups change from 8 to 16 samples") == 1


@pytest.mark.slow
def test_run_folders_may_have_any_name(forked, train_arguments, small_shards, fashion, tmp_path):
    """Two runs whose names are one to YAML, evaluated on fewer classes than they train on."""
    for name in ("Bag", "Coat", "Trouser"):
        shutil.copytree(fashion / name, tmp_path / "some" / name)
    pack(tmp_path / "some", tmp_path / "a: b", PackOptions())
    short = f"data.val={tmp_path / 'a: b'}", "optimizer.epochs=0.2", "optimizer.warmup_epochs=0"
    for number in (1, 2):
        finished = forked(1, TRAIN, *train_arguments(small_shards, tmp_path / f"run #{number}", *short))
        assert finished.returncode == 0, finished.stderr
        assert "resumes from" not in finished.stdout
        assert "of 3 classes out of 10" in finished.stdout
        assert (tmp_path / f"run #{number}" / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_checkpoints_by_the_clock_and_milestones(forked, train_arguments, small_shards, tmp_path):
    """The clock's is due at once, and ranks know it a step later: after steps 2, 4, … 10. Epochs end at 6 and 11."""
    clock = "checkpoint.every_epochs=99", "checkpoint.every_minutes=1e-6", "log.eval_every_epochs=99"
    kept = "checkpoint.keep=3", "checkpoint.keep_every_epochs=1"
    finished = forked(2, TRAIN, *train_arguments(small_shards, tmp_path, *clock, *kept))
    assert finished.returncode == 0, finished.stderr
    assert [layout.step_of(path) for path in layout.list_checkpoints(tmp_path / "checkpoints")] == [6, 8, 10, 11]


@pytest.mark.slow
def test_a_checkpoint_that_fails_in_the_background_ends_all_ranks(forked, train_arguments, small_shards, tmp_path):
    """At the next step boundary, or the next save at the latest, whatever the rank whose thread has failed."""
    (tmp_path / "checkpoints").touch()
    finished = forked(2, TRAIN, *train_arguments(small_shards, tmp_path))
    assert finished.returncode == 1
    assert finished.stderr.count("error: cannot write the checkpoint step-00000003 in ") == 1
    assert "Traceback" not in finished.stderr
    assert max(line["step"] for line in written(tmp_path)) <= 6


@pytest.mark.slow
def test_a_number_of_ranks_that_does_not_divide_the_batch_is_an_error(forked, train_arguments, runs, small_shards):
    before = sorted((runs["whole"] / "checkpoints").rglob("*"))
    finished = forked(3, TRAIN, *train_arguments(small_shards, runs["whole"]))
    assert finished.returncode == 2
    assert finished.stderr.endswith(
        "error: global batch 32 is not divisible by 3 ranks × 2 accumulation; use 30 or 36, or 2 or 4 ranks\n"
    )
    assert sorted((runs["whole"] / "checkpoints").rglob("*")) == before


@pytest.mark.slow
def test_the_deepspeed_launcher_with_bf16_and_ema_decay_0(command, train_arguments, small_shards, tmp_path, free_port):
    """On two ranks; an EMA with decay 0 equals the weights, buffers included."""
    arguments = train_arguments(
        small_shards, tmp_path, "engine.precision=bf16", "optimizer.ema_decay=0", "optimizer.epochs=0.4"
    )
    launcher = "-m", "deepspeed.launcher.runner", "--num_accelerators", 2, "--master_port", free_port
    finished = command(*launcher, TRAIN, *arguments)
    assert finished.returncode == 0, finished.stderr
    newest, _ = layout.find_newest(tmp_path / "checkpoints")
    model, ema = (load_file(newest / name) for name in (layout.MODEL_NAME, layout.EMA_NAME))
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.values())
    assert_equal_tree(model, ema, "weights")
    assert all(torch.isfinite(value).all() for value in model.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_resumes_past_corrupt_checkpoints(forked, train_arguments, small_shards, tmp_path, stage):
    staged = (
        f"engine.zero_stage={stage}",
        "optimizer.gradient_accumulation_steps=1",
        "optimizer.epochs=1",
        "log.eval_every_epochs=9",
    )
    whole = train_arguments(small_shards, tmp_path / "whole", *staged)
    assert forked(2, TRAIN, *whole).returncode == 0
    folder = tmp_path / "whole" / "checkpoints"
    oldest, *later = sorted(folder.glob("step-*"))
    assert later
    files = layout.MODEL_NAME, layout.EMA_NAME, *layout.MOMENT_NAMES.values()
    final = {file: load(later[-1].joinpath(file).read_bytes()) for file in files}  # the files are about to be damaged
    for damaged in later:
        moment = damaged / layout.MOMENT_NAMES["exp_avg"]
        os.truncate(moment, moment.stat().st_size - 1)
    finished = forked(2, TRAIN, *whole)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("exp_avg.safetensors has") == len(later)
    assert f"resumes from {oldest}" in finished.stdout
    assert_equal_tree({file: load_file(later[-1] / file) for file in files}, final, "state")


@pytest.mark.slow
def test_the_ema_is_updated_once_per_step(forked, train_arguments, small_shards, tmp_path):
    """After one step of two micro-steps it is a tenth initial values, of parameters and BatchNorm statistics."""
    short = "optimizer.epochs=0.1", "optimizer.warmup_epochs=0", "optimizer.ema_decay=0.5"
    arguments = train_arguments(small_shards, tmp_path, *short)
    assert forked(1, TRAIN, *arguments).returncode == 0
    config = load_config(arguments[1], arguments[2:])
    start = build_model(config, make_plan(config, 0, 1), torch.device("cpu")).state_dict()
    newest, _ = layout.find_newest(tmp_path / "checkpoints")
    assert layout.read_state(newest).step == 1
    model, ema = (load_file(newest / name) for name in (layout.MODEL_NAME, layout.EMA_NAME))
    for name, value in ema.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (start[name] + 9 * model[name]) / 10, msg=name)


@pytest.mark.slow
def test_training_from_a_url_equals_training_from_a_folder(forked, train_arguments, runs, small_shards, tmp_path):
    """Two ranks with one cache: losses and accuracies are bit-identical to those of the run on local disk.

    The token in the URL is neither printed nor saved.
    """
    handler = partial(SimpleHTTPRequestHandler, directory=str(small_shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        paths = [f"data.{part}={url}/{part}?token=hush" for part in ("train", "val")]
        more = "data.shuffle=full", f"data.cache={tmp_path / 'cache'}"
        finished = forked(2, TRAIN, *train_arguments(small_shards, tmp_path / "run", *paths, *more))
        server.shutdown()
    assert finished.returncode == 0, finished.stderr
    assert metrics(tmp_path / "run") == metrics(runs["whole"])
    assert f"{url}/train?…" in finished.stdout + finished.stderr
    assert "hush" not in finished.stdout + finished.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hush" in path.read_bytes()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_it_trains_and_resumes_on_a_gpu(train_arguments, small_shards, tmp_path):
    """With nvJPEG, NCCL and bf16, losses after a resume are near those of the uninterrupted run."""
    arguments = train_arguments(small_shards, tmp_path, "engine.precision=bf16")
    start = [sys.executable, TRAIN, *arguments]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(start, cwd=ROOT, env=environ, check=True)
    before = metrics(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / FINAL)
    subprocess.run(start, cwd=ROOT, env=environ, check=True)
    for first, again in zip(before, metrics(tmp_path), strict=True):
        if "train/loss" in first:
            assert again["train/loss"] == pytest.approx(first["train/loss"], rel=0.05)


@pytest.mark.slow
def test_resuming_on_another_data_set_is_an_error(forked, train_arguments, fashion, small_shards, runs, tmp_path):
    pack(fashion, tmp_path / "train", PackOptions(val_percent=60, split="train", seed=1))
    finished = forked(2, TRAIN, *train_arguments(small_shards, runs["whole"], f"data.train={tmp_path / 'train'}"))
    assert finished.returncode != 0
    assert finished.stderr.count("the run began on a data set with manifest") == 1


@pytest.mark.slow
def test_resuming_another_model_is_an_error(forked, train_arguments, small_shards, runs):
    finished = forked(2, TRAIN, *train_arguments(small_shards, runs["whole"], "model.name=polaformerpp_b1"))
    wanted = "error: the run's checkpoint has model polaformerpp_b0, this start has polaformerpp_b1"
    assert finished.returncode != 0
    assert finished.stderr.count(wanted) == 1

"""The story of a run with real launchers: it trains, goes on after a kill as if nothing had been, or says why not."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dataio.manifest import Manifest
from dataio.pack.packer import PackOptions, pack
from dataio.sampler import ShuffledSampler
from launch import checkpoint, train
from launch.config import load_config, parse_config
from launch.engine import build_model
from launch.plan import make_plan

ROOT = Path(__file__).parents[2]
CONFIG = "configs/quickstart.yaml"
RECORDED_RUN = str(Path(__file__).with_name("recorded_run.py"))
RUN_IN_OWN_FOLDER = str(Path(__file__).with_name("run_in_own_folder.py"))
TRAIN = "launch/train.py"
STEPS = 11  # of the runs below
FINAL = f"step-{STEPS:08d}"
KEPT = PackOptions(val_percent=60, split="train")


@pytest.fixture(scope="module")
def few(fashion, tmp_path_factory) -> Path:
    """Folder with `train` and `val`: 167 and 37 images of `fashion`."""
    root = tmp_path_factory.mktemp("few")
    pack(fashion, root / "train", KEPT)
    pack(fashion, root / "val", PackOptions(val_percent=10, split="val"))
    return root


def overrides(shards: Path, output: Path, *more: str) -> list[str]:
    """A run of STEPS steps over 2 epochs on CPU, with everything on that draws random numbers."""
    return [
        *("--config", CONFIG, f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"output={output}"),
        *("optimizer.epochs=2", "optimizer.global_batch_size=32", "optimizer.gradient_accumulation_steps=2"),
        *(
            "model.drop_path_rate=0.1",
            "data.mixup=0.8",
            "data.cutmix=1.0",
            "data.reprob=0.25",
            "data.augmentation=rand-augment",
            "data.threads=1",
        ),
        *("checkpoint.every_epochs=0.4", "checkpoint.keep=3", "log.eval_every_epochs=1", "log.every_steps=1", *more),
    ]


def kill_in_the_middle(arguments: list[str], environ: dict[str, str], folder: Path) -> Path:
    """Starts a run on 2 ranks, kills all of it once it has a checkpoint, and returns the newest one.

    However late that is seen: the run waits in its fifth step, before it would write the second.
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
                for doomed in (process, *process.children(recursive=True)):
                    doomed.kill()
            process.wait()
    newest, _ = checkpoint.find_newest(folder / "checkpoints")
    return newest


def records(path: Path) -> dict[int, list[int]]:
    """Samples by position, over both ranks; after a kill some positions come twice, and must come alike."""
    seen: dict[int, list[int]] = {}
    for rank in (0, 1):
        for line in Path(f"{path}-{rank}.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert seen.setdefault(entry["position"], entry["samples"]) == entry["samples"]
    return seen


def written(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict]:
    """What a run measured of its training, without its speed."""
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


def test_which_weights_to_take():
    assert train.compare_ema(50.0, 50.0).startswith("the EMA is as good or better (50.00 % against 50.00 %): launch")
    assert train.compare_ema(50.01, 50.0).endswith("launch.export take them with --kind model")


def refusal(finished: subprocess.CompletedProcess) -> str:
    """The message with which launch/train.py has refused to start."""
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stderr.partition("error: ")[2].strip()


@pytest.fixture(scope="module")
def runs(forked, torchrun, environ, few, tmp_path_factory) -> dict[str, Any]:
    """The same run twice on 2 ranks: once in one go, once killed in the middle and started again."""
    folder = tmp_path_factory.mktemp("runs")
    whole, killed = (
        [RECORDED_RUN, str(folder / f"{name}-record"), *overrides(few, folder / name)] for name in ("whole", "killed")
    )
    finished = forked(2, *whole)
    assert finished.returncode == 0, finished.stderr
    resumed_from = kill_in_the_middle(killed, environ, folder / "killed")
    state = checkpoint.read_state(resumed_from)
    assert 0 < state.step < STEPS
    finished = torchrun(2, *killed)
    assert finished.returncode == 0, finished.stderr
    assert f"goes on from {resumed_from}" in finished.stdout
    return {"whole": folder / "whole", "killed": folder / "killed", "state": state}


@pytest.mark.slow
def test_it_was_killed_in_the_middle_of_an_epoch(runs, few):
    samples = json.loads((few / "train" / "manifest.json").read_text())["samples"]
    assert runs["state"].loader["samples_seen"] % samples


@pytest.mark.slow
@pytest.mark.parametrize("file", [checkpoint.MODEL_NAME, checkpoint.EMA_NAME])
def test_weights_and_buffers_are_bit_identical(runs, file):
    whole, killed = (load_file(runs[name] / "checkpoints" / FINAL / file) for name in ("whole", "killed"))
    assert any(name.endswith("running_mean") for name in whole)
    assert_equal_tree(whole, killed, file)


@pytest.mark.slow
def test_optimizer_state_is_bit_identical(runs):
    folders = [runs[name] / "checkpoints" / FINAL / "engine" for name in ("whole", "killed")]
    files = sorted(path.name for path in folders[0].iterdir())
    assert len([name for name in files if "optim_states" in name]) == 2  # one a rank
    for name in files:
        assert_equal_tree(*(torch.load(folder / name, weights_only=False) for folder in folders), name)


@pytest.mark.slow
def test_losses_rates_and_scores_are_equal(runs):
    whole, killed = metrics(runs["whole"]), metrics(runs["killed"])
    assert len([line for line in whole if "train/loss" in line]) == STEPS
    assert whole == killed


@pytest.mark.slow
def test_samples_are_equal_and_each_epoch_is_whole(runs, few):
    whole, killed = (records(Path(f"{runs[name]}-record")) for name in ("whole", "killed"))
    steps = {position: samples for position, samples in whole.items() if position < STEPS * 32}
    assert steps == {position: samples for position, samples in killed.items() if position < STEPS * 32}
    order = [sample for position in sorted(steps) for sample in steps[position]]
    count = json.loads((few / "train" / "manifest.json").read_text())["samples"]
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
def test_started_again_a_finished_run_does_nothing(forked, runs, few):
    before = sorted((runs["whole"] / "checkpoints").iterdir())
    arguments = overrides(few, runs["whole"], "optimizer.max_grad_norm=0.7")
    finished = forked(2, TRAIN, *arguments)
    assert finished.returncode == 0
    assert finished.stdout.count("changed since the last start: ") == 1
    assert "changed since the last start: optimizer.max_grad_norm: 1.0 → 0.7" in finished.stdout
    kept = parse_config(yaml.safe_load((runs["whole"] / "config.yaml").read_text()))
    assert kept == load_config(arguments[1], arguments[2:])
    assert f"trained for {STEPS} steps" in finished.stdout
    assert sorted((runs["whole"] / "checkpoints").iterdir()) == before


@pytest.mark.slow
def test_folders_with_any_name_are_folders_of_their_own(forked, few, fashion, tmp_path):
    """Two runs whose names YAML would take for one, evaluated during training on fewer classes than it has."""
    for name in ("Bag", "Coat", "Trouser"):
        shutil.copytree(fashion / name, tmp_path / "some" / name)
    pack(tmp_path / "some", tmp_path / "a: b", PackOptions())
    short = f"data.val={tmp_path / 'a: b'}", "optimizer.epochs=0.2", "optimizer.warmup_epochs=0"
    for number in (1, 2):
        finished = forked(1, TRAIN, *overrides(few, tmp_path / f"run #{number}", *short))
        assert finished.returncode == 0, finished.stderr
        assert "goes on from" not in finished.stdout
        assert "of 3 classes out of 10" in finished.stdout
        assert (tmp_path / f"run #{number}" / "checkpoints" / "latest").exists()


@pytest.mark.slow
def test_another_number_of_ranks_is_refused(forked, runs, few):
    message = refusal(forked(1, TRAIN, *overrides(few, runs["whole"])))
    assert "the run's checkpoint has number of ranks 2, this start has 1" in message


@pytest.mark.slow
def test_deepspeed_launcher_bf16_and_an_average_of_nothing(command, few, tmp_path, free_port):
    """Two ranks of the deepspeed command; an EMA with decay 0 is the weights themselves, buffers included."""
    arguments = overrides(few, tmp_path, "engine.precision=bf16", "optimizer.ema_decay=0", "optimizer.epochs=0.4")
    launcher = "-m", "deepspeed.launcher.runner", "--num_accelerators", 2, "--master_port", free_port
    finished = command(*launcher, TRAIN, *arguments)
    assert finished.returncode == 0, finished.stderr
    newest, _ = checkpoint.find_newest(tmp_path / "checkpoints")
    model, ema = (load_file(newest / name) for name in (checkpoint.MODEL_NAME, checkpoint.EMA_NAME))
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.values())
    assert_equal_tree(model, ema, "weights")
    assert all(torch.isfinite(value).all() for value in model.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_resumes_past_damaged_checkpoints(forked, few, tmp_path, stage):
    staged = (
        f"engine.zero_stage={stage}",
        "optimizer.gradient_accumulation_steps=1",
        "optimizer.epochs=1",
        "log.eval_every_epochs=9",
    )
    whole = overrides(few, tmp_path / "whole", *staged)
    assert forked(2, TRAIN, *whole).returncode == 0
    folder = tmp_path / "whole" / "checkpoints"
    oldest, *later = sorted(folder.glob("step-*"))
    assert later
    final = load_file(later[-1] / checkpoint.EMA_NAME)
    for damaged in later:
        states = next((damaged / "engine").glob("*model_states.pt"))
        os.truncate(states, states.stat().st_size - 1)
    finished = forked(2, TRAIN, *whole)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("model_states.pt has") == len(later)
    assert f"goes on from {oldest}" in finished.stdout
    assert_equal_tree(load_file(later[-1] / checkpoint.EMA_NAME), final, "ema")


@pytest.mark.slow
def test_the_moving_average_follows_once_in_a_step(forked, few, tmp_path):
    """One step of two micro-steps: a tenth of the start, for parameters and BatchNorm's statistics."""
    short = "optimizer.epochs=0.1", "optimizer.warmup_epochs=0", "optimizer.ema_decay=0.5"
    arguments = overrides(few, tmp_path, *short)
    assert forked(1, TRAIN, *arguments).returncode == 0
    config = load_config(arguments[1], arguments[2:])
    start = build_model(config, make_plan(config, 0, 1), torch.device("cpu")).state_dict()
    newest, _ = checkpoint.find_newest(tmp_path / "checkpoints")
    assert checkpoint.read_state(newest).step == 1
    model, ema = (load_file(newest / name) for name in (checkpoint.MODEL_NAME, checkpoint.EMA_NAME))
    for name, value in ema.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (start[name] + 9 * model[name]) / 10, msg=name)


def break_image(manifest: Manifest, sample: int) -> None:
    row = manifest.samples[sample]
    with open(manifest.folder / manifest.shards[row["shard"]].name, "r+b") as shard:
        shard.seek(int(row["offset"]))
        shard.write(bytes(int(row["bytes"])))


@pytest.mark.slow
def test_an_image_that_breaks_after_packing_ends_all_ranks(forked, fashion, tmp_path):
    """Only one rank meets it; the run ends at once, and says where the image lies."""
    manifest = pack(fashion, tmp_path / "train", KEPT)
    break_image(manifest, 7)
    places = f"data.val={tmp_path / 'train'}", "data.max_bad_samples=0"
    finished = forked(2, TRAIN, *overrides(tmp_path, tmp_path / "run", *places))
    assert finished.returncode != 0
    assert f"cannot decode {manifest.describe(7)}: not an image; check the folder with" in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("every_steps", [1, 1000])
def test_broken_images_are_named_and_counted_up_to_the_limit(forked, fashion, few, tmp_path, every_steps):
    """Two ranks meet three, of which both together may replace two: the run ends with the first epoch at the latest."""
    manifest = pack(fashion, tmp_path / "train", replace(KEPT, val_percent=55))
    order = ShuffledSampler(0, manifest.shard_samples).samples_at(np.arange(6 * 32))
    order, next_epoch = order[: len(manifest)], order[len(manifest) :]  # which the sixth step reaches into
    once = [sample for sample in order.tolist() if sample not in next_epoch]
    broken = [once[3], once[40], once[-1]]  # the third in the last step of the epoch
    assert broken[-1] in order[5 * 32 :]
    for sample in broken:
        break_image(manifest, sample)
    places = f"data.val={few / 'val'}", "data.max_bad_samples=2"
    often = f"log.every_steps={every_steps}", "checkpoint.every_epochs=2"
    finished = forked(2, TRAIN, *overrides(tmp_path, tmp_path / "run", *places, *often))
    assert finished.returncode != 0
    message = (
        "error: 3 broken images in this epoch at step 6, data.max_bad_samples allows 2; check the shards with python"
    )
    assert finished.stderr.count(message) == 1
    said = [line for line in finished.stderr.splitlines() if "stands for" in line]
    for sample in broken:
        words = f"sample {sample + 1} stands for {manifest.describe(sample)}: not an image"
        assert sum(line in (f"rank 0: {words}", f"rank 1: {words}") for line in said) == 1
    counts = [line["data/broken_images"] for line in written(tmp_path / "run") if "data/broken_images" in line]
    assert len(counts) == max(1, -(-len(manifest) // 32) // every_steps)
    assert counts == sorted(counts)
    assert counts[-1] == 3


@pytest.mark.slow
def test_training_from_afar_is_training_from_a_folder(forked, runs, few, tmp_path):
    """Two ranks over one cache: to the last bit the losses and scores of the run on local disk.

    The token that the server might ask for is neither printed nor kept.
    """
    handler = partial(SimpleHTTPRequestHandler, directory=str(few))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        places = [f"data.{part}={url}/{part}?token=hush" for part in ("train", "val")]
        more = "data.shuffle=full", f"data.cache={tmp_path / 'cache'}"
        finished = forked(2, TRAIN, *overrides(few, tmp_path / "run", *places, *more))
        server.shutdown()
    assert finished.returncode == 0, finished.stderr
    assert metrics(tmp_path / "run") == metrics(runs["whole"])
    assert f"{url}/train?…" in finished.stdout + finished.stderr
    assert "hush" not in finished.stdout + finished.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hush" in path.read_bytes()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_it_trains_and_resumes_on_a_gpu(few, tmp_path):
    """nvJPEG, NCCL, bf16: the steps after a resume have losses near those of the uninterrupted run."""
    arguments = overrides(few, tmp_path, "engine.precision=bf16")
    start = [sys.executable, TRAIN, *arguments]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(start, cwd=ROOT, env=environ, check=True)
    before = metrics(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / FINAL)
    subprocess.run(start, cwd=ROOT, env=environ, check=True)
    for first, again in zip(before, metrics(tmp_path), strict=True):
        if "train/loss" in first:
            assert again["train/loss"] == pytest.approx(first["train/loss"], rel=0.05)


SLOW_TO_SPEAK = """
import sys, time
from launch import train

def report_error(error, rank, report_error=train.report_error):
    if rank == 0:
        time.sleep(1)  # for the other rank to exit, for which the launcher would end this one
    return report_error(error, rank)

train.report_error = report_error
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr; did you mean lr?"),
        (
            "optimizer.global_batch_size=33",
            "global batch 33 is not divisible by 2 ranks × 2 accumulation; use 32 or 36",
        ),
    ],
)
def test_one_message_for_all_ranks(forked, few, tmp_path, override, message):
    """However late rank 0 gives it: no other rank, whose end ends all, is gone before."""
    script = tmp_path / "script.py"
    script.write_text(SLOW_TO_SPEAK)
    finished = forked(2, script, *overrides(few, tmp_path / "run", override))
    assert finished.returncode != 0
    assert finished.stderr.count(f"error: {message}") == 1
    assert not (tmp_path / "run").exists()


def test_other_data_on_another_machine(forked, fashion, few, tmp_path):
    """Each rank has the same paths, and behind them what its machine has."""
    for rank, seed in enumerate((0, 1)):
        folder = tmp_path / "machines" / str(rank)
        pack(fashion, folder / "train", PackOptions(seed=seed))
        (folder / "val").symlink_to(few / "val")
    arguments = overrides(Path(), tmp_path / "run")
    arguments[1] = str(ROOT / CONFIG)
    finished = forked(2, RUN_IN_OWN_FOLDER, tmp_path / "machines", *arguments)
    assert finished.returncode != 0
    assert finished.stderr.count("error: rank 1: train holds other data here (manifest ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_data_set_on_resume(forked, fashion, few, runs, tmp_path):
    pack(fashion, tmp_path / "train", replace(KEPT, seed=1))
    finished = forked(2, TRAIN, *overrides(few, runs["whole"], f"data.train={tmp_path / 'train'}"))
    assert finished.returncode != 0
    assert finished.stderr.count("the run began on a data set with manifest") == 1


@pytest.mark.slow
def test_a_checkpoint_of_another_model(forked, few, runs):
    finished = forked(2, TRAIN, *overrides(few, runs["whole"], "model.name=polaformerpp_b1"))
    wanted = "error: the run's checkpoint has model polaformerpp_b0, this start has polaformerpp_b1"
    assert finished.returncode != 0
    assert finished.stderr.count(wanted) == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.global_batch_size=33",
            "global batch 33 is not divisible by 1 ranks × 2 accumulation; use 32 or 34",
        ),
        ("data.train=nowhere", "no manifest.json in nowhere; write shards there with: python -m dataio.pack"),
        ("model.weights=nothing.pth", "no weights at nothing.pth"),
        ("deepspeed.zero_optimization.typo=1", "in the deepspeed section, typo is 1: Extra inputs are not permitted"),
    ],
)
def test_what_cannot_work_is_refused(forked, few, tmp_path, override, message):
    assert message in refusal(forked(1, TRAIN, *overrides(few, tmp_path / "run", override)))
    assert not (tmp_path / "run").exists()


def test_half_of_a_launchers_environment(forked, few, tmp_path):
    half = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    message = refusal(forked(1, TRAIN, *overrides(few, tmp_path / "run"), **half))
    assert message.startswith("MASTER_ADDR is not set although other variables of a launcher are; start the run with")


@pytest.mark.slow
def test_kernels_that_are_required_and_missing(command, few, tmp_path):
    arguments = overrides(few, tmp_path / "run", "model.kernels=required")
    message = refusal(command(TRAIN, *arguments, POLAFORMER_KERNELS="none"))
    assert "model.kernels=required, but there are no compiled kernels for cpu: POLAFORMER_KERNELS is none" in message
    assert not (tmp_path / "run").exists()


def test_a_truncated_shard_is_refused(forked, fashion, tmp_path):
    pack(fashion, tmp_path / "train", PackOptions())
    shard = tmp_path / "train" / "shard-000000.tar"
    os.truncate(shard, shard.stat().st_size - 1024)
    message = refusal(forked(1, TRAIN, *overrides(tmp_path, tmp_path / "run", f"data.val={tmp_path / 'train'}")))
    assert f"{shard} has {shard.stat().st_size} bytes where the manifest says" in message

"""What ends launch/train.py with one message: settings, launchers and data that do not fit, and bad samples."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataio.manifest import Manifest
from dataio.pack.packer import PackOptions, pack
from dataio.sampler import ShuffledSampler

ROOT = Path(__file__).parents[2]
RUN_IN_OWN_FOLDER = str(Path(__file__).with_name("run_in_own_folder.py"))
TRAIN = "launch/train.py"
SUBSET = PackOptions(val_percent=60, split="train")


def error_of(finished: subprocess.CompletedProcess) -> str:
    """The message of a run that ended before its first step."""
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    return finished.stderr.partition("error: ")[2].strip()


def break_image(manifest: Manifest, sample: int) -> None:
    """Overwrites a sample's image with zeros."""
    row = manifest.samples[sample]
    with open(manifest.folder / manifest.shards[row["shard"]].name, "r+b") as shard:
        shard.seek(int(row["offset"]))
        shard.write(bytes(int(row["bytes"])))


@pytest.mark.slow
def test_an_undecodable_image_ends_all_ranks(forked, train_arguments, fashion, tmp_path):
    """Only one rank decodes it; the run ends at once and names the image."""
    manifest = pack(fashion, tmp_path / "train", SUBSET)
    break_image(manifest, 7)
    paths = f"data.val={tmp_path / 'train'}", "data.max_bad_samples=0"
    finished = forked(2, TRAIN, *train_arguments(tmp_path, tmp_path / "run", *paths))
    assert finished.returncode != 0
    assert f"cannot decode {manifest.describe(7)}: not an image; check the folder with" in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("every_steps", [1, 1000])
def test_bad_samples_are_reported_and_counted_up_to_the_limit(
    forked, train_arguments, fashion, small_shards, tmp_path, every_steps
):
    """Two ranks decode three, of which they may substitute two: the run ends with the first epoch at the latest."""
    manifest = pack(fashion, tmp_path / "train", replace(SUBSET, val_percent=55))
    order = ShuffledSampler(0, manifest.shard_samples).samples_at(np.arange(6 * 32))
    order, next_epoch = order[: len(manifest)], order[len(manifest) :]  # which the sixth step reaches into
    once = [sample for sample in order.tolist() if sample not in next_epoch]
    broken = [once[3], once[40], once[-1]]  # the third in the last step of the epoch
    assert broken[-1] in order[5 * 32 :]
    for sample in broken:
        break_image(manifest, sample)
    paths = f"data.val={small_shards / 'val'}", "data.max_bad_samples=2"
    often = f"log.every_steps={every_steps}", "checkpoint.every_epochs=2"
    finished = forked(2, TRAIN, *train_arguments(tmp_path, tmp_path / "run", *paths, *often))
    assert finished.returncode == 1
    message = (
        "error: 3 bad samples in this epoch at step 6, data.max_bad_samples allows 2; check the shards with python"
    )
    assert finished.stderr.count(message) == 1
    printed = [line for line in finished.stderr.splitlines() if "replaces sample" in line]
    for sample in broken:
        words = f"sample {sample + 1} replaces {manifest.describe(sample)}: not an image"
        assert sum(line in (f"rank 0: {words}", f"rank 1: {words}") for line in printed) == 1
    written = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    counts = [line["data/broken_images"] for line in written if "data/broken_images" in line]
    assert len(counts) == max(1, -(-len(manifest) // 32) // every_steps)
    assert counts == sorted(counts)
    assert counts[-1] == 3


SLOW_REPORT = """
import sys, time
from launch import distributed, train

def report_error(error, rank=0, report_error=distributed.report_error):
    if rank == 0:
        time.sleep(1)  # so that the other rank could exit, whereupon the launcher would end this one
    return report_error(error, rank)

distributed.report_error = report_error
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
def test_one_message_for_all_ranks(forked, train_arguments, small_shards, tmp_path, override, message):
    """However late rank 0 prints it: no other rank exits before, which would end all of them."""
    script = tmp_path / "script.py"
    script.write_text(SLOW_REPORT)
    finished = forked(2, script, *train_arguments(small_shards, tmp_path / "run", override))
    assert finished.returncode != 0
    assert finished.stderr.count(f"error: {message}") == 1
    assert not (tmp_path / "run").exists()


def test_other_data_on_another_machine_is_an_error(forked, train_arguments, fashion, small_shards, tmp_path):
    """Each rank has the same paths, which lead to its own machine's files."""
    for rank, seed in enumerate((0, 1)):
        folder = tmp_path / "machines" / str(rank)
        pack(fashion, folder / "train", PackOptions(seed=seed))
        (folder / "val").symlink_to(small_shards / "val")
    arguments = train_arguments(Path(), tmp_path / "run")
    arguments[1] = str(ROOT / arguments[1])
    finished = forked(2, RUN_IN_OWN_FOLDER, tmp_path / "machines", *arguments)
    assert finished.returncode != 0
    assert finished.stderr.count("error: rank 1: train holds other data here (manifest ") == 1
    assert not (tmp_path / "run").exists()


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
def test_invalid_settings_are_errors(forked, train_arguments, small_shards, tmp_path, override, message):
    assert message in error_of(forked(1, TRAIN, *train_arguments(small_shards, tmp_path / "run", override)))
    assert not (tmp_path / "run").exists()


def test_an_incomplete_launcher_environment_is_an_error(forked, train_arguments, small_shards, tmp_path):
    half = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    message = error_of(forked(1, TRAIN, *train_arguments(small_shards, tmp_path / "run"), **half))
    assert message.startswith("MASTER_ADDR is not set although other variables of a launcher are; start the run with")


@pytest.mark.slow
def test_missing_required_kernels_are_an_error(command, train_arguments, small_shards, tmp_path):
    arguments = train_arguments(small_shards, tmp_path / "run", "model.kernels=required")
    message = error_of(command(TRAIN, *arguments, POLAFORMER_KERNELS="none"))
    assert "model.kernels=required, but there are no compiled kernels for cpu: POLAFORMER_KERNELS is none" in message
    assert not (tmp_path / "run").exists()


def test_a_truncated_shard_is_an_error(forked, train_arguments, fashion, tmp_path):
    pack(fashion, tmp_path / "train", PackOptions())
    shard = tmp_path / "train" / "shard-000000.tar"
    os.truncate(shard, shard.stat().st_size - 1024)
    message = error_of(forked(1, TRAIN, *train_arguments(tmp_path, tmp_path / "run", f"data.val={tmp_path / 'train'}")))
    assert f"{shard} has {shard.stat().st_size} bytes where the manifest says" in message

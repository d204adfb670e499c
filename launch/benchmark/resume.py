"""Times of the first batch after a fresh start and after a resume at a late step, on as many samples as ImageNet has.

python -m launch.benchmark resume
python -m launch.benchmark resume --step 5000000 --output launch/benchmark/results/resume-cpu.json
python -m launch.benchmark resume --show launch/benchmark/results/resume-cpu.json

The samples are a few images under many names, in as many shards as ImageNet would have. Each start has a process of its
own, which has imported everything and read none of the data; its time goes from the manifest to the first batch on the
device. The quality of the shuffle is a pure function of seed and counts: the largest correlation of an epoch's order
with the stored one.
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from dataio.augment.params import ImageOptions
from dataio.loader import LoaderOptions, TrainLoader
from dataio.loader_state import LoaderState
from dataio.manifest import MANIFEST_NAME, SAMPLES_NAME, Manifest, load_manifest, read_manifest_file
from dataio.sampler import ShuffledSampler
from dataio.workers import available_cores, sigint_blocked
from launch.benchmark.cli import USAGE_ERRORS, AddOption, Command, Report, resolve_device
from launch.benchmark.measure import quantiles, synchronize
from launch.benchmark.report import describe_run
from launch.benchmark.sample_images import DESCRIPTION, pack_images

_UNIQUE_IMAGES = 128  # one shard of them
_SAMPLES = 1_281_167  # training images of ImageNet-1k
_PLAN = LoaderOptions(seed=0, global_batch_size=1024, world_size=8)
_SHARDS = 560  # shards of 256 MiB, if these were ImageNet's samples
_WINDOW_SHARDS, _SHUFFLED_EPOCHS, _SHUFFLED_SEEDS = 16, 5, 3


def replicate_samples(manifest: Manifest, folder: Path, samples: int) -> Manifest:
    """Make a packed folder of `samples` samples, or a few more, in 560 hard links to the one shard of another.

    Each of its shards lists the same few samples again and again.
    """
    folder.mkdir()
    [shard] = manifest.shards
    each = -(-samples // _SHARDS)
    shards = tuple(replace(shard, name=f"shard-{number:06d}.tar", samples=each) for number in range(_SHARDS))
    for link in shards:
        os.link(manifest.folder / shard.name, folder / link.name)
    rows = np.tile(np.resize(manifest.samples, each), _SHARDS)
    rows["shard"] = np.repeat(np.arange(_SHARDS), each)
    table = io.BytesIO()
    np.save(table, rows)
    (folder / SAMPLES_NAME).write_bytes(table.getvalue())
    file, _ = read_manifest_file(manifest.folder)
    digest = hashlib.sha256(table.getvalue()).hexdigest()
    file = replace(file, samples=len(rows), samples_sha256=digest, shards=shards, sha256="")
    (folder / MANIFEST_NAME).write_text(json.dumps(asdict(file)))
    return load_manifest(folder)


def state_at(step: int, folder: Path) -> LoaderState:
    """State of the loader in the checkpoint of a run after so many steps."""
    state = TrainLoader(load_manifest(folder), ImageOptions(), _PLAN, torch.device("cpu")).state()
    return state | {"samples_seen": step * _PLAN.global_batch_size}


def first_batch(folder: Path, state: LoaderState | None, device: torch.device) -> float:
    """Seconds from the manifest to rank 0's first batch. state: None for a fresh start.

    Raises RuntimeError if it is the batch of another step.
    """
    began = time.perf_counter()
    loader = TrainLoader(load_manifest(folder), ImageOptions(threads=available_cores()), _PLAN, device)
    if state:
        loader.restore(state)
    batch = next(loader)
    synchronize(device)
    seconds = time.perf_counter() - began
    if batch.position != (state["samples_seen"] if state else 0):
        raise RuntimeError(f"the first batch is that of position {batch.position}; its time would mean nothing")
    return seconds


def _warm_up(device: torch.device) -> None:
    """Import this module in a new process, and start the device."""
    torch.zeros(1, device=device)


def correlations(manifest: Manifest) -> dict[str, float]:
    """Largest absolute correlation of an epoch's order with the stored one, over epochs and seeds, by sampler."""
    largest = {}
    stored = np.arange(len(manifest))
    for window in (None, _WINDOW_SHARDS):
        orders = [ShuffledSampler(seed, manifest.shard_samples, window) for seed in range(_SHUFFLED_SEEDS)]
        seen = (order.samples_at(epoch * len(stored) + stored) for order in orders for epoch in range(_SHUFFLED_EPOCHS))
        largest[str(orders[0])] = max(abs(float(np.corrcoef(stored, samples)[0, 1])) for samples in seen)
    return largest


def measure(samples: int, step: int, rounds: int, device: torch.device, _path: Path) -> Report:
    """Measure everything and return the report."""
    report = describe_run("resume", device)
    with tempfile.TemporaryDirectory(prefix="photographs-") as folder:
        print(f"making {_UNIQUE_IMAGES} images, and {samples} samples of them", file=sys.stderr)
        few = pack_images(Path(folder), _UNIQUE_IMAGES, cores=1)
        many = replicate_samples(few, Path(folder, "many"), samples)
        report["data"] = {"description": DESCRIPTION, "samples": len(many), "shards": len(many.shards)}
        state = state_at(step, many.folder)
        report |= {"step": step, "state_bytes": len(json.dumps(state))}
        report |= {"batch": _PLAN.micro_batch_size, "rounds": rounds}
        seconds: dict[str, list[float]] = {"fresh": [], "resumed": []}
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for kind, given in (("fresh", None), ("resumed", state)):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    with sigint_blocked():
                        ready = process.submit(_warm_up, device)
                    ready.result()
                    seconds[kind].append(process.submit(first_batch, many.folder, given, device).result())
    report["seconds"] = {name: asdict(quantiles(own)) for name, own in seconds.items()}
    later = [resumed - fresh for fresh, resumed in zip(*seconds.values(), strict=True)]
    report["seconds_later_than_fresh"] = asdict(quantiles(later))
    report["correlation"] = correlations(many)
    return report


def show(report: Report, _markdown: bool) -> None:
    """Print a report."""
    fresh, resumed = (report["seconds"][name]["median"] for name in ("fresh", "resumed"))
    print(
        f"{report['data']['samples']:,} samples in {report['data']['shards']:,} shards; {report['device']['name']},"
        f" commit {report['commit']}\n"
        f"first batch of {report['batch']} after a fresh start: {fresh:.2f} s;"
        f" after a resume at step {report['step']:,}, from {report['state_bytes']} bytes: {resumed:.2f} s"
    )
    for name, value in report["correlation"].items():
        print(f"largest correlation of an epoch's order with the stored one, {name}: {value:.4f}")


def add_options(add: AddOption) -> None:
    """Declare the options."""
    add("--samples", type=int, default=_SAMPLES, help=f"at least so many (default {_SAMPLES})")
    add("--step", type=int, default=1_000_000, help="of the run that is resumed (default 1000000)")
    add("--rounds", type=int, default=5, help="starts of each kind (default 5)")


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError or RuntimeError."""
    for name, least in (("samples", _SHARDS), ("step", 1), ("rounds", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name} is {getattr(arguments, name)}; give {least} or more")
    device = resolve_device(arguments.device)
    return partial(measure, arguments.samples, arguments.step, arguments.rounds, device)


COMMAND = Command(
    "resume", __doc__, add_options, resolve, show,
    failures=USAGE_ERRORS, device_help="of the batches (default: a GPU where there is one)",
)  # fmt: skip
parse, main = COMMAND.parse, COMMAND.main

"""Times the first batch of a run after a fresh start and after a resume far away, on as many samples as ImageNet has.

python -m launch.benchmark resume
python -m launch.benchmark resume --step 5000000 --output launch/benchmark/results/resume-cpu.json
python -m launch.benchmark resume --show launch/benchmark/results/resume-cpu.json

The samples are a few photographs under many names, in as many shards as ImageNet would have. Each start has a process
of its own that has imported everything and knows nothing of the data; its time goes from the manifest to the first
batch on the device. How well a run is shuffled is a pure function of seed and counts: the largest correlation of an
epoch's order with the stored one.
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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataio.augment.params import ImageOptions
from dataio.loader import LoaderOptions, TrainLoader
from dataio.manifest import MANIFEST_NAME, SAMPLES_NAME, Manifest, load_manifest, read_manifest_file
from dataio.sampler import ShuffledSampler
from dataio.workers import available_cores, sigint_blocked
from launch.benchmark.measure import quantiles
from launch.benchmark.report import default_path, describe_run, read_report, user_path, write_report
from launch.benchmark.sample_images import DESCRIPTION, pack_images
from launch.distributed import default_device_type

_UNIQUE_IMAGES = 128  # one shard of them
_SAMPLES = 1_281_167  # of ImageNet-1k
_PLAN = LoaderOptions(seed=0, global_batch_size=1024, world_size=8)
_SHARDS = 560  # of 256 MiB, if these were ImageNet's samples
_WINDOW_SHARDS, _SHUFFLED_EPOCHS, _SHUFFLED_SEEDS = 16, 5, 3


def replicate_samples(manifest: Manifest, folder: Path, samples: int) -> Manifest:
    """A packed folder with so many samples, or a few more, in 560 shards: another one's, as hard links.

    In each its samples are named again and again.
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


def state_at(step: int, folder: Path) -> dict[str, int | str]:
    """What a checkpoint keeps of the loader of a run that has done so many steps."""
    state = TrainLoader(load_manifest(folder), ImageOptions(), _PLAN, torch.device("cpu")).state()
    return state | {"samples_seen": step * _PLAN.global_batch_size}


def first_batch(folder: Path, state: dict[str, int | str] | None, device: torch.device) -> float:
    """Seconds from the manifest to the first batch, of rank 0. state: None for a fresh start.

    Raises RuntimeError if it is the batch of another step.
    """
    began = time.perf_counter()
    loader = TrainLoader(load_manifest(folder), ImageOptions(threads=available_cores()), _PLAN, device)
    if state:
        loader.restore(state)
    batch = next(loader)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if batch.position != (state["samples_seen"] if state else 0):
        raise RuntimeError(f"the first batch is that of position {batch.position}; its time would mean nothing")
    return seconds


def _warm_up(device: torch.device) -> None:
    """Imports all this, and starts the device."""
    torch.zeros(1, device=device)


def correlations(manifest: Manifest) -> dict[str, float]:
    """By order: the largest, in absolute value, of an epoch's order with the stored one, over some epochs and seeds."""
    largest = {}
    stored = np.arange(len(manifest))
    for window in (None, _WINDOW_SHARDS):
        orders = [ShuffledSampler(seed, manifest.shard_samples, window) for seed in range(_SHUFFLED_SEEDS)]
        seen = (order.samples_at(epoch * len(stored) + stored) for order in orders for epoch in range(_SHUFFLED_EPOCHS))
        largest[str(orders[0])] = max(abs(float(np.corrcoef(stored, samples)[0, 1])) for samples in seen)
    return largest


def measure(samples: int, step: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """The whole report."""
    report = describe_run("resume", device)
    with tempfile.TemporaryDirectory(prefix="photographs-") as folder:
        print(f"making {_UNIQUE_IMAGES} photographs, and {samples} samples of them", file=sys.stderr)
        few = pack_images(Path(folder), _UNIQUE_IMAGES, cores=1)
        many = replicate_samples(few, Path(folder, "many"), samples)
        report["data"] = {"description": DESCRIPTION, "samples": len(many), "shards": len(many.shards)}
        state = state_at(step, many.folder)
        report |= {
            "step": step,
            "state_bytes": len(json.dumps(state)),
            "batch": _PLAN.micro_batch_size,
            "rounds": rounds,
        }
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


def show(report: dict[str, Any]) -> None:
    """Prints a report, for people."""
    fresh, resumed = (report["seconds"][name]["median"] for name in ("fresh", "resumed"))
    print(
        f"{report['data']['samples']:,} samples in {report['data']['shards']:,} shards; {report['device']['name']},"
        f" commit {report['commit']}\n"
        f"first batch of {report['batch']} after a fresh start: {fresh:.2f} s;"
        f" after a resume at step {report['step']:,}, from {report['state_bytes']} bytes: {resumed:.2f} s"
    )
    for name, value in report["correlation"].items():
        print(f"largest correlation of an epoch's order with the stored one, {name}: {value:.4f}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark resume",
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="where batches are handed over (default: a GPU where there is one)")
    add("--samples", type=int, default=_SAMPLES, help=f"at least so many (default {_SAMPLES})")
    add("--step", type=int, default=1_000_000, help="of the run that is resumed (default 1000000)")
    add("--rounds", type=int, default=5, help="starts of each kind (default 5)")
    add("--output", type=user_path, metavar="FILE.json", help="default: a new file below runs/benchmark")
    add("--show", type=user_path, metavar="FILE.json", help="print what this file says and measure nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.show:
            show(read_report(arguments.show, "resume"))
            return 0
        for name, least in (("samples", _SHARDS), ("step", 1), ("rounds", 1)):
            if getattr(arguments, name) < least:
                raise ValueError(f"--{name} is {getattr(arguments, name)}; give {least} or more")
        device = torch.device(arguments.device or default_device_type())
        path = arguments.output or default_path("resume")
        path.parent.mkdir(parents=True, exist_ok=True)  # now, if it cannot be
        report = measure(arguments.samples, arguments.step, arguments.rounds, device)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_report(path, report)
    show(report)
    print(f"written to {path}", file=sys.stderr)
    return 0

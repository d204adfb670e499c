"""Times of `python -m dataio.pack` on a class folder of images, beside cp -r, tar and webdataset's ShardWriter.

python -m launch.benchmark pack
python -m launch.benchmark pack --images 36000 --output launch/benchmark/results/pack-cpu.json
python -m launch.benchmark pack --show launch/benchmark/results/pack-cpu.json --markdown

Whole commands, their start included, run in turn, in another order each round. Before each, pending writes are flushed
to disk, untimed; after it, the images in its output are counted. dataio.pack flushes its output to disk before it ends;
the others do not, so cp -r is timed both without and with that.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dataio.workers import available_cores
from launch.benchmark.cli import USAGE_ERRORS, AddOption, Command, Report, require_few_threads, require_positive
from launch.benchmark.measure import Trial, cpu_seconds, quantiles, rotate_order, times_faster_than
from launch.benchmark.report import Column, describe_run, format_quantiles, missing_modules, tabulate
from launch.benchmark.sample_images import DESCRIPTION, make_images

_IMAGES = 6000
_BASELINE = "cp -r"
_WEBDATASET = """
import sys
from pathlib import Path
from webdataset import ShardWriter

source, target = map(Path, sys.argv[1:])
target.mkdir()
with ShardWriter(f"{target}/shard-%06d.tar", maxsize=256 * 2**20, maxcount=10**9, verbose=0) as shards:
    for label, folder in enumerate(sorted(source.iterdir())):
        for path in folder.iterdir():
            shards.write({"__key__": f"{folder.name}-{path.stem}", "jpg": path.read_bytes(), "cls": label})
"""


def _ours(check: str) -> Callable[[str, str, int], Sequence[str]]:
    return lambda source, target, workers: (
        *(sys.executable, "-m", "dataio.pack", source, target, "--check", check, "--workers", str(workers)),
    )


#: Name → (source, target, processes) → command.
COMMANDS: dict[str, Callable[[str, str, int], Sequence[str]]] = {
    "ours, --check none": _ours("none"),
    "ours, --check header": _ours("header"),
    "ours, --check decode": _ours("decode"),
    "cp -r": lambda source, target, _: ("cp", "-r", source, target),
    "cp -r, until on disk": lambda source, target, _: ("sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', source, target),
    "tar": lambda source, target, _: ("tar", "-cf", f"{target}.tar", "-C", source, "."),
    "webdataset": lambda source, target, _: (sys.executable, "-c", _WEBDATASET, source, target),
}


def run_trial(name: str, source: Path, folder: Path, workers: int) -> Trial:
    """Time a command that writes into the empty `folder`, and empties that again.

    Raises RuntimeError if it fails, or its output lacks images.
    """
    command = COMMANDS[name](str(source), str(folder / "made"), workers)
    os.sync()
    cpu, began = cpu_seconds(), time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    trial = Trial(time.perf_counter() - began, cpu_seconds() - cpu)
    made, expected = count_images(folder), count_images(source)
    if run.returncode or made != expected:
        raise RuntimeError(f"{name} made {made} of {expected} images; its stderr: {run.stderr.strip()[-500:]}")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return trial


def count_images(folder: Path) -> int:
    """Images in a folder and in the tar files there."""
    count = sum(1 for _ in folder.rglob("*.jpg"))
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as members:
            count += sum(member.name.endswith(".jpg") for member in members)
    return count


def file_system(folder: Path) -> str:
    """Type of the file system, as `stat` names it; "tmpfs" is no disk."""
    command = ("stat", "--file-system", "--format=%T", str(folder))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def measure(images: int, workers: int, rounds: int, _path: Path) -> Report:
    """Measure everything and return the report. Raises RuntimeError if a command fails."""
    report = describe_run("pack", torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="photographs-") as folder:
        source, target = Path(folder, "photographs"), Path(folder, "target")
        target.mkdir()
        print(f"making {images} images", file=sys.stderr)
        make_images(source, images, workers)
        whole = sum(path.stat().st_size for path in source.rglob("*.jpg"))
        report["data"] = {"description": DESCRIPTION, "images": images, "bytes": whole}
        report |= {"workers": workers, "rounds": rounds, "file_system": file_system(target)}
        trials: dict[str, list[Trial]] = {name: [] for name in COMMANDS}
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for name in rotate_order(list(COMMANDS), number * len(COMMANDS) // rounds):
                trials[name].append(run_trial(name, source, target, workers))
    report["results"] = [describe(name, trials) for name in trials]
    return report


def describe(name: str, trials: dict[str, list[Trial]]) -> dict[str, Any]:
    """Entry of the report for a command. Ratios are of trials of the same round."""
    seconds = {command: [trial.seconds for trial in own] for command, own in trials.items()}
    return {
        "contender": name,
        "seconds": asdict(quantiles(seconds[name])),
        "cpu_seconds": asdict(quantiles([trial.cpu_seconds for trial in trials[name]])),
        "times_faster_than": times_faster_than(seconds, name),
    }


def show(report: Report, markdown: bool) -> None:
    """Print a report."""
    data = report["data"]
    print(
        f"{data['images']} images, {data['bytes'] / 1e9:.2f} GB, {report['workers']} processes of ours,"
        f" {report['rounds']} rounds, {report['file_system']}; {report['device']['name']}, commit {report['commit']}\n"
    )
    print(tabulate(report["results"], _COLUMNS, markdown=markdown))


def _times_as_fast(entry: dict[str, Any]) -> str:
    same = {"median": 1.0, "low": 1.0, "high": 1.0}
    return format_quantiles(entry["times_faster_than"].get(_BASELINE, same), "{:.2f}".format)


_COLUMNS: dict[str, Column] = {
    "command": lambda entry: entry["contender"],
    "seconds: median (0.2–0.8)": lambda entry: format_quantiles(entry["seconds"], "{:.2f}".format),
    "CPU seconds": lambda entry: f"{entry['cpu_seconds']['median']:.2f}",
    f"times as fast as {_BASELINE}": _times_as_fast,
}


def add_options(add: AddOption) -> None:
    """Declare the options."""
    add("--images", type=int, default=_IMAGES, help=f"number of images to make (default {_IMAGES})")
    add("--workers", type=int, default=available_cores(), help="processes of dataio.pack (default: one per core)")
    add("--rounds", type=int, default=5, help="trials of each command (default 5)")


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError or RuntimeError."""
    require_positive(arguments, "images", "workers", "rounds")
    require_few_threads(arguments, "workers")
    if missing := missing_modules("webdataset"):
        raise RuntimeError(f"{missing}; install it")
    return partial(measure, arguments.images, arguments.workers, arguments.rounds)


COMMAND = Command("pack", __doc__, add_options, resolve, show, failures=USAGE_ERRORS, device_help="")
parse, main = COMMAND.parse, COMMAND.main

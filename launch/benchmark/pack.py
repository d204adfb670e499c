"""Times `python -m dataio.pack` on a class folder of photographs, against cp -r, tar and webdataset's ShardWriter.

python -m launch.benchmark pack
python -m launch.benchmark pack --images 36000 --output launch/benchmark/results/pack-cpu.json
python -m launch.benchmark pack --show launch/benchmark/results/pack-cpu.json --markdown

Whole commands, their start included, take trials, in each round in another order. Before each the disk writes all that
it still has to, untimed; after it the images in what it made are counted. What dataio.pack has made is on disk when it
ends. The others leave that for later, so that one of them is timed with it, too.
"""

import argparse
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from dataio.workers import available_cores
from launch.benchmark.measure import quantiles
from launch.benchmark.report import default_path, describe_run, read_report, user_path, write_report
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


#: Name → (source, target, processes) → the command.
COMMANDS: dict[str, Callable[[str, str, int], Sequence[str]]] = {
    "ours, --check none": _ours("none"),
    "ours, --check header": _ours("header"),
    "ours, --check decode": _ours("decode"),
    "cp -r": lambda source, target, _: ("cp", "-r", source, target),
    "cp -r, until on disk": lambda source, target, _: ("sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', source, target),
    "tar": lambda source, target, _: ("tar", "-cf", f"{target}.tar", "-C", source, "."),
    "webdataset": lambda source, target, _: (sys.executable, "-c", _WEBDATASET, source, target),
}


@dataclass(frozen=True)
class Trial:
    """A command, from its start to its end. cpu_seconds: with all processes that it started."""

    seconds: float
    cpu_seconds: float


def run_trial(name: str, source: Path, folder: Path, workers: int) -> Trial:
    """Runs a command into the empty `folder`, which is empty again afterwards.

    Raises RuntimeError if it fails, or not all images are in what it made.
    """
    command = COMMANDS[name](str(source), str(folder / "made"), workers)
    os.sync()
    cpu, began = _cpu_seconds(), time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True)
    trial = Trial(time.perf_counter() - began, _cpu_seconds() - cpu)
    made, expected = count_images(folder), count_images(source)
    if run.returncode or made != expected:
        raise RuntimeError(f"{name} made {made} of {expected} images and said: {run.stderr.strip()[-500:]}")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return trial


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def count_images(folder: Path) -> int:
    """In the folder, and in tar files there."""
    count = sum(1 for _ in folder.rglob("*.jpg"))
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as members:
            count += sum(member.name.endswith(".jpg") for member in members)
    return count


def file_system(folder: Path) -> str:
    """Its type, as `stat` names it; "tmpfs" is no disk."""
    command = ("stat", "--file-system", "--format=%T", str(folder))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def rotate_order(names: list[str], first: int) -> list[str]:
    return names[first:] + names[:first]


def measure(images: int, workers: int, rounds: int) -> dict[str, Any]:
    """The whole report. Raises RuntimeError if a command fails."""
    report = describe_run("pack", torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="photographs-") as folder:
        source, target = Path(folder, "photographs"), Path(folder, "target")
        target.mkdir()
        print(f"making {images} photographs", file=sys.stderr)
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
    """A contender's entry. Ratios are of trials of the same round."""
    own = trials[name]
    return {
        "contender": name,
        "seconds": asdict(quantiles([trial.seconds for trial in own])),
        "cpu_seconds": asdict(quantiles([trial.cpu_seconds for trial in own])),
        "times_faster_than": {
            other: asdict(quantiles([a.seconds / b.seconds for a, b in zip(theirs, own, strict=True)]))
            for other, theirs in trials.items()
            if other != name
        },
    }


def show(report: dict[str, Any], markdown: bool) -> None:
    """Prints a report, for people."""
    data, console = report["data"], Console(width=200)
    console.print(
        f"{data['images']} images, {data['bytes'] / 1e9:.2f} GB, {report['workers']} processes of ours,"
        f" {report['rounds']} rounds, {report['file_system']}; {report['device']['name']}, commit {report['commit']}",
        highlight=False,
    )
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in ("contender", "seconds: median (0.2–0.8)", "CPU seconds", f"times as fast as {_BASELINE}"):
        table.add_column(name, no_wrap=True)
    for entry in report["results"]:
        seconds, ratio = entry["seconds"], entry["times_faster_than"].get(_BASELINE, {"median": 1, "low": 1, "high": 1})
        table.add_row(
            entry["contender"],
            f"{seconds['median']:.2f} ({seconds['low']:.2f}–{seconds['high']:.2f})",
            f"{entry['cpu_seconds']['median']:.2f}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})",
        )
    console.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark pack",
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--images", type=int, default=_IMAGES, help=f"so many photographs are made (default {_IMAGES})")
    add("--workers", type=int, default=available_cores(), help="processes of dataio.pack (default: one per core)")
    add("--rounds", type=int, default=5, help="trials of each loader (default 5)")
    add("--output", type=user_path, metavar="FILE.json", help="default: a new file below runs/benchmark")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--show", type=user_path, metavar="FILE.json", help="print the table of this file and measure nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.show:
            show(read_report(arguments.show, "pack"), arguments.markdown)
            return 0
        for name in ("images", "workers", "rounds"):
            if getattr(arguments, name) < 1:
                raise ValueError(f"--{name} is {getattr(arguments, name)}; give a number above 0")
        if importlib.util.find_spec("webdataset") is None:
            raise RuntimeError("webdataset, a loader, is not installed; install it")
        path = arguments.output or default_path("pack")
        path.parent.mkdir(parents=True, exist_ok=True)  # now, if it cannot be
        report = measure(arguments.images, arguments.workers, arguments.rounds)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_report(path, report)
    show(report, arguments.markdown)
    print(f"written to {path}", file=sys.stderr)
    return 0

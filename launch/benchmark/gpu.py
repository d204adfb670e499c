"""Everything that needs a GPU, in one command: build, checks, tests, benchmarks, counters, sanitizers.

python -m launch.benchmark gpu
python -m launch.benchmark gpu --minutes 7 --output runs/gpu --archive runs/gpu.tar.gz
python -m launch.benchmark gpu --parts build check kernels
python -m launch.benchmark gpu --list

Its parts run one after the other, the most informative first. After a part that fails or exceeds its time limit the
others still run, and the exit status is 1. --minutes leaves out what would not fit any more. The command needs torch,
timm, pytest and hypothesis; a part that needs more is skipped with its reason where that is not installed. --list says
what each part needs, and needs no GPU.

It writes one folder: for each part a folder with log.txt, part.json (command, outcome, result) and the command's own
files, and summary.json of all parts, rewritten after each part, so that a later crash loses nothing.
"""

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from launch.benchmark.cli import Report, require_positive, resolve_device, start
from launch.benchmark.gpu_parts import FILES, LOG, Part, last_line, plan_parts
from launch.benchmark.report import (
    ROOT,
    default_path,
    describe_run,
    format_table,
    prepare_output,
    user_path,
    write_report,
)
from launch.command_line import make_parser

PASSED, FAILED, TIMED_OUT, SKIPPED, LEFT_OUT = "passed", "failed", "exceeded its limit", "skipped", "left out"
_KILL_AFTER_SECONDS = 15  # pytest takes up to 10 to end its workers
_TIMEOUT_STATUSES = (124, 137)  # by SIGINT; by SIGKILL, where that did not suffice
_HEADLINE_WIDTH = 110


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    seconds: float,
    report: Report,
    archive: Path | None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the parts that fit into so many seconds; add their entries to `report`, and write it after each."""
    began = clock()
    report["parts"] = []
    for part in parts:
        left = seconds - (clock() - began)
        no_kernels = part.needs_kernels and any(
            entry["name"] == "build" and entry["outcome"] != PASSED for entry in report["parts"]
        )
        if reason := part.missing or ("no kernels that run here, see build" if no_kernels else ""):
            entry = {"name": part.name, "outcome": SKIPPED, "headline": reason}
        elif part.expected_seconds > left:
            reason = f"takes about {part.expected_seconds:.0f} s, and {max(left, 0):.0f} s are left"
            entry = {"name": part.name, "outcome": LEFT_OUT, "headline": reason}
        else:
            print(f"{part.name} …", flush=True)
            entry = run_part(part, folder / part.name, min(part.timeout_seconds, left))
            entry.pop("result")  # part.json has it
        print(f"{part.name}: {entry['outcome']}, {entry['headline']}", flush=True)
        report["parts"].append(entry)
        write_report(folder / "summary.json", report)
        if archive:
            _archive(folder, archive)


def run_part(part: Part, folder: Path, timeout_seconds: float) -> dict[str, Any]:
    """Run a part and return the entry that part.json gets: outcome, result, and the headline of that."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)  # left by an earlier run
    entry: dict[str, Any] = {
        "name": part.name,
        "command": list(part.command),
        "limit_seconds": round(timeout_seconds, 1),
    }
    write_report(folder / "part.json", entry | {"outcome": "running"})
    began = time.monotonic()
    with open(folder / LOG, "wb") as log:
        status = _run_within(timeout_seconds, part, log)
    entry["seconds"] = round(time.monotonic() - began, 1)
    entry["exit_status"] = status
    ended = status in _TIMEOUT_STATUSES and entry["seconds"] > timeout_seconds - 0.2
    entry["outcome"] = PASSED if status == 0 else TIMED_OUT if ended else FAILED
    try:
        entry["result"], entry["headline"] = part.parse_result(folder)
    except Exception as error:  # whatever a command that did not end well, or not as foreseen, has left
        entry["result"], entry["headline"] = last_line(folder)
        if status == 0:
            entry["outcome"] = FAILED
            entry["headline"] = f"no result: {type(error).__name__}: {error}"
    write_report(folder / "part.json", entry)
    return entry


def _run_within(timeout_seconds: float, part: Part, log: Any) -> int:
    """Run a part and return its exit status. If it exceeds the limit, it is ended with the processes that it started.

    `timeout` sees to that, even if this process is killed meanwhile; by Ctrl-C first, on which pytest still says what
    failed.
    """
    environ = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(part.environ)
    limits = ("--signal=INT", f"--kill-after={_KILL_AFTER_SECONDS}", f"{timeout_seconds:.3f}")
    process = subprocess.Popen(
        ("timeout", *limits, *part.command),
        cwd=ROOT,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        status = process.wait()
        return status if status >= 0 else 128 - status  # as a shell says it of a signal
    finally:
        if process.poll() is None:  # interrupted: it hands the signal on
            process.terminate()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the command left running; `timeout` made them one group


def _archive(folder: Path, path: Path) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    with tarfile.open(unfinished, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    unfinished.replace(path)


def describe_gpu() -> dict[str, Any]:
    """Properties, clocks and power limit of the GPU, which tell it from another one of the same name."""
    properties = torch.cuda.get_device_properties()
    asked = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    command = ("nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split(",")
    except (OSError, subprocess.SubprocessError):
        answer = []
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_cache_bytes": properties.L2_cache_size,
        **dict(zip(asked, map(str.strip, answer), strict=False)),
    }


def format_summary(entries: Iterable[dict[str, Any]]) -> str:
    """Table of the parts: part, outcome, seconds, headline."""
    rows = [
        (entry["name"], entry["outcome"], f"{entry['seconds']:.0f}" if "seconds" in entry else "", entry["headline"])
        for entry in entries
    ]
    cut = [(*row[:3], row[3][:_HEADLINE_WIDTH]) for row in rows]
    return format_table(("part", "outcome", "s", "headline"), cut, left=4)


def format_plan(parts: Sequence[Part]) -> str:
    """Table of the parts: name, needs, expected time and limit; below it, those that would be skipped here, and why."""
    rows = [
        (
            part.name,
            ", ".join(("GPU", *("kernels",) * part.needs_kernels, *part.needs)),
            f"{part.expected_seconds:.0f}",
            f"{part.timeout_seconds:.0f}",
        )
        for part in parts
    ]
    skipped = [f"skipped here: {part.name}: {part.missing}" for part in parts if part.missing]
    return "\n".join((format_table(("part", "needs", "about s", "limit s"), rows, left=2), *skipped))


def choose_parts(parts: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """Parts of these names, or all. Raises ValueError if there is no part of a name."""
    known = [part.name for part in parts]
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no part {name!r}; use some of {', '.join(known)}")
    return [part for part in parts if names is None or part.name in names]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; --help and errors exit."""
    listed = ", ".join(part.name for part in plan_parts(Path()))
    parser = make_parser("python -m launch.benchmark gpu", __doc__, f"\nparts: {listed}")
    add = parser.add_argument
    add("--output", type=user_path, metavar="FOLDER", help="default: a new folder below runs/benchmark")
    minutes = "total time; parts that no longer fit are left out (default: run all, over an hour)"
    add("--minutes", type=float, metavar="MINUTES", help=minutes)
    add("--parts", nargs="+", metavar="PART", help="only these; one that cannot run is an error then")
    add("--list", action="store_true", help="print the parts with their time limits and needs, and run none")
    archive = "also pack the folder into this file, after every part"
    add("--archive", type=user_path, metavar="FILE.tar.gz", help=archive)
    return parser.parse_args(argv)


def _stop(_signal: int, _frame: Any) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def resolve(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the arguments and return what runs the parts. Raises ValueError, RuntimeError or OSError."""
    folder = (arguments.output or default_path("gpu").with_suffix("")).resolve()
    parts = choose_parts(plan_parts(folder), arguments.parts)
    if arguments.list:
        return partial(_list, parts)
    if arguments.archive and folder in arguments.archive.resolve().parents:
        raise ValueError(f"--archive {arguments.archive} is in the folder that it packs; put it elsewhere")
    require_positive(arguments, "minutes")
    device = resolve_device("cuda", remedy="run this where nvidia-smi lists one")
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.archive:
        prepare_output(arguments.archive)
    return partial(_run, parts, folder, arguments, device)


def _list(parts: Sequence[Part]) -> int:
    print(format_plan(parts))
    return 0


def _run(parts: Sequence[Part], folder: Path, arguments: argparse.Namespace, device: torch.device) -> int:
    signal.signal(signal.SIGTERM, _stop)  # a part's command is ended, too
    report = describe_run("gpu", device) | {"minutes": arguments.minutes}
    report["device"] |= describe_gpu()
    seconds = 60 * arguments.minutes if arguments.minutes else float("inf")
    run_parts(parts, folder, seconds, report, arguments.archive)
    print(f"\n{format_summary(report['parts'])}\nwritten to {folder}")
    bad = (FAILED, TIMED_OUT, SKIPPED) if arguments.parts else (FAILED, TIMED_OUT)
    return int(any(entry["outcome"] in bad for entry in report["parts"]))


def main(argv: list[str] | None = None) -> int:
    """Run the parts; returns the exit status."""
    return start(parse(argv), resolve)


if __name__ == "__main__":
    sys.exit(main())

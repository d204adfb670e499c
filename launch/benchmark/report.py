"""The JSON report that every benchmark writes: its first keys, its file, and tables printed from it.

Imports torch alone: some benchmarks run where nothing else is installed.
"""

import errno
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
Column = Callable[[dict[str, Any]], str]  # an entry of a report → its cell in a table


def describe_run(benchmark: str, device: torch.device) -> dict[str, Any]:
    """First keys of a report: date, commit, device, versions and threads."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": {"type": device.type, "name": device_name(device)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "threads": torch.get_num_threads(),
    }


def user_path(text: str) -> Path:
    """Path that `text` names, ~ being the home folder; dataio.files has the same for what may import dataio."""
    return Path(text).expanduser()


def commit() -> str | None:
    """Commit of these sources, with "+changes" if files differ from it.

    Outside a checkout, the commit that POLAFORMER_COMMIT names, or None.
    """
    answers = []
    for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            finished = subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return os.environ.get("POLAFORMER_COMMIT")
        answers.append(finished.stdout.strip())
    return answers[0] + ("+changes" if answers[1] else "")


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor with the vector instructions that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"


def default_path(benchmark: str) -> Path:
    """Path of a new file in runs/benchmark, named by the time."""
    return Path("runs", "benchmark", f"{benchmark}-{datetime.now():%Y%m%d-%H%M%S}.json")


def missing_modules(*modules: str) -> str:
    """Name those of the modules that are not installed, in a sentence; empty if all are."""
    missing = [name for name in modules if not _is_installed(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is part of
        return False


def prepare_output(path: Path) -> Path:
    """Make the folder of `path` and return `path`. Raises OSError if no file can be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    return path


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, atomically. Raises ValueError for NaN and infinite numbers, which JSON does not have."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    unfinished.replace(path)


def finite(value: Any) -> Any:
    """Return the value with NaN and infinite numbers in it as text."""
    if isinstance(value, Mapping):
        return {key: finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_report(path: Path, benchmark: str) -> dict[str, Any]:
    """Read the report that an earlier run wrote. Raises OSError or ValueError if there is none of this benchmark."""
    fault = f"{path} is no report of python -m launch.benchmark {benchmark}; name one"
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(fault) from error
    if not isinstance(report, dict) or report.get("benchmark") != benchmark:
        raise ValueError(fault)
    return report


def heading(report: Mapping[str, Any], versions: Iterable[str] = ("torch",), workers: str = "threads") -> str:
    """Format the first line of a printed report: device, versions, commit, date."""
    named = "".join(f" {name} {report['versions'][name]}," for name in versions)
    return (
        f"{report['device']['name']}, {report[workers]} {workers},{named} commit {report['commit']}, {report['date']}\n"
    )


def format_quantiles(values: Mapping[str, float], form: Callable[[float], str], unit: float = 1) -> str:
    """Format the median, and the other two quantiles in parentheses, each times `unit`."""
    median, low, high = (form(unit * values[name]) for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def three_digits(value: float) -> str:
    """Format a number to three significant digits, or as a whole number from 1000 on."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def pass_milliseconds(name: str) -> Column:
    """Column of a pass's milliseconds, for entries with quantiles of "seconds" in each of their "passes"."""
    return lambda entry: format_quantiles(entry["passes"][name]["seconds"], three_digits, 1000)


def forward_and_backward(key: str, unit: float, form: str) -> Column:
    """Column of a number of the forward pass and the same of the backward pass, in multiples of `unit`."""
    return lambda entry: "·".join(format(entry["passes"][name][key] / unit, form) for name in ("forward", "backward"))


def tabulate(
    entries: Iterable[dict[str, Any]], columns: Mapping[str, Column], left: int = 1, markdown: bool = False
) -> str:
    """Table with a row for each entry; one that was skipped has its first `left` cells and "skipped"."""
    cells = list(columns.values())
    rows = [
        [cell(entry) for cell in cells[:left]] + ["skipped"] if "skipped" in entry else [cell(entry) for cell in cells]
        for entry in entries
    ]
    return format_table(list(columns), rows, left, markdown)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, markdown: bool = False) -> str:
    """Table of aligned columns, the first `left` of them to the left. Rows may be shorter than the header."""
    rows = [(*row, *(len(header) - len(row)) * ("",)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    dash = "-" if markdown else "─"
    rule = [(width - 1) * dash + (":" if markdown and place >= left else dash) for place, width in enumerate(widths)]
    return "\n".join(map(line, (header, rule, *rows)))

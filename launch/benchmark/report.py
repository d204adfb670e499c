"""What every benchmark's JSON begins with, the file it goes to, and tables for people."""

import errno
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def describe_run(benchmark: str, device: torch.device) -> dict[str, Any]:
    """When, from which commit, on which device, with which versions and how many threads a benchmark runs."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": {"type": device.type, "name": device_name(device)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "threads": torch.get_num_threads(),
    }


def user_path(text: str) -> Path:
    """dataio.files.user_path, for benchmarks that need nothing of dataio."""
    return Path(text).expanduser()


def commit() -> str | None:
    """The commit of these sources, with "+changes" if files differ from it.

    Outside a checkout, where they were copied without .git, the one that POLAFORMER_COMMIT names, or None.
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
    """The maker's name of the GPU, or of the processor with the vector units that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {torch.backends.cpu.get_cpu_capability()}"


def default_path(benchmark: str) -> Path:
    """A new file below runs/benchmark, named by the time."""
    return Path("runs", "benchmark", f"{benchmark}-{datetime.now():%Y%m%d-%H%M%S}.json")


def prepare_output(path: Path) -> Path:
    """`path`, after making the folder that it is in. Raises OSError if no file can be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    return path


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes the JSON into an existing folder, so that no half-written file is ever seen."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    unfinished.replace(path)


def read_report(path: Path, benchmark: str) -> dict[str, Any]:
    """What an earlier run wrote. Raises OSError or ValueError if there is no such thing at `path`."""
    fault = f"{path} is no report of python -m launch.benchmark {benchmark}; name one"
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(fault) from error
    if not isinstance(report, dict) or report.get("benchmark") != benchmark:
        raise ValueError(fault)
    return report


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, markdown: bool = False) -> str:
    """Aligned columns, the first `left` of them to the left. Rows may be shorter than the header."""
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

"""What `python -m launch.benchmark gpu` runs: its parts in the order of their worth, and what each one's files say.

Each part is a command of its own; gpu.py runs them. How long they take was estimated before any had run on a GPU.
"""

import csv
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.benchmark.check_kernels import is_right
from launch.benchmark.report import read_report

FILES = REPORT, LOG, TESTS, COUNTERS = "report.json", "log.txt", "tests.xml", "counters.csv"  # in each part's folder

ResultParser = Callable[[Path], tuple[Any, str]]  # a part's folder → its result, for JSON, and the headline of that

_PYTHON = (sys.executable, "-m")
_CHECK = (*_PYTHON, "launch.benchmark.check_kernels")
_KERNEL_TESTS = ("tests/polaformer/test_ops.py", "tests/polaformer/test_kernels.py")
_STAGES = ("128,1,56x56,96", "128,2,28x28,96")  # of b4 and b5
_METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "breakdown:sm__throughput.avg.pct_of_peak_sustained_elapsed",  # every pipe's share
)
_ADVICE = re.compile("Search for `cuda|CUDA kernel errors might|For debugging consider|Compile with `TORCH_USE_CUDA")


@dataclass(frozen=True)
class Part:
    """A command; about how long it takes, and after how long it is ended."""

    name: str
    command: tuple[str, ...]
    expected_seconds: float
    timeout_seconds: float
    parse_result: ResultParser
    missing: str = ""  # why it cannot run here
    needs_kernels: bool = True
    environ: Mapping[str, str] = field(default_factory=dict)


def plan_parts(folder: Path) -> list[Part]:
    """All parts; each writes to the folder of its own name below `folder`."""
    return [*_plan_first(folder), *_plan_tools(folder), *_plan_long(folder)]


def _plan_first(folder: Path) -> list[Part]:
    # Apart, as after one illegal access a process can compute nothing more.
    real, awkward = (
        (*_CHECK, "errors", "--shapes", shapes, "--output", str(folder / name / REPORT))
        for name, shapes in (("check", "real"), ("check-awkward", "awkward"))
    )
    eager = ("--modes", "eager", "--seconds", "3")
    side_by_side = ("--implementations", "ours", "eager", "sdpa", "--seconds", "3")
    return [
        Part("build", (*_PYTHON, "launch.benchmark.build_kernels"), 15, 300, last_line, needs_kernels=False),
        Part("check", real, 20, 60, parse_checks),
        Part("check-awkward", awkward, 15, 60, parse_checks),
        Part("kernels", _benchmark(folder / "kernels", "profile"), 30, 90, parse_profile),
        Part("tests", _pytest(folder / "tests", *_KERNEL_TESTS), 60, 150, parse_tests),
        Part("kernel", _benchmark(folder / "kernel", "kernel", *side_by_side), 60, 150, parse_kernel),
        Part("step", _benchmark(folder / "step", "step", *eager), 90, 180, parse_steps, needs_kernels=False),
    ]


def _plan_tools(folder: Path) -> list[Part]:
    counters = (
        *("--clock-control", "none", "--profile-from-start", "off"),
        *("--kernel-name-base", "demangled", "--kernel-name", "regex:polaformer"),
        *("--csv", "--print-units", "base", "--log-file", str(folder / "counters" / COUNTERS)),
        *("--metrics", ",".join(_METRICS), *_CHECK, "profiled"),
    )
    # Without PyTorch's cache of freed memory, so that the sanitizer sees where each tensor ends. PyTorch asks the
    # driver for functions that it may lack, which memcheck would report; our own launches are checked anyway.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    memory = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", *_CHECK, "tiny")
    races = ("--tool", "racecheck", "--error-exitcode", "9", *_CHECK, "tiny")
    return [
        _tool_part("counters", "ncu", counters, 40, 120, parse_counters),
        _tool_part("memcheck", "compute-sanitizer", memory, 45, 120, parse_sanitizer, environ=uncached),
        _tool_part("racecheck", "compute-sanitizer", races, 45, 120, parse_sanitizer, environ=uncached),
    ]


def _plan_long(folder: Path) -> list[Part]:
    compiled = ("--shapes", *_STAGES, "--implementations", "ours", "compiled", "--growth", "--seconds", "2")
    of_b5 = ("--model", "polaformerpp_b5")
    steps = ("--modes", "compiled", "--models", "polaformerpp_b5", "vit_base_patch16_224", "convnext_base")
    of_data = ("--images", "8192", "--batch", "128")
    every_test = _pytest(folder / "all-tests", "tests")
    no_tests = missing_modules("deepspeed", "nvidia.dali", "pydantic", "webdataset", "fvcore", "skimage")
    no_data = missing_modules("nvidia.dali", "pydantic", "webdataset", "matplotlib", "skimage", "psutil", "rich")
    no_resume = missing_modules("nvidia.dali", "pydantic", "matplotlib", "skimage")
    data, resume = _benchmark(folder / "data", "data", *of_data), _benchmark(folder / "resume", "resume")
    return [
        Part("compiled", _benchmark(folder / "compiled", "kernel", *compiled), 60, 180, parse_kernel),
        Part("operators", _benchmark(folder / "operators", "profile", *of_b5), 40, 120, parse_operators),
        Part("compiled-step", _benchmark(folder / "compiled-step", "step", *steps), 180, 420, parse_steps),
        Part("all-tests", every_test, 600, 3600, parse_tests, no_tests),
        Part("data", data, 600, 3600, last_line, no_data, needs_kernels=False),
        Part("resume", resume, 300, 1800, last_line, no_resume, needs_kernels=False),
        Part("full", _benchmark(folder / "full", "kernel", "--full"), 1800, 5400, parse_kernel),
    ]


def _benchmark(folder: Path, name: str, *arguments: str) -> tuple[str, ...]:
    return *_PYTHON, "launch.benchmark", name, "--device", "cuda", "--output", str(folder / REPORT), *arguments


def _pytest(folder: Path, *tests: str) -> tuple[str, ...]:
    quiet = ("-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={folder / TESTS}")
    return *_PYTHON, "pytest", "-m", "gpu", *quiet, *tests


def find_tool(name: str) -> str | None:
    """Path of one of CUDA's tools, on the PATH or in the toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{home}/bin")


def _tool_part(name: str, tool: str, arguments: tuple[str, ...], *rest: Any, **options: Any) -> Part:
    path = find_tool(tool)
    missing = "" if path else f"{tool} is neither on the PATH nor in CUDA_HOME/bin"
    return Part(name, (path or tool, *arguments), *rest, missing=missing, **options)


def missing_modules(*modules: str) -> str:
    """Which of these modules are not installed, in a sentence; empty if all are."""
    missing = [name for name in modules if not _is_installed(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is part of
        return False


def last_line(folder: Path) -> tuple[None, str]:
    """No result; the log's last line as the headline, or the last before PyTorch's advice on errors of CUDA."""
    lines = (folder / LOG).read_text(errors="replace").split("\n")
    return None, next((line.strip() for line in reversed(lines) if line.strip() and not _ADVICE.match(line)), "")


def report_parser(benchmark: str, headline: Callable[[dict[str, Any]], str]) -> ResultParser:
    """The parse_result of a part that writes a benchmark's JSON."""

    def parse_result(folder: Path) -> tuple[dict[str, Any], str]:
        report = read_report(folder / REPORT, benchmark)
        return report, headline(report)

    return parse_result


def _headline_of_checks(report: dict[str, Any]) -> str:
    wrong = [f"{entry['shape']} {entry['dtype']}" for entry in report["checks"] if not is_right(entry)]
    right = f"{len(report['checks']) - len(wrong)} of {len(report['checks'])} right and bit-identical"
    return right + (f"; wrong: {'; '.join(wrong)}" if wrong else "")


def _headline_of_kernel(report: dict[str, Any]) -> str:
    """Ours on that of the measured shapes that takes the most operations."""
    ours = [entry for entry in report["results"] if entry["contender"] == "ours" and "passes" in entry]
    if not ours:
        return "ours was not measured"
    entry = max(ours, key=lambda entry: entry["passes"]["both"]["flops"])
    forward, backward = (entry["passes"][name] for name in ("forward", "backward"))
    times = " + ".join(f"{1e6 * one['seconds']['median']:.0f}" for one in (forward, backward))
    shares = " and ".join(f"{100 * one['share_of_copy_rate']:.0f} %" for one in (forward, backward))
    ratios = "".join(f", {ratio:.1f}× {other}" for other, ratio in entry["passes"]["both"]["times_faster_than"].items())
    return f"{entry['shape']}: {times} µs, {shares} of copy{ratios}"


def _headline_of_profile(report: dict[str, Any]) -> str:
    """Forward and backward of every shape, in the kernels' own time."""
    return "; ".join(
        f"{entry['shape']} "
        + (" + ".join(f"{1e6 * one['seconds']['median']:.0f}" for one in entry["passes"].values()) + " µs"
           if "passes" in entry else "failed")
        for entry in report["results"]
    )  # fmt: skip


def _headline_of_steps(report: dict[str, Any]) -> str:
    rates = (
        f"{entry['model']} " + (f"{entry['images_per_second']['median']:.0f}" if "seconds" in entry else "failed")
        for entry in report["results"]
    )
    return f"images/s: {', '.join(rates)}"


def _headline_of_operators(report: dict[str, Any]) -> str:
    slowest = ", ".join(f"{one['name']} {100 * one['share']:.0f} %" for one in report["operators"][:3])
    return f"{report['model']}: {1000 * report['seconds']:.0f} ms a step; {slowest}"


parse_checks = report_parser("check_kernels", _headline_of_checks)
parse_kernel = report_parser("kernel", _headline_of_kernel)
parse_profile = report_parser("profile", _headline_of_profile)
parse_operators = report_parser("profile", _headline_of_operators)
parse_steps = report_parser("step", _headline_of_steps)


def parse_tests(folder: Path) -> tuple[dict[str, Any], str]:
    """How many tests passed, failed and so on, and which failed, from pytest's junitxml."""
    suite = ElementTree.parse(folder / TESTS).getroot().find("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    bad = [case for case in suite.iter("testcase") if {child.tag for child in case} & {"failure", "error"}]
    failed = [f"{case.attrib['classname']}.{case.attrib['name']}" for case in bad]
    shown = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failures", "errors", "skipped") if counts[name])
    return counts | {"failed": failed}, shown


def parse_counters(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The metrics of each launch, in order, from Nsight Compute's CSV: one line there for each launch and metric."""
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(_skip_to_header((folder / COUNTERS).read_text())):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "metrics": {}})
        number = row["Metric Value"].replace(",", "")
        launch["metrics"][row["Metric Name"]] = (
            float(number) if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", number) else number
        )
    if not launches:
        raise ValueError(f"{COUNTERS} has no launch of a kernel of ours")
    times = [launch["metrics"].get("gpu__time_duration.sum") for launch in launches.values()]
    total = sum(time for time in times if isinstance(time, float)) / 1000  # nanoseconds
    return list(launches.values()), f"{len(launches)} launches, {total:.0f} µs"


def _skip_to_header(text: str) -> list[str]:
    """The lines from the CSV's header on: lines of the profiler and of the program may come before."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith('"ID",')]
    return [line for line in lines[starts[0] :] if line.startswith('"')] if starts else []


def parse_sanitizer(folder: Path) -> tuple[dict[str, int], str]:
    """How many errors and hazards compute-sanitizer's summary counts."""
    log = (folder / LOG).read_text(errors="replace")
    [summary] = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (error|hazard|warning)", summary)}
    return counts, summary.strip()

"""The parts of `python -m launch.benchmark gpu` in the order of their worth, and the parsers of their results.

Each part is a command of its own; gpu.py runs them. Expected times of build, the checks, kernels, depthwise and the
sanitizers are measured on an H200; the others are estimates.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from launch.benchmark import depthwise, kernel, kernel_checks, profiling, step
from launch.benchmark.report import missing_modules, read_report

REPORT, LOG, TESTS = "report.json", "log.txt", "tests.xml"  # in each part's folder
COUNTERS, PROFILE = "counters.csv", "counters.ncu-rep"
FILES = REPORT, LOG, TESTS, COUNTERS, PROFILE

ResultParser = Callable[[Path], tuple[Any, str]]  # a part's folder → its result, for JSON, and the headline of that

_PYTHON = (sys.executable, "-m")
_CHECK = (*_PYTHON, "launch.benchmark.kernel_checks")
_KERNEL_TESTS = tuple(f"tests/polaformer/test_{name}.py" for name in ("ops", "kernels", "depthwise"))
_WORKERS = min(8, os.cpu_count() or 1)  # that share the tests, and the GPU
_STAGES = ("128,1,56x56,96", "128,2,28x28,96")  # the first two stages of b4 and b5
_METRICS = (  # of the full report, that part.json shows
    "gpu__time_duration.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
_PIPE = re.compile(r"sm__(inst_executed_)?pipe_\w+\.avg\.pct_of_peak_sustained_(elapsed|active)")  # every pipe's share
_ADVICE = re.compile("Search for `cuda|CUDA kernel errors might|For debugging consider|Compile with `TORCH_USE_CUDA")


@dataclass(frozen=True)
class Part:
    """A command with its expected time, its time limit and the parser of its result."""

    name: str
    command: tuple[str, ...]
    expected_seconds: float
    timeout_seconds: float
    parse_result: ResultParser
    needs: tuple[str, ...] = ()  # modules or CUDA's tools, beyond what all parts need
    missing: str = ""  # why it cannot run here
    needs_kernels: bool = True
    environ: Mapping[str, str] = field(default_factory=dict)


def plan_parts(folder: Path) -> list[Part]:
    """All parts; each writes to a folder of its own name in `folder`."""
    return [*_plan_first(folder), *_plan_tools(folder), *_plan_long(folder)]


def _plan_first(folder: Path) -> list[Part]:
    # Apart, as after one illegal access a process can compute nothing more.
    real, awkward = (
        (*_CHECK, "errors", "--shapes", shapes, "--output", str(folder / name / REPORT))
        for name, shapes in (("check", "real"), ("check-awkward", "awkward"))
    )
    eager = ("--modes", "eager", "--seconds", "3")
    side_by_side = ("--implementations", "ours", "eager", "sdpa", "--seconds", "3")
    in_both_layouts = ("--implementations", "ours", "channels-last", "nchw", "--seconds", "2")
    return [
        Part("build", (*_CHECK, "build"), 20, 300, last_line, needs_kernels=False),
        Part("check", real, 12, 60, parse_checks),
        Part("check-awkward", awkward, 12, 60, parse_checks),
        Part("kernels", _benchmark(folder / "kernels", "profile"), 10, 60, parse_profile),
        Part("kernel", _benchmark(folder / "kernel", "kernel", *side_by_side), 60, 150, parse_kernel),
        Part("depthwise", _benchmark(folder / "depthwise", "depthwise", *in_both_layouts), 50, 120, parse_depthwise),
        Part("step", _benchmark(folder / "step", "step", *eager), 90, 180, parse_steps, needs_kernels=False),
        Part("tests", _pytest(folder / "tests", *_KERNEL_TESTS), 90, 300, parse_tests, environ=_few_threads()),
    ]


def _plan_tools(folder: Path) -> list[Part]:
    ncu = find_tool("ncu") or "ncu"
    profiled = str(folder / "counters" / PROFILE)
    counters = (
        *(ncu, "--set", "full"),
        *("--clock-control", "none", "--profile-from-start", "off"),
        *("--kernel-name-base", "demangled", "--kernel-name", "regex:polaformer"),
        *("--force-overwrite", "--export", profiled, *_CHECK, "profiled"),
    )
    # Without PyTorch's cache of freed memory, so that the sanitizer sees where each tensor ends. PyTorch asks the
    # driver for functions that it may lack, which memcheck would report; our own launches are checked anyway.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    memory = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", *_CHECK, "tiny")
    races = ("--tool", "racecheck", "--error-exitcode", "9", *_CHECK, "tiny")
    return [
        Part("counters", counters, 50, 150, parse_counters, ("ncu",), missing_tool("ncu")),
        _sanitize(Part("memcheck", memory, 15, 120, parse_sanitizer, environ=uncached)),
        _sanitize(Part("racecheck", races, 50, 150, parse_sanitizer, environ=uncached)),
    ]


def _plan_long(folder: Path) -> list[Part]:
    compiled = ("--shapes", *_STAGES, "--implementations", "ours", "compiled", "--growth", "--seconds", "2")
    of_b5 = ("--model", "polaformerpp_b5")
    steps = ("--modes", "compiled", "--models", "polaformerpp_b5", "vit_base_patch16_224", "convnext_base")
    of_data = ("--images", "8192", "--batch", "128")
    every_test = _pytest(folder / "all-tests", "tests")
    for_tests = ("deepspeed", "nvidia.dali", "pydantic", "webdataset", "fvcore", "skimage")
    for_data = ("nvidia.dali", "pydantic", "webdataset", "matplotlib", "skimage", "psutil", "rich")
    for_resume = ("nvidia.dali", "pydantic", "matplotlib", "skimage")
    for_runs = ("deepspeed", *for_resume)
    data, resume = _benchmark(folder / "data", "data", *of_data), _benchmark(folder / "resume", "resume")
    checkpoint = _benchmark(folder / "checkpoint", "checkpoint", "--resolution", "224", "--batch", "64")
    goodput = _benchmark(folder / "goodput", "goodput", "--minutes", "10", "--world-size", "1")
    return [
        Part("compiled", _benchmark(folder / "compiled", "kernel", *compiled), 60, 180, parse_kernel),
        Part("operators", _benchmark(folder / "operators", "profile", *of_b5), 40, 120, parse_profile),
        Part("compiled-step", _benchmark(folder / "compiled-step", "step", *steps), 180, 420, parse_steps),
        _require(Part("all-tests", every_test, 600, 3600, parse_tests, environ=_few_threads()), *for_tests),
        _require(Part("data", data, 600, 3600, last_line, needs_kernels=False), *for_data),
        _require(Part("resume", resume, 300, 1800, last_line, needs_kernels=False), *for_resume),
        _require(Part("checkpoint", checkpoint, 120, 600, last_line, needs_kernels=False), *for_runs),
        _require(Part("goodput", goodput, 660, 1200, last_line, needs_kernels=False), *for_runs),
        Part("full", _benchmark(folder / "full", "kernel", "--full"), 1800, 5400, parse_kernel),
    ]


def _require(part: Part, *modules: str) -> Part:
    return replace(part, needs=modules, missing=missing_modules(*modules))


def _benchmark(folder: Path, name: str, *arguments: str) -> tuple[str, ...]:
    return *_PYTHON, "launch.benchmark", name, "--device", "cuda", "--output", str(folder / REPORT), *arguments


def _pytest(folder: Path, *tests: str) -> tuple[str, ...]:
    quiet = ("-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={folder / TESTS}")
    parallel = () if missing_modules("xdist") else ("-n", str(_WORKERS), "--dist", "loadgroup")
    return *_PYTHON, "pytest", "-m", "gpu", *quiet, *parallel, *tests


def _few_threads() -> dict[str, str]:
    """For tests: more threads would only wait for each other."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))}


def find_tool(name: str) -> str | None:
    """Path of one of CUDA's tools, on the PATH or in the toolkit, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{home}/bin")


def missing_tool(name: str) -> str:
    """Why one of CUDA's tools cannot run, or ""."""
    return "" if find_tool(name) else f"{name} is neither on the PATH nor in CUDA_HOME/bin"


def _sanitize(part: Part) -> Part:
    tool = "compute-sanitizer"
    command = (find_tool(tool) or tool, *part.command)
    return replace(part, command=command, needs=(tool,), missing=missing_tool(tool))


def last_line(folder: Path) -> tuple[None, str]:
    """Take the log's last line before PyTorch's advice on CUDA errors as the headline, and no result."""
    lines = (folder / LOG).read_text(errors="replace").split("\n")
    return None, next((line.strip() for line in reversed(lines) if line.strip() and not _ADVICE.match(line)), "")


def parse_report(benchmark: str, headline: Callable[[dict[str, Any]], str], folder: Path) -> tuple[dict[str, Any], str]:
    """Read the JSON that a part's benchmark wrote, and make its headline."""
    report = read_report(folder / REPORT, benchmark)
    return report, headline(report)


parse_checks = partial(parse_report, "check_kernels", kernel_checks.headline)
parse_kernel = partial(parse_report, "kernel", kernel.headline)
parse_depthwise = partial(parse_report, "depthwise", depthwise.headline)
parse_profile = partial(parse_report, "profile", profiling.headline)
parse_steps = partial(parse_report, "step", step.headline)


def parse_tests(folder: Path) -> tuple[dict[str, Any], str]:
    """Numbers of tests by outcome, and which failed, from pytest's junitxml."""
    root = ElementTree.parse(folder / TESTS).getroot()  # noqa: S314  (our own tests wrote it)
    suite = next(root.iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    bad = [case for case in suite.iter("testcase") if {child.tag for child in case} & {"failure", "error"}]
    failed = [f"{case.attrib['classname']}.{case.attrib['name']}" for case in bad]
    shown = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failures", "errors", "skipped") if counts[name])
    return counts | {"failed": failed}, shown


def parse_counters(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Chosen metrics of each launch, in order, from Nsight Compute's report; writes its CSV, with all metrics."""
    command = (find_tool("ncu") or "ncu", "--import", str(folder / PROFILE), "--page", "raw", "--csv")
    with open(folder / COUNTERS, "w") as table:
        subprocess.run((*command, "--print-units", "base"), stdout=table, check=True, timeout=60)
    return parse_table(folder / COUNTERS)


def parse_table(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Chosen metrics of each launch from Nsight Compute's CSV: a line of units, then one for each launch."""
    lines = path.read_text().splitlines()
    begin = next((number for number, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    launches: list[dict[str, Any]] = [
        {
            "kernel": row["Kernel Name"],
            "metrics": {name: _number(row[name]) for name in row if name in _METRICS or _PIPE.fullmatch(name)},
        }
        for row in csv.DictReader(line for line in lines[begin:] if line.startswith('"'))
        if row["ID"]
    ]
    if not launches:
        raise ValueError(f"{COUNTERS} has no launch of a kernel of ours")
    times = [launch["metrics"].get("gpu__time_duration.sum") for launch in launches]
    total = sum(time for time in times if isinstance(time, float)) / 1000  # nanoseconds
    return launches, f"{len(launches)} launches, {total:.0f} µs"


def _number(text: str) -> float | str:
    plain = text.replace(",", "")
    return float(plain) if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", plain) else text


def parse_sanitizer(folder: Path) -> tuple[dict[str, int], str]:
    """Errors and hazards that compute-sanitizer's summary counts."""
    log = (folder / LOG).read_text(errors="replace")
    [summary] = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", log)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (error|hazard|warning)", summary)}
    return counts, summary.strip()

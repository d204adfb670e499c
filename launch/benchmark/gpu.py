"""Everything that needs a GPU, in one command: tests, compute-sanitizer where it is installed, benchmarks but for pack.

python -m launch.benchmark gpu
python -m launch.benchmark gpu --quick --output runs/gpu

It writes one folder: summary.json (what ran, how it ended, how many tests), the benchmarks' own JSON, and a log of each
step. A step that fails does not keep the next ones from running; it makes the exit status 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.report import ROOT, default_path, describe_run, write_report

_GPU_TESTS = ("-m", "pytest", "-m", "gpu")
_OPERATOR_TESTS = ("tests/polaformer/test_ops.py", "tests/polaformer/test_kernels.py")
_SANITIZERS = ("memcheck", "racecheck")


@dataclass(frozen=True)
class Step:
    """A command to run, or the reason why there is none."""

    name: str
    command: tuple[str, ...] = ()
    skipped: str | None = None


def plan_steps(folder: Path, quick: bool) -> list[Step]:
    """All of them, in order. quick: the benchmarks' usual choice instead of everything."""
    python = sys.executable
    steps = [Step("tests", (python, *_GPU_TESTS, f"--junitxml={folder / 'tests.xml'}"))]
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:{cuda}/bin")
    for tool in _SANITIZERS:
        if sanitizer is None:
            steps.append(Step(tool, skipped="compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"))
            continue
        checked = (sanitizer, "--tool", tool, "--error-exitcode", "1", python, *_GPU_TESTS, *_OPERATOR_TESTS)
        steps.append(Step(tool, checked))
    kernel, data, resume = (
        (python, "-m", "launch.benchmark", name, "--device", "cuda", "--output", str(folder / f"{name}.json"))
        for name in ("kernel", "data", "resume")
    )
    return [
        *steps,
        Step("kernel", kernel if quick else (*kernel, "--full")),
        Step("data", data if quick else (*data, "--images", "8192", "--batch", "128")),
        Step("resume", resume),
    ]


def run_step(step: Step, folder: Path) -> dict[str, Any]:
    """What the summary says of a step; its output goes to a log in the folder."""
    if step.skipped is not None:
        return {"name": step.name, "skipped": step.skipped}
    # Without PyTorch's cache of freed memory, so that the sanitizer sees where each tensor ends.
    environ = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step.name in _SANITIZERS else {})
    began = time.perf_counter()
    with open(folder / f"{step.name}.log", "wb") as log:
        status = subprocess.run(step.command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT).returncode
    return {
        "name": step.name,
        "command": list(step.command),
        "exit_status": status,
        "seconds": round(time.perf_counter() - began, 1),
    }


def count_tests(path: Path) -> dict[str, int]:
    """How many tests ran, failed and so on, from pytest's junitxml."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    return {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark gpu",
        description=summary,
        epilog=f"examples:\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: a new folder below runs/benchmark")
    parser.add_argument("--quick", action="store_true", help="benchmarks at 224 pixels only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print("error: PyTorch sees no NVIDIA GPU; run this where nvidia-smi lists one", file=sys.stderr)
        return 2
    folder = (arguments.output or default_path("gpu").with_suffix("")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report = describe_run("gpu", torch.device("cuda")) | {"steps": []}
    for step in plan_steps(folder, arguments.quick):
        print(f"{step.name} …", flush=True)
        entry = run_step(step, folder)
        print(f"  {entry.get('skipped') or entry['exit_status']}", flush=True)
        report["steps"].append(entry)
        if step.name == "tests" and (folder / "tests.xml").exists():
            report["tests"] = count_tests(folder / "tests.xml")
        write_report(folder / "summary.json", report)  # what was measured survives what comes next
    print(f"written to {folder}")
    return int(any(entry.get("exit_status") for entry in report["steps"]))

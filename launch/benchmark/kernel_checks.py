"""Build and checks of the CUDA kernels on a GPU: accuracy against float64, and tiny runs for NVIDIA's tools.

python -m launch.benchmark.kernel_checks build
python -m launch.benchmark.kernel_checks errors --output errors.json
python -m launch.benchmark.kernel_checks errors --shapes awkward --device cpu
compute-sanitizer python -m launch.benchmark.kernel_checks tiny
ncu --profile-from-start off python -m launch.benchmark.kernel_checks profiled

build: builds the kernels in place for this GPU's architecture alone, unless those that are there already run on it.
Kernels for this GPU that fail or hang are kept: rebuilding would not repair them, and the other modes show the fault.
errors: compares the first and the last image of every shape with float64, and two runs bit by bit. Errors may be as
large as kernel_runner.py allows, relative to eager PyTorch's in the same dtype; a larger one makes the exit status 1.
tiny: forward and backward of awkward shapes, of attention with features of ordinary and of overflowing size, and of
depthwise convolution; nothing is compared.
profiled: a forward and a backward of b5's first stage, attention and two convolutions, the only ones within the
profiler's range.

gpu.py runs all four.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.cli import Report, resolve_device, start
from launch.benchmark.depthwise_runner import TOLERANCES, Convolution, bind
from launch.benchmark.depthwise_runner import make_inputs as make_conv_inputs
from launch.benchmark.kernel_runner import AttentionCall, call_ours, find_errors, get_implementation, make_inputs
from launch.benchmark.measure import dtype_name
from launch.benchmark.report import ROOT, describe_run, finite, prepare_output, user_path, write_report
from launch.benchmark.shapes import parse_shape
from launch.command_line import make_parser
from polaformer import ops

#: Sizes that fill no tile, a head dimension that no vector load divides, and the widest one. A single token is not
#: among them: there the gradients of q and k vanish, and relative errors mean nothing.
EDGE_CASES = (
    ("2,3,7x9,32", "bfloat16"),
    ("1,2,5x13,98", "bfloat16"),
    ("3,1,33x31,96", "bfloat16"),
    ("2,2,113x1,64", "bfloat16"),
    ("1,1,5x13,128", "bfloat16"),
    ("1,1,17x1,6", "float16"),
    ("2,2,14x14,96", "float16"),
    ("2,2,7x7,96", "float32"),
    ("3,1,33x31,64", "float32"),
    ("1,1,5x13,128", "float32"),
)
#: Stages with polarity attention of b4 and b5, and of a narrower model.
MODEL_CASES = (
    ("128,1,56x56,96", "bfloat16"),
    ("128,2,28x28,96", "bfloat16"),
    ("256,1,56x56,32", "bfloat16"),
    ("64,1,56x56,96", "float16"),
    ("16,1,56x56,96", "float32"),
)
TINY = (*EDGE_CASES, ("1,1,1x1,96", "bfloat16"), ("1,1,1x1,96", "float32"))
#: Incomplete blocks of channels, groups of images, and tiles of columns.
TINY_CONVOLUTIONS = (Convolution(3, 9, 40, 3), Convolution(9, 2, 72, 5), Convolution(2, 16, 8, 5))
PROFILED = MODEL_CASES[0]
PROFILED_CONVOLUTIONS = (Convolution(128, 56, 96, 5), Convolution(128, 56, 336, 3))
_OVERFLOWING = 40.0  # factor of q and k with which exp overflows, so that the kernels' second passes have work
_LONGEST_SECONDS = 60
_TRY = """
import torch
from polaformer import ops
fault = ops.kernels_unavailable_reason("cuda")
if fault:
    raise SystemExit(fault)
x = torch.ones(1, 1, 4, 32, device="cuda", dtype=torch.bfloat16)
logits = torch.zeros(1, 64, device="cuda")
try:
    ops.polarity_attention(x, x, x, logits, logits, 2, 2).sum().item()
except RuntimeError as error:
    fault = str(error).partition("\\n")[0]  # advice follows
    if any(words in fault for words in ("no kernel image", "invalid device function", "PTX")):
        raise SystemExit(fault)
    print(f"kernels load, but the first run of one failed: {fault}", flush=True)
else:
    print("kernels run", flush=True)
"""

Case = tuple[str, str]  # shape, dtype


def check_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Entry of the report for a shape: errors by image, tensor and size, those too large, and whether runs agree."""
    shape, dtype = parse_shape(case[0]), getattr(torch, case[1])
    attention = get_implementation("ours")
    errors = {image: find_errors(attention, shape, dtype, device, image) for image in sorted({0, shape.batch - 1})}
    call = call_ours(shape, dtype, device)
    return {
        "shape": case[0],
        "dtype": case[1],
        "errors": {
            image: {name: {size: asdict(error) for size, error in sizes.items()} for name, sizes in found.items()}
            for image, found in errors.items()
        },
        "too_large": [
            f"{name} of image {image}: {size} error {error.ours:.1e}, allowed {error.allowed:.1e}"
            for image, found in errors.items()
            for name, sizes in found.items()
            for size, error in sizes.items()
            if error.exceed
        ],
        "bit_identical": all(map(torch.equal, call.results(), call.results())),
    }


def check_all(cases: tuple[Case, ...], device: torch.device, output: Path | None) -> int:
    """Check all cases, printing a line and writing the report after each; exit status 1 if one is wrong."""
    report = describe_run("check_kernels", device) | {"checks": []}
    for case in cases:
        try:
            entry = check_case(case, device)
        except RuntimeError as error:  # a kernel that did not start, or memory
            entry = {"shape": case[0], "dtype": case[1], "failed": " ".join(str(error).split())}
        report["checks"].append(entry)
        print(_line(entry), flush=True)
        if output:
            write_report(output, finite(report))
    return int(not all(map(is_right, report["checks"])))


def is_right(entry: dict[str, Any]) -> bool:
    """Whether a case ran, without large errors, and two runs were bit-identical."""
    return "failed" not in entry and entry["bit_identical"] and not entry["too_large"]


def headline(report: Report) -> str:
    """Summarise in a line how many cases are right, and which are wrong."""
    wrong = [f"{entry['shape']} {entry['dtype']}" for entry in report["checks"] if not is_right(entry)]
    right = f"{len(report['checks']) - len(wrong)} of {len(report['checks'])} right and bit-identical"
    return right + (f"; wrong: {'; '.join(wrong)}" if wrong else "")


def _line(entry: dict[str, Any]) -> str:
    name = f"{entry['shape']:16} {entry['dtype']:9}"
    if "failed" in entry:
        return f"{name} FAILED: {entry['failed']}"
    last = list(entry["errors"].values())[-1]
    errors = "  ".join(
        f"{tensor} {sizes['root mean square']['ours']:.1e} ({sizes['root mean square']['eager']:.1e})"
        for tensor, sizes in last.items()
    )
    bits = "bit-identical" if entry["bit_identical"] else "A SECOND RUN DIFFERS"
    return "\n    ".join((f"{name} {errors}  {bits}", *(f"TOO LARGE: {fault}" for fault in entry["too_large"])))


def run_tiny(device: torch.device) -> int:
    """Run forward and backward of all tiny shapes. Raises RuntimeError if a result is not finite."""
    for text, dtype in TINY:
        for scale in (1.0, _OVERFLOWING):
            inputs = make_inputs(parse_shape(text), getattr(torch, dtype), device)
            with torch.no_grad():
                for x in inputs.tensors[:2]:
                    x.mul_(scale)
            if not all(x.isfinite().all() for x in AttentionCall(get_implementation("ours"), inputs).results()):
                raise RuntimeError(f"{text} in {dtype}, q and k times {scale:g}: not every result is finite")
            print(f"{text} in {dtype}, q and k times {scale:g}: ran", flush=True)
    for convolution, stored in product(TINY_CONVOLUTIONS, TOLERANCES):
        name = f"{convolution} in {dtype_name(stored)}"
        if not all(x.isfinite().all() for x in bind("ours", make_conv_inputs(convolution, stored, device)).results()):
            raise RuntimeError(f"{name}: not every result is finite")
        print(f"{name}: ran", flush=True)
    return 0


def run_profiled(device: torch.device) -> int:
    """Run forward and backward three times, the last time within cudaProfilerStart and cudaProfilerStop."""
    dtype = getattr(torch, PROFILED[1])
    attention = call_ours(parse_shape(PROFILED[0]), dtype, device)
    convolutions = [bind("ours", make_conv_inputs(shape, dtype, device)) for shape in PROFILED_CONVOLUTIONS]

    def run() -> None:
        attention.both()
        for call in convolutions:
            call.results()
        torch.cuda.synchronize()

    for _ in range(2):
        run()
    with torch.cuda.profiler.profile():
        run()
    return 0


def find_fault() -> str:
    """Try the built kernels; the reason why they do not suit this GPU, in one line, or "".

    Prints how they ran.
    """
    command = [sys.executable, "-c", _TRY]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"kernels are there, but the first run of one took more than {_LONGEST_SECONDS} s", flush=True)
        return ""
    print(done.stdout, end="", flush=True)
    if done.stdout or not done.returncode:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def build() -> int:
    """Build the kernels in place with setup.py, unless the present ones run; returns the exit status."""
    if not (fault := find_fault()):
        return 0
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    print(f"{fault}\nbuilding for {architecture}", flush=True)
    for library in Path(ROOT, "polaformer").glob("_cuda*.so"):
        library.unlink()  # all that are there are loaded, and this one does not run
    wanted = {"POLAFORMER_KERNELS": "all", "TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(os.cpu_count())}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | wanted).returncode
    if fault := find_fault():
        print(fault)
    return status or int(bool(fault))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; --help and errors exit."""
    parser = make_parser("python -m launch.benchmark.kernel_checks", __doc__)
    parser.add_argument("mode", choices=("build", "errors", "tiny", "profiled"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", choices=("all", "awkward", "real"), default="all", help="of errors (default: all)")
    parser.add_argument("--output", type=user_path, metavar="FILE.json", help="of errors")
    return parser.parse_args(argv)


def resolve(arguments: argparse.Namespace) -> Callable[[], int]:
    """Check the arguments and return what runs the mode. Raises RuntimeError or OSError."""
    mode = arguments.mode
    if mode == "build":
        resolve_device("cuda", remedy="run this where nvidia-smi lists one")
        return build
    device = resolve_device(arguments.device)
    if device.type == "cpu" and mode == "profiled":
        raise RuntimeError("Nsight Compute profiles GPUs alone; leave --device out")
    if fault := ops.kernels_unavailable_reason(device.type):
        raise RuntimeError(fault)
    if arguments.output:
        prepare_output(arguments.output)
    if mode == "errors":
        cases = {"all": EDGE_CASES + MODEL_CASES, "awkward": EDGE_CASES, "real": MODEL_CASES}[arguments.shapes]
        return partial(check_all, cases, device, arguments.output)
    return partial(run_tiny if mode == "tiny" else run_profiled, device)


def main(argv: list[str] | None = None) -> int:
    """Run a mode; returns its exit status."""
    return start(parse(argv), resolve)


if __name__ == "__main__":
    sys.exit(main())

"""Polarity attention on a GPU against float64, and tiny runs of it for compute-sanitizer and Nsight Compute.

python -m launch.benchmark.check_kernels errors --output errors.json
python -m launch.benchmark.check_kernels errors --shapes awkward --device cpu
compute-sanitizer python -m launch.benchmark.check_kernels tiny
ncu --profile-from-start off python -m launch.benchmark.check_kernels profiled

errors: compares the first and the last image of every shape with float64, and two runs bit by bit. Errors may be as
large as check.py allows, in comparison with eager PyTorch's in the same dtype; a larger one makes the exit status 1.
tiny: forward and backward of awkward shapes, with features of ordinary and of overflowing size; nothing is compared.
profiled: a forward and a backward of b5's first stage, the only ones within the profiler's range.

gpu.py runs all three; kernel.py checks what it times by itself.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.check import find_errors
from launch.benchmark.implementations import AttentionCall, Shape, get_implementation, make_inputs, parse_shape
from launch.benchmark.report import describe_run, prepare_output, user_path, write_report
from polaformer import ops

#: Sizes that fill no tile, one head dimension that no vector divides, and the widest. One token alone is not among them:
#: there the gradients of q and k vanish, and relative errors mean nothing.
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
#: Stages with polarity attention: of b4 and b5, and of a narrower model.
MODEL_CASES = (
    ("128,1,56x56,96", "bfloat16"),
    ("128,2,28x28,96", "bfloat16"),
    ("256,1,56x56,32", "bfloat16"),
    ("64,1,56x56,96", "float16"),
    ("16,1,56x56,96", "float32"),
)
TINY = (*EDGE_CASES, ("1,1,1x1,96", "bfloat16"), ("1,1,1x1,96", "float32"))
PROFILED = MODEL_CASES[0]
_OVERFLOWING = 40.0  # q and k times that: beyond what exp can hold, so that the kernels' second passes have work

Case = tuple[str, str]  # shape, dtype


def check_case(case: Case, device: torch.device) -> dict[str, Any]:
    """What the report says of one shape: errors by image, tensor and size, which of them are too large, and bits."""
    shape, dtype = parse_shape(case[0]), getattr(torch, case[1])
    attention = get_implementation("ours")
    errors = {image: find_errors(attention, shape, dtype, device, image) for image in sorted({0, shape.batch - 1})}
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
        "bit_identical": _is_bit_identical(shape, dtype, device),
    }


def _is_bit_identical(shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    call = AttentionCall(get_implementation("ours"), make_inputs(shape, dtype, device))
    runs = []
    for _ in range(2):
        out = call.forward()
        runs.append((out.detach(), *call.backward(out)))
    return all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def check_all(cases: tuple[Case, ...], device: torch.device, output: Path | None) -> bool:
    """Whether all are right; prints a line for each, and writes the report after each."""
    report = describe_run("check_kernels", device) | {"checks": []}
    for case in cases:
        try:
            entry = check_case(case, device)
        except RuntimeError as error:  # a kernel that did not start, or memory
            entry = {"shape": case[0], "dtype": case[1], "failed": " ".join(str(error).split())}
        report["checks"].append(entry)
        print(_line(entry), flush=True)
        if output:
            write_report(output, _without_nan(report))
    return all(is_right(entry) for entry in report["checks"])


def is_right(entry: dict[str, Any]) -> bool:
    return "failed" not in entry and entry["bit_identical"] and not entry["too_large"]


def _line(entry: dict[str, Any]) -> str:
    name = f"{entry['shape']:16} {entry['dtype']:9}"
    if "failed" in entry:
        return f"{name} FAILED: {entry['failed']}"
    last = list(entry["errors"].values())[-1]
    errors = "  ".join(
        f"{tensor} {sizes['root mean square']['ours']:.1e} ({sizes['root mean square']['eager']:.1e})"
        for tensor, sizes in last.items()
    )
    bits = "the same bits" if entry["bit_identical"] else "OTHER BITS IN A SECOND RUN"
    return "\n    ".join((f"{name} {errors}  {bits}", *(f"TOO LARGE: {fault}" for fault in entry["too_large"])))


def _without_nan(value: Any) -> Any:
    """The same with infinite numbers and NaN, for which JSON has no words, as text."""
    if isinstance(value, dict):
        return {key: _without_nan(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_without_nan(own) for own in value]
    return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value


def run_tiny(device: torch.device) -> None:
    """Runs forward and backward of all tiny shapes. Raises RuntimeError if a result is not finite."""
    for text, dtype in TINY:
        for scale in (1.0, _OVERFLOWING):
            inputs = make_inputs(parse_shape(text), getattr(torch, dtype), device)
            with torch.no_grad():
                for x in inputs.tensors[:2]:
                    x.mul_(scale)
            call = AttentionCall(get_implementation("ours"), inputs)
            out = call.forward()
            results = (out, *call.backward(out))
            if not all(x.isfinite().all() for x in results):
                raise RuntimeError(f"{text} in {dtype}, q and k times {scale:g}: not every result is finite")
            print(f"{text} in {dtype}, q and k times {scale:g}: ran", flush=True)


def run_profiled(device: torch.device) -> None:
    """Runs forward and backward three times, the last time within cudaProfilerStart and cudaProfilerStop."""
    call = AttentionCall(
        get_implementation("ours"), make_inputs(parse_shape(PROFILED[0]), getattr(torch, PROFILED[1]), device)
    )
    for _ in range(2):
        call.both()
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile():
        call.both()
        torch.cuda.synchronize()


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark.check_kernels",
        description=summary,
        epilog=f"examples:\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("mode", choices=("errors", "tiny", "profiled"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", choices=("all", "awkward", "real"), default="all", help="of errors (default: all)")
    parser.add_argument("--output", type=user_path, metavar="FILE.json", help="of errors")
    return parser.parse_args(argv)


def _find_fault(device: torch.device, mode: str) -> str:
    """Why this mode cannot run on the device; empty if it can."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU; use --device cpu"
    if device.type == "cpu" and mode == "profiled":
        return "Nsight Compute profiles GPUs alone; leave --device out"
    return ops.kernels_unavailable_reason(device.type)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    try:
        if fault := _find_fault(device, arguments.mode):
            raise RuntimeError(fault)
        if arguments.output:
            prepare_output(arguments.output)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.mode == "errors":
        cases = {"all": EDGE_CASES + MODEL_CASES, "awkward": EDGE_CASES, "real": MODEL_CASES}[arguments.shapes]
        return int(not check_all(cases, device, arguments.output))
    (run_tiny if arguments.mode == "tiny" else run_profiled)(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())

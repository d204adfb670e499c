"""Times polarity attention: ours against eager PyTorch, that compiled, and softmax attention of the same shape.

python -m launch.benchmark kernel
python -m launch.benchmark kernel --full --output launch/benchmark/results/kernel-h100.json
python -m launch.benchmark kernel --device cpu --threads 2 --shapes 8,1,56x56,96 --dtype float32
python -m launch.benchmark kernel --show launch/benchmark/results/kernel-h100.json --markdown

Before any of them is timed, ours is checked against the reference in float64, for every shape and dtype; if it is
wrong there are no times. "forward" is training's, which keeps what backward needs; "both" is the sum of the two. "GB/s
of floor" counts what no implementation can leave unmoved: 4·D elements for each token and head forward, 7·D backward.
A implementation that has no room in memory or time, or does not run, has an entry that says so.
"""

import argparse
import sys
from dataclasses import asdict, replace
from typing import Any

import torch

from launch.benchmark.check import WrongResult
from launch.benchmark.implementations import IMPLEMENTATIONS, Shape, model_shapes, parse_shape
from launch.benchmark.kernel_report import describe, dtype_name, growth_ratios, show
from launch.benchmark.kernel_runner import KernelBenchmark, Settings
from launch.benchmark.report import default_path, describe_run, prepare_output, read_report, user_path, write_report
from launch.distributed import default_device_type
from polaformer import ops
from polaformer.model import TOTAL_STRIDE

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_USUAL_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
_USUAL_RESOLUTIONS, _ALL_RESOLUTIONS = (224,), (224, 384, 512, 768, 1024)
_USUAL_BATCHES = {"cpu": (8,), "cuda": (64, 128)}
_ALL_BATCHES = {"cpu": (1, 8), "cuda": (1, 16, 64, 128)}
_GROWTH_SIDES = (56, 112, 256)
_GROWTH_BATCH = {"cpu": 1, "cuda": 16}  # the fewest tokens already fill a GPU


def measure(
    settings: Settings, shapes: list[Shape], implementations: list[str], growth_sides: list[int]
) -> dict[str, Any]:
    """The whole report. Raises WrongResult if ours is wrong for one of the shapes; then no implementation was timed.

    growth_sides: of square images, in tokens, on which ours alone is timed, from small to large.
    """
    report = describe_run("kernel", settings.device)
    compiled = ops.has_compiled_kernels(settings.device.type)
    report["implementation_of_ours"] = "compiled kernel" if compiled else "reference"
    benchmark = KernelBenchmark(settings)
    report["copy_bytes_per_second"] = asdict(benchmark.peaks.copy)
    report["product_flops_per_second"] = {
        dtype_name(dtype): asdict(rate) for dtype, rate in benchmark.peaks.products.items()
    }
    like = model_shapes([224], [_GROWTH_BATCH[settings.device.type]])[0]
    growing = [replace(like, height=side, width=side) for side in growth_sides] if "ours" in implementations else []
    checked = dict.fromkeys((*shapes, *growing)) if "ours" in implementations else {}
    report["checks"] = [_check(benchmark, shape, dtype) for shape in checked for dtype in settings.dtypes]
    for key, competing, participants in (("results", shapes, implementations), ("growth", growing, ["ours"])):
        report[key] = []
        for shape in competing:
            print(f"measuring {shape}", file=sys.stderr)
            results = benchmark.run(shape, participants)
            report[key] += [describe(result, results, benchmark.peaks) for result in results]
    report["growth_ratios"] = growth_ratios(report["growth"])
    return report


def _check(benchmark: KernelBenchmark, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    print(f"checking {shape} in {dtype_name(dtype)}", file=sys.stderr)
    found = benchmark.check_ours(shape, dtype)
    entry = {"shape": str(shape), "dtype": dtype_name(dtype)}
    if isinstance(found, str):
        return entry | {"skipped": found}
    return entry | {
        "errors": {name: {size: asdict(error) for size, error in sizes.items()} for name, sizes in found.items()}
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark kernel",
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    dtypes = f"of {', '.join(_DTYPES)} (default: bfloat16 on a GPU, float32 bfloat16 on the CPU)"
    add("--dtype", nargs="+", choices=_DTYPES, metavar="DTYPE", help=dtypes)
    add("--resolutions", nargs="+", type=int, metavar="PIXELS", help="of b4's and b5's square images (default 224)")
    add("--batches", nargs="+", type=int, metavar="IMAGES", help="default: 64 128 on a GPU, 8 on the CPU")
    add("--full", action="store_true", help="resolutions 224 384 512 768 1024, batches from 1 up: about half an hour")
    add("--shapes", nargs="+", metavar="B,H,HEIGHTxWIDTH,D", help="these instead, for example 8,1,56x56,96")
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME", default=list(IMPLEMENTATIONS),
        help=f"of {', '.join(IMPLEMENTATIONS)} (default: all)")  # fmt: skip
    sides = "of square images, in tokens, where ours alone is timed; may be empty (default 56 112 256)"
    add("--growth", nargs="*", type=int, default=list(_GROWTH_SIDES), metavar="SIDE", help=sides)
    add("--seconds", type=float, default=10, help="to measure one shape, about; at least 5 rounds (default 10)")
    add(
        "--limit", type=float, default=5, help="a implementation that takes longer once is skipped, seconds (default 5)"
    )
    add("--threads", type=int, help="of the CPU (default: PyTorch's choice)")
    add("--output", type=user_path, metavar="FILE.json", help="default: a new file below runs/benchmark")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--show", type=user_path, metavar="FILE.json", help="print the table of this file and measure nothing")
    return parser.parse_args(argv)


def resolve_shapes(arguments: argparse.Namespace, device_type: str) -> list[Shape]:
    """The shapes that the arguments name. Raises ValueError if they contradict each other or name none."""
    if arguments.shapes:
        if arguments.full or arguments.resolutions or arguments.batches:
            raise ValueError("--shapes says all; leave --full, --resolutions and --batches out")
        return [parse_shape(text) for text in arguments.shapes]
    resolutions = arguments.resolutions or (_ALL_RESOLUTIONS if arguments.full else _USUAL_RESOLUTIONS)
    batches = arguments.batches or (_ALL_BATCHES if arguments.full else _USUAL_BATCHES)[device_type]
    for resolution in resolutions:
        if resolution < 1 or resolution % TOTAL_STRIDE:
            raise ValueError(f"--resolutions names {resolution}; give multiples of {TOTAL_STRIDE}, as the models need")
    if min(batches) < 1:
        raise ValueError(f"--batches names {min(batches)}; give numbers above 0")
    return model_shapes(resolutions, batches)


def resolve_settings(arguments: argparse.Namespace) -> Settings:
    """Raises ValueError or RuntimeError if the arguments, or this machine, do not allow it."""
    device = torch.device(arguments.device or default_device_type())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no NVIDIA GPU; use --device cpu")
    for name in ("seconds", "limit", "threads"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; give a number above 0")
    if min(arguments.growth, default=1) < 1:
        raise ValueError(f"--growth names {min(arguments.growth)}; give numbers above 0")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtypes = tuple(getattr(torch, name) for name in dict.fromkeys(arguments.dtype or _USUAL_DTYPES[device.type]))
    return Settings(device, dtypes, arguments.seconds, arguments.limit)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.show:
            show(read_report(arguments.show, "kernel"), arguments.markdown)
            return 0
        settings = resolve_settings(arguments)
        shapes = resolve_shapes(arguments, settings.device.type)
        path = prepare_output(arguments.output or default_path("kernel"))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        report = measure(settings, shapes, arguments.implementations, sorted(arguments.growth))
    except WrongResult as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_report(path, report)
    show(report, arguments.markdown)
    print(f"written to {path}", file=sys.stderr)
    return 0

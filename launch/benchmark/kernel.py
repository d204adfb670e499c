"""Times of polarity attention: ours, eager PyTorch, compiled PyTorch, and softmax attention of the same shape.

python -m launch.benchmark kernel
python -m launch.benchmark kernel --full --output launch/benchmark/results/kernel-h100.json
python -m launch.benchmark kernel --device cpu --threads 2 --shapes 8,1,56x56,96 --dtype float32
python -m launch.benchmark kernel --show launch/benchmark/results/kernel-cpu.json --markdown

Ours is first checked against the reference in float64, for every shape and dtype; if it is wrong, nothing is timed.
"forward" is training's, which keeps what backward needs; "both" is the sum of the two. "floor GB/s" counts the bytes
that no implementation can avoid: 4·D elements for each token and head forward, 7·D backward. An implementation that
needs too much memory or time, or does not run, is skipped with its reason.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.cli import AddOption, Command, Report, require_few_threads, require_positive, resolve_device
from launch.benchmark.kernel_runner import (
    IMPLEMENTATIONS,
    KernelBenchmark,
    Result,
    Settings,
    WrongResult,
    check_resolutions,
    describe_checks,
    flops,
    implementation_of_ours,
    model_shapes,
)
from launch.benchmark.measure import PASSES, DevicePeaks, dtype_name
from launch.benchmark.report import (
    Column,
    describe_run,
    forward_and_backward,
    heading,
    pass_milliseconds,
    tabulate,
    write_report,
)
from launch.benchmark.shapes import MIN_TRAFFIC_ELEMENTS, Shape, parse_shape

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_USUAL_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
_USUAL_RESOLUTIONS, _ALL_RESOLUTIONS = (224,), (224, 384, 512, 768, 1024)
_USUAL_BATCHES = {"cpu": (8,), "cuda": (64, 128)}
_ALL_BATCHES = {"cpu": (1, 8), "cuda": (1, 16, 64, 128)}
_GROWTH_SIDES = (56, 112, 256)
_GROWTH_BATCH = {"cpu": 1, "cuda": 16}  # the fewest tokens already fill a GPU


def measure(
    settings: Settings, shapes: list[Shape], implementations: list[str], growth_sides: list[int], path: Path
) -> Report:
    """Measure everything. Raises WrongResult, before anything is timed, if ours is wrong for one of the shapes.

    growth_sides: of square images, in tokens, on which ours alone is timed, from small to large.
    """
    report = describe_run("kernel", settings.device)
    report["implementation_of_ours"] = implementation_of_ours(settings.device)
    benchmark = KernelBenchmark(settings)
    report["copy_bytes_per_second"] = asdict(benchmark.peaks.copy)
    report["product_flops_per_second"] = {
        dtype_name(dtype): asdict(rate) for dtype, rate in benchmark.peaks.products.items()
    }
    like = model_shapes([224], [_GROWTH_BATCH[settings.device.type]])[0]
    growing = [replace(like, height=side, width=side) for side in growth_sides] if "ours" in implementations else []
    checked = dict.fromkeys((*shapes, *growing)) if "ours" in implementations else {}
    report["checks"] = [_check(benchmark, shape, dtype) for shape in checked for dtype in settings.dtypes]
    report |= {"results": [], "growth": [], "growth_ratios": growth_ratios([])}
    for key, competing, participants in (("results", shapes, implementations), ("growth", growing, ["ours"])):
        for shape in competing:
            print(f"measuring {shape}", file=sys.stderr)
            results = benchmark.run(shape, participants)
            report[key] += [describe(result, results, benchmark.peaks) for result in results]
            write_report(path, report)  # whatever happens to the next shapes
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


def describe(result: Result, results: Sequence[Result], peaks: DevicePeaks) -> dict[str, Any]:
    """Entry of the report for a result. results: all on the same shape, this one among them."""
    entry: dict[str, Any] = {
        "contender": result.implementation,
        "shape": str(result.shape),
        "tokens": result.shape.tokens,
    }
    entry |= {"dtype": dtype_name(result.dtype)}
    if not result.seconds:
        return entry | {"skipped": result.skipped}
    others = {}
    for baseline in results:
        if not baseline.seconds or baseline is result:
            continue
        if baseline.dtype == result.dtype:
            others[baseline.implementation] = baseline
        elif baseline.implementation == result.implementation:  # bf16 against float32
            others[f"{baseline.implementation} {dtype_name(baseline.dtype)}"] = baseline
    peak = result.peak_extra_bytes["both"]
    return entry | {
        "passes": {name: _describe_pass(result, name, others, peaks) for name in PASSES},
        "peak_extra_bytes": result.peak_extra_bytes,
        "peak_as_share_of": {name: peak / baseline.peak_extra_bytes["both"] for name, baseline in others.items()},
    }


def _describe_pass(result: Result, name: str, others: dict[str, Result], peaks: DevicePeaks) -> dict[str, Any]:
    seconds = result.seconds[name]
    floor_bytes = MIN_TRAFFIC_ELEMENTS[name] * result.shape.elements * result.dtype.itemsize
    operations = flops(result.implementation, result.shape)[name]
    return {
        "seconds": asdict(seconds),
        "floor_bytes": floor_bytes,
        "bytes_per_second": floor_bytes / seconds.median,
        "share_of_copy_rate": floor_bytes / seconds.median / peaks.copy.median,
        "flops": operations,
        "share_of_product_rate": operations / seconds.median / peaks.products[result.dtype].median,
        "times_faster_than": {
            other: baseline.seconds[name].median / seconds.median for other, baseline in others.items()
        },
    }


def growth_ratios(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Growth of the time and memory of forward and backward from the fewest to the most tokens measured, by dtype."""
    ratios = []
    for dtype in dict.fromkeys(entry["dtype"] for entry in entries):
        measured = [entry for entry in entries if entry["dtype"] == dtype and "passes" in entry]
        if len(measured) < 2:
            continue
        first, last = measured[0], measured[-1]
        seconds = [entry["passes"]["both"]["seconds"]["median"] for entry in (first, last)]
        peaks = [entry["peak_extra_bytes"]["both"] for entry in (first, last)]
        ratios.append(
            {
                "dtype": dtype,
                "tokens": last["tokens"] / first["tokens"],
                "seconds": seconds[1] / seconds[0],
                "peak_extra_bytes": peaks[1] / peaks[0],
            }
        )
    return ratios


def show(report: Report, markdown: bool) -> None:
    """Print a report."""
    rates = report["product_flops_per_second"]
    products = "".join(f", {dtype} products {rate['median'] / 1e12:.3g} TFLOP/s" for dtype, rate in rates.items())
    print(
        f"{heading(report)}\nmeasured: copy {report['copy_bytes_per_second']['median'] / 1e9:.4g} GB/s{products}\n\n"
        f"{describe_checks(report)}; times are medians (quantiles 0.2–0.8); f·b: forward · backward\n"
    )
    for title, key, columns in (
        ("side by side", "results", {**_COLUMNS, **_BASELINE_COLUMNS}),
        ("growth", "growth", _COLUMNS),
    ):
        if report[key]:
            print(title, tabulate(report[key], columns, left=3, markdown=markdown), sep="\n\n", end="\n\n")
    for entry in (*report["results"], *report["growth"]):
        if "skipped" in entry:
            print(f"skipped: {entry['contender']} on {entry['shape']} in {entry['dtype']}: {entry['skipped']}")
    for ratio in report["growth_ratios"]:
        print(
            f"{ratio['dtype']}: {ratio['tokens']:.3g} × the tokens take {ratio['seconds']:.3g} × the time"
            f" and {ratio['peak_extra_bytes']:.3g} × the memory"
        )


def headline(report: Report) -> str:
    """Ours on the measured shape that takes the most operations, in a line."""
    ours = [entry for entry in report["results"] if entry["contender"] == "ours" and "passes" in entry]
    if not ours:
        return "ours was not measured"
    entry = max(ours, key=lambda entry: entry["passes"]["both"]["flops"])
    forward, backward = (entry["passes"][name] for name in ("forward", "backward"))
    times = " + ".join(f"{1e6 * one['seconds']['median']:.0f}" for one in (forward, backward))
    shares = " and ".join(f"{100 * one['share_of_copy_rate']:.0f} %" for one in (forward, backward))
    ratios = "".join(f", {ratio:.1f}× {other}" for other, ratio in entry["passes"]["both"]["times_faster_than"].items())
    return f"{entry['shape']}: {times} µs, {shares} of copy{ratios}"


def _times_faster(baseline: str) -> Column:
    def cell(entry: dict[str, Any]) -> str:
        ratios = entry["passes"]["both"]["times_faster_than"]
        other = baseline or f"{entry['contender']} float32"
        return f"{ratios[other]:.2f}" if other in ratios else ""

    return cell


def _share_of_eager_memory(entry: dict[str, Any]) -> str:
    share = entry["peak_as_share_of"].get("eager")
    return "" if share is None else f"{share:.3f}"


_COLUMNS: dict[str, Column] = {
    "B,H,height×width,D": lambda entry: entry["shape"],
    "dtype": lambda entry: entry["dtype"],
    "implementation": lambda entry: entry["contender"],
    **{f"{name} ms": pass_milliseconds(name) for name in PASSES},
    "floor GB/s f·b": forward_and_backward("bytes_per_second", 1e9, ".4g"),
    "% of copy f·b": forward_and_backward("share_of_copy_rate", 0.01, ".1f"),
    "% of products": lambda entry: f"{100 * entry['passes']['both']['share_of_product_rate']:.1f}",
    "peak MiB": lambda entry: f"{entry['peak_extra_bytes']['both'] / 2**20:.4g}",
}
_BASELINE_COLUMNS: dict[str, Column] = {
    "of eager's": _share_of_eager_memory,
    **{f"× {baseline}": _times_faster(baseline) for baseline in ("eager", "compiled", "sdpa")},
    "× float32": _times_faster(""),
}


def add_options(add: AddOption) -> None:
    """Declare the options."""
    dtypes = f"of {', '.join(_DTYPES)} (default: bfloat16 on a GPU, float32 bfloat16 on the CPU)"
    add("--dtype", nargs="+", choices=_DTYPES, metavar="DTYPE", help=dtypes)
    add("--resolutions", nargs="+", type=int, metavar="PIXELS", help="of b4's and b5's square images (default 224)")
    add("--batches", nargs="+", type=int, metavar="IMAGES", help="default: 64 128 on a GPU, 8 on the CPU")
    add("--full", action="store_true", help="resolutions 224 384 512 768 1024, batches from 1 up: about half an hour")
    add("--shapes", nargs="+", metavar="B,H,HEIGHTxWIDTH,D", help="these instead, for example 8,1,56x56,96")
    names = f"of {', '.join(IMPLEMENTATIONS)} (default: all)"
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME", default=IMPLEMENTATIONS, help=names)
    sides = "of square images, in tokens, where ours alone is timed; may be empty (default 56 112 256)"
    add("--growth", nargs="*", type=int, default=_GROWTH_SIDES, metavar="SIDE", help=sides)
    add("--seconds", type=float, default=10, help="to measure one shape, about; at least 5 rounds (default 10)")
    add("--limit", type=float, default=5, help="seconds an implementation may take for one run (default 5)")
    add("--threads", type=int, help="of the CPU (default: PyTorch's choice)")


def resolve_shapes(arguments: argparse.Namespace, device_type: str) -> list[Shape]:
    """Shapes that the arguments name. Raises ValueError if they contradict each other or name none."""
    if arguments.shapes:
        if arguments.full or arguments.resolutions or arguments.batches:
            raise ValueError("--shapes says all; leave --full, --resolutions and --batches out")
        return [parse_shape(text) for text in arguments.shapes]
    resolutions = arguments.resolutions or (_ALL_RESOLUTIONS if arguments.full else _USUAL_RESOLUTIONS)
    batches = arguments.batches or (_ALL_BATCHES if arguments.full else _USUAL_BATCHES)[device_type]
    check_resolutions(resolutions)
    if min(batches) < 1:
        raise ValueError(f"--batches names {min(batches)}; give numbers above 0")
    return model_shapes(resolutions, batches)


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError or RuntimeError."""
    device = resolve_device(arguments.device)
    require_positive(arguments, "seconds", "limit", "threads")
    require_few_threads(arguments, "threads")
    if min(arguments.growth, default=1) < 1:
        raise ValueError(f"--growth names {min(arguments.growth)}; give numbers above 0")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtypes = tuple(getattr(torch, name) for name in dict.fromkeys(arguments.dtype or _USUAL_DTYPES[device.type]))
    settings = Settings(device, dtypes, arguments.seconds, arguments.limit)
    shapes = resolve_shapes(arguments, device.type)
    return partial(measure, settings, shapes, list(arguments.implementations), sorted(arguments.growth))


COMMAND = Command("kernel", __doc__, add_options, resolve, show, failures={WrongResult: 1})
parse, main = COMMAND.parse, COMMAND.main

"""Times of the models' depthwise convolutions: ours, PyTorch's in both memory layouts, and compiled PyTorch.

python -m launch.benchmark depthwise
python -m launch.benchmark depthwise --models polaformerpp_b4 polaformerpp_b5 --resolutions 224 384 --batch 128
python -m launch.benchmark depthwise --device cpu --models polaformerpp_b0 --resolutions 32 --batch 96 --dtype float32
python -m launch.benchmark depthwise --device cpu --shapes 8,56x56,96,3x3 8,56x56,96,5x5
python -m launch.benchmark depthwise --show depthwise.json --markdown

The third is what one of the quickstart's two ranks computes. Every block of a model has three of these convolutions:
two of 3×3, which add their input, and one of 5×5, which adds another tensor and whose input is a quarter of the
projection to q, k, v and gate. Ours reads weight and bias in float32; PyTorch gets them already cast to the
activations' dtype, and "nchw" gets the activations already in NCHW. Ours is first checked against PyTorch in float64,
for every shape and dtype; if it is wrong, nothing is timed. "floor GB/s" counts the bytes that no implementation can
avoid: forward input, output and another residual; backward input and both gradients. A model's sum adds the medians of
its shapes, each as often as the shape occurs.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.cli import AddOption, Command, Report, require_few_threads, require_positive, resolve_device
from launch.benchmark.depthwise_runner import (
    IMPLEMENTATIONS,
    TOLERANCES,
    Convolution,
    Settings,
    Times,
    find_errors,
    model_convolutions,
    parse_convolution,
    time_shape,
)
from launch.benchmark.kernel_runner import (
    WrongResult,
    check_resolutions,
    describe_checks,
    implementation_of_ours,
    skip_reason,
)
from launch.benchmark.measure import PASSES, Clock, Quantiles, copy_bandwidth, dtype_name, quantiles, times_faster_than
from launch.benchmark.report import (
    Column,
    describe_run,
    forward_and_backward,
    heading,
    pass_milliseconds,
    tabulate,
    three_digits,
    write_report,
)
from polaformer import PRESETS

_LAYOUTS = ("channels-last", "nchw")  # PyTorch's
_BETTER, _BETTER_BY_SHAPE = "better layout", "better layout by shape"
_DTYPES = tuple(map(dtype_name, TOLERANCES))
_USUAL_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
_USUAL_BATCH = {"cpu": 8, "cuda": 128}

Occurrences = dict[Convolution, int]  # how often each convolution occurs in a model


def measure(
    settings: Settings, shapes: Sequence[Convolution], models: Mapping[tuple[str, int], Occurrences], path: Path
) -> Report:
    """Measure everything. Raises WrongResult, before anything is timed, if ours is wrong for one of the shapes.

    models: the convolutions of each model and resolution, all of them among the shapes.
    """
    report = describe_run("depthwise", settings.device)
    report["implementation_of_ours"] = implementation_of_ours(settings.device)
    if settings.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    clock = Clock(settings.device)
    copy = copy_bandwidth(clock, settings.device)
    report["copy_bytes_per_second"] = asdict(copy)
    cases = list(product(shapes, settings.dtypes))
    checked = cases if "ours" in settings.implementations else []
    report["checks"] = [_check(shape, dtype, settings.device) for shape, dtype in checked]
    unchecked = {(entry["shape"], entry["dtype"]): entry["skipped"] for entry in report["checks"] if "skipped" in entry}
    report["results"] = []
    for shape, dtype in cases:
        print(f"measuring {shape} in {dtype_name(dtype)}", file=sys.stderr)
        reason = unchecked.get((str(shape), dtype_name(dtype)))
        found = time_shape(shape, dtype, settings, clock, {"ours": reason} if reason else {})
        report["results"] += describe(shape, dtype, found, copy)
        write_report(path, report | {"models": []})  # whatever happens to the next shapes
    report["models"] = [
        {"model": model, "resolution": resolution} | sum_over_model(occurrences, dtype_name(dtype), report["results"])
        for (model, resolution), occurrences in models.items()
        for dtype in settings.dtypes
    ]
    return report


def _check(shape: Convolution, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    print(f"checking {shape} in {dtype_name(dtype)}", file=sys.stderr)
    entry = {"shape": str(shape), "dtype": dtype_name(dtype)}
    try:
        return entry | {"errors": find_errors(shape, dtype, device)}
    except RuntimeError as error:
        return entry | {"skipped": f"not checked: {skip_reason('ours', error)}"}


def describe(
    shape: Convolution, dtype: torch.dtype, found: Mapping[str, Times | str], copy: Quantiles
) -> list[dict[str, Any]]:
    """Entries of the report for a shape. found: the times of each implementation, or why there are none."""
    times_by_name = {name: times for name, times in found.items() if not isinstance(times, str)}
    entries = []
    for name, own in found.items():
        entry: dict[str, Any] = {"contender": name, "shape": str(shape), "dtype": dtype_name(dtype)}
        if isinstance(own, str):
            entries.append(entry | {"skipped": own})
            continue
        entry["passes"] = {}
        for of_pass, floor_bytes in shape.floor_bytes(dtype).items():
            seconds = quantiles(own[of_pass])
            entry["passes"][of_pass] = {
                "seconds": asdict(seconds),
                "floor_bytes": floor_bytes,
                "bytes_per_second": floor_bytes / seconds.median,
                "share_of_copy_rate": floor_bytes / seconds.median / copy.median,
                "times_faster_than": times_faster_than(
                    {other: times[of_pass] for other, times in times_by_name.items()}, name
                ),
            }
        entries.append(entry)
    return entries


def sum_over_model(occurrences: Occurrences, dtype: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a model's convolutions, forward and backward, and ours against the others.

    Of implementations that were measured on every shape; beside them PyTorch in its better layout, chosen once for
    the whole model or for each shape.
    """
    medians = {
        (entry["shape"], entry["contender"]): entry["passes"]["both"]["seconds"]["median"]
        for entry in results
        if entry["dtype"] == dtype and "passes" in entry
    }

    def total(*names: str) -> float:
        return sum(times * min(medians[str(shape), name] for name in names) for shape, times in occurrences.items())

    measured = [name for name in IMPLEMENTATIONS if all((str(shape), name) in medians for shape in occurrences)]
    seconds = {name: total(name) for name in measured}
    if layouts := [name for name in _LAYOUTS if name in measured]:
        seconds |= {_BETTER: min(seconds[name] for name in layouts), _BETTER_BY_SHAPE: total(*layouts)}
    ours = seconds.get("ours")
    return {
        "dtype": dtype,
        "convolutions": sum(occurrences.values()),
        "occurrences": {str(shape): times for shape, times in occurrences.items()},
        "seconds": seconds,
        "times_faster_than": {name: other / ours for name, other in seconds.items() if name != "ours"} if ours else {},
    }


def show(report: Report, markdown: bool) -> None:
    """Print a report."""
    print(
        f"{heading(report)}\nmeasured: copy {report['copy_bytes_per_second']['median'] / 1e9:.4g} GB/s\n\n"
        f"{describe_checks(report)}; times are medians (quantiles 0.2–0.8), ratios medians of the same round;"
        " f·b: forward · backward\n"
    )
    print(tabulate(report["results"], _COLUMNS, left=3, markdown=markdown), end="\n\n")
    if report["models"]:
        print("all depthwise convolutions of a model, forward and backward; × as fast: ours against the others\n")
        print(tabulate(report["models"], _MODEL_COLUMNS, left=3, markdown=markdown))
    for entry in report["results"]:
        if "skipped" in entry:
            print(f"\nskipped: {entry['contender']} on {entry['shape']} in {entry['dtype']}: {entry['skipped']}")


def headline(report: Report) -> str:
    """Ours on every model, in a line."""
    return "; ".join(
        f"{entry['model']} at {entry['resolution']}, {entry['dtype']}: {_headline_of_model(entry)}"
        for entry in report["models"]
    )


def _headline_of_model(entry: dict[str, Any]) -> str:
    if "ours" not in entry["seconds"]:
        return "not measured"
    ratios = entry["times_faster_than"]
    compared = f", {ratios[_BETTER]:.2f}× the {_BETTER}" if _BETTER in ratios else ""
    return f"{three_digits(1000 * entry['seconds']['ours'])} ms{compared}"


def _times_faster(other: str) -> Column:
    def cell(entry: dict[str, Any]) -> str:
        ratios = entry["passes"]["both"]["times_faster_than"]
        return f"{ratios[other]['median']:.2f}" if other in ratios else ""

    return cell


def _sum_milliseconds(name: str) -> Column:
    return lambda entry: three_digits(1000 * entry["seconds"][name]) if name in entry["seconds"] else ""


def _sum_times_faster(name: str) -> Column:
    return lambda entry: f"{entry['times_faster_than'][name]:.2f}" if name in entry["times_faster_than"] else ""


_COLUMNS: dict[str, Column] = {
    "B,height×width,C,k×k": lambda entry: entry["shape"],
    "dtype": lambda entry: entry["dtype"],
    "implementation": lambda entry: entry["contender"],
    **{f"{name} ms": pass_milliseconds(name) for name in PASSES},
    "floor GB/s f·b": forward_and_backward("bytes_per_second", 1e9, ".4g"),
    "% of copy f·b": forward_and_backward("share_of_copy_rate", 0.01, ".1f"),
    **{f"× {name}": _times_faster(name) for name in IMPLEMENTATIONS[1:]},
}
_MODEL_COLUMNS: dict[str, Column] = {
    "model": lambda entry: entry["model"],
    "pixels": lambda entry: str(entry["resolution"]),
    "dtype": lambda entry: entry["dtype"],
    "convolutions": lambda entry: str(entry["convolutions"]),
    **{f"{name} ms": _sum_milliseconds(name) for name in IMPLEMENTATIONS},
    **{f"× {name}": _sum_times_faster(name) for name in (_BETTER, _BETTER_BY_SHAPE, "compiled")},
}


def add_options(add: AddOption) -> None:
    """Declare the options."""
    models = f"of {', '.join(PRESETS)} (default: polaformerpp_b5)"
    add("--models", nargs="+", choices=tuple(PRESETS), metavar="NAME", help=models)
    add("--resolutions", nargs="+", type=int, metavar="PIXELS", help="of square images (default 224)")
    add("--batch", type=int, metavar="IMAGES", help="default: 128 on a GPU, 8 on the CPU")
    add("--shapes", nargs="+", metavar="B,SIDExSIDE,C,KxK", help="these instead, for example 8,56x56,96,3x3")
    dtypes = f"of {', '.join(_DTYPES)} (default: bfloat16 on a GPU, float32 bfloat16 on the CPU)"
    add("--dtype", nargs="+", choices=_DTYPES, metavar="DTYPE", help=dtypes)
    names = f"of {', '.join(IMPLEMENTATIONS)} (default: all)"
    add("--implementations", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME", default=IMPLEMENTATIONS, help=names)
    seconds = "to time one shape in one dtype, about; at least 5 rounds (default 5)"
    add("--seconds", type=float, default=5, help=seconds)
    add("--threads", type=int, help="of the CPU (default: PyTorch's choice)")


def resolve_models(arguments: argparse.Namespace, device_type: str) -> dict[tuple[str, int], Occurrences]:
    """Convolutions of the models and resolutions that the arguments name. Raises ValueError for bad resolutions."""
    models, resolutions = arguments.models or ("polaformerpp_b5",), arguments.resolutions or (224,)
    check_resolutions(resolutions)
    batch = arguments.batch or _USUAL_BATCH[device_type]
    return {
        (model, resolution): model_convolutions(model, resolution, batch)
        for model, resolution in product(models, resolutions)
    }


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError or RuntimeError."""
    device = resolve_device(arguments.device)
    require_positive(arguments, "batch", "seconds", "threads")
    require_few_threads(arguments, "threads")
    if arguments.shapes:
        if arguments.models or arguments.resolutions or arguments.batch:
            raise ValueError("--shapes says all; leave --models, --resolutions and --batch out")
        shapes, models = [parse_convolution(text) for text in dict.fromkeys(arguments.shapes)], {}
    else:
        models = resolve_models(arguments, device.type)
        shapes = list(dict.fromkeys(shape for occurrences in models.values() for shape in occurrences))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtypes = tuple(getattr(torch, name) for name in dict.fromkeys(arguments.dtype or _USUAL_DTYPES[device.type]))
    settings = Settings(device, dtypes, tuple(dict.fromkeys(arguments.implementations)), arguments.seconds)
    return partial(measure, settings, shapes, models)


COMMAND = Command("depthwise", __doc__, add_options, resolve, show, failures={WrongResult: 1})
parse, main = COMMAND.parse, COMMAND.main

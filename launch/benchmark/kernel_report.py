"""The kernel benchmark's results as JSON and, from that, as tables."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from launch.benchmark.implementations import MIN_TRAFFIC_ELEMENTS, flops
from launch.benchmark.kernel_runner import DevicePeaks, Result
from launch.benchmark.measure import PASSES
from launch.benchmark.report import format_table

_Column = Callable[[dict[str, Any]], str]  # an entry's cell


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(result: Result, baselines: Sequence[Result], peaks: DevicePeaks) -> dict[str, Any]:
    """A result with what follows from it. baselines: all results on the same shape, this one among them."""
    entry = {"contender": result.implementation, "shape": str(result.shape), "tokens": result.shape.tokens}
    entry |= {"dtype": dtype_name(result.dtype)}
    if result.seconds is None:
        return entry | {"skipped": result.skipped}
    others = {}
    for baseline in baselines:
        if baseline.seconds is None or baseline is result:
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
    """floor_bytes: what any implementation must move; shares: of the device's measured rates."""
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
    """How time and memory of forward and backward grow from the fewest to the most tokens measured, by dtype."""
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


def show(report: dict[str, Any], markdown: bool) -> None:
    """Prints a report, for people."""
    print(_heading(report))
    for title, key, columns in (
        ("side by side", "results", {**_COLUMNS, **_BASELINE_COLUMNS}),
        ("growth", "growth", _COLUMNS),
    ):
        if report[key]:
            print(title, _table(report[key], columns, markdown), sep="\n\n", end="\n\n")
    for line in (*_skipped_lines(report), *map(_growth_line, report["growth_ratios"])):
        print(line)


def _heading(report: dict[str, Any]) -> str:
    products = (
        f"{dtype} products {rate['median'] / 1e12:.3g} TFLOP/s"
        for dtype, rate in report["product_flops_per_second"].items()
    )
    checked = sum("errors" in entry for entry in report["checks"])
    return (
        f"{report['device']['name']}, {report['threads']} threads, torch {report['versions']['torch']},"
        f" commit {report['commit']}, {report['date']}\n\n"
        f"measured: copy {report['copy_bytes_per_second']['median'] / 1e9:.4g} GB/s, {', '.join(products)}\n\n"
        f"ours is the {report['implementation_of_ours']}, right on {checked} of {len(report['checks'])} shapes and"
        " dtypes; times are medians (quantiles 0.2–0.8); f·b: forward · backward\n"
    )


def _skipped_lines(report: dict[str, Any]) -> list[str]:
    return [
        f"skipped: {entry['contender']} on {entry['shape']} in {entry['dtype']}: {entry['skipped']}"
        for entry in (*report["results"], *report["growth"])
        if "skipped" in entry
    ]


def _growth_line(ratio: dict[str, Any]) -> str:
    return (
        f"{ratio['dtype']}: {ratio['tokens']:.3g} × the tokens take {ratio['seconds']:.3g} × the time"
        f" and {ratio['peak_extra_bytes']:.3g} × the memory"
    )


def _table(entries: list[dict[str, Any]], columns: dict[str, _Column], markdown: bool) -> str:
    rows = []
    for entry in entries:
        cells = (cell(entry) for cell in columns.values()) if "passes" in entry else ("skipped",)
        rows.append((entry["shape"], entry["dtype"], entry["contender"], *cells))
    return format_table(("B,H,height×width,D", "dtype", "contender", *columns), rows, left=3, markdown=markdown)


def _milliseconds(name: str) -> _Column:
    def cell(entry: dict[str, Any]) -> str:
        seconds = entry["passes"][name]["seconds"]
        median, low, high = (_three_digits(1000 * seconds[quantile]) for quantile in ("median", "low", "high"))
        return f"{median} ({low}–{high})"

    return cell


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _forward_and_backward(key: str, unit: float, form: str) -> _Column:
    return lambda entry: "·".join(format(entry["passes"][name][key] / unit, form) for name in PASSES[:2])


def _times_faster(baseline: str) -> _Column:
    def cell(entry: dict[str, Any]) -> str:
        ratios = entry["passes"]["both"]["times_faster_than"]
        other = baseline or f"{entry['contender']} float32"
        return f"{ratios[other]:.2f}" if other in ratios else ""

    return cell


def _share_of_eager_memory(entry: dict[str, Any]) -> str:
    share = entry["peak_as_share_of"].get("eager")
    return "" if share is None else f"{share:.3f}"


_COLUMNS: dict[str, _Column] = {
    **{f"{name} ms": _milliseconds(name) for name in PASSES},
    "floor GB/s f·b": _forward_and_backward("bytes_per_second", 1e9, ".3g"),
    "% of copy f·b": _forward_and_backward("share_of_copy_rate", 0.01, ".1f"),
    "% of products": lambda entry: f"{100 * entry['passes']['both']['share_of_product_rate']:.1f}",
    "peak MiB": lambda entry: f"{entry['peak_extra_bytes']['both'] / 2**20:.4g}",
}
_BASELINE_COLUMNS: dict[str, _Column] = {
    "of eager's": _share_of_eager_memory,
    **{f"× {baseline}": _times_faster(baseline) for baseline in ("eager", "compiled", "sdpa")},
    "× float32": _times_faster(""),
}

"""The data benchmark's results as JSON, as a table and as a bar chart."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from launch.benchmark.loader_processes import PeakMemory, Trial
from launch.benchmark.measure import quantiles

DESCRIPTIONS = {
    "ours": "dataio",
    "webdataset": "webdataset; decodes with PIL in worker processes, and reads in its own process, which is faster",
    "torchvision": "webdataset, PIL and torchvision's transforms in worker processes",
    "timm": "webdataset, PIL and timm's transforms in worker processes",
    "dali": "DALI's fn.readers.webdataset with DALI's own operations, its own RandAugment among them",
}
_COLORS = {
    "ours": "#1b6ca8",
    "webdataset": "#c8963e",
    "torchvision": "#c8963e",
    "timm": "#8f5b9a",
    "dali": "#6aa84f",
}
_TABLE_WIDTH = 200  # wider than the widest, so that nothing is cut
_INCHES, _DPI = (9, 1.9), 80  # of the chart, a row of workloads


def describe(measured_by_loader: dict[str, Any], workload: str) -> list[dict[str, Any]]:
    """An entry for each loader of a workload. Ratios are of trials of the same round."""
    return [
        {"work": workload, "contender": name}
        | _describe_trials(measured["trials"])
        | _describe_peak(measured["peak"])
        | {
            "difference_to_first": measured["differences"],
            "times_faster_than": {
                other: asdict(quantiles(_ratios(baseline["trials"], measured["trials"])))
                for other, baseline in measured_by_loader.items()
                if other != name
            },
        }
        for name, measured in measured_by_loader.items()
    ]


def _describe_trials(trials: Sequence[Trial]) -> dict[str, Any]:
    images = sum(trials[0].labels)
    return {
        "images": images,
        "images_per_second": asdict(quantiles([images / trial.seconds for trial in trials])),
        "cpu_seconds_per_1000_images": asdict(quantiles([1000 * trial.cpu_seconds / images for trial in trials])),
    }


def _describe_peak(peak: PeakMemory) -> dict[str, int]:
    return {"peak_resident_bytes": peak.resident, "peak_own_bytes": peak.own}


def _ratios(slower: Sequence[Trial], faster: Sequence[Trial]) -> list[float]:
    return [a.seconds / b.seconds for a, b in zip(slower, faster, strict=True)]


def show(report: dict[str, Any], markdown: bool) -> None:
    """Prints a report, for people."""
    console = Console(width=_TABLE_WIDTH)
    console.print(_heading(report), highlight=False, soft_wrap=True)
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE_HEAD)
    for name in ("work", "contender"):
        table.add_column(name, no_wrap=True)
    for name in ("images/s", "CPU s / 1000 images", "peak MiB resident · own", "ours against it"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in report["results"]:
        ratio = _times_ours(report, entry)
        table.add_row(
            entry["work"],
            entry["contender"],
            _three(entry["images_per_second"], ",.0f"),
            _three(entry["cpu_seconds_per_1000_images"], ".3g"),
            f"{entry['peak_resident_bytes'] / 2**20:,.0f} · {entry['peak_own_bytes'] / 2**20:,.0f}",
            f"{ratio:.2f} ×" if ratio else "",
        )
    console.print(table)
    for line in map(_feeding_line, report.get("feeding", [])):
        console.print(line, highlight=False, soft_wrap=True)


def _heading(report: dict[str, Any]) -> str:
    data = report["data"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    return (
        f"{report['device']['name']}, {report['cores']} cores, {versions}, commit {report['commit']},"
        f" {report['date']}\n\n"
        f"{data['images']} images of {data['mean_bytes'] / 1000:.0f} kB on average: {data['description']};"
        f" batches of {report['batch']}, {report['size']}² pixels; medians of {report['rounds']} rounds"
        " (quantiles 0.2–0.8)\n"
    )


def _three(quantiles: dict[str, float], form: str) -> str:
    median, low, high = (format(quantiles[name], form) for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def _times_ours(report: dict[str, Any], entry: dict[str, Any]) -> float | None:
    """How many times faster ours is than another loader in the same workload."""
    for ours in report["results"]:
        if ours["contender"] == "ours" and ours["work"] == entry["work"]:
            return ours["times_faster_than"].get(entry["contender"], {}).get("median")
    return None


def _feeding_line(entry: dict[str, Any]) -> str:
    return (
        f"{entry['model']}, batch {entry['batch']}, {entry['recipe']}: a step takes"
        f" {entry['step_images_per_second']['median']:,.0f} images/s, with our loader it gets"
        f" {entry['fed_images_per_second']['median']:,.0f}: {100 * entry['share_fed']:.1f} %"
    )


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the bar chart: images/s of all contenders, workload by workload, with quantiles."""
    workloads = list(dict.fromkeys(entry["work"] for entry in report["results"]))
    columns = min(3, len(workloads))
    rows = -(-len(workloads) // columns)
    figure = Figure(figsize=(_INCHES[0], 0.5 + _INCHES[1] * rows), dpi=_DPI, layout="constrained")
    for place, workload in enumerate(workloads):
        axes = figure.add_subplot(rows, columns, place + 1)
        entries = [entry for entry in report["results"] if entry["work"] == workload][::-1]
        rates = [entry["images_per_second"] for entry in entries]
        medians = [rate["median"] for rate in rates]
        spans = [[rate["median"] - rate["low"] for rate in rates], [rate["high"] - rate["median"] for rate in rates]]
        names = [entry["contender"] for entry in entries]
        bars = axes.barh(names, medians, xerr=spans, color=[_COLORS[name] for name in names], error_kw={"lw": 1})
        axes.bar_label(bars, [f" {median:,.0f}" for median in medians], fontsize=8)
        axes.set_xlim(0, 1.3 * max(medians))
        axes.set_title(workload, fontsize=10, loc="left")
        axes.set_xticks([])
        axes.tick_params(labelsize=8, length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    title = f"images/s, {report['device']['name']}, {report['cores']} cores"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path)

"""Throughput from shards to batches: ours, webdataset with torchvision's or timm's transforms, DALI's own reader.

python -m launch.benchmark data
python -m launch.benchmark data --workloads simple rand-augment --loaders ours timm --images 512
python -m launch.benchmark data --data data/imagenet/val --rounds 3 --output launch/benchmark/results/data-h100.json
python -m launch.benchmark data --show launch/benchmark/results/data-cpu.json --markdown

Each loader has a process of its own, all cores, and the same images; it delivers batches of float32, normalised,
(B, 3, S, S), to a consumer that counts labels. "read" is encoded images only, "decode" whole images, "evaluation" the
official recipe's resize and crop; the others are values of data.augmentation, without what is done to whole batches on
the device. Nothing is timed before all loaders deliver the same labels, and where nothing is random the same bytes, or
pixels within rounding of their filters. Then they are timed in turn, one epoch each. A bar chart goes beside the JSON.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from dataio.manifest import Manifest, load_manifest
from dataio.workers import available_cores
from launch.benchmark.cli import (
    USAGE_ERRORS,
    AddOption,
    Command,
    Report,
    require_few_threads,
    require_positive,
    resolve_device,
)
from launch.benchmark.data_stalls import DataStallConfig, measure_data_stalls
from launch.benchmark.loader_processes import LOADERS, OutputMismatch, benchmark_loaders, require_tools
from launch.benchmark.loaders import WORKLOADS, LoaderConfig
from launch.benchmark.measure import quantiles, times_faster_than
from launch.benchmark.report import (
    Column,
    default_path,
    describe_run,
    format_quantiles,
    heading,
    read_report,
    tabulate,
    user_path,
    write_report,
)
from launch.benchmark.sample_images import DESCRIPTION, pack_images
from polaformer import PRESETS

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
_INCHES, _DPI = (9, 1.9), 80  # chart: width, and height for each row of workloads
_IMAGES = 2048
_LIBRARIES = ("nvidia-dali-cuda130", "webdataset", "torchvision", "timm", "pillow")
_STALL_MODELS = {"cuda": ("polaformerpp_b4", "polaformerpp_b5"), "cpu": ()}
_STALL_RECIPE = "rand-augment"
_STALL_STEPS = 20


@dataclass(frozen=True)
class DataBenchmark:
    """The loaders and workloads to measure. config: common to all workloads, each of which sets its name and folder."""

    config: LoaderConfig
    workloads: tuple[str, ...]
    loaders: tuple[str, ...]
    rounds: int
    models: tuple[str, ...]  # whose data stalls are measured

    def loaders_for(self, workload: str) -> list[str]:
        """Loaders that can do a workload."""
        return [name for name in self.loaders if workload in LOADERS[name]]


def measure(benchmark: DataBenchmark, manifest: Manifest, description: str) -> Report:
    """Measure everything. Raises OutputMismatch if loaders deliver different outputs, RuntimeError if one fails."""
    config, device = benchmark.config, torch.device(benchmark.config.device)
    report = describe_run("data", device)
    report["versions"] |= {name: importlib.metadata.version(name) for name in _LIBRARIES if _is_installed(name)}
    report["data"] = {
        "description": description,
        "images": len(manifest),
        "shards": len(manifest.shards),
        "mean_bytes": float(manifest.samples["bytes"].mean()),
        "mean_width": float(manifest.samples["width"].mean()),
        "mean_height": float(manifest.samples["height"].mean()),
    }
    report |= {"cores": config.cores, "batch": config.batch, "size": config.size, "rounds": benchmark.rounds}
    report["contenders"] = {name: DESCRIPTIONS[name] for name in benchmark.loaders}
    labels = tuple(np.bincount(manifest.samples["label"], minlength=len(manifest.classes)).tolist())
    report["results"] = []
    for workload in benchmark.workloads:
        names = benchmark.loaders_for(workload)
        print(f"measuring {workload}: {', '.join(names)}", file=sys.stderr)
        own = replace(config, workload=workload, folder=manifest.folder)
        report["results"] += describe(benchmark_loaders(names, own, labels, benchmark.rounds), workload)
    report["decoding_share"] = decoding_shares(report["results"])
    report["feeding"] = []
    for model in benchmark.models:
        print(f"measuring data stalls of {model}", file=sys.stderr)
        stalls = DataStallConfig(model, _STALL_RECIPE, config.batch, config.size, config.cores, _STALL_STEPS)
        report["feeding"].append(measure_data_stalls(stalls, manifest.folder, device))
    return report


def _is_installed(distribution: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=distribution)))


def describe(measured_by_loader: dict[str, Any], workload: str) -> list[dict[str, Any]]:
    """Entries of the report for a workload. Ratios are of trials of the same round."""
    seconds = {name: [trial.seconds for trial in measured["trials"]] for name, measured in measured_by_loader.items()}
    entries = []
    for name, measured in measured_by_loader.items():
        trials, peak = measured["trials"], measured["peak"]
        images = sum(trials[0].labels)
        cpu = [1000 * trial.cpu_seconds / images for trial in trials]
        entries.append(
            {
                "work": workload,
                "contender": name,
                "images": images,
                "images_per_second": asdict(quantiles([images / trial.seconds for trial in trials])),
                "cpu_seconds_per_1000_images": asdict(quantiles(cpu)),
                "peak_resident_bytes": peak.resident,
                "peak_own_bytes": peak.own,
                "difference_to_first": measured["differences"],
                "times_faster_than": times_faster_than(seconds, name),
            }
        )
    return entries


def decoding_shares(results: list[dict[str, Any]]) -> dict[str, float]:
    """Share of decoding whole images (by nvJPEG on a GPU) in the time of each other workload of ours."""
    rates = {entry["work"]: entry["images_per_second"]["median"] for entry in results if entry["contender"] == "ours"}
    if "decode" not in rates:
        return {}
    return {workload: rate / rates["decode"] for workload, rate in rates.items() if workload not in ("read", "decode")}


def add_to(earlier: Report, report: Report) -> Report:
    """Merge a report with an earlier one's results of other workloads.

    Raises ValueError if that was measured under other circumstances.
    """
    for key in ("commit", "device", "versions", "data", "cores", "batch", "size", "rounds"):
        if earlier[key] != report[key]:
            raise ValueError(f"--add: {key} was {earlier[key]} and is {report[key]}; measure all workloads again")
    measured = {entry["work"] for entry in report["results"]}
    kept = [entry for entry in earlier["results"] if entry["work"] not in measured]
    results = sorted(kept + report["results"], key=lambda entry: WORKLOADS.index(entry["work"]))
    fed = {entry["model"] for entry in report["feeding"]}
    return report | {
        "contenders": earlier["contenders"] | report["contenders"],
        "results": results,
        "decoding_share": decoding_shares(results),
        "feeding": [entry for entry in earlier["feeding"] if entry["model"] not in fed] + report["feeding"],
    }


def show(report: Report, markdown: bool) -> None:
    """Print a report."""
    data = report["data"]
    print(heading(report, [name for name, version in report["versions"].items() if version], workers="cores"))
    print(
        f"{data['images']} images of {data['mean_bytes'] / 1000:.0f} kB on average: {data['description']};"
        f" batches of {report['batch']}, {report['size']}² pixels; medians of {report['rounds']} rounds"
        " (quantiles 0.2–0.8)\n"
    )
    ours = {entry["work"]: entry["times_faster_than"] for entry in report["results"] if entry["contender"] == "ours"}

    def times_ours(entry: dict[str, Any]) -> str:
        ratio = ours.get(entry["work"], {}).get(entry["contender"])
        return f"{ratio['median']:.2f} ×" if ratio else ""

    columns = _COLUMNS | {"ours against it": times_ours}
    print(tabulate(report["results"], columns, left=2, markdown=markdown), end="\n\n")
    for entry in report.get("feeding", []):
        print(
            f"{entry['model']}, batch {entry['batch']}, {entry['recipe']}: a step takes"
            f" {entry['step_images_per_second']['median']:,.0f} images/s, with our loader it gets"
            f" {entry['fed_images_per_second']['median']:,.0f}: {100 * entry['share_fed']:.1f} %"
        )


def _mebibytes(entry: dict[str, Any]) -> str:
    return f"{entry['peak_resident_bytes'] / 2**20:,.0f} · {entry['peak_own_bytes'] / 2**20:,.0f}"


_COLUMNS: dict[str, Column] = {
    "workload": lambda entry: entry["work"],
    "loader": lambda entry: entry["contender"],
    "images/s": lambda entry: format_quantiles(entry["images_per_second"], "{:,.0f}".format),
    "CPU s / 1000 images": lambda entry: format_quantiles(entry["cpu_seconds_per_1000_images"], "{:.3g}".format),
    "peak MiB resident · own": _mebibytes,
}


def draw(report: Report, path: Path) -> None:
    """Write the bar chart: images/s of all loaders, workload by workload, with quantiles."""
    workloads = list(dict.fromkeys(entry["work"] for entry in report["results"]))
    columns = min(3, len(workloads))
    rows = -(-len(workloads) // columns)
    figure = Figure(figsize=(_INCHES[0], 0.5 + _INCHES[1] * rows), dpi=_DPI, layout="constrained")
    for index, workload in enumerate(workloads):
        axes = figure.add_subplot(rows, columns, index + 1)
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


def add_options(add: AddOption) -> None:
    """Declare the options."""
    workloads, loaders = (f"of {', '.join(names)} (default: all)" for names in (WORKLOADS, LOADERS))
    add("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="WORKLOAD", help=workloads)
    add("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS), metavar="NAME", help=loaders)
    add("--data", type=user_path, metavar="FOLDER", help="packed by dataio.pack (default: images made for this)")
    add("--images", type=int, help=f"number of images to make (default {_IMAGES})")
    add("--batch", type=int, default=64, help="images (default 64)")
    add("--size", type=int, default=224, metavar="PIXELS", help="height and width of the batches (default 224)")
    add("--cores", type=int, help="worker processes, or threads, of each loader (default: all)")
    add("--rounds", type=int, default=5, help="epochs timed of each loader (default 5)")
    models = "whose data stalls are measured (default: polaformerpp_b4 polaformerpp_b5 on a GPU, none on the CPU)"
    add("--models", nargs="*", choices=tuple(PRESETS), metavar="MODEL", help=models)
    add("--add", action="store_true", help="keep what the output's file says of other workloads")


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError, RuntimeError or OSError."""
    device_type = resolve_device(arguments.device).type
    require_positive(arguments, "images", "batch", "size", "cores", "rounds")
    require_few_threads(arguments, "cores")
    if arguments.size % 32:
        raise ValueError(f"--size is {arguments.size}; give a multiple of 32, as the models need")
    if arguments.data and arguments.images:
        raise ValueError("--data says which images; leave --images out")
    cores = arguments.cores or available_cores()
    config = LoaderConfig("", Path(), arguments.batch, arguments.size, cores, device_type)
    models = _STALL_MODELS[device_type] if arguments.models is None else tuple(arguments.models)
    workloads, loaders = (tuple(dict.fromkeys(names)) for names in (arguments.workloads, arguments.loaders))
    benchmark = DataBenchmark(config, workloads, loaders, arguments.rounds, models)
    for workload in benchmark.workloads:
        if not benchmark.loaders_for(workload):
            able = ", ".join(name for name, workloads in LOADERS.items() if workload in workloads)
            raise ValueError(f"none of --loaders does {workload}; add one of {able}")
    require_tools(benchmark.loaders)
    earlier = read_report(arguments.output or default_path("data"), "data") if arguments.add else None
    return partial(_run, benchmark, arguments, earlier)


@contextmanager
def images_to_load(arguments: argparse.Namespace, benchmark: DataBenchmark) -> Iterator[tuple[Manifest, str]]:
    """Packed images and their description; images that were made for it are deleted after the block.

    Raises ValueError, FileNotFoundError or RuntimeError if there are none, or not enough.
    """
    count = arguments.images or _IMAGES
    least = 2 * benchmark.config.batch  # or pipelines would be ahead of the end
    with tempfile.TemporaryDirectory(prefix="photographs-") as folder:
        if arguments.data:
            manifest, description = load_manifest(arguments.data), str(arguments.data)
            count = len(manifest)
        if count < least:
            raise ValueError(f"{count} images are fewer than 2 batches; give {least} or more, or a smaller --batch")
        if not arguments.data:
            print(f"making {count} images", file=sys.stderr)
            manifest, description = pack_images(Path(folder), count, benchmark.config.cores), DESCRIPTION
        yield manifest, description


def _run(benchmark: DataBenchmark, arguments: argparse.Namespace, earlier: Report | None, path: Path) -> Report:
    with images_to_load(arguments, benchmark) as (manifest, description):
        report = measure(benchmark, manifest, description)
    if earlier:
        report = add_to(earlier, report)
    write_report(path, report)  # before the chart, which may fail
    draw(report, path.with_suffix(".png"))
    return report


COMMAND = Command(
    "data", __doc__, add_options, resolve, show,
    failures={OutputMismatch: 1, **USAGE_ERRORS}, device_help="of the batches (default: a GPU where there is one)",
)  # fmt: skip
parse, main = COMMAND.parse, COMMAND.main

"""Times the way from shards to batches: ours, webdataset with torchvision's and timm's transforms, DALI's own reader.

python -m launch.benchmark data
python -m launch.benchmark data --workloads simple rand-augment --loaders ours timm --images 512
python -m launch.benchmark data --data data/imagenet/val --rounds 3 --output launch/benchmark/results/data-h100.json
python -m launch.benchmark data --show launch/benchmark/results/data-cpu.json --markdown

Each loader has a process of its own, all cores, and the same images; it hands over batches of float32, normalised,
(B, 3, S, S), to a consumer that counts labels. "read" is encoded images only, "decode" whole images, "evaluation" the
official recipe's resize and crop, the others are data.augmentation's, without what is done to whole batches on the device.
Before anything is timed all must hand over the same labels, and where nothing is random the same bytes or pixels, as
nearly as filters round. Then all take turns of one epoch each. Beside the JSON lies a bar chart.
"""

import argparse
import importlib.metadata
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataio.manifest import Manifest, load_manifest
from dataio.workers import available_cores
from launch.benchmark.data_report import DESCRIPTIONS, describe, draw, show
from launch.benchmark.data_stalls import DataStallConfig, measure_data_stalls
from launch.benchmark.loader_processes import LOADERS, OutputMismatch, benchmark_loaders, require_tools
from launch.benchmark.loaders import WORKLOADS, LoaderConfig
from launch.benchmark.report import default_path, describe_run, read_report, user_path, write_report
from launch.benchmark.sample_images import DESCRIPTION, pack_images
from launch.distributed import default_device_type
from polaformer import PRESETS

_IMAGES = 2048
_LIBRARIES = ("nvidia-dali-cuda130", "webdataset", "torchvision", "timm", "pillow")
_STALL_MODELS = {"cuda": ("polaformerpp_b4", "polaformerpp_b5"), "cpu": ()}
_STALL_RECIPE = "rand-augment"
_STALL_STEPS = 20


@dataclass(frozen=True)
class DataBenchmark:
    """What is measured. config: of all workloads, but for its name."""

    config: LoaderConfig
    workloads: tuple[str, ...]
    loaders: tuple[str, ...]
    rounds: int
    models: tuple[str, ...]  # to be fed

    def loaders_for(self, workload: str) -> list[str]:
        return [name for name in self.loaders if workload in LOADERS[name]]


def measure(benchmark: DataBenchmark, manifest: Manifest, description: str) -> dict[str, Any]:
    """The whole report. Raises OutputMismatch if the loaders do not do the same, RuntimeError if one fails."""
    device = torch.device(benchmark.config.device)
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
    report |= {
        "cores": benchmark.config.cores,
        "batch": benchmark.config.batch,
        "size": benchmark.config.size,
        "rounds": benchmark.rounds,
    }
    report["contenders"] = {name: DESCRIPTIONS[name] for name in benchmark.loaders}
    labels = tuple(np.bincount(manifest.samples["label"], minlength=len(manifest.classes)).tolist())
    report["results"] = []
    for workload in benchmark.workloads:
        names = benchmark.loaders_for(workload)
        print(f"measuring {workload}: {', '.join(names)}", file=sys.stderr)
        config = replace(benchmark.config, workload=workload, folder=manifest.folder)
        report["results"] += describe(benchmark_loaders(names, config, labels, benchmark.rounds), workload)
    report["decoding_share"] = decoding_shares(report["results"])
    report["feeding"] = []
    for model in benchmark.models:
        print(f"feeding {model}", file=sys.stderr)
        config = DataStallConfig(
            model, _STALL_RECIPE, benchmark.config.batch, benchmark.config.size, benchmark.config.cores, _STALL_STEPS
        )
        report["feeding"].append(measure_data_stalls(config, manifest.folder, device))
    return report


def _is_installed(name: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=name)))


def decoding_shares(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of ours: the time of decoding whole images as a share of each other work's, nvJPEG's on a GPU."""
    rates = {entry["work"]: entry["images_per_second"]["median"] for entry in results if entry["contender"] == "ours"}
    if "decode" not in rates:
        return {}
    return {workload: rate / rates["decode"] for workload, rate in rates.items() if workload not in ("read", "decode")}


def add_to(earlier: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The report with what an earlier one says of other workloads.

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


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark data",
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="where batches are handed over (default: a GPU where there is one)")
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD",
        help=f"of {', '.join(WORKLOADS)} (default: all)")  # fmt: skip
    add("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS), metavar="NAME",
        help=f"of {', '.join(LOADERS)} (default: all)")  # fmt: skip
    add("--data", type=user_path, metavar="FOLDER", help="packed by dataio.pack (default: photographs made for this)")
    add("--images", type=int, help=f"so many photographs are made (default {_IMAGES})")
    add("--batch", type=int, default=64, help="images (default 64)")
    add("--size", type=int, default=224, metavar="PIXELS", help="height and width of what is handed over (default 224)")
    add("--cores", type=int, help="worker processes, or threads, of each loader (default: all)")
    add("--rounds", type=int, default=5, help="epochs timed of each loader (default 5)")
    models = "whether ours feeds them (default: polaformerpp_b4 polaformerpp_b5 on a GPU, none on the CPU)"
    add("--models", nargs="*", choices=tuple(PRESETS), metavar="MODEL", help=models)
    add("--output", type=user_path, metavar="FILE.json", help="default: a new file below runs/benchmark")
    add("--add", action="store_true", help="keep what the output's file says of other works")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--show", type=user_path, metavar="FILE.json", help="print the table of this file and measure nothing")
    return parser.parse_args(argv)


def resolve(arguments: argparse.Namespace) -> DataBenchmark:
    """Raises ValueError or RuntimeError if the arguments, or this machine, do not allow it."""
    device_type = arguments.device or default_device_type()
    if device_type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no NVIDIA GPU; use --device cpu")
    for name in ("images", "batch", "size", "cores", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; give a number above 0")
    if arguments.size % 32:
        raise ValueError(f"--size is {arguments.size}; give a multiple of 32, as the models need")
    if arguments.data and arguments.images:
        raise ValueError("--data says which images; leave --images out")
    config = LoaderConfig(
        "", Path(), arguments.batch, arguments.size, arguments.cores or available_cores(), device_type
    )
    models = _STALL_MODELS[device_type] if arguments.models is None else tuple(arguments.models)
    unique = (tuple(dict.fromkeys(names)) for names in (arguments.workloads, arguments.loaders))
    benchmark = DataBenchmark(config, *unique, arguments.rounds, models)
    for workload in benchmark.workloads:
        if not benchmark.loaders_for(workload):
            able = ", ".join(name for name, workloads in LOADERS.items() if workload in workloads)
            raise ValueError(f"none of --loaders does {workload}; add one of {able}")
    require_tools(benchmark.loaders)
    return benchmark


@contextmanager
def images_to_load(arguments: argparse.Namespace, benchmark: DataBenchmark) -> Iterator[tuple[Manifest, str]]:
    """(what is loaded, its description); photographs that were made for it are gone after the block.

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
            print(f"making {count} photographs", file=sys.stderr)
            manifest, description = pack_images(Path(folder), count, benchmark.config.cores), DESCRIPTION
        yield manifest, description


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.show:
            show(read_report(arguments.show, "data"), arguments.markdown)
            return 0
        benchmark = resolve(arguments)
        path = arguments.output or default_path("data")
        earlier = read_report(path, "data") if arguments.add else None
        path.parent.mkdir(parents=True, exist_ok=True)  # now, if it cannot be
        with images_to_load(arguments, benchmark) as (manifest, description):
            report = measure(benchmark, manifest, description)
        if earlier:
            report = add_to(earlier, report)
    except OutputMismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_report(path, report)
    draw(report, path.with_suffix(".png"))
    show(report, arguments.markdown)
    print(f"written to {path} and {path.with_suffix('.png')}", file=sys.stderr)
    return 0

"""Times the way from shards to batches: ours, webdataset with torchvision's and timm's transforms, DALI's own reader.

python -m launch.benchmark data
python -m launch.benchmark data --works simple rand-augment --contenders ours timm --images 512
python -m launch.benchmark data --data data/imagenet/val --rounds 3 --output launch/benchmark/results/data-h100.json
python -m launch.benchmark data --show launch/benchmark/results/data-cpu.json --markdown

Each contender has a process of its own, all cores, and the same images; it hands over batches of float32, normalised,
(B, 3, S, S), to a consumer that counts labels. "read" is encoded images only, "decode" whole images, "evaluation" the
official recipe's resize and crop, the others are data.recipe's, without what is done to whole batches on the device.
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
from launch.benchmark.feed import Feeding, measure_feeding
from launch.benchmark.loaders import WORKS, Task
from launch.benchmark.loading import CONTENDERS, UnequalWork, hold_contest, require_tools
from launch.benchmark.photographs import DESCRIPTION, pack_photographs
from launch.benchmark.report import default_path, describe_run, read_report, user_path, write_report
from launch.distributed import default_device_type
from polaformer import PRESETS

_IMAGES = 2048
_LIBRARIES = ("nvidia-dali-cuda130", "webdataset", "torchvision", "timm", "pillow")
_FED = {"cuda": ("polaformerpp_b4", "polaformerpp_b5"), "cpu": ()}
_FED_RECIPE = "rand-augment"
_FED_STEPS = 20


@dataclass(frozen=True)
class Race:
    """What is measured. task: of all works, but for its name."""

    task: Task
    works: tuple[str, ...]
    contenders: tuple[str, ...]
    rounds: int
    models: tuple[str, ...]  # to be fed

    def racing(self, work: str) -> list[str]:
        return [name for name in self.contenders if work in CONTENDERS[name]]


def measure(race: Race, manifest: Manifest, description: str) -> dict[str, Any]:
    """The whole report. Raises UnequalWork if the contenders do not do the same, RuntimeError if one fails."""
    device = torch.device(race.task.device)
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
    report |= {"cores": race.task.cores, "batch": race.task.batch, "size": race.task.size, "rounds": race.rounds}
    report["contenders"] = {name: DESCRIPTIONS[name] for name in race.contenders}
    labels = tuple(np.bincount(manifest.samples["label"], minlength=len(manifest.classes)).tolist())
    report["results"] = []
    for work in race.works:
        names = race.racing(work)
        print(f"measuring {work}: {', '.join(names)}", file=sys.stderr)
        task = replace(race.task, work=work, folder=manifest.folder)
        report["results"] += describe(hold_contest(names, task, labels, race.rounds), work)
    report["decoding_share"] = decoding_shares(report["results"])
    report["feeding"] = []
    for model in race.models:
        print(f"feeding {model}", file=sys.stderr)
        feeding = Feeding(model, _FED_RECIPE, race.task.batch, race.task.size, race.task.cores, _FED_STEPS)
        report["feeding"].append(measure_feeding(feeding, manifest.folder, device))
    return report


def _is_installed(name: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=name)))


def decoding_shares(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of ours: the time of decoding whole images as a share of each other work's, nvJPEG's on a GPU."""
    rates = {entry["work"]: entry["images_per_second"]["median"] for entry in results if entry["contender"] == "ours"}
    if "decode" not in rates:
        return {}
    return {work: rate / rates["decode"] for work, rate in rates.items() if work not in ("read", "decode")}


def add_to(earlier: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The report with what an earlier one says of other works.

    Raises ValueError if that was measured under other circumstances.
    """
    for key in ("commit", "device", "versions", "data", "cores", "batch", "size", "rounds"):
        if earlier[key] != report[key]:
            raise ValueError(f"--add: {key} was {earlier[key]} and is {report[key]}; measure all works again")
    measured = {entry["work"] for entry in report["results"]}
    kept = [entry for entry in earlier["results"] if entry["work"] not in measured]
    results = sorted(kept + report["results"], key=lambda entry: WORKS.index(entry["work"]))
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
    add("--works", nargs="+", choices=WORKS, default=list(WORKS), metavar="WORK",
        help=f"of {', '.join(WORKS)} (default: all)")  # fmt: skip
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME",
        help=f"of {', '.join(CONTENDERS)} (default: all)")  # fmt: skip
    add("--data", type=user_path, metavar="FOLDER", help="packed by dataio.pack (default: photographs made for this)")
    add("--images", type=int, help=f"so many photographs are made (default {_IMAGES})")
    add("--batch", type=int, default=64, help="images (default 64)")
    add("--size", type=int, default=224, metavar="PIXELS", help="height and width of what is handed over (default 224)")
    add("--cores", type=int, help="worker processes, or threads, of each contender (default: all)")
    add("--rounds", type=int, default=5, help="epochs timed of each contender (default 5)")
    models = "whether ours feeds them (default: polaformerpp_b4 polaformerpp_b5 on a GPU, none on the CPU)"
    add("--models", nargs="*", choices=tuple(PRESETS), metavar="MODEL", help=models)
    add("--output", type=user_path, metavar="FILE.json", help="default: a new file below runs/benchmark")
    add("--add", action="store_true", help="keep what the output's file says of other works")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--show", type=user_path, metavar="FILE.json", help="print the table of this file and measure nothing")
    return parser.parse_args(argv)


def settle(arguments: argparse.Namespace) -> Race:
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
    task = Task("", Path(), arguments.batch, arguments.size, arguments.cores or available_cores(), device_type)
    models = _FED[device_type] if arguments.models is None else tuple(arguments.models)
    unique = (tuple(dict.fromkeys(names)) for names in (arguments.works, arguments.contenders))
    race = Race(task, *unique, arguments.rounds, models)
    for work in race.works:
        if not race.racing(work):
            able = ", ".join(name for name, works in CONTENDERS.items() if work in works)
            raise ValueError(f"none of --contenders does {work}; add one of {able}")
    require_tools(race.contenders)
    return race


@contextmanager
def images_to_load(arguments: argparse.Namespace, race: Race) -> Iterator[tuple[Manifest, str]]:
    """(what is loaded, its description); photographs that were made for it are gone after the block.

    Raises ValueError, FileNotFoundError or RuntimeError if there are none, or not enough.
    """
    count = arguments.images or _IMAGES
    least = 2 * race.task.batch  # or pipelines would be ahead of the end
    with tempfile.TemporaryDirectory(prefix="photographs-") as folder:
        if arguments.data:
            manifest, description = load_manifest(arguments.data), str(arguments.data)
            count = len(manifest)
        if count < least:
            raise ValueError(f"{count} images are fewer than 2 batches; give {least} or more, or a smaller --batch")
        if not arguments.data:
            print(f"making {count} photographs", file=sys.stderr)
            manifest, description = pack_photographs(Path(folder), count, race.task.cores), DESCRIPTION
        yield manifest, description


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.show:
            show(read_report(arguments.show, "data"), arguments.markdown)
            return 0
        race = settle(arguments)
        path = arguments.output or default_path("data")
        earlier = read_report(path, "data") if arguments.add else None
        path.parent.mkdir(parents=True, exist_ok=True)  # now, if it cannot be
        with images_to_load(arguments, race) as (manifest, description):
            report = measure(race, manifest, description)
        if earlier:
            report = add_to(earlier, report)
    except UnequalWork as error:
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

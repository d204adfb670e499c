"""The quickstart after its set-up: photographs → shards → training → evaluation → export → a summary.

Started by quickstart.sh. Each stage is a command of the project's own, printed as it starts, and is left out when
its result is there already. The summary, with the machine and what each stage took, is kept in the run's folder.
"""

from launch.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dataio.files import user_path
from dataio.index import MANIFEST_NAME
from dataio.remote import shown
from launch.benchmark.report import describe_run, write_report
from launch.config import load_config
from launch.distributed import find_free_port
from launch.monitor import METRICS_NAME

CONFIG = "configs/quickstart.yaml"
SUMMARY_NAME = "quickstart.json"
HELD_OUT_PERCENT = "10"
CPU_RANKS = 2
OWN_IMAGES = [  # the configuration's crops, mean and size are for 28×28 grey photographs
    "data.image_size=64",
    "data.crop_scale=[0.25, 1.0]",
    "data.crop_ratio=[0.75, 1.3333]",
    "data.eval_crop_fraction=0.875",
    "data.mean=[0.485, 0.456, 0.406]",
    "data.std=[0.229, 0.224, 0.225]",
    "optimizer.epochs=20",
    "optimizer.warmup_epochs=1",
]


class Stages:
    """Runs commands, and keeps how long each stage took: seconds, or None if its result was there already."""

    def __init__(self, console: Console, setup_seconds: float) -> None:
        self._console = console
        self.seconds: dict[str, float | None] = {"set-up": setup_seconds}

    def run(self, name: str, *commands: list[str], done: bool = False) -> None:
        """Runs a stage's commands unless it is `done`. Ends this process as the first that fails does."""
        self._console.rule(name)
        began = time.perf_counter()
        for command in () if done else commands:
            self._console.print(f"$ {shlex.join(command)}", style="dim", highlight=False, soft_wrap=True)
            status = subprocess.run(command).returncode
            if status:
                sys.exit(status)
        self.seconds[name] = None if done else time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    console = Console()
    stages = Stages(console, arguments.setup_seconds)
    own = arguments.data is not None
    photographs = arguments.data if own else Path("data/fashion-mnist")
    shards = Path("data/shards") / name_of(photographs if own else None)
    run = Path("runs") / (f"quickstart-{shards.name}" if own else "quickstart")

    if not own:
        stages.run("photographs", module("dataio.fashion_mnist", photographs), done=photographs.is_dir())
    packed = all((shards / part / MANIFEST_NAME).is_file() for part in ("train", "val"))
    stages.run("packing", *packing(photographs, shards), done=packed)
    places = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"output={run}"]
    use_ranks()
    began = time.time()
    stages.run("training", training([*places, *(OWN_IMAGES if own else []), *arguments.overrides]))
    stages.run("export", module("launch.export", run))
    exported = run / "export" / "model.safetensors"
    top1 = {}
    for kind, weights in (("weights", run), ("EMA", exported)):
        out = run / f"evaluation-{kind.lower()}.json"
        stages.run(f"evaluation of the {kind}", evaluation(weights, shards / "val", out))
        top1[kind] = json.loads(out.read_text())["top1"]
    summary = describe_run("quickstart", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    summary |= {
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),  # of a rank
        "cores": len(os.sched_getaffinity(0)),
        "gpus": torch.cuda.device_count(),
        "arguments": [shown(word) for word in arguments.overrides],
        "seconds": stages.seconds,
        "speed": training_speed(run, began),
        "top1": top1,
    }
    if summary["speed"]:  # otherwise the run was finished before, and its summary is there
        write_report(run / SUMMARY_NAME, summary)
    show(console, summary, {"run": run, "shards": shards, "exported EMA": exported})
    return 0


def name_of(own: Path | None) -> str:
    """What shards and runs are called: after the folder, and its place, since others may bear the same name."""
    if own is None:
        return "fashion-mnist"
    place = hashlib.sha256(os.fsencode(own.resolve())).hexdigest()[:8]
    return f"{own.resolve().name}-{place}"


def packing(photographs: Path, shards: Path) -> list[list[str]]:
    """Commands that pack a train and a val folder, or hold some images of a plain class folder out."""
    commands = []
    for part, held_out in (("train", "kept"), ("val", "held-out")):
        if (shards / part / MANIFEST_NAME).is_file():
            continue
        source, split = photographs / part, []
        if not (photographs / "train").is_dir():
            source, split = photographs, ["--hold-out", HELD_OUT_PERCENT, "--part", held_out]
        commands.append(module("dataio.pack", source, shards / part, "--shard-mib", "32", *split))
    return commands


def use_ranks() -> None:
    """Tells the commands to come how many CPU threads a rank has, and DeepSpeed that there is no GPU."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // CPU_RANKS)))


def training(overrides: list[str]) -> list[str]:
    """On every GPU (as many as the global batch can be dealt to), or else on two CPU ranks."""
    batch = load_config(CONFIG, overrides).optimizer.global_batch
    gpus = [count for count in range(1, torch.cuda.device_count() + 1) if batch % count == 0]
    ranks = gpus[-1] if gpus else CPU_RANKS
    # DeepSpeed's own port is always the same, which another run on this machine may have.
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(find_free_port())]
    return [*launcher, "launch/train.py", "--config", CONFIG, *overrides]


def evaluation(weights: Path, data: Path, out: Path) -> list[str]:
    ranks = torch.cuda.device_count() or CPU_RANKS
    flags = ["--weights", weights, "--kind", "model", "--data", data, "--batch", "250", "--out", out]
    return ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "launch.evaluate", *map(str, flags)]


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def training_speed(run: Path, began: float) -> dict[str, float] | None:
    """Of a run's training steps: seconds, images per second, and the share of time spent waiting for data.

    began: seconds since the epoch; earlier steps do not count. None if there are no others.
    """
    lines = [json.loads(line) for line in (run / METRICS_NAME).read_text().splitlines()]
    batch = load_config(run / "config.yaml", []).optimizer.global_batch
    images = seconds = waited = step = 0
    for line in lines:
        if "speed/images_per_second" not in line:
            continue
        computed, step = (line["step"] - step) * batch, line["step"]
        if line["time"] >= began:
            took = computed / line["speed/images_per_second"]
            images, seconds = images + computed, seconds + took
            waited += took * line["speed/waiting_for_data"]
    if not images:
        return None
    return {"seconds": seconds, "images_per_second": images / seconds, "waiting_for_data": waited / seconds}


def show(console: Console, summary: dict[str, Any], places: dict[str, Path]) -> None:
    """Prints a summary as a table."""
    table = Table("", "", title="PolaFormer++ quickstart", show_header=False)
    device, speed = summary["device"]["name"], summary["speed"]
    table.add_row(
        "machine", f"{summary['gpus']} × {device}" if summary["gpus"] else f"{device}; cores: {summary['cores']}"
    )
    for kind, top1 in summary["top1"].items():
        table.add_row(f"top-1 of the {kind}", f"{top1:.2f} %")
    known = {stage: seconds for stage, seconds in summary["seconds"].items() if seconds is not None}
    whole = sum(known.values())
    for stage in summary["seconds"]:
        table.add_row(
            stage, f"{known[stage]:.0f} s, {known[stage] / whole:.0%}" if stage in known else "was there already"
        )
        if stage == "training" and speed:
            table.add_row(
                "  of which steps",
                f"{speed['seconds']:.0f} s at {speed['images_per_second']:,.0f} images/s,"
                f" {speed['waiting_for_data']:.0%} waiting for data",
            )
    table.add_row("altogether", f"{whole:.0f} s")
    for name, place in places.items():
        table.add_row(name, str(place))
    table.add_row("TensorBoard", f".venv/bin/tensorboard --logdir {places['run']}")
    console.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash launch/quickstart.sh", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="FOLDER",
        help="images of your own: FOLDER/class/image, or FOLDER/train and FOLDER/val",
    )
    parser.add_argument("--setup-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"on top of {CONFIG}")
    arguments = parser.parse_args(argv)
    if arguments.data is not None and not arguments.data.is_dir():
        parser.error(f"--data {arguments.data} is no folder; name one that holds a folder of images for each class")
    return arguments


if __name__ == "__main__":
    sys.exit(main())

"""Run the quickstart: images → shards → training → evaluation → export of the better weights → summary.

quickstart.sh starts it after the set-up. Each stage is a command of this project, printed as it starts, and is skipped
if its result exists. The summary, with the machine and the time of each stage, is kept in the run's folder.
"""

from launch.interrupt import EXIT_INTERRUPTED, EXIT_RESUME, exit_on_interrupt, exit_process

if __name__ == "__main__":
    exit_on_interrupt()

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from dataio.files import printable, user_path
from dataio.manifest import MANIFEST_NAME, load_manifest
from dataio.pack.options import PackOptions, add_options
from dataio.urls import redact_url
from launch.benchmark.report import describe_run, write_report
from launch.checkpoint.layout import LATEST
from launch.config import load_config
from launch.custom_dataset import (
    DEFAULT_VAL_PERCENT,
    CustomDataset,
    image_overrides,
    inspect_dataset,
    schedule_overrides,
)
from launch.distributed import find_free_port
from launch.monitor import METRICS_NAME

CONFIG = "configs/quickstart.yaml"
SUMMARY_NAME = "quickstart.json"
FASHION_MNIST = Path("data/fashion-mnist")
SHARD_MIB = 32
CPU_RANKS = 2
KINDS = {"weights": "model", "EMA": "ema"}  # name in the summary → value of --kind


class Stages:
    """Runs stages of commands and keeps their times: seconds, or None if a stage's result existed already."""

    def __init__(self, console: Console, setup_seconds: float) -> None:
        self._console = console
        self.seconds: dict[str, float | None] = {"set-up": setup_seconds}

    def run(self, name: str, *commands: list[str], done: bool = False) -> None:
        """Run a stage's commands unless it is `done`. Exits with the status of the first command that fails."""
        self._console.rule(name)
        began = time.perf_counter()
        for command in () if done else commands:
            line = printable(f"$ {shlex.join(command)}")
            self._console.print(line, style="dim", highlight=False, soft_wrap=True)
            status = run_training(command) if name == "training" else subprocess.run(command).returncode
            if status:
                sys.exit(status)
        self.seconds[name] = None if done else time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart as the command line says; return the exit status."""
    arguments = parse(argv)
    try:
        run_stages(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_stages(arguments: argparse.Namespace) -> None:
    """Run all stages, from images to the summary. Raises ValueError or OSError if images or options cannot be used."""
    console = Console(markup=False, emoji=False)  # folder names may look like either
    stages = Stages(console, arguments.setup_seconds)
    dataset, options = prepare(arguments)
    name = "fashion-mnist" if dataset is None else dataset.name
    shards = Path("data/shards") / name
    run = Path("runs") / ("quickstart" if dataset is None else f"quickstart-{name}")
    if dataset is None:
        stages.run(
            "photographs", module_command("dataio.pack.fashion_mnist", FASHION_MNIST), done=FASHION_MNIST.is_dir()
        )
    for remark in dataset.remarks if dataset else ():
        console.print(printable(remark), soft_wrap=True)
    commands = pack_commands(dataset, shards, options)
    stages.run("packing", *commands, done=not commands)
    set_cpu_environment()
    began = time.time()
    overrides = arguments.overrides if dataset is None else tuned_overrides(shards, arguments.overrides)
    paths = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", f"output={run}"]
    stages.run("training", train_command([*paths, *overrides]))
    top1 = {}
    for label, kind in KINDS.items():
        out = run / f"evaluation-{kind}.json"
        known = read_top1(out, run / "checkpoints" / LATEST, shards / "val" / MANIFEST_NAME)
        command = evaluate_command(run, kind, shards / "val", out)
        stages.run(f"evaluation of the {label}", command, done=known is not None)
        top1[label] = json.loads(out.read_text())["top1"]
    better = max(top1, key=lambda label: (top1[label], label == "EMA"))
    stages.run("export", module_command("launch.export", run, "--kind", KINDS[better]))
    summary = {
        "arguments": [redact_url(word) for word in arguments.overrides],
        "seconds": stages.seconds,
        "speed": training_speed(run, began),
        "top1": top1,
        "exported": better,
    }
    summary = describe_machine() | summary
    if summary["speed"]:  # otherwise the run was finished before, and its summary exists
        write_report(run / SUMMARY_NAME, summary)
    exported = run / "export" / "model.safetensors"
    show(console, summary, {"run": run, "shards": shards, f"exported, the better: {better}": exported})


def run_training(command: list[str]) -> int:
    """Run a training command and return its status; Ctrl-C, SIGTERM and SIGHUP of this process are passed to its ranks.

    The launcher does not get them: DeepSpeed's ends before its ranks, kills those that save for more than 30 s, and
    loses their status. So it has a session of its own, which the terminal's Ctrl-C does not reach.
    """
    process: subprocess.Popen[bytes] | None = None
    stopped = False

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if process is None:
            sys.exit(EXIT_INTERRUPTED)
        ranks = find_ranks(process.pid)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        if not ranks and process.poll() is None:  # not started yet
            os.killpg(process.pid, signal.SIGTERM)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, forward)
    try:
        process = subprocess.Popen(command, start_new_session=True)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped and status in (EXIT_RESUME, 128 + signal.SIGTERM, -signal.SIGTERM):
        print("interrupted; the same command resumes", file=sys.stderr)
        return EXIT_RESUME
    return status


def find_ranks(launcher: int) -> list[psutil.Process]:
    """Return the ranks that a launcher, a process id, has started: the first of its descendants that have a RANK."""
    ranks, found = set(), []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(launcher).children(recursive=True):  # parents come before their children
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if "RANK" in process.environ():
                    found += [] if process.ppid() in ranks else [process]
                    ranks.add(process.pid)
    return found


def describe_machine() -> dict[str, Any]:
    """Return the summary's entries about the machine."""
    return {
        **describe_run("quickstart", torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),  # per rank
        "cores": len(os.sched_getaffinity(0)),
        "gpus": torch.cuda.device_count(),
    }


def prepare(arguments: argparse.Namespace) -> tuple[CustomDataset | None, PackOptions]:
    """Return the user's data set, None without --data, and the packing options. Raises ValueError for unusable ones."""
    fields = {name: value for name, value in vars(arguments).items() if name in PackOptions.__dataclass_fields__}
    val_percent = fields.pop("val_percent")
    options = PackOptions(**fields)
    if arguments.data is None:
        if val_percent is not None or options != PackOptions(shard_mib=SHARD_MIB):
            raise ValueError("options of packing are for images of your own; name them with --data, or leave these out")
        load_config(CONFIG, arguments.overrides)
        return None, options
    load_config(CONFIG, ["optimizer.warmup_epochs=0", *arguments.overrides])
    dataset = inspect_dataset(arguments.data, options, val_percent)
    if dataset.val is None:
        options = replace(
            options, val_percent=DEFAULT_VAL_PERCENT if val_percent is None else val_percent, split="train"
        )
    return dataset, options


def pack_commands(dataset: CustomDataset | None, shards: Path, options: PackOptions) -> list[list[str]]:
    """Return the commands that pack training and validation images, without those whose shards exist."""
    sources = {"train": FASHION_MNIST / "train", "val": FASHION_MNIST / "val"}
    chosen = {"train": options, "val": options}
    if dataset is not None and dataset.val is not None:  # it may lack classes, and takes their labels from training
        sources = {"train": dataset.train, "val": dataset.val}
        names = shards / "classes.txt"
        shards.mkdir(parents=True, exist_ok=True)
        names.write_text("".join(f"{name}\n" for name in dataset.classes), "utf-8")
        chosen["val"] = replace(options, classes=names)
    elif dataset is not None:
        sources = {"train": dataset.train, "val": dataset.train}
        chosen["val"] = replace(options, split="val")
    return [
        module_command("dataio.pack", sources[part].absolute(), shards / part, *chosen[part].flags())
        for part in ("train", "val")
        if not (shards / part / MANIFEST_NAME).is_file()
    ]


def tuned_overrides(shards: Path, overrides: list[str]) -> list[str]:
    """Return the settings that suit the packed images, then the user's overrides, which take precedence."""
    images = load_manifest(shards / "train")
    first = image_overrides(images)
    chosen = load_config(CONFIG, [*first, *overrides]).optimizer
    return [*first, *schedule_overrides(len(images), chosen.epochs, chosen.global_batch_size), *overrides]


def set_cpu_environment() -> None:
    """Set the environment of later commands on a machine without a GPU: CPU threads per rank, DeepSpeed's device."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // CPU_RANKS)))


def train_command(overrides: list[str]) -> list[str]:
    """Return the training command: on as many GPUs as divide the global batch, else on two CPU ranks."""
    batch = load_config(CONFIG, overrides).optimizer.global_batch_size
    gpus = [count for count in range(1, torch.cuda.device_count() + 1) if batch % count == 0]
    world_size = gpus[-1] if gpus else CPU_RANKS
    # DeepSpeed's default port is fixed, and another run on this machine may use it.
    launcher = ["deepspeed", "--num_accelerators", str(world_size), "--master_port", str(find_free_port())]
    return [*launcher, "launch/train.py", "--config", CONFIG, *overrides]


def evaluate_command(run: Path, kind: str, data: Path, out: Path) -> list[str]:
    """Return the command that evaluates a run's weights on all GPUs, else on two CPU ranks."""
    world_size = torch.cuda.device_count() or CPU_RANKS
    flags = ["--weights", run, "--kind", kind, "--data", data, "--batch-size", "250", "--out", out]
    return ["torchrun", "--standalone", "--nproc-per-node", str(world_size), "-m", "launch.evaluate", *map(str, flags)]


def read_top1(report: Path, *sources: Path) -> float | None:
    """Return the top-1 in an evaluation's report; None if it is absent, incomplete or older than one of its sources."""
    with suppress(OSError, ValueError):
        if all(source.stat().st_mtime_ns < report.stat().st_mtime_ns for source in sources):
            return float(json.loads(report.read_text())["top1"])
    return None


def module_command(name: str, *arguments: object) -> list[str]:
    """Return the command that runs a module with this Python."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def training_speed(run: Path, began: float) -> dict[str, float] | None:
    """Return the seconds, images per second and share of time waiting for data of a run's training steps.

    began: Unix time; steps before it do not count. None if there are no others.
    """
    lines = [json.loads(line) for line in (run / METRICS_NAME).read_text().splitlines()]
    batch = load_config(run / "config.yaml", []).optimizer.global_batch_size
    images = step = 0
    seconds = waited = 0.0
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


def show(console: Console, summary: dict[str, Any], results: dict[str, Path]) -> None:
    """Print a summary as a table, followed by the paths of the results, by name."""
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
        table.add_row(stage, f"{known[stage]:.0f} s, {known[stage] / whole:.0%}" if stage in known else "already done")
        if stage == "training" and speed:
            table.add_row(
                "  of which steps",
                f"{speed['seconds']:.0f} s at {speed['images_per_second']:,.0f} images/s,"
                f" {speed['waiting_for_data']:.0%} waiting for data",
            )
    table.add_row("total", f"{whole:.0f} s")
    for name, path in results.items():
        table.add_row(name, str(path))
    table.add_row("TensorBoard", f".venv/bin/tensorboard --logdir {shlex.quote(str(results['run']))}")
    console.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments, with paths relative to where the command was typed."""
    parser = argparse.ArgumentParser(
        prog="bash launch/quickstart.sh", description=(__doc__ or "").partition("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="FOLDER",
        help="images of your own, a folder, zip or tar: FOLDER/class/image, or the same in FOLDER/train and FOLDER/val"
        " (also valid, validation, test)",
    )
    parser.add_argument("--setup-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"on top of {CONFIG}")
    add_options(parser.add_argument_group("packing, with --data"))
    parser.set_defaults(shard_mib=SHARD_MIB)
    parser.add_argument("--called-from", type=user_path, default=Path(), help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    for name in ("data", "classes"):
        if getattr(arguments, name) is not None:
            setattr(arguments, name, arguments.called_from / getattr(arguments, name))
    return arguments


if __name__ == "__main__":
    exit_process(main())

"""Times of saving and loading a checkpoint beside `cp`, and of training steps while one is written.

python -m launch.benchmark checkpoint
python -m launch.benchmark checkpoint --model polaformerpp_b0 --resolution 224 --batch 16
python -m launch.benchmark checkpoint --show launch/benchmark/results/checkpoint-cpu.json

One rank under ZeRO-1. "cp" copies the checkpoint's folder and waits until the copy is on disk. "save" is the same for
a new checkpoint, "copy" the part of it for which a step waits. "load" is what a resumed run does: it hashes all files
of the newest checkpoint, then reads them into the engine. All that is read lies in the page cache. Steps with and
without a checkpoint being written alternate.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.cli import USAGE_ERRORS, AddOption, Command, Report, require_positive, resolve_device
from launch.benchmark.measure import quantiles, synchronize
from launch.benchmark.report import describe_run, format_quantiles, heading
from launch.benchmark.sample_images import pack_images
from launch.checkpoint import layout
from launch.checkpoint.layout import RunState
from launch.checkpoint.tensors import load
from launch.checkpoint.writer import CheckpointWriter, Retention
from launch.config import Config, parse_config
from launch.distributed import RankInfo, destroy_process_group, init_distributed
from launch.ema import ModelEma
from launch.engine import Engine, build_model, start_engine
from launch.plan import Plan, make_plan
from polaformer import PRESETS


def measure(model: str, resolution: int, batch: int, rounds: int, device: torch.device, _path: Path | None) -> Report:
    """Measure everything and return the report."""
    report = describe_run("checkpoint", device) | {"model": model, "resolution": resolution, "batch": batch}
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=".") as folder:
        data = str(pack_images(Path(folder), 16, cores=1).folder)
        config = parse_config(
            {
                "output": f"{folder}/run",
                "model": {"name": model},
                "data": {"train": data, "val": data, "image_size": resolution},
                "optimizer": {"global_batch_size": batch},
                "engine": {"precision": "fp32" if device.type == "cpu" else "bf16"},
            }
        )
        init_distributed(RankInfo(0, 0, 1, "python"), device.type, timedelta(minutes=10))
        try:
            plan = make_plan(config, 0, 1)
            report["seconds"] = _measure_rounds(config, plan, rounds, device, report)
        finally:
            destroy_process_group()
    seconds = report["seconds"]
    for name, over, under in (("save", "save", "cp"), ("load", "load", "cp"), ("step", "step while saving", "step")):
        ratios = [one / other for one, other in zip(seconds[over], seconds[under], strict=True)]
        report[f"{name}_ratio"] = asdict(quantiles(ratios))
    report["seconds"] = {name: asdict(quantiles(values)) for name, values in seconds.items()}
    return report


def _measure_rounds(
    config: Config, plan: Plan, rounds: int, device: torch.device, report: Report
) -> dict[str, list[float]]:
    """Return the seconds of each part in each round; adds the size of a checkpoint to the report."""
    network = build_model(config, plan, device)
    ema = ModelEma(network)
    engine = start_engine(config, plan, network)
    size = config.data.image_size
    images = torch.randn(config.optimizer.global_batch_size, 3, size, size, device=device)
    step = partial(_step, engine, images)
    step(), step()  # the first allocates the optimizer's state
    folder = config.output / "checkpoints"
    folder.parent.mkdir()
    loader: Any = {"seed": 0, "samples_seen": 0, "manifest_hash": "", "global_batch": 1, "order": "full"}
    state = RunState(0, config.model.name, plan.num_classes, 1, 1, loader, 0.0, plan.norm_group)
    writer = CheckpointWriter(folder, engine, ema, state, {}, Retention(keep=2))
    found: dict[str, list[float]] = {name: [] for name in ("cp", "copy", "save", "load", "step", "step while saving")}
    for number in range(rounds + 1):  # the first warms up
        print(f"round {number} of {rounds}", file=sys.stderr)
        began = time.perf_counter()
        writer.save(replace(state, step=2 * number))
        copied = time.perf_counter() - began
        writer.wait()
        saved = time.perf_counter() - began
        newest = layout.list_checkpoints(folder)[-1]
        report["bytes"] = sum(path.stat().st_size for path in newest.iterdir())
        round_seconds = {
            "cp": _seconds(partial(_copy, newest, folder.parent / "copy"), device),
            "copy": copied,
            "save": saved,
            "load": _seconds(partial(_resume, folder, engine, ema), device),
            "step": _seconds(step, device),
        }
        writer.save(replace(state, step=2 * number + 1))
        round_seconds["step while saving"] = _seconds(step, device)
        writer.wait()
        for name, value in round_seconds.items() if number else ():
            found[name].append(value)
    writer.close()
    return found


def _step(engine: Engine, images: torch.Tensor) -> None:
    engine.backward(engine(images).float().square().mean())
    engine.step()


def _copy(source: Path, target: Path) -> None:
    """Copy a folder as a user would, and wait until it is on disk."""
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", *target.iterdir()], check=True)
    subprocess.run(["rm", "-r", target], check=True)


def _resume(folder: Path, engine: Engine, ema: ModelEma) -> None:
    newest, _ = layout.find_newest(folder)
    assert newest is not None
    load(newest, engine, ema)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - began


def show(report: Report, _markdown: bool) -> None:
    """Print a report."""
    seconds: Callable[[str], str] = lambda name: format_quantiles(report["seconds"][name], "{:.3f} s".format)  # noqa: E731
    ratio: Callable[[str], str] = lambda name: format_quantiles(report[f"{name}_ratio"], "{:.2f}".format)  # noqa: E731
    print(
        f"{heading(report)}\n"
        f"a checkpoint of {report['model']}: {report['bytes'] / 2**20:,.0f} MiB; medians (quantiles 0.2–0.8)\n"
        f"cp: {seconds('cp')}\n"
        f"save: {seconds('save')}, {ratio('save')} of cp; a step waits for {seconds('copy')} of it\n"
        f"load: {seconds('load')}, {ratio('load')} of cp\n"
        f"step of {report['batch']} images of {report['resolution']}²: {seconds('step')};"
        f" while a checkpoint is written: {seconds('step while saving')}, {ratio('step')} of it"
    )


def add_options(add: AddOption) -> None:
    """Declare the options."""
    add("--model", choices=tuple(PRESETS), default="polaformerpp_b5", help="default polaformerpp_b5")
    add("--resolution", type=int, default=64, help="of the steps' images, in pixels (default 64)")
    add("--batch", type=int, default=8, help="images of a step (default 8)")
    add("--rounds", type=int, default=5, help="checkpoints of each kind (default 5)")


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError or RuntimeError."""
    require_positive(arguments, "resolution", "batch", "rounds")
    device = resolve_device(arguments.device)
    return partial(measure, arguments.model, arguments.resolution, arguments.batch, arguments.rounds, device)


COMMAND = Command("checkpoint", __doc__, add_options, resolve, show, failures=USAGE_ERRORS)
parse, main = COMMAND.parse, COMMAND.main

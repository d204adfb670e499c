"""Trains PolaFormer++: the story of a run, top to bottom.

    deepspeed launch/train.py --config configs/X.yaml [key=value …]
    torchrun --standalone --nproc-per-node 8 launch/train.py --config configs/X.yaml [key=value …]
    srun python launch/train.py --config configs/X.yaml [key=value …]

Started again with the same command, a run goes on from its newest whole checkpoint, in the middle of an epoch too.
"""

import os
import sys

from launch.interrupt import exit_on_interrupt

# The imports below take 4 s, and half a minute on a slow machine: nobody should wait for the first line that long.
# Which rank this is, `placement` knows better; it is not imported yet.
if __name__ == "__main__":
    exit_on_interrupt("; the same command goes on from the last checkpoint, if there is one")
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print("launch/train.py: loading PyTorch, timm and DALI", flush=True)

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.loss import SoftTargetCrossEntropy

from dataio.augment.mixing import Augment
from dataio.files import replace_file, user_path
from dataio.loader import EvalLoader, TrainLoader
from dataio.urls import shown
from launch import checkpoint
from launch.averages import MovingAverage, average_buffers
from launch.card import make_card
from launch.checkpoint import RunState
from launch.config import Config, EngineSection, dump_config, load_config
from launch.distributed import (
    Refusal,
    count_ranks_here,
    default_device_type,
    end_at_once,
    from_rank_zero,
    placement,
    start,
    stop,
    together,
)
from launch.engine import build_model, check_engine, plain_model, seed_step, set_lr, start_engine
from launch.evaluate import evaluate
from launch.flops import measure_rates
from launch.monitor import Monitor
from launch.plan import Plan, describe, make_plan
from launch.run_lock import locked
from launch.schedule import ema_decay_at, ends_interval, lr_at

REFUSED = 2  # exit status: the run was given something that cannot work; nothing was lost


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        place = placement(os.environ)
    except ValueError as error:  # of this rank alone: there is no group yet
        return refuse(error, rank=0)
    rank, device_type, fault = place.rank, default_device_type(), None
    try:
        config = load_config(arguments.config, arguments.overrides)
        timeout = config.engine.timeout_minutes
    except (ValueError, OSError) as error:
        if place.ranks == 1:
            return refuse(error, rank)
        # Launchers end all ranks as soon as one has ended: they meet, so that rank 0 has said why by then.
        fault, timeout = error, EngineSection().timeout_minutes
    else:
        announce(f"starting {config.model.name}, world size {place.ranks} ({device_type}): loading DeepSpeed", rank)
    try:
        device = start(place, device_type, timedelta(minutes=timeout))
    except (ValueError, RuntimeError) as error:  # of this rank alone, too
        return refuse(error, rank=0)
    try:
        with together():
            if fault is not None:
                raise fault
        ranks_here = count_ranks_here()
        announce(f"opening {shown(config.data.train)} and {shown(config.data.val)}", rank)
        with together():
            plan = make_plan(config, rank, place.ranks, ranks_here)
            check_engine(config, plan)
            augment = Augment(plan.mixing, plan.classes, config.seed, plan.batches.batch, device)
        with locked(config.output, partial(announce, rank=rank)) as check_lock:
            run = prepare(config, plan, device, check_lock)
            with contextlib.closing(run.monitor), contextlib.closing(run.loader):
                train(run, augment)
    except Refusal as refusal:
        status = refuse(refusal, rank)
        torch.distributed.barrier()
        stop()
        return status
    except Exception:
        end_at_once()
    stop()
    return 0


def train(run: "Run", augment: Augment) -> None:
    """From where the run stands to its last step."""
    config, plan, engine, monitor = run.config, run.plan, run.engine, run.monitor
    loss_of = SoftTargetCrossEntropy()
    for step in range(run.state.step, plan.steps):
        seed_step(config.seed, step, plan.batches.rank)
        lr = lr_at(step, plan.schedule)
        set_lr(engine, lr)
        for _ in range(config.optimizer.accumulation):
            with monitor.waiting():
                batch = next(run.loader)
            for broken in batch.replaced:
                monitor.warn(f"sample {broken.by} stands for {plan.train.describe(broken.sample)}: {broken.reason}")
            images, targets = augment(batch)  # (B, 3, S, S); (B, K), rows sum to 1
            loss = loss_of(engine(images).float(), targets)
            engine.backward(loss)
            engine.step()  # updates at the boundary only
            monitor.add(loss.detach(), len(images))  # stays on the device
        average_buffers(engine.module)
        run.average.update(engine, ema_decay_at(step, config.optimizer))

        if step == 0:
            monitor.images(images, config.data.mean, config.data.std)
        saving = is_due(step, config.checkpoint.every_epochs, plan)
        # Refuses to go on, and so to save, if the loss or too much data is lost; which is counted anew in each epoch.
        if saving or monitor.due(step) or is_due(step, 1, plan):
            norm = engine.get_global_grad_norm()
            monitor.write(step, lr, norm, run.loader.broken)  # our only wait for the device
        with monitor.paused():
            top1 = run.evaluate(step) if is_due(step, config.log.eval_every_epochs, plan) else 0.0
            if saving:
                run.save(step, top1)
    monitor.say(f"trained for {plan.steps} steps; {config.output} holds the run")


@dataclass
class Run:
    """What a run is made of. Every rank has one and calls every method; rank 0's writes."""

    config: Config
    plan: Plan
    engine: Any  # DeepSpeed's
    average: MovingAverage
    loader: TrainLoader
    monitor: Monitor
    state: RunState  # as last saved, or at the beginning
    check_lock: Callable[[], None]  # raises RuntimeError if another run writes to the folder

    def evaluate(self, step: int) -> float:
        """Scores weights and EMA on all validation images after `step`, counted from 0; the better top-1, percent."""
        plan, batches, average = self.plan, self.plan.batches, self.average.module
        device = next(average.parameters()).device
        rank, ranks = batches.rank, batches.ranks
        loader = EvalLoader(plan.val, plan.images, batches.batch, rank, ranks, device, plan.val_label_map)
        models = plain_model(self.engine, average), average
        of_weights, of_ema = evaluate(models, loader, plan.classes, self.config.engine.precision)
        scores = {f"eval/{name}": value for name, value in of_weights.items()}
        scores |= {f"eval_ema/{name}": value for name, value in of_ema.items()}
        self.monitor.scalars(step + 1, scores)
        epochs = (step + 1) * batches.global_batch / plan.samples_per_epoch
        self.monitor.say(
            f"epoch {epochs:.2f}  top-1 {scores['eval/top1']:.2f} % (EMA {scores['eval_ema/top1']:.2f} %)"
            f"  top-5 {scores['eval/top5']:.2f} % (EMA {scores['eval_ema/top5']:.2f} %)"
        )
        if step + 1 == plan.steps:
            self.monitor.say(which_is_better(scores["eval/top1"], scores["eval_ema/top1"]))
        return max(scores["eval/top1"], scores["eval_ema/top1"])

    def save(self, step: int, top1: float) -> None:
        """Writes a checkpoint after `step`, counted from 0; `best` names it if none was evaluated better.

        top1: percent, of these weights; 0 if they were not evaluated.
        """
        best_top1 = max(top1, self.state.best_top1)
        is_best = top1 > self.state.best_top1
        self.state = replace(self.state, step=step + 1, loader=self.loader.state(), best_top1=best_top1)
        card = make_card(self.config.model.name, self.plan.class_names, self.plan.images)
        folder = checkpoints_of(self.config)
        saved = checkpoint.save(folder, self.engine, self.average, self.state, card.metadata(), self.check_lock)
        checkpoint.retain(saved, is_best, self.config.checkpoint.keep)


def prepare(config: Config, plan: Plan, device: torch.device, check_lock: Callable[[], None]) -> Run:
    """Everything that a run is made of, on its device, as the newest whole checkpoint left it if there is one.

    Raises Refusal on every rank if checkpoint, weights or kernels are not what the configuration asks for, or ranks
    have different data.
    """
    hashes = from_rank_zero((plan.train.hash, plan.val.hash))
    with together():
        require_same_data(plan, hashes)
    loader = TrainLoader(plan.train, plan.images, plan.batches, device)
    beginning = RunState(
        step=0,
        model=config.model.name,
        classes=plan.classes,
        ranks=plan.batches.ranks,
        zero_stage=config.engine.zero_stage,
        loader=loader.state(),
        best_top1=0.0,
    )
    found, faults = find_checkpoint(checkpoints_of(config), plan.batches.rank)
    announce(f"building {config.model.name} and its engine", plan.batches.rank)
    with together():
        state = beginning if found is None else checkpoint.read_state(found)
        state.check_continues(beginning)
        loader.restore(state.loader)
        model = build_model(config, plan, device)
    average = MovingAverage(model)
    with together():
        if plan.batches.rank == 0 and state.step < plan.steps:
            checkpoint.require_room(config.output, average)
    engine = start_engine(config, plan, model)
    if found is not None:
        checkpoint.load(found, engine, average)
    rates = measure_rates(config, plan, device)
    with together():
        check_lock()
        every, allowed = config.log.every_steps, config.data.max_broken
        monitor = Monitor(config.output, state.step, plan.steps, every, rates, allowed)
        introduce(config, plan, monitor, [*faults, *([f"goes on from {found}"] if found else [])])
    return Run(config, plan, engine, average, loader, monitor, state, check_lock)


def find_checkpoint(folder: Path, rank: int) -> tuple[Path | None, list[str]]:
    """The newest whole one, on all ranks the one that rank 0 sees, and what is wrong with newer ones.

    Raises Refusal on every rank if none is whole, or the folder is not one for a run to go on with.
    """
    found = None, []
    with together():
        if rank == 0:
            checkpoint.check_pointers(folder)
            found = checkpoint.newest(folder)
    return from_rank_zero(found)


def require_same_data(plan: Plan, hashes: tuple[str, str]) -> None:
    """Raises ValueError if this rank's shards are others than rank 0's, whose manifests have these hashes."""
    for manifest, expected in zip((plan.train, plan.val), hashes, strict=True):
        if manifest.hash != expected:
            raise ValueError(
                f"{manifest.place} holds other data here (manifest {manifest.hash[:12]}) than on rank 0"
                f" ({expected[:12]}); copy that to every machine"
            )


def introduce(config: Config, plan: Plan, monitor: Monitor, news: list[str]) -> None:
    """Prints the effective configuration and what it comes to, and keeps it with the run; names what changed."""
    text = shown(dump_config(config))
    path = config.output / "config.yaml"
    if plan.batches.rank == 0:
        if path.is_file():
            news = [*news, *changes_since(path, text)]
        replace_file(path, text.encode())
    monitor.text("configuration", text)
    for line in (text, *(f"{name}: {value}" for name, value in describe(config, plan).items()), *news):
        monitor.say(line)


def changes_since(path: Path, text: str) -> list[str]:
    """What is another configuration now than in the file of the last start, which people may have edited."""
    try:
        before = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        before = " ".join(str(error).split())
    if isinstance(before, dict):
        return changes(before, yaml.safe_load(text))
    return [f"{path} held no configuration ({before}); written anew, what changed since the last start is unknown"]


def changes(before: dict[str, Any], now: dict[str, Any], section: str = "") -> list[str]:
    """A line for each key whose value is another than at the run's last start."""
    lines = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += changes(old, new, f"{section}{key}.")
        elif old != new:
            lines.append(f"changed since the last start: {section}{key}: {old} → {new}")
    return lines


def which_is_better(weights: float, ema: float) -> str:
    """Advice on what to evaluate and export, by their top-1 in percent."""
    if ema >= weights:
        return f"the EMA is as good or better ({ema:.2f} % against {weights:.2f} %): launch.evaluate and export take it"
    return (
        f"the weights are better than the EMA ({weights:.2f} % against {ema:.2f} %):"
        " launch.evaluate and launch.export take them with --kind model"
    )


def checkpoints_of(config: Config) -> Path:
    return config.output / "checkpoints"


def is_due(step: int, every_epochs: float, plan: Plan) -> bool:
    """Whether something that happens every so many epochs, and at the end, happens after `step`, counted from 0."""
    last = step + 1 == plan.steps
    return last or ends_interval(step, plan.batches.global_batch, every_epochs * plan.samples_per_epoch)


def announce(line: str, rank: int) -> None:
    """Says on rank 0 what is being started, before there is a monitor."""
    if rank == 0:
        print(line, flush=True)


def refuse(error: Exception, rank: int) -> int:
    """Every rank ends alike; rank 0 says why."""
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return REFUSED


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="launch/train.py",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", type=user_path, required=True, help="a YAML file, for example configs/polaformerpp_b4.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.epochs=10")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

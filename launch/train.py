"""Train PolaFormer++: a run from start to end, top to bottom.

    deepspeed launch/train.py --config configs/X.yaml [key=value …]
    torchrun --standalone --nproc-per-node 8 launch/train.py --config configs/X.yaml [key=value …]
    srun python launch/train.py --config configs/X.yaml [key=value …]

The same command resumes a run from its newest intact checkpoint, in the middle of an epoch too. SIGINT, SIGTERM,
SIGUSR1 and SIGUSR2 stop it with a checkpoint. Exit status: 0 done, 2 refused, 75 stopped (start it again), 1 failed.
"""

import os

from launch.interrupt import EXIT_FATAL, EXIT_RESUME, StopSignals, exit_process

# The imports below take 4 s, and half a minute on a slow machine; the first line appears before them. `read_rank_info`
# is not imported yet, so the rank is read from the environment.
if __name__ == "__main__":
    stop_signals = StopSignals().listen()
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
from torch import Tensor

from dataio.augment.batch_augment import BatchAugment
from dataio.files import atomic_write, user_path
from dataio.loader import EvalLoader, TrainLoader
from dataio.urls import redact_url
from launch.batchnorm import sync_batchnorm_buffers
from launch.checkpoint import layout
from launch.checkpoint.layout import RunState
from launch.checkpoint.tensors import load
from launch.checkpoint.writer import CheckpointWriter, Retention, check_disk_space
from launch.command_line import make_parser
from launch.config import Config, EngineSection, dump_config, load_config, translate_renamed_keys
from launch.distributed import (
    RankInfo,
    RunError,
    broadcast_object,
    default_device_type,
    failed_rank_check,
    get_local_world_size,
    print_rank_0,
    raise_on_all_ranks,
    run_distributed,
)
from launch.drop_path import draw_drop_paths
from launch.ema import ModelEma
from launch.engine import (
    Engine,
    build_model,
    check_engine,
    set_lr,
    start_engine,
    unwrapped_model,
)
from launch.evaluate import evaluate
from launch.flops import measure_mfu_constants
from launch.model_metadata import make_model_metadata
from launch.monitor import Monitor
from launch.plan import Plan, describe, keep_norm_group, make_plan
from launch.run_lock import locked
from launch.schedule import ema_decay_at, lr_at
from launch.stop import StopAgreement, Stopped


def main(argv: list[str] | None = None, signals: StopSignals | None = None) -> int:
    """Train as the command line says; return the exit status. signals: those that stop the run, by default none."""
    arguments, device_type, signals = parse(argv), default_device_type(), signals or StopSignals()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except (ValueError, OSError) as error:
        timeout = timedelta(minutes=EngineSection().timeout_minutes)
        return run_distributed(lambda rank_info, device: 0, device_type, timeout, fault=error, settled=signals.ignore)
    timeout = timedelta(minutes=config.engine.timeout_minutes)
    body = partial(start, config, signals)
    return run_distributed(body, device_type, timeout, title=config.model.name, settled=signals.ignore)


def start(config: Config, signals: StopSignals, rank_info: RankInfo, device: torch.device) -> int:
    """Start or resume a run on all ranks, train to its last step or until it is stopped; return the exit status.

    Raises RunError on every rank if configuration, data, checkpoint and machine do not fit each other, or training
    fails.
    """
    signals.defer(failed_rank_check())
    stop = StopAgreement(signals, device, config.checkpoint.stop_after_minutes)
    rank, local_world_size = rank_info.rank, get_local_world_size()
    print_rank_0(f"opening {redact_url(config.data.train)} and {redact_url(config.data.val)}", rank)
    try:
        stop.check()
        with raise_on_all_ranks():
            plan = make_plan(config, rank, rank_info.world_size, local_world_size)
            check_engine(config, plan)
            augment = BatchAugment(
                plan.batch_augment, plan.num_classes, config.seed, plan.loader_options.micro_batch_size, device
            )
        stop.check()
        with locked(config.output, partial(print_rank_0, rank=rank)) as check_lock:
            run = prepare(config, plan, device, check_lock, stop)
            with contextlib.closing(run.monitor), contextlib.closing(run.loader), contextlib.closing(run.writer):
                return train(run, augment)
    except Stopped as stopped:
        print_rank_0(f"stopped by {stopped} before the first step; the same command starts it again", rank)
        return EXIT_RESUME


def train(run: "Run", augment: BatchAugment) -> int:
    """Train from the run's current step to its last one, or until all ranks agree to stop; return the exit status.

    Raises Stopped before the first step, RunError with status EXIT_FATAL after it, on every rank.
    """
    run.stop.check()
    try:
        reason = train_steps(run, augment)
        run.writer.wait()
        return run.finish(reason)
    except RunError as error:
        error.status = EXIT_FATAL
        raise


def train_steps(run: "Run", augment: BatchAugment) -> str | None:
    """Make the run's remaining steps, with their evaluations and checkpoints; return why they were stopped, if so."""
    config, plan, engine, monitor = run.config, run.plan, run.engine, run.monitor
    loss_fn = SoftTargetCrossEntropy()
    with monitor.paused():
        if run.writer.saved.evaluation_due and (reason := run.evaluate_resumed()):
            return reason
    for step in range(run.first_step, plan.steps):
        lr = lr_at(step, plan.schedule)
        set_lr(engine, lr)
        for _ in range(config.optimizer.gradient_accumulation_steps):
            with monitor.data_wait():
                batch = next(run.loader)
            for bad in batch.substituted:
                monitor.warn(f"sample {bad.substitute} replaces {plan.train.describe(bad.sample)}: {bad.reason}")
            draw_drop_paths(engine.module, config.seed, batch.position)
            images, targets = augment(batch)  # (B, 3, S, S); (B, num_classes), rows sum to 1
            loss = loss_fn(engine(images).float(), targets)
            engine.backward(loss)
            engine.step()  # updates the weights in the last micro-step only
            monitor.add(loss.detach(), len(images))  # stays on the device
        agreed = run.stop.exchange(sync_batchnorm_buffers(engine.module, run.flags()))
        run.ema.update(engine, ema_decay_at(step, config.optimizer))

        if step == 0:
            monitor.images(images, config.data.mean, config.data.std)
        if agreed.save_failed:
            run.writer.wait()  # raises on every rank
        run.report_failed_saves(step)
        kept = plan.ends_epochs(step, config.checkpoint.keep_every_epochs)
        # Read one step late, so in the step after a save the flag is still that of the step before.
        by_clock = agreed.save_due and step > run.writer.begun_step
        saving = plan.is_due(step, config.checkpoint.every_epochs) or kept or by_clock or agreed.reason is not None
        # `write` raises, before a save, if the loss is not finite or an epoch has too many bad samples. Their
        # count restarts in each epoch, so the last step of an epoch writes too.
        if saving or monitor.due(step) or plan.is_due(step, 1):
            norm = engine.get_global_grad_norm()
            monitor.write(step, lr, norm, run.loader.bad_samples)  # the loop's only synchronisation with the device
        with monitor.paused():
            if reason := run.evaluate_and_save(step, saving, agreed.reason):
                return reason
    return None


@dataclass
class Run:
    """The parts of a run. Every rank has one and calls every method; rank 0 writes."""

    config: Config
    plan: Plan
    engine: Engine
    ema: ModelEma
    loader: TrainLoader
    monitor: Monitor
    writer: CheckpointWriter
    stop: StopAgreement
    first_step: int
    failed_saves: int = 0  # on rank 0

    def flags(self) -> Tensor:
        """Return what this rank tells the others in a step, for `StopAgreement.exchange`."""
        every_minutes = self.config.checkpoint.every_minutes
        is_save_due = every_minutes is not None and self.writer.seconds_since_save >= 60 * every_minutes
        return self.stop.flags(is_save_due, self.writer.failed)

    def evaluate_and_save(self, step: int, saving: bool, reason: str | None) -> str | None:
        """Evaluate after `step`, counted from 0, if that is due, and begin a checkpoint if `saving`.

        reason: why the run stops, None if it does not: then the evaluation is left to the resumed run. A stop during
        the evaluation is the same. Returns the reason.
        """
        evaluating, top1 = self.plan.is_due(step, self.config.log.eval_every_epochs), 0.0
        if evaluating and reason is None:
            try:
                top1, evaluating = self.evaluate(step), False
            except Stopped as stopped:
                reason = str(stopped)
        if saving or reason:
            state = replace(
                self.writer.saved,
                step=step + 1,
                epoch=self.plan.epochs(step + 1),
                loader=self.loader.state(),
                evaluation_due=evaluating,
            )
            self.writer.save(state, top1)
        return reason

    def evaluate_resumed(self) -> str | None:
        """Evaluate the checkpoint that the run resumes from, where it was stopped before that, and save it again.

        Returns the reason if this evaluation is stopped as well, and remains due.
        """
        try:
            top1 = self.evaluate(self.first_step - 1)
        except Stopped as stopped:
            return str(stopped)
        self.writer.save(replace(self.writer.saved, evaluation_due=False), top1)
        return None

    def report_failed_saves(self, step: int) -> None:
        """Warn, after `step`, of checkpoints that could not be written, or not with all that belongs to them."""
        while self.writer.warnings:
            self.failed_saves += 1
            line = self.writer.warnings.pop(0)
            self.monitor.warn(f"{line}; training goes on")
            self.monitor.text("checkpoint warning", line)
            self.monitor.scalars(step + 1, {"checkpoint/failed": self.failed_saves})

    def finish(self, reason: str | None) -> int:
        """Say how the run ended, and return the exit status. reason: why it was stopped, if it was.

        Raises RunError on every rank if the last checkpoint of a finished run could not be written.
        """
        steps, saved = self.plan.steps, self.writer.saved
        self.report_failed_saves(saved.step - 1)
        if self.failed_saves:
            self.monitor.warn(f"{self.failed_saves} saves of checkpoints failed, see the warnings above")
        newest = checkpoint_folder(self.config) / layout.checkpoint_name(saved.step)
        if reason is not None:
            where = f"resumes from {newest}" if saved.step else "starts it over, as no checkpoint could be written"
            self.monitor.log(
                f"stopped by {reason} after step {self.writer.begun_step}/{steps}; the same command {where}"
            )
            return EXIT_RESUME
        if saved.step < steps:
            raise RunError(
                f"trained for {steps} steps, but there is no space for the last checkpoint; make room, and the same"
                f" command goes on from step {saved.step}"
            )
        self.monitor.log(f"trained for {saved.step} steps; {self.config.output} holds the run")
        return 0

    def evaluate(self, step: int) -> float:
        """Evaluate weights and EMA after `step`, counted from 0; return the EMA's top-1 accuracy in percent.

        Raises Stopped on every rank.
        """
        plan, loader_options, ema = self.plan, self.plan.loader_options, self.ema.module
        device = next(ema.parameters()).device
        rank, world_size = loader_options.rank, loader_options.world_size
        loader = EvalLoader(
            plan.val, self.config.data, loader_options.micro_batch_size, rank, world_size, device, plan.val_label_map
        )
        models = unwrapped_model(self.engine, ema), ema
        of_weights, of_ema = evaluate(models, self.stop.polled(loader), plan.num_classes, self.config.engine.precision)
        scores = {f"eval/{name}": value for name, value in of_weights.items()}
        scores |= {f"eval_ema/{name}": value for name, value in of_ema.items()}
        self.monitor.scalars(step + 1, scores)
        self.monitor.log(
            f"epoch {plan.epochs(step + 1):.2f}"
            f"  top-1 {scores['eval/top1']:.2f} % (EMA {scores['eval_ema/top1']:.2f} %)"
            f"  top-5 {scores['eval/top5']:.2f} % (EMA {scores['eval_ema/top5']:.2f} %)"
        )
        if step + 1 == plan.steps:
            self.monitor.log(compare_ema(scores["eval/top1"], scores["eval_ema/top1"]))
        return scores["eval_ema/top1"]


def prepare(
    config: Config, plan: Plan, device: torch.device, check_lock: Callable[[], None], stop: StopAgreement
) -> Run:
    """Return a run's parts on their device, in the state of the newest intact checkpoint if there is one.

    Raises Stopped on every rank between these parts, if the run is stopped.
    Raises RunError on every rank if checkpoint, weights or kernels do not fit the configuration, or the ranks have
    different data.
    """
    hashes = broadcast_object((plan.train.hash, plan.val.hash))
    with raise_on_all_ranks():
        require_same_data(plan, hashes)
    loader = TrainLoader(plan.train, config.data, plan.loader_options, device)
    initial_state = RunState(
        step=0,
        model=config.model.name,
        num_classes=plan.num_classes,
        world_size=plan.loader_options.world_size,
        zero_stage=config.engine.zero_stage,
        loader=loader.state(),
        best_top1=0.0,
        norm_group=plan.norm_group,
    )
    found, faults = find_checkpoint(checkpoint_folder(config), plan.loader_options.rank)
    stop.check()
    print_rank_0(f"building {config.model.name} and its engine", plan.loader_options.rank)
    with raise_on_all_ranks():
        saved = initial_state if found is None else layout.read_state(found)
        saved.check_compatible(initial_state)
        state = replace(
            initial_state,
            step=saved.step,
            epoch=saved.epoch,
            loader=saved.loader,
            best_top1=saved.best_top1,
            evaluation_due=saved.evaluation_due,
        )
        loader.restore(state.loader)
        plan, changes = keep_norm_group(config, plan, saved.norm_group)
        state = replace(state, norm_group=plan.norm_group)
        model = build_model(config, plan, device)
    ema = ModelEma(model)
    with raise_on_all_ranks():
        if plan.loader_options.rank == 0 and state.step < plan.steps:
            check_disk_space(config.output, ema)
    stop.check()
    engine = start_engine(config, plan, model)
    if found is not None:
        load(found, engine, ema)
    stop.check()
    mfu_constants = measure_mfu_constants(config, plan, device)
    with raise_on_all_ranks():
        check_lock()
        every, allowed = config.log.every_steps, config.data.max_bad_samples
        monitor = Monitor(config.output, state.step, plan.steps, every, mfu_constants, allowed, state.evaluation_due)
        passed_over = [f"{fault}; passed over, and removed by the next checkpoint" for fault in faults]
        log_run_header(config, plan, monitor, [*passed_over, *([f"resumes from {found}"] if found else []), *changes])
    metadata = make_model_metadata(config.model.name, plan.class_names, config.data).safetensors_metadata()
    kept_epochs = config.checkpoint.keep_every_epochs
    retention = Retention(config.checkpoint.keep, lambda steps: plan.ends_epochs(steps - 1, kept_epochs))
    timeout = timedelta(minutes=config.engine.timeout_minutes)
    writer = CheckpointWriter(checkpoint_folder(config), engine, ema, state, metadata, retention, check_lock, timeout)
    return Run(config, plan, engine, ema, loader, monitor, writer, stop, state.step)


def find_checkpoint(folder: Path, rank: int) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, on every rank the one that rank 0 sees, and the faults of newer ones.

    Raises RunError on every rank if all are corrupt, or the folder was copied in a way that a run cannot resume from.
    """
    found: tuple[Path | None, list[str]] = None, []
    with raise_on_all_ranks():
        if rank == 0:
            layout.check_pointers(folder)
            layout.restore_replaced(folder)
            found = layout.find_newest(folder)
    return broadcast_object(found)


def require_same_data(plan: Plan, hashes: tuple[str, str]) -> None:
    """Raise ValueError if this rank's manifests do not have these hashes, which are those of rank 0's."""
    for manifest, expected in zip((plan.train, plan.val), hashes, strict=True):
        if manifest.hash != expected:
            raise ValueError(
                f"{manifest.location} holds other data here (manifest {manifest.hash[:12]}) than on rank 0"
                f" ({expected[:12]}); copy that to every machine"
            )


def log_run_header(config: Config, plan: Plan, monitor: Monitor, notes: list[str]) -> None:
    """Print the effective configuration and the plan, and what changed since the last start; save config.yaml."""
    text = redact_url(dump_config(config))
    path = config.output / "config.yaml"
    if plan.loader_options.rank == 0:
        if path.is_file():
            notes = [*notes, *diff_with_saved_config(path, text)]
        atomic_write(path, text.encode())
    monitor.text("configuration", text)
    for line in (text, *(f"{name}: {value}" for name, value in describe(config, plan).items()), *notes):
        monitor.log(line)


def diff_with_saved_config(path: Path, text: str) -> list[str]:
    """Return a line for each difference to the configuration of the last start, which may be of an older version."""
    try:
        before = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        before = " ".join(str(error).split())
    if isinstance(before, dict):
        return config_diff(translate_renamed_keys(before), yaml.safe_load(text))
    return [
        f"{path} held no configuration ({before}); it is rewritten, and what changed since the last start is unknown"
    ]


def config_diff(before: dict[str, Any], now: dict[str, Any], section: str = "") -> list[str]:
    """Return a line for each key whose value differs between the run's last start and now."""
    lines = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += config_diff(old, new, f"{section}{key}.")
        elif old != new:
            lines.append(f"changed since the last start: {section}{key}: {old} → {new}")
    return lines


def compare_ema(weights: float, ema: float) -> str:
    """Return advice on which to evaluate and export, weights or EMA, by their top-1 accuracy in percent."""
    if ema >= weights:
        return f"the EMA is as good or better ({ema:.2f} % against {weights:.2f} %): launch.evaluate and export take it"
    return (
        f"the weights are better than the EMA ({weights:.2f} % against {ema:.2f} %):"
        " launch.evaluate and launch.export take them with --kind model"
    )


def checkpoint_folder(config: Config) -> Path:
    """Return the folder of a run's checkpoints."""
    return config.output / "checkpoints"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = make_parser("launch/train.py", __doc__)
    parser.add_argument(
        "--config", type=user_path, required=True, help="a YAML file, for example configs/polaformerpp_b4.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.epochs=10")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(argv)


if __name__ == "__main__":
    exit_process(main(signals=stop_signals))

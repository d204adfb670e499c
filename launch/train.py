"""Train PolaFormer++: a run from start to end, top to bottom.

    deepspeed launch/train.py --config configs/X.yaml [key=value …]
    torchrun --standalone --nproc-per-node 8 launch/train.py --config configs/X.yaml [key=value …]
    srun python launch/train.py --config configs/X.yaml [key=value …]

The same command resumes a run from its newest intact checkpoint, in the middle of an epoch too. SIGINT, SIGTERM,
SIGUSR1 and SIGUSR2 stop it with a checkpoint. Exit status: 0 done, 2 refused, 1 failed, 75 stopped, or ended because
another rank was killed or hung (start it again).
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
import math
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from dataio.augment.batch_augment import BatchAugment
from dataio.files import user_path
from dataio.loader import TrainLoader
from dataio.urls import redact_url
from launch import flight_recorder
from launch.checkpoint import layout
from launch.checkpoint.layout import RunState
from launch.checkpoint.tensors import load
from launch.checkpoint.writer import CheckpointWriter, Retention, check_disk_space
from launch.command_line import make_parser
from launch.config import Config, EngineSection, load_config
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
    build_model,
    check_engine,
    set_lr,
    start_engine,
)
from launch.flops import measure_mfu_constants
from launch.goodput import DATA, SAVING, TRAINING, Goodput
from launch.guard import Guard, TrainedStep
from launch.model_metadata import make_model_metadata
from launch.monitor import Monitor
from launch.plan import Plan, keep_norm_group, make_plan
from launch.replicas import ReplicaCheck
from launch.run import Run, checkpoint_folder, find_checkpoint
from launch.run_header import log_run_header
from launch.run_lock import locked
from launch.schedule import ema_decay_at, lr_at
from launch.startup_check import check_ranks, check_shared_folder
from launch.stop import StopAgreement, Stopped, process_age_seconds
from launch.watchdog import FOLDER_NAME as HEARTBEATS_NAME
from launch.watchdog import Watchdog


def main(argv: list[str] | None = None, signals: StopSignals | None = None) -> int:
    """Train as the command line says; return the exit status. signals: those that stop the run, by default none."""
    arguments, device_type, signals = parse(argv), default_device_type(), signals or StopSignals()
    try:
        config = load_config(arguments.config, arguments.overrides)
    except (ValueError, OSError) as error:
        timeout = timedelta(minutes=EngineSection().timeout_minutes)
        return run_distributed(lambda rank_info, device: 0, device_type, timeout, fault=error, settled=signals.ignore)
    if device_type == "cuda":
        flight_recorder.configure(config.output / HEARTBEATS_NAME)
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
        check_ranks(device)
        with raise_on_all_ranks():
            plan = make_plan(config, rank, rank_info.world_size, local_world_size)
            check_engine(config, plan)
            augment = BatchAugment(
                plan.batch_augment, plan.num_classes, config.seed, plan.loader_options.micro_batch_size, device
            )
        stop.check()
        with locked(config.output, partial(print_rank_0, rank=rank)) as check_lock:
            run = prepare(config, plan, device, check_lock, stop)
            signals.defer(run.watchdog.status_without_rank)
            with contextlib.closing(run), run.watchdog.ending_lost_runs():
                return train(run, augment)
    except Stopped as stopped:
        print_rank_0(f"stopped by {stopped} before the first step; the same command starts it again", rank)
        return EXIT_RESUME


def train(run: Run, augment: BatchAugment) -> int:
    """Train from the run's current step to its last one, or until all ranks agree to stop; return the exit status.

    Raises Stopped before the first step, RunError with status EXIT_FATAL after it, on every rank.
    """
    run.stop.check()
    try:
        while True:
            reason = train_steps(run, augment)
            with run.goodput.spending(SAVING), run.watchdog.paused():
                run.writer.wait()
            if reason is not None or run.writer.not_finite is None:
                return run.finish(reason)
            run.first_step = run.go_back(run.plan.steps, run.writer.not_finite)
    except RunError as error:
        error.status = EXIT_FATAL
        raise


def train_steps(run: Run, augment: BatchAugment) -> str | None:
    """Make the run's remaining steps, with their evaluations and checkpoints; return why they were stopped, if so."""
    config, plan, engine, monitor = run.config, run.plan, run.engine, run.monitor
    with monitor.paused():
        if run.writer.saved.evaluation_due and (reason := run.evaluate_resumed()):
            return reason
    step = run.first_step
    while step < plan.steps:
        lr = lr_at(step, plan.schedule)
        set_lr(engine, lr)
        trained = train_step(run, augment, step)
        agreed = run.exchange(trained)
        if trained.applied:
            run.ema.update(engine, ema_decay_at(step, config.optimizer))
        if run.guard.check(trained, agreed.loss):
            step = run.go_back(step)
            continue
        if agreed.save_failed:
            with run.watchdog.paused():
                run.writer.wait()  # raises on every rank, unless the state was not finite
            if run.writer.not_finite is not None:
                step = run.go_back(step, run.writer.not_finite)
                continue

        run.report_failed_saves(step)
        saving = run.is_save_due(step, agreed)
        # `write` raises, before a save, if an epoch has too many bad samples. Their count restarts in each epoch, so
        # the last step of an epoch writes too.
        if saving or monitor.due(step) or plan.is_due(step, 1):
            norm = engine.get_global_grad_norm() if trained.applied else math.nan
            monitor.write(step, lr, norm, run.loader.bad_samples, run.goodput.shares())  # waits for the device
            run.goodput.write()
        with monitor.paused():
            if reason := run.evaluate_and_save(step, saving, agreed.reason):
                return reason
        run.watchdog.arm()
        run.goodput.begin(TRAINING)
        step += 1
    return None


def train_step(run: Run, augment: BatchAugment, step: int) -> TrainedStep:
    """Compute a step's micro-steps and update the weights, unless a loss or gradient of any rank is not finite.

    Without loss or update, take the samples of a step that the run skips.
    """
    config, plan, engine, monitor = run.config, run.plan, run.engine, run.monitor
    loss_fn, skipped = SoftTargetCrossEntropy(), step in run.guard.skipped
    # The forward pass of ZeRO-3 waits for other ranks.
    own_work = monitor.own_work.running if config.engine.zero_stage < 3 else contextlib.nullcontext
    losses: list[Tensor] = []
    samples: list[npt.NDArray[np.int64]] = []
    for _ in range(config.optimizer.gradient_accumulation_steps):
        with own_work():
            run.watchdog.beat(step, "waiting for data")
            with monitor.data_wait(), run.goodput.spending(DATA):
                batch = next(run.loader)
            run.watchdog.beat(step, "computing")
            for bad in batch.substituted:
                monitor.warn(f"sample {bad.substitute} replaces {plan.train.describe(bad.sample)}: {bad.reason}")
            samples.append(batch.samples)
            if skipped:
                continue
            draw_drop_paths(engine.module, config.seed, batch.position)
            images, targets = augment(batch)  # (B, 3, S, S); (B, num_classes), rows sum to 1
            if step == 0 and not losses:
                monitor.images(images, config.data.mean, config.data.std)
            loss = loss_fn(engine(images).float(), targets)
        engine.backward(run.guard.spread_non_finite(loss))
        engine.step()  # updates the weights in the last micro-step only
        losses.append(loss.detach())  # stays on the device
    applied = not skipped and engine.was_step_applied()
    if applied:
        monitor.add(losses, plan.loader_options.micro_batch_size)
    return TrainedStep(step, np.concatenate(samples), losses, applied)


def prepare(
    config: Config, plan: Plan, device: torch.device, check_lock: Callable[[], None], stop: StopAgreement
) -> Run:
    """Return a run's parts on their device, in the state of the newest intact checkpoint if there is one.

    Raises Stopped on every rank between these parts, if the run is stopped.
    Raises RunError on every rank if checkpoint, weights or kernels do not fit the configuration, or the ranks have
    different data or output folders.
    """
    hashes = broadcast_object((plan.train.hash, plan.val.hash))
    with raise_on_all_ranks():
        require_same_data(plan, hashes)
    check_shared_folder(config.output)
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
            guard=saved.guard,
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
    guard = Guard(config, plan.train, monitor, engine.module, state.step)
    guard.restore(state.guard)
    replicas = ReplicaCheck(engine, ema, state.step)
    goodput = Goodput(config.output if plan.loader_options.rank == 0 else None, process_age_seconds(), monitor.warn)
    goodput.resume(state.step)
    goodput.write()
    ranks = plan.loader_options.rank, plan.loader_options.world_size
    start_id = broadcast_object(secrets.token_hex(8))
    with raise_on_all_ranks():
        watchdog = Watchdog(config.output, *ranks, config.hang_seconds, start_id)
    return Run(config, plan, engine, ema, loader, monitor, writer, stop, guard, replicas, watchdog, goodput, state.step)


def require_same_data(plan: Plan, hashes: tuple[str, str]) -> None:
    """Raise ValueError if this rank's manifests do not have these hashes, which are those of rank 0's."""
    for manifest, expected in zip((plan.train, plan.val), hashes, strict=True):
        if manifest.hash != expected:
            raise ValueError(
                f"{manifest.location} holds other data here (manifest {manifest.hash[:12]}) than on rank 0"
                f" ({expected[:12]}); copy that to every machine"
            )


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

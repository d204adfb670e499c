"""A run's parts, and what it does beside training steps: evaluations, checkpoints, going back, its end."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dataio.loader import EvalLoader, TrainLoader
from launch.batchnorm import sync_batchnorm_buffers
from launch.checkpoint import layout
from launch.checkpoint.tensors import load
from launch.checkpoint.writer import CheckpointWriter
from launch.config import Config
from launch.distributed import RunError, broadcast_object, raise_on_all_ranks
from launch.ema import ModelEma
from launch.engine import Engine, unwrapped_model
from launch.evaluate import evaluate
from launch.goodput import EVALUATION, SAVING, Goodput
from launch.guard import Guard, TrainedStep
from launch.interrupt import EXIT_RESUME
from launch.monitor import Monitor
from launch.plan import Plan
from launch.replicas import ReplicaCheck
from launch.stop import Agreed, StopAgreement, Stopped
from launch.watchdog import Watchdog


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
    guard: Guard
    replicas: ReplicaCheck
    watchdog: Watchdog
    goodput: Goodput
    first_step: int
    failed_saves: int = 0  # on rank 0
    save_due: bool = False  # a checkpoint that waits for the end of bad steps
    has_evaluated: bool = False  # in this start

    def close(self) -> None:
        """Leave the run: close its files, and wait for the threads."""
        with self.watchdog.paused():
            self.writer.close()
        self.loader.close()
        self.monitor.close()
        self.watchdog.close()

    def exchange(self, trained: TrainedStep) -> Agreed:
        """Update BatchNorm's statistics and hear from the other ranks, in a step's one all-reduce of ours.

        Raises RunError on every rank if their copies of the state are not equal.
        """
        self.watchdog.beat(trained.number, "hearing from the other ranks")
        every_minutes = self.config.checkpoint.every_minutes
        is_save_due = every_minutes is not None and self.writer.seconds_since_save >= 60 * every_minutes
        flags = self.stop.flags(is_save_due, self.writer.failed, trained.loss)
        comparing = trained.applied and self.is_comparison_due(trained.number)
        riders = torch.cat([flags, self.replicas.fingerprints(comparing)])
        sums = sync_batchnorm_buffers(self.engine.module, riders, trained.applied)
        self.replicas.exchange(trained.number, trained.applied, sums[len(flags) :])
        return self.stop.exchange(sums[: len(flags)])

    def is_comparison_due(self, step: int) -> bool:
        """Return whether the ranks compare their copies of the state after `step`, counted from 0."""
        every_steps = self.config.guard.compare_every_steps
        if every_steps is None:
            return False
        return (step + 1) % every_steps == 0 or self.plan.is_due(step, self.config.checkpoint.every_epochs)

    def is_save_due(self, step: int, agreed: Agreed) -> bool:
        """Return whether a checkpoint is to be written after `step`, counted from 0."""
        section = self.config.checkpoint
        # Read one step late, so in the step after a save the flag is still that of the step before.
        by_clock = agreed.save_due and step > self.writer.begun_step
        kept = self.plan.ends_epochs(step, section.keep_every_epochs)
        self.save_due |= self.plan.is_due(step, section.every_epochs) or kept or by_clock
        is_last = agreed.reason is not None or step + 1 == self.plan.steps
        if not (is_last or self.save_due):
            return False
        self.guard.judge(self.stop.latest().loss)  # a save waits for the device anyway
        # The run may have to go back to before the bad steps.
        if not (is_last or self.guard.is_checkpoint_safe):
            return False
        self.save_due = False
        return True

    def go_back(self, step: int, fault: str | None = None) -> int:
        """Load the newest checkpoint from before the bad steps, during `step`; return the step to go on with.

        fault: what is wrong if it is not the steps.
        Raises RunError on every rank if there is none, or the run has gone back before and got no further.
        """
        self.watchdog.beat(step, "going back")
        with self.watchdog.paused():  # a checkpoint may be large, and its disk slow
            self.writer.wait()
            return self._load_earlier(step, fault)

    def _load_earlier(self, step: int, fault: str | None) -> int:
        """Do what `go_back` says; no checkpoint is being written."""
        # A stop between the bad steps has left a checkpoint of them.
        first_bad = min(self.guard.in_a_row, default=step)
        folder, is_rank_zero = checkpoint_folder(self.config), self.plan.loader_options.rank == 0
        found, faults = find_checkpoint(folder, self.plan.loader_options.rank, first_bad)
        for fault_of_newer in faults:
            self.monitor.log(f"{fault_of_newer}; passed over, and removed")
        self.guard.go_back(step, None if found is None else layout.step_of(found), fault)
        assert found is not None  # else the guard has raised
        with raise_on_all_ranks():
            saved = layout.read_state(found)
            self.loader.restore(saved.loader)
        load(found, self.engine, self.ema)
        self.guard.restore(saved.guard)
        with raise_on_all_ranks():
            if is_rank_zero:
                layout.remove_newer(found)
            self.monitor.rewind(saved.step)
        state = replace(self.writer.saved, step=saved.step, epoch=saved.epoch, loader=saved.loader, guard=saved.guard)
        self.writer.rewind(replace(state, best_top1=saved.best_top1, evaluation_due=False))
        self.guard.report_going_back(step, saved.step)
        self.replicas.rewind(saved.step)
        self.goodput.resume(saved.step)
        self.save_due = False
        return saved.step

    def evaluate_and_save(self, step: int, saving: bool, reason: str | None) -> str | None:
        """Evaluate after `step`, counted from 0, if that is due, and begin a checkpoint if `saving`.

        reason: why the run stops, None if it does not: then the evaluation is left to the resumed run. A stop during
        the evaluation is the same. Returns the reason.
        Raises RunError on every rank if their copies of the state are not equal.
        """
        evaluating, top1 = self.plan.is_due(step, self.config.log.eval_every_epochs), 0.0
        if evaluating and reason is None:
            self.guard.judge(self.stop.latest().loss)  # which an evaluation overwrites
            try:
                with self.goodput.spending(EVALUATION):
                    top1, evaluating = self.evaluate(step), False
            except Stopped as stopped:
                reason = str(stopped)
        if saving or reason:
            self.watchdog.beat(step, "saving")
            self.replicas.finish()
            state = replace(
                self.writer.saved,
                step=step + 1,
                epoch=self.plan.epochs(step + 1),
                loader=self.loader.state(),
                evaluation_due=evaluating,
                guard=self.guard.state(),
            )
            # the watchdog, until the checkpoint before is written
            with self.goodput.spending(SAVING), self.watchdog.paused():
                self.goodput.begin_save(step + 1)
                self.writer.save(state, top1)
        return reason

    def evaluate_resumed(self) -> str | None:
        """Evaluate the checkpoint that the run resumes from, where it was stopped before that, and save it again.

        Returns the reason if this evaluation is stopped as well, and remains due.
        """
        try:
            with self.goodput.spending(EVALUATION):
                top1 = self.evaluate(self.first_step - 1)
        except Stopped as stopped:
            return str(stopped)
        with self.goodput.spending(SAVING):
            self.goodput.begin_save(self.first_step)
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
        self.goodput.write()
        self.monitor.log(str(self.goodput))
        self.report_failed_saves(saved.step - 1)
        if self.plan.loader_options.rank == 0:
            self._warn_of_faults()
        newest = checkpoint_folder(self.config) / layout.checkpoint_name(saved.step)
        if reason is not None:
            where = f"resumes from {newest}" if saved.step else "starts it over, as no checkpoint could be written"
            self.monitor.log(
                f"stopped by {reason} after step {self.writer.begun_step}/{steps}; the same command {where}"
            )
            return EXIT_RESUME
        if saved.step < steps:
            raise RunError(
                f"trained for {steps} steps, but the last checkpoint is not written, for the reason above; the same"
                f" command goes on from step {saved.step}"
            )
        self.monitor.log(f"trained for {saved.step} steps; {self.config.output} holds the run")
        return 0

    def _warn_of_faults(self) -> None:
        if self.guard.count:
            ending = f", {len(self.guard.in_a_row)} of them the last" if self.guard.in_a_row else ""
            self.monitor.warn(f"{self.guard.count} steps of this start were bad{ending}, see the warnings above")
        if self.writer.not_finite is not None:
            self.monitor.warn(f"{self.writer.not_finite}: there is no checkpoint of step {self.writer.begun_step}")
        if self.failed_saves:
            self.monitor.warn(f"{self.failed_saves} saves of checkpoints failed, see the warnings above")

    def evaluate(self, step: int) -> float:
        """Evaluate weights and EMA after `step`, counted from 0; return the EMA's top-1 accuracy in percent.

        Raises Stopped on every rank.
        """
        self.watchdog.beat(step, "evaluating")
        plan, loader_options, ema = self.plan, self.plan.loader_options, self.ema.module
        device = next(ema.parameters()).device
        rank, world_size = loader_options.rank, loader_options.world_size
        loader = EvalLoader(
            plan.val, self.config.data, loader_options.micro_batch_size, rank, world_size, device, plan.val_label_map
        )
        models = unwrapped_model(self.engine, ema), ema
        batches = self.stop.polled(loader, partial(self.watchdog.beat, step, "evaluating"))
        # The first evaluation of a start may compile for minutes, as the first step may.
        with nullcontext() if self.has_evaluated else self.watchdog.paused():
            of_weights, of_ema = evaluate(models, batches, plan.num_classes, self.config.engine.precision)
        self.has_evaluated = True
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


def find_checkpoint(folder: Path, rank: int, last_step: int | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, on every rank the one that rank 0 sees, and the faults of newer ones.

    last_step: as of `layout.find_newest`.

    Raises RunError on every rank if all are corrupt, or the folder was copied in a way that a run cannot resume from.
    """
    found: tuple[Path | None, list[str]] = None, []
    with raise_on_all_ranks():
        if rank == 0:
            layout.check_pointers(folder)
            layout.restore_replaced(folder)
            found = layout.find_newest(folder, last_step=last_step)
    return broadcast_object(found)


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

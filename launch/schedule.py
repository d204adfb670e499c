"""The schedule of a run as pure functions of the step: learning rate, EMA decay, ends of intervals."""

import math
from dataclasses import dataclass

from launch.config import LR_REFERENCE_BATCH_SIZE, OptimizerSection


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up followed by a cosine. Learning rates are scaled with the global batch already."""

    peak_lr: float
    warmup_lr: float  # rate of the first step
    min_lr: float  # the cosine would reach it one step after the last
    warmup_steps: int
    steps: int


def make_schedule(optimizer: OptimizerSection, samples: int) -> Schedule:
    """Return the schedule of a run with `samples` images per epoch. Learning rates scale with global batch / 512."""
    scale = optimizer.global_batch_size / LR_REFERENCE_BATCH_SIZE
    return Schedule(
        peak_lr=optimizer.lr * scale,
        warmup_lr=optimizer.warmup_lr * scale,
        min_lr=optimizer.min_lr * scale,
        warmup_steps=math.ceil(optimizer.warmup_epochs * samples / optimizer.global_batch_size),
        steps=math.ceil(optimizer.epochs * samples / optimizer.global_batch_size),
    )


def lr_at(step: int, schedule: Schedule) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < schedule.warmup_steps:
        return schedule.warmup_lr + (schedule.peak_lr - schedule.warmup_lr) * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    return schedule.min_lr + (schedule.peak_lr - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def ema_decay_at(step: int, optimizer: OptimizerSection) -> float:
    """Return the decay of the EMA's update after a step, counted from 0.

    With optimizer.ema_warmup it is at most (1 + step) / (10 + step), as with `num_updates` of TensorFlow's
    ExponentialMovingAverage: the EMA then covers about the last tenth of the steps, until the configured decay is
    smaller. timm's warm-up (power 2/3) would reach 0.99982 after 414,000 steps; 300 epochs of ImageNet have 375,000.
    """
    return min(optimizer.ema_decay, (1 + step) / (10 + step)) if optimizer.ema_warmup else optimizer.ema_decay


def ends_interval(step: int, global_batch_size: int, interval: float) -> bool:
    """Return whether a step, counted from 0, completes another `interval` of samples."""
    return (step + 1) * global_batch_size // interval > step * global_batch_size // interval

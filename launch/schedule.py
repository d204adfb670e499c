"""What each step of a run gets: its learning rate, the decay of its moving average, and whether it ends an interval."""

import math
from dataclasses import dataclass

from launch.config import LR_REFERENCE_BATCH_SIZE, OptimizerSection


@dataclass(frozen=True)
class Schedule:
    """A cosine with a linear warm-up before it. Rates are final: already scaled with the global batch."""

    peak_lr: float
    warmup_lr: float  # the rate of the first step
    min_lr: float  # what the cosine would reach one step after the last
    warmup_steps: int
    steps: int


def make_schedule(optimizer: OptimizerSection, samples: int) -> Schedule:
    """The schedule of a run over `samples` images an epoch; the three rates scale with global batch / 512."""
    scale = optimizer.global_batch_size / LR_REFERENCE_BATCH_SIZE
    return Schedule(
        peak_lr=optimizer.lr * scale,
        warmup_lr=optimizer.warmup_lr * scale,
        min_lr=optimizer.min_lr * scale,
        warmup_steps=math.ceil(optimizer.warmup_epochs * samples / optimizer.global_batch_size),
        steps=math.ceil(optimizer.epochs * samples / optimizer.global_batch_size),
    )


def lr_at(step: int, schedule: Schedule) -> float:
    """The learning rate of a step, counted from 0."""
    if step < schedule.warmup_steps:
        return schedule.warmup_lr + (schedule.peak_lr - schedule.warmup_lr) * step / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps)
    return schedule.min_lr + (schedule.peak_lr - schedule.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def ema_decay_at(step: int, optimizer: OptimizerSection) -> float:
    """The decay with which a moving average takes in the weights after a step, counted from 0.

    With optimizer.ema_warmup at most (1 + step) / (10 + step), as TensorFlow's ExponentialMovingAverage has it for
    `num_updates`: the average is then over about the last tenth of the steps, until that is as many as the decay asks
    for. timm's warm-up (power 2/3) would reach 0.99982 after 414,000 steps; 300 epochs of ImageNet have 375,000.
    """
    return min(optimizer.ema_decay, (1 + step) / (10 + step)) if optimizer.ema_warmup else optimizer.ema_decay


def ends_interval(step: int, global_batch_size: int, interval: float) -> bool:
    """Whether this step, counted from 0, is the first to complete another `interval` of samples."""
    return (step + 1) * global_batch_size // interval > step * global_batch_size // interval

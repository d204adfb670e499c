"""The learning rate of every step against timm's scheduler, EMA decays, and the ends of intervals."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from launch.config import OptimizerSection
from launch.schedule import ema_decay_at, ends_interval, lr_at, make_schedule

SAMPLES = 1000


def rates(optimizer: OptimizerSection) -> list[float]:
    schedule = make_schedule(optimizer, SAMPLES)
    return [lr_at(step, schedule) for step in range(schedule.steps)]


def timms_rates(optimizer: OptimizerSection) -> list[float]:
    """Learning rates of the official recipe: timm's cosine by steps, after the warm-up."""
    schedule = make_schedule(optimizer, SAMPLES)
    scale = optimizer.global_batch_size / 512
    timms = CosineLRScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=optimizer.lr * scale),
        t_initial=schedule.steps - schedule.warmup_steps,
        lr_min=optimizer.min_lr * scale,
        warmup_t=schedule.warmup_steps,
        warmup_lr_init=optimizer.warmup_lr * scale,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    return [timms._get_lr(step)[0] for step in range(schedule.steps)]


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerSection(),
        OptimizerSection(global_batch_size=512, epochs=30, warmup_epochs=2.5, warmup_lr=0, min_lr=0),
        OptimizerSection(global_batch_size=96, epochs=0.7, warmup_epochs=0.1),
        OptimizerSection(global_batch_size=100, epochs=3, warmup_epochs=0),
    ],
    ids=["defaults", "from nothing to nothing", "less than an epoch", "no warm-up"],
)
def test_every_step_has_timms_learning_rate(optimizer):
    assert rates(optimizer) == pytest.approx(timms_rates(optimizer), rel=1e-12, abs=1e-20)


def test_the_first_the_peak_and_the_last_learning_rate():
    optimizer = OptimizerSection(global_batch_size=512, epochs=40, warmup_epochs=4)
    schedule = make_schedule(optimizer, 5120)
    assert (schedule.warmup_steps, schedule.steps) == (40, 400)
    assert lr_at(0, schedule) == optimizer.warmup_lr
    assert lr_at(40, schedule) == optimizer.lr
    assert lr_at(40 + 360 // 2, schedule) == pytest.approx((optimizer.lr + optimizer.min_lr) / 2)
    assert lr_at(400, schedule) == pytest.approx(optimizer.min_lr)
    assert lr_at(399, schedule) == pytest.approx(optimizer.min_lr, rel=1e-3)
    assert lr_at(399, schedule) > optimizer.min_lr


def test_the_learning_rate_rises_then_falls():
    optimizer = OptimizerSection(global_batch_size=64, epochs=10, warmup_epochs=2)
    warmup_steps = make_schedule(optimizer, SAMPLES).warmup_steps
    all_rates = rates(optimizer)
    assert len(all_rates) == math.ceil(10 * SAMPLES / 64)
    rising, falling = all_rates[: warmup_steps + 1], all_rates[warmup_steps:]
    assert rising == sorted(set(rising))
    assert falling == sorted(set(falling), reverse=True)


def test_learning_rates_scale_with_the_batch():
    small, large = (make_schedule(OptimizerSection(global_batch_size=batch), SAMPLES) for batch in (512, 2048))
    assert (small.warmup_lr, small.peak_lr, small.min_lr) == (1e-7, 5e-4, 1e-5)
    assert (large.warmup_lr, large.peak_lr, large.min_lr) == pytest.approx((4e-7, 2e-3, 4e-5))


def test_a_partial_step_counts_as_a_step():
    schedule = make_schedule(OptimizerSection(global_batch_size=64, epochs=1, warmup_epochs=0.1), SAMPLES)
    assert (schedule.steps, schedule.warmup_steps) == (16, 2)  # 15.6 and 1.6


def test_a_run_within_its_warm_up_has_learning_rates():
    optimizer = OptimizerSection(global_batch_size=1000, epochs=1, warmup_epochs=0.9)
    assert rates(optimizer) == [optimizer.warmup_lr * 1000 / 512]


def ema_weights(optimizer: OptimizerSection, steps: int) -> np.ndarray:
    """The shares of the initial weights, and of the weights after each step, in the final EMA."""
    decays = np.array([ema_decay_at(step, optimizer) for step in range(steps)])
    kept = np.append(np.cumprod(decays[::-1])[::-1], 1.0)  # of what was there before a step
    return kept * np.append(1.0, 1 - decays)


def test_the_ema_of_a_short_run_covers_its_last_steps():
    """With a constant decay of 0.99 it would be 80 % initial weights after 24 steps."""
    long = ema_weights(OptimizerSection(ema_decay=0.99, ema_warmup=False), 24)
    short = ema_weights(OptimizerSection(ema_decay=0.99), 24)
    assert long.sum() == pytest.approx(1)
    assert short.sum() == pytest.approx(1)
    assert long[0] == pytest.approx(0.786, abs=1e-3)
    assert short[0] < 1e-7
    assert short[12:].sum() > 0.99
    assert 2 < 1 / np.square(short).sum() < 12, "it must be an average of several steps"


@pytest.mark.parametrize("global_batch_size", [1024, 512])
def test_the_ema_of_a_long_run_is_hardly_warmed_up(global_batch_size):
    """For 300 epochs of ImageNet, with the recipe's and the fine-tuning batch, the warm-up changes 2e-27 of it."""
    steps = math.ceil(300 * 1_281_167 / global_batch_size)
    with_warmup, without = (ema_weights(OptimizerSection(ema_warmup=on), steps) for on in (True, False))
    assert np.abs(with_warmup - without).sum() < 1e-26


def test_the_decay_depends_on_the_step_only():
    optimizer = OptimizerSection(ema_decay=0.9)
    assert [ema_decay_at(step, optimizer) for step in (0, 1, 40, 80, 81, 10**6)] == [0.1, 2 / 11, 0.82, 0.9, 0.9, 0.9]
    assert ema_decay_at(0, OptimizerSection(ema_decay=0.0)) == 0.0
    assert ema_decay_at(0, OptimizerSection(ema_decay=0.9, ema_warmup=False)) == 0.9


@given(
    samples=st.integers(1, 5000),
    global_batch_size=st.integers(1, 3000),
    epochs=st.floats(0.01, 20),
    steps=st.integers(1, 400),
)
def test_an_interval_ends_in_the_step_that_completes_it(samples, global_batch_size, epochs, steps):
    interval = epochs * samples
    ends = {step for step in range(steps) if ends_interval(step, global_batch_size, interval)}
    completed = math.floor(Fraction(steps * global_batch_size) / Fraction(interval))
    first_steps = {
        math.ceil(number * Fraction(interval) / global_batch_size) - 1
        for number in range(1, min(completed, 10 * steps) + 1)
    }
    if completed <= 10 * steps:
        assert ends == first_steps  # of several that end in one step, each is in it
    if interval >= global_batch_size:
        assert len(ends) == completed


def test_an_indivisible_epoch_ends_within_a_step():
    """10 images in steps of 4: epochs end after 10, 20 and 30 images, in steps 2, 4 and 7, counted from 0."""
    assert [step for step in range(8) if ends_interval(step, 4, 10)] == [2, 4, 7]
    assert [step for step in range(8) if ends_interval(step, 4, 0.5 * 10)] == [1, 2, 3, 4, 6, 7]


def test_intervals_shorter_than_a_step_end_in_every_step():
    assert all(ends_interval(step, 64, 10) for step in range(20))

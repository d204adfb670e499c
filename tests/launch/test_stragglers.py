"""Stragglers: a real run with a slow rank, and decisions on times and warnings."""

import json
import socket
from pathlib import Path

import pytest
import torch

from launch.stragglers import SlowestRank, StragglerAlarm, WorkTimer, find_slowest

HARMED_RUN = Path(__file__).parent / "faults" / "harmed_run.py"


@pytest.mark.slow
def test_a_slow_rank_is_named(forked, train_arguments, small_shards, tmp_path):
    """It sleeps for two seconds in steps that take a fraction of one; the others wait for it in the backward pass."""
    run = tmp_path / "run"
    more = "optimizer.global_batch_size=24", "optimizer.gradient_accumulation_steps=1", "optimizer.epochs=1"
    more += "optimizer.warmup_epochs=0.2", "checkpoint.every_epochs=9", "log.eval_every_epochs=9"
    harm = [{"step": 4, "to": "speed", "rank": 1, "from_then_on": True}]
    finished = forked(3, HARMED_RUN, *train_arguments(small_shards, run, *more), HARM=json.dumps(harm))
    assert finished.returncode == 0, finished.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slowest = [line["speed/slowest_rank"] for line in lines if line.get("train/loss")]
    assert slowest[3:] == [1] * 4
    assert min(line["speed/slowest_over_median"] for line in lines[3:7]) > 1.5
    (warned,) = [line for line in finished.stderr.splitlines() if " is slow, " in line]
    expected = f"rank 0: rank 1 ({socket.gethostname()}) is slow, and the others wait for it: its data and forward pass"
    assert warned.startswith(expected)
    assert list(run.glob(".start-up-check*")) == []


def test_the_slowest_rank_against_the_median():
    assert find_slowest([1.0, 1.0, 3.0, 2.0]) == SlowestRank(2, 3.0)
    assert find_slowest([2.9, 1.0]) == SlowestRank(0, 2.9)
    assert find_slowest([2.0]) is None
    assert find_slowest([0.0, 0.0]) is None  # ZeRO-3


def test_a_straggler_is_warned_of_once_until_it_is_another():
    alarm = StragglerAlarm()
    seen = [(1, 2.0), (1, 2.0), (1, 1.2), (1, 2.0), (2, 2.0), (1, 2.0), (1, 2.0), (1, 2.0)]  # the last: three in a row
    seen += [(1, 2.0), (1, 1.0), (1, 2.0), (1, 2.0), (1, 2.0), (2, 1.6), (2, 1.6), (2, 1.6), (2, 1.6)]
    due = [number for number, each in enumerate(seen) if alarm.is_due(SlowestRank(*each))]
    assert due == [7, 15]


def test_a_timer_adds_up_blocks_until_it_is_read(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.5, 20.0])
    monkeypatch.setattr("launch.stragglers.time.perf_counter", lambda: next(clock))
    timer = WorkTimer(on_gpu=False)
    for _ in range(2):
        with timer.running():
            pass
    assert (timer.take(), timer.take()) == (2.5, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_timer_measures_the_work_of_a_gpu():
    matrix, timer, seconds = torch.ones(4096, 4096, device="cuda"), WorkTimer(on_gpu=True), []
    for products in (1, 1, 100):  # the first loads the kernel
        with timer.running():
            for _ in range(products):
                matrix @ matrix
        seconds.append(timer.take())
    assert seconds[2] > 10 * seconds[1] > 0
    assert timer.take() == 0

"""Runs of which one rank hangs: all others name it, and the same command goes on."""

import json
import re
from pathlib import Path

import pytest

from launch.interrupt import EXIT_RESUME
from launch.watchdog import Heartbeat, describe_hang

HARMED_RUN = Path(__file__).with_name("harmed_run.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "rank", "place", "fault"),
    [(3, 0, "process", "stopped or gone"), (2, 1, "main thread", "behind the others")],
)
def test_a_rank_that_hangs_is_named(forked, train_arguments, small_shards, tmp_path, ranks, rank, place, fault):
    run = tmp_path / "run"
    more = "optimizer.global_batch_size=24", "guard.hang_seconds=20", "checkpoint.every_epochs=0.4"
    arguments = train_arguments(small_shards, run, "optimizer.epochs=1", "optimizer.warmup_epochs=0.2", *more)
    harm = [{"step": 4, "to": place, "rank": rank}]
    finished = forked(ranks, HARMED_RUN, *arguments, HARM=json.dumps(harm))
    assert finished.returncode == EXIT_RESUME, finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: no progress")]
    assert len(lines) == 1, finished.stderr
    # Of a process that stops, the others see the last heartbeat.
    where = "step 3, saving" if place == "main thread" else r"step [1-3], [a-z ]+"
    assert re.fullmatch(
        rf"error: no progress for 20 s: rank {rank} \([^ ]+, process [0-9]+\) in {where}: {fault}. The stacks of the"
        rf" ranks are in {run}/heartbeats; the same command goes on from the last checkpoint, if there is one",
        lines[0],
    )
    stacks = re.findall(r"^rank ([0-9]) \(.*\) in step 4, .*\n(?:Thread|Current thread)", finished.stderr, re.MULTILINE)
    stuck = [str(other) for other in range(ranks) if other != rank]
    assert set(stuck) <= set(stacks)  # the stopped one, if it goes on, sees that the run hung
    assert finished.stderr.count("in train_step") >= len(stuck)
    resumed = forked(ranks, HARMED_RUN, *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert f"trained for 7 steps; {run} holds the run" in resumed.stdout


def test_whom_the_others_wait_for():
    beats = [Heartbeat(rank, "node7", 10 + rank, step=5, phase="computing", beats=9 - (rank == 2)) for rank in range(3)]
    assert describe_hang(beats, [1]) == "rank 1 (node7, process 11) in step 5, computing: stopped or gone"
    assert describe_hang(beats, []) == "rank 2 (node7, process 12) in step 5, computing: behind the others"
    assert describe_hang(beats[:2], []) == (
        "all ranks have come to the same point, as rank 0 (node7, process 10) in step 5, computing"
    )

"""Runs of which one rank hangs: all others name it, and the same command goes on."""

import json
import re
from pathlib import Path

import pytest

from launch.interrupt import EXIT_RESUME

HARMED_RUN = Path(__file__).with_name("harmed_run.py")


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(forked, train_arguments, small_shards, tmp_path):
    """Its main thread waits for ever. tests/slurm has a process that is stopped."""
    run = tmp_path / "run"
    more = "optimizer.global_batch_size=24", "guard.hang_seconds=20", "checkpoint.every_epochs=0.4"
    arguments = train_arguments(small_shards, run, "optimizer.epochs=1", "optimizer.warmup_epochs=0.2", *more)
    harm = [{"step": 4, "to": "main thread", "rank": 1}]
    finished = forked(3, HARMED_RUN, *arguments, HARM=json.dumps(harm))
    assert finished.returncode == EXIT_RESUME, finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error: no progress")]
    assert re.fullmatch(
        r"error: no progress for 20 s: rank 1 \([^ ]+, process [0-9]+\) in step 3, saving: behind the others."
        rf" The stacks of the ranks are in {run}/heartbeats; the same command goes on from the last checkpoint, if"
        " there is one",
        line,
    )
    stacks = re.findall(
        r"^(rank [0-9]) .* in (step [0-9]), .*\n(?:Thread|Current thread)", finished.stderr, re.MULTILINE
    )
    assert sorted(stacks) == [("rank 0", "step 4"), ("rank 1", "step 3"), ("rank 2", "step 4")]
    assert finished.stderr.count("in train_steps\n") == 3
    assert (run / "heartbeats" / "rank-00002.txt").read_text().count("in train_steps\n") == 1
    resumed = forked(3, HARMED_RUN, *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert f"trained for 7 steps; {run} holds the run" in resumed.stdout

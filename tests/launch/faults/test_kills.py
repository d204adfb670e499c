"""A run that is killed again and again, at random, ends as one that was left alone: bit for bit.

CI kills it a few times. FAULTS_KILLS=200 FAULTS_SEED=7 pytest -s tests/launch/faults/test_kills.py prints each kill,
and the time from a kill to the next step, without imports. With FAULTS_RANKS=2,4,1,3 each start has another number of
ranks, and the run ends alike but for rounding.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch.checkpoint import layout
from launch.interrupt import EXIT_RESUME

HARMED_RUN = Path(__file__).with_name("harmed_run.py")
KILLS, SEED = int(os.environ.get("FAULTS_KILLS", "3")), int(os.environ.get("FAULTS_SEED", "0"))
RANKS = [int(ranks) for ranks in os.environ.get("FAULTS_RANKS", "2").split(",")]  # of the starts in turn
LONGEST = 8.0  # seconds after which a run is killed
CLOCK_JUMPS = [{"step": 2, "to": "clock", "rank": 0}, {"step": 3, "to": "clock", "rank": 1}]  # of each start
#: Functions in which a checkpoint is made, and how often one start calls each.
OF_A_SAVE = {
    "_copy_tensors": 5, "_begin": 5, "_write_file": 10, "write_state": 5, "publish": 5, "write_pointer": 9, "prune": 5
}  # fmt: skip


def draw_kill(chance: random.Random, world_size: int) -> tuple[str, list[dict]]:
    """Returns what is killed, and the harm that does it: one rank or all, at a time or in a function of a save."""
    everyone = list(range(world_size))
    ranks = chance.choice([*([rank] for rank in everyone), everyone])
    whom = "all ranks" if ranks == everyone else f"rank {ranks[0]}"
    if chance.random() < 0.5:
        after = chance.uniform(0, LONGEST)
        return f"{whom} at a time", [{"kill": True, "rank": rank, "after": after} for rank in ranks]
    name = chance.choice(sorted(OF_A_SAVE))
    call = chance.randint(1, OF_A_SAVE[name])
    return f"{whom} in {name}", [{"kill": True, "rank": rank, "at": name, "call": call} for rank in ranks]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[dict]:
    kept = [{k: v for k, v in line.items() if k.startswith(("step", "train/", "eval"))} for line in metrics(run)]
    return [line for line in kept if len(line) > 1]


def state(run: Path) -> dict[str, bytes]:
    """All tensors of the newest checkpoint, and its position in the data."""
    found, faults = layout.find_newest(run / "checkpoints")
    assert not faults
    files = (layout.MODEL_NAME, layout.EMA_NAME, *layout.MOMENT_NAMES.values())
    tensors = {f"{file} {name}": value for file in files for name, value in load_file(found / file).items()}
    read = layout.read_state(found)
    position = repr((read.step, read.loader, read.best_top1, read.evaluation_due)).encode()
    return {name: value.numpy().tobytes() for name, value in tensors.items()} | {"position": position}


def check_survivors(finished: subprocess.CompletedProcess, what: str, harm: list[dict]) -> None:
    """Asserts that those of the ranks that were not killed end with the status to start again, and one says why."""
    lines = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in finished.stderr
    killed = [kill["rank"] for kill in harm]
    survivors = {status for rank, status in enumerate(finished.statuses) if rank not in killed}
    if what.endswith("at a time"):  # the launcher's signal ends one that has not joined yet; or the run was done
        survivors -= {0, 128 + signal.SIGTERM}
        assert len(lines) <= 1
    elif survivors:
        assert re.fullmatch(rf"error: rank {killed[0]} \(.*\) gone in step [0-9]+, .*; the same command .*", *lines)
    assert survivors <= {EXIT_RESUME}


def check_end(run: Path, whole: Path) -> None:
    """Asserts that two runs are equal, but for rounding if their ranks are not."""
    if len(set(RANKS)) == 1:
        found, expected = state(run), state(whole)
        assert [name for name in expected if found[name] != expected[name]] == []
        assert losses(run) == losses(whole)
    else:
        found, expected = ([line.get("train/loss") for line in losses(folder)] for folder in (run, whole))
        assert found == pytest.approx(expected, rel=1e-5)


def check_goodput(run: Path, printed: str) -> None:
    line = next(line for line in reversed(metrics(run)) if "goodput/training" in line)
    assert sum(share for name, share in line.items() if name.startswith("goodput/")) == pytest.approx(1)
    starts = json.loads((run / "goodput.json").read_text())["starts"]
    took = "[0-9.]+ (s|min)"
    restarts = f"; {took} lost; the start and {starts - 1} restarts? took {took}" if starts > 1 else ""
    assert re.search(rf"^[0-9.]+ % of {took} trained{restarts}$", printed, re.MULTILINE)


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_as_one_that_was_left_alone(
    forked, train_arguments, small_shards, tmp_path
):
    more = ["checkpoint.every_epochs=0.2", "log.eval_every_epochs=0.5"]
    if len(set(RANKS)) > 1:  # groups of BatchNorm that 1, 2, 3 and 4 ranks can have
        more += ["optimizer.global_batch_size=48", "optimizer.gradient_accumulation_steps=1", "model.norm_group=4"]
    run, whole, mark, stepped = (tmp_path / name for name in ("run", "whole", "killed", "stepped"))
    finished = forked(RANKS[0], HARMED_RUN, *train_arguments(small_shards, whole, *more))
    assert finished.returncode == 0, finished.stderr
    arguments, ranks = train_arguments(small_shards, run, *more), itertools.cycle(RANKS)
    chance, killed, restarts, killed_at, done = random.Random(SEED), Counter(), [], None, False
    while not done:
        world_size = next(ranks)
        what, harm = draw_kill(chance, world_size) if killed.total() < KILLS else ("nothing", [])
        files = {"KILLED": str(mark), "STEPPED": str(stepped)}
        finished = forked(world_size, HARMED_RUN, *arguments, HARM=json.dumps(harm + CLOCK_JUMPS), **files)
        if killed_at and stepped.exists():
            restarts.append(stepped.stat().st_mtime - killed_at)
            killed_at = None
        stepped.unlink(missing_ok=True)
        if finished.returncode:
            assert mark.exists(), (SEED, killed, finished.stderr)  # else the run failed by itself
            check_survivors(finished, what, harm)
            killed_at = killed_at or mark.stat().st_mtime
            mark.unlink()
            killed[what] += 1
            print(f"{killed.total():4} {what} {harm[0]}")
        else:
            check_end(run, whole)
            check_goodput(run, finished.stdout)
            shutil.rmtree(run)
            killed_at, done = None, killed.total() == KILLS
    for what, count in sorted(killed.items()):
        print(f"{count:4} {what}")
    if restarts:
        print(f"restart: median {statistics.median(restarts):.1f} s, maximum {max(restarts):.1f} s, of {len(restarts)}")

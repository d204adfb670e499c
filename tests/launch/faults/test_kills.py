"""A run that is killed again and again, at random, ends as one that was left alone: bit for bit.

CI kills it a few times. FAULTS_KILLS=200 FAULTS_SEED=7 pytest -s tests/launch/faults/test_kills.py prints each kill.
"""

import json
import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch.checkpoint import layout

HARMED_RUN = Path(__file__).with_name("harmed_run.py")
KILLS, SEED = int(os.environ.get("FAULTS_KILLS", "3")), int(os.environ.get("FAULTS_SEED", "0"))
LONGEST = 8.0  # seconds after which a run is killed
#: Functions in which a checkpoint is made, and how often one start calls each.
OF_A_SAVE = {
    "_copy_tensors": 5, "_begin": 5, "_write_file": 10, "write_state": 5, "publish": 5, "write_pointer": 9, "prune": 5
}  # fmt: skip


def draw_kill(chance: random.Random) -> tuple[str, list[dict]]:
    """Returns what is killed, and the harm that does it: one rank or both, at a time or in a function of a save."""
    ranks = chance.choice([[0], [1], [0, 1]])
    whom = "both ranks" if len(ranks) == 2 else f"rank {ranks[0]}"
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


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_ends_as_one_that_was_left_alone(
    forked, train_arguments, small_shards, tmp_path
):
    more = "checkpoint.every_epochs=0.2", "log.eval_every_epochs=0.5"
    finished = forked(2, HARMED_RUN, *train_arguments(small_shards, tmp_path / "whole", *more))
    assert finished.returncode == 0, finished.stderr
    expected, expected_losses = state(tmp_path / "whole"), losses(tmp_path / "whole")
    chance, killed, run, mark = random.Random(SEED), Counter(), tmp_path / "run", tmp_path / "killed"
    arguments = train_arguments(small_shards, run, *more)
    while killed.total() < KILLS:
        what, harm = draw_kill(chance)
        finished = forked(2, HARMED_RUN, *arguments, HARM=json.dumps(harm), KILLED=str(mark))
        if finished.returncode:
            mark.unlink()  # else nobody was killed, and the run failed by itself
            assert "error: " not in finished.stderr, (SEED, killed, finished.stderr)
            killed[what] += 1
            print(f"{killed.total():4} {what} {harm[0]}")
        if killed.total() == KILLS:
            finished = forked(2, HARMED_RUN, *arguments)
            assert finished.returncode == 0, (SEED, killed, finished.stderr)
        if finished.returncode == 0:
            found = state(run)
            assert [name for name in expected if found[name] != expected[name]] == [], (SEED, killed)
            assert losses(run) == expected_losses, (SEED, killed)
            line = next(line for line in reversed(metrics(run)) if "goodput/training" in line)
            assert sum(share for name, share in line.items() if name.startswith("goodput/")) == pytest.approx(1)
            starts = json.loads((run / "goodput.json").read_text())["starts"]
            restarts = f"; {starts - 1} restarts? lost [0-9.]+ (s|min)" if starts > 1 else ""
            assert re.search(rf"^[0-9.]+ % of [0-9.]+ (s|min) trained{restarts}$", finished.stdout, re.MULTILINE)
            shutil.rmtree(run)
    for what, count in sorted(killed.items()):
        print(f"{count:4} {what}")

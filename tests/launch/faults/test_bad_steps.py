"""Steps that are not finite, and spikes of the loss, in real runs: equal to runs without these steps, bit for bit."""

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch.checkpoint import layout
from launch.interrupt import EXIT_RESUME

HARMED_RUN = Path(__file__).with_name("harmed_run.py")
SHORT = "optimizer.epochs=1", "optimizer.warmup_epochs=0.2", "log.eval_every_epochs=9", "optimizer.eps=1e-3"


@pytest.fixture(scope="module")
def train(forked, train_arguments, small_shards, tmp_path_factory) -> Callable:
    """Returns a function: harm, skipped steps, overrides → (the run's folder, exit status, all output).

    folder: of a run that goes on.
    """

    def run(
        harm: list[dict] = (), skip: list[int] = (), *more: str, ranks: int = 2, folder: Path | None = None
    ) -> tuple[Path, int, str]:
        folder = folder or tmp_path_factory.mktemp("harmed") / "run"
        arguments = train_arguments(small_shards, folder, *SHORT, *more)
        variables = {"HARM": json.dumps(list(harm)), "SKIP": json.dumps(list(skip)), "KILLED": f"{folder}.killed"}
        finished = forked(ranks, HARMED_RUN, *arguments, **variables)
        assert "Traceback" not in finished.stderr or any("kill" in one for one in harm)  # of a rank that is left
        return folder, finished.returncode, finished.stdout + finished.stderr

    return run


def tensors(run: Path) -> dict[str, bytes]:
    """All tensors of a run's newest checkpoint, as bytes."""
    found, faults = layout.find_newest(run / "checkpoints")
    assert not faults
    files = (layout.MODEL_NAME, layout.EMA_NAME, *layout.MOMENT_NAMES.values())
    loaded = {f"{file}: {name}": value for file in files for name, value in load_file(found / file).items()}
    assert all(value.isfinite().all() for value in loaded.values())
    return {name: value.numpy().tobytes() for name, value in loaded.items()} | {"": found.name.encode()}


def assert_equal(run: Path, expected: Path) -> None:
    found, wanted = tensors(run), tensors(expected)
    assert [name for name in wanted if found.get(name) != wanted[name]] == []


def metrics(run: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(train, stage):
    places = {2: ("image", 1), 3: ("target", 0), 4: ("gradient", 1), 6: ("sums", 1)}
    harm = [{"step": step, "to": to, "rank": rank} for step, (to, rank) in places.items()]
    run, status, output = train(harm, [], f"engine.zero_stage={stage}")
    assert status == 0, output
    expected, status, undisturbed = train([], list(places), f"engine.zero_stage={stage}")
    assert status == 0, undisturbed
    assert_equal(run, expected)
    assert metrics(run, "train/loss") == metrics(expected, "train/loss")
    assert all(map(math.isfinite, metrics(run, "train/loss").values()))
    assert metrics(run, "train/gradient_norm").keys() == {1, 5}
    assert metrics(run, "guard/bad_steps") == {2: 1, 3: 2, 4: 3, 6: 4}
    path = run / "bad_steps.jsonl"
    for text in (
        f"step 2 is skipped: the loss is nan on rank 1; bad steps in a row: 1; samples: {path}\n",
        f"step 3 is skipped: the loss is inf on rank 0; bad steps in a row: 2; samples: {path}\n",
        f"step 4 is skipped: the gradient is not finite; bad steps in a row: 3; samples: {path}\n",
        f"step 6 is skipped: the gradient is not finite; bad steps in a row: 1; samples: {path}\n",
    ):
        assert output.count(text) == 1, text
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(record["step"], record["rank"]) for record in records] == [
        (2, 1), (3, 0), (4, 0), (4, 1), (6, 0), (6, 1)
    ]  # fmt: skip
    assert all(len(record["samples"]) == 16 for record in records)
    assert records[0]["samples"][0].startswith("sample ")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rank"), [(1, 0), (3, 1)])
def test_after_bad_steps_in_a_row_the_run_goes_back_once(train, stage, rank):
    """A weight that is NaN on one rank, as after a fault of its memory, until the run loads its checkpoint."""
    more = "guard.max_bad_steps=2", "checkpoint.every_epochs=0.1", f"engine.zero_stage={stage}"
    run, status, output = train([{"step": 4, "to": "weight", "rank": rank}], [], *more)
    assert status == 0, output
    expected, status, _ = train([], [4, 5], *more)
    assert status == 0
    assert "the last 2 steps were bad: the run goes back to step 3, and skips 2 steps from there on\n" in output
    assert_equal(run, expected)
    assert metrics(run, "train/loss") == metrics(expected, "train/loss")
    assert (run / "metrics.jsonl").read_text().count('{"step": 4,') == 1


@pytest.mark.slow
def test_spikes_of_the_loss_are_bad_steps_where_that_is_set(train):
    """A run that is stopped between them, killed in going back and killed after that takes the same steps."""
    more = "optimizer.epochs=3", "guard.max_bad_steps=2", "checkpoint.every_epochs=0.2"
    guards = "guard.spike_sigmas=100", "guard.spike_window=8"
    harm = [{"step": step, "to": "spike", "rank": 1} for step in (10, 12, 13)]
    run, status, output = train([*harm, {"step": 12, "to": "stop", "rank": 0}], [], *more, *guards)
    assert status == EXIT_RESUME, output
    for step, count in ((10, 1), (12, 1), (13, 2)):
        assert f"step {step} has a loss of " in output
        assert f", a spike; bad steps in a row: {count}" in output
    folder = run / "checkpoints"
    # Those of steps 10 and 12 waited for the end of the bad steps.
    assert [path.name[-2:] for path in layout.list_checkpoints(folder)] == ["09", "11", "13"]
    for harmed, place in (([], "remove_newer"), ([], "rewind"), (harm[1:], "_copy_tensors")):
        kill = {"kill": True, "rank": 0, "at": place, "call": 1}
        _, status, output = train([*harmed, kill], [], *more, *guards, folder=run)
        assert status == -signal.SIGKILL, output
        assert "the last 2 steps were bad: the run goes back to step 11, and skips 2 steps from there on\n" in output
        newest = "13" if place == "remove_newer" else "11"
        assert layout.list_checkpoints(folder)[-1].name[-2:] == newest
    _, status, output = train([], [], *more, *guards, folder=run)
    assert status == 0, output
    assert metrics(run, "train/loss").keys() == set(range(1, 17)) - {12, 13}
    modes = {path.name: path.stat().st_mode for path in run.iterdir() if path.is_file()}
    assert modes.keys() >= {"bad_steps.jsonl", "guard.json"}
    assert set(modes.values()) == {modes["config.yaml"]}
    expected, status, _ = train(harm[:1], [12, 13], *more)
    assert status == 0
    assert_equal(run, expected)


@pytest.mark.slow
def test_bad_steps_that_go_on_are_an_error_and_no_checkpoint_of_them_is_kept(train):
    more = "guard.max_bad_steps=2", "checkpoint.every_epochs=0.1", "optimizer.epochs=2"
    harm = [{"step": 4, "to": "weight", "rank": 0, "from_then_on": True}]
    run, status, output = train(harm, [], *more)
    assert status == 1
    assert (
        "error: the last 2 steps were bad, although the run had gone back before step 7 and skipped 2 steps; try to"
        " lower optimizer.lr, lower optimizer.max_grad_norm; where the weights are spoilt"
        f" already, remove the newest checkpoints first. The samples of bad steps are in {run / 'bad_steps.jsonl'}\n"
    ) in output
    assert [path.name for path in layout.list_checkpoints(run / "checkpoints")] == [
        layout.checkpoint_name(step) for step in (1, 2, 3)
    ]
    run, status, output = train([{**harm[0], "step": 1}], [], *more)
    assert status == 1
    assert "error: the last 2 steps were bad, and there is no checkpoint from before that to go back to; try" in output


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_found_by_the_next_checkpoint(train):
    """It has no effect on losses and gradients. The last checkpoint is that of a stop, or of the end."""
    more = "checkpoint.every_epochs=0.4", "optimizer.epochs=2"
    ema, statistics = ({"to": to, "rank": 0} for to in ("EMA", "statistics"))
    expected, status, output = train([], [], *more, ranks=1)
    assert status == 0, output
    run, status, output = train([ema | {"step": 4}, {"step": 4, "to": "stop", "rank": 0}], [], *more, ranks=1)
    assert status == EXIT_RESUME, output
    assert "rank 0: norm.weight in ema.safetensors is not finite: there is no checkpoint of step 5\n" in output
    assert f"step 5/11; the same command resumes from {run / 'checkpoints' / layout.checkpoint_name(3)}\n" in output
    _, status, output = train([ema | {"step": 4}], [], *more, ranks=1, folder=run)
    assert status == 0, output
    assert "norm.weight in ema.safetensors is not finite: the run goes back to step 3\n" in output
    assert_equal(run, expected)
    shutil.rmtree(run / "checkpoints" / layout.checkpoint_name(11))
    _, status, output = train([statistics | {"step": 11}], [], *more, ranks=1, folder=run)
    assert status == 0, output
    assert "norm.running_var in model.safetensors is not finite: the run goes back to step 9\n" in output
    assert_equal(run, expected)

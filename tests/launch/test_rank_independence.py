"""The same run on 1, 2 and 4 ranks, with everything on that is random or statistical: equal up to rounding."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.checkpoint import layout
from launch.interrupt import EXIT_RESUME

STOPPED_RUN = Path(__file__).with_name("stopped_run.py")
STEPS = 16
EVERYTHING = "model.drop_path_rate=0.3", "model.norm_group=8", "checkpoint.every_epochs=99", "log.eval_every_epochs=99"
ACCUMULATION = {1: 1, 2: 2, 4: 1}  # micro-steps by ranks: 4 groups of BatchNorm in a batch, or 1


@pytest.fixture(scope="module")
def train(forked, train_arguments, small_shards, tmp_path_factory) -> Callable[..., Path]:
    """Returns a function: ranks and overrides → the folder of the run.

    stop: the step in which SIGTERM reaches rank 0, after which there is another; the run is finished by default.
    output: of a run that is resumed.
    """

    def run(ranks: int, *more: str, stop: int | None = None, output: Path | None = None) -> Path:
        output = output or tmp_path_factory.mktemp(f"ranks-{ranks}") / "run"
        micro_steps = f"optimizer.gradient_accumulation_steps={ACCUMULATION[ranks]}"
        arguments = train_arguments(small_shards, output, *EVERYTHING, micro_steps, *more)
        wanted = {"STOP_AT": json.dumps({"at": f"step {stop}", "signals": ["SIGTERM"], "rank": 0})} if stop else {}
        finished = forked(ranks, STOPPED_RUN, *arguments, **wanted)
        assert finished.returncode == (EXIT_RESUME if stop else 0), finished.stderr
        return output

    return run


@pytest.fixture(scope="module")
def one(train) -> Path:
    """The whole run on one rank."""
    return train(1, "optimizer.epochs=3")


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest, _ = layout.find_newest(run / "checkpoints")
    return load_file(newest / layout.MODEL_NAME)


def assert_near(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], kind: str) -> None:
    """Asserts that these tensors differ by 1e-4 of their largest value at most, room for any processor's rounding."""
    names = [name for name in left if name.endswith(kind)]
    assert names
    for name in names:
        tolerance = 1e-4 * right[name].abs().max().item()
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_losses_and_variances_do_not_depend_on_the_number_of_ranks(train, one):
    others = [train(ranks, "optimizer.epochs=3") for ranks in (2, 4)]
    assert len(losses(one)) == STEPS
    assert losses(one)[-1] < losses(one)[0]
    for other in others:
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)
        assert_near(weights(other), weights(one), "running_var")


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_and_zero_stages_in_mid_epoch(train, one):
    """4 → 1 → 2 ranks under ZeRO-1, 3 and 0, with the same command but for the stage."""
    run = train(4, "optimizer.epochs=3", stop=5)
    train(1, "optimizer.epochs=3", "engine.zero_stage=3", stop=10, output=run)
    train(2, "optimizer.epochs=3", "engine.zero_stage=0", output=run)
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)
    assert_near(weights(run), weights(one), "running_var")


@pytest.mark.slow
def test_weights_and_running_means_do_not_depend_on_the_number_of_ranks(train):
    """With an eps that hides rounding errors from AdamW.

    The gradient of a bias before BatchNorm is zero but for rounding. At an eps of 1e-8 AdamW makes steps of the size of
    the learning rate from it: BatchNorm hides them from the loss, but they are in its running mean.
    """
    one, four = (weights(train(ranks, "optimizer.epochs=1.2", "optimizer.eps=1e-3")) for ranks in (1, 4))
    for kind in ("running_mean", "running_var", "weight", "num_batches_tracked"):
        assert_near(four, one, kind)
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=0, atol=1e-5)

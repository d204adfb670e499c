"""The same run on 1, 2 and 4 ranks, with everything on that is random or statistical: equal up to rounding."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import checkpoint

STEPS = 31
EVERYTHING = "model.drop_path_rate=0.3", "model.norm_group=8", "checkpoint.every_epochs=99", "log.eval_every_epochs=99"
ACCUMULATION = {1: 1, 2: 2, 4: 1}  # micro-steps by ranks: 4 groups of BatchNorm in a batch, or 1


@pytest.fixture(scope="module")
def train(forked, train_arguments, small_shards, tmp_path_factory) -> Callable[..., Path]:
    """Returns a function: ranks and overrides → the folder of the finished run."""

    def run(ranks: int, *more: str) -> Path:
        output = tmp_path_factory.mktemp(f"ranks-{ranks}") / "run"
        micro_steps = f"optimizer.gradient_accumulation_steps={ACCUMULATION[ranks]}"
        arguments = train_arguments(small_shards, output, *EVERYTHING, micro_steps, *more)
        finished = forked(ranks, "launch/train.py", *arguments)
        assert finished.returncode == 0, finished.stderr
        return output

    return run


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest, _ = checkpoint.find_newest(run / "checkpoints")
    return load_file(newest / checkpoint.MODEL_NAME)


def assert_near(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], kind: str) -> None:
    """Asserts that these tensors differ by 1e-5 of their largest value at most."""
    names = [name for name in left if name.endswith(kind)]
    assert names
    for name in names:
        tolerance = 1e-5 * right[name].abs().max().item()
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_losses_and_variances_do_not_depend_on_the_number_of_ranks(train):
    one, *others = (train(ranks, "optimizer.epochs=6") for ranks in ACCUMULATION)
    assert len(losses(one)) == STEPS
    assert losses(one)[-1] < losses(one)[0]
    for other in others:
        assert losses(other) == pytest.approx(losses(one), rel=1e-5)
        assert_near(weights(other), weights(one), "running_var")


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
        torch.testing.assert_close(four[name], one[name], rtol=0, atol=1e-6)

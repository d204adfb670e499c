"""What the guard counts as bad: its rules, on steps as the loop hands them in. Runs are in faults/."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from dataio.manifest import load_manifest
from launch.batchnorm import convert_batchnorm
from launch.checkpoint.layout import GuardState
from launch.distributed import RunError
from launch.flops import MfuConstants
from launch.guard import BAD_STEPS_NAME, STATE_NAME, Guard, TrainedStep
from launch.monitor import Monitor


@pytest.fixture
def make_guard(alone, small_shards, configure, tmp_path):
    """Returns a function: overrides, the start's first step → the guard of a run with a small model."""
    monitor = Monitor(tmp_path / "run", 0, 1000, 1, MfuConstants(1, 1.0))
    manifest, model = load_manifest(small_shards / "train"), nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    convert_batchnorm(model, 2)
    yield lambda *overrides, first_step=0: Guard(configure(*overrides), manifest, monitor, model, first_step)
    monitor.close()


def good(number: int) -> TrainedStep:
    return TrainedStep(number, np.array([number]), [torch.tensor(1.0)], applied=True)


def skipped(number: int, loss: float = math.nan) -> TrainedStep:
    return TrainedStep(number, np.array([number]), [torch.tensor(loss)], applied=False)


def test_only_bad_steps_in_a_row_count(make_guard):
    guard = make_guard("guard.max_bad_steps=3")
    found = [guard.check((skipped if bad else good)(step), 1.0) for step, bad in enumerate([1, 1, 0, 1, 1, 1])]
    assert found == [False] * 5 + [True]
    assert guard.in_a_row == [3, 4, 5]


def test_a_step_that_is_passed_over_is_neither_good_nor_bad(make_guard):
    guard = make_guard("guard.max_bad_steps=3")
    for step in (skipped(0), skipped(1), TrainedStep(2, np.array([2]), [], applied=False)):
        assert not guard.check(step, math.nan)
    assert guard.check(skipped(3), math.nan)


def test_spikes_are_measured_by_the_median_absolute_deviation(make_guard):
    guard = make_guard("guard.spike_sigmas=10", "guard.spike_window=9")
    losses = [1.0 + 0.01 * number for number in range(9)]
    for number, loss in enumerate(losses, 1):
        guard.check(good(number), loss if number > 1 else math.nan)
    guard.check(good(10), 1e9)
    assert guard.in_a_row == []  # the window was not full: this is one of the good losses
    # Now they are 1.01 … 1.08 and 1e9: the median is 1.05, the deviation 0.02, ten sigmas 0.297.
    for number, (loss, bad) in enumerate([(1.05 + 0.31, True), (1.05 + 0.29, False)], 11):
        guard.check(good(number), loss)
        assert bool(guard.in_a_row) == bad, loss


def go_back(guard: Guard, at: int, to: int, fault: str | None = None) -> None:
    guard.go_back(at, to, fault)
    guard.restore(GuardState(losses=[], in_a_row=[]))  # the checkpoint's
    guard.report_going_back(at, to)


def test_a_run_goes_back_again_only_when_it_has_got_further(make_guard, capsys):
    guard = make_guard("guard.max_bad_steps=2", "optimizer.max_grad_norm=null")
    assert [guard.check(skipped(step), 1.0) for step in (5, 6)] == [False, True]
    go_back(guard, at=6, to=4)
    assert "the last 2 steps were bad: the run goes back to step 4, and skips 2 steps from there on\n" in (
        capsys.readouterr().out
    )
    assert (guard.skipped, guard.in_a_row, guard.is_checkpoint_safe) == ({5, 6}, [], False)
    with pytest.raises(RunError) as caught:
        guard.go_back(at=8, to=4)
    assert str(caught.value).startswith(
        "the last 0 steps were bad, although the run had gone back before step 9 and skipped 2 steps; try to lower"
        " optimizer.lr, set optimizer.max_grad_norm; where the weights are spoilt already, remove the newest"
        " checkpoints first. The samples of bad steps are in"
    )
    for step in (7, 8):
        guard.check(good(step), 1.0)
    assert guard.is_checkpoint_safe
    guard.go_back(at=9, to=8, fault="the EMA is not finite")
    with pytest.raises(RunError, match="^the EMA is not finite, and there is no checkpoint from before that"):
        make_guard().go_back(9, None, "the EMA is not finite")


def test_a_restarted_run_skips_the_same_steps(make_guard):
    guard = make_guard("guard.max_bad_steps=2")
    for step in (5, 6):
        guard.check(skipped(step), 1.0)
    go_back(guard, at=6, to=4)
    for first_step in (4, 6):  # the run has got no further: it does not go back again, and saves nothing
        again = make_guard(first_step=first_step)
        assert (again.skipped, again.is_checkpoint_safe) == ({5, 6}, False)
    assert make_guard(first_step=7).is_checkpoint_safe
    older = make_guard(first_step=3)  # as the newer checkpoints were removed, or are damaged
    assert (older.skipped, older.is_checkpoint_safe) == ({5, 6}, True)
    for step in (8, 9):
        older.check(skipped(step), 1.0)
    go_back(older, at=9, to=3)
    assert make_guard(first_step=3).skipped == {5, 6, 8, 9}
    assert make_guard().skipped == set()  # anew


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"at": 6, "to": 4', "the file: Invalid JSON: EOF while parsing an object at line 1 column 17"),
        ('{"at": 6, "to": 4, "skipped": [-1]}', "skipped.0: Input should be greater than or equal to 0"),
    ],
)
def test_a_damaged_state_is_named(make_guard, tmp_path, capsys, content, fault):
    path = tmp_path / "run" / STATE_NAME
    path.write_text(content)
    assert make_guard(first_step=4).skipped == set()
    assert f"{path} cannot be read ({fault}); the steps that it names are not skipped" in capsys.readouterr().err


def test_the_state_is_restored_as_it_was_saved(make_guard):
    """Otherwise a kill would decide which steps are spikes."""
    options = "guard.spike_sigmas=10", "guard.spike_window=8"
    guard = make_guard(*options)
    for number in range(10):
        guard.check(good(number), 1.0 + 0.01 * number)
    guard.judge(9.0)
    guard.check(skipped(10), 0.0)
    state = guard.state()
    assert state == GuardState(losses=[1.0 + 0.01 * number for number in range(2, 10)], in_a_row=[9, 10])
    again = make_guard(*options, first_step=11)
    again.restore(json.loads(json.dumps(state)))
    for copy in (guard, again):
        copy.check(good(11), 0.0)
        copy.judge(1.06 + 0.31)
    assert guard.state() == again.state() == state | {"in_a_row": [9, 10, 11]}


def test_a_full_disk_costs_records_and_ends_no_run(make_guard, tmp_path, capsys, no_file_larger_than):
    guard, path = make_guard("guard.max_bad_steps=2"), tmp_path / "run" / BAD_STEPS_NAME
    guard.check(skipped(1), 1.0)
    whole = path.read_bytes()
    with no_file_larger_than(len(whole) + 10):
        guard.check(skipped(2), 1.0)
    assert path.read_bytes() == whole
    with no_file_larger_than(10):
        go_back(guard, at=3, to=0)
    assert guard.skipped == {1, 2}
    path.write_bytes(whole[:-1])  # as after a kill
    guard.check(skipped(3), 1.0)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]
    errors = capsys.readouterr().err
    assert f"cannot write to {path}: File too large; training goes on" in errors
    assert f"cannot write {tmp_path / 'run' / STATE_NAME}: File too large; training goes on" in errors


def test_gradients_are_nan_where_the_loss_or_batchnorm_is_not_finite(make_guard):
    guard = make_guard()
    (norm,) = guard._norms
    model = nn.Sequential(nn.Conv2d(1, 1, 1), norm)
    images = torch.randn(2, 1, 3, 3)

    def gradient(loss=1.0, sums=0.0) -> torch.Tensor:
        model[1].sums.zero_()[0] = sums
        out = model(images).square().mean() * loss
        (found,) = torch.autograd.grad(guard.spread_non_finite(out), model[1].weight)
        return found

    (plain,) = torch.autograd.grad(model(images).square().mean(), model[1].weight)
    assert torch.equal(gradient(), plain)
    for loss, sums in ((math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan), (1.0, math.inf)):
        assert gradient(loss, sums).isnan().all()

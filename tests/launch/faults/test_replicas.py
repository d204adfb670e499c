"""Ranks whose copies of the state drift apart, by one bit, in real runs and in fingerprints."""

import json
import socket
from pathlib import Path

import pytest
import torch

from launch.checkpoint import layout
from launch.replicas import fingerprint

HARMED_RUN = Path(__file__).with_name("harmed_run.py")
SHORT = "optimizer.epochs=1", "optimizer.warmup_epochs=0.2", "log.eval_every_epochs=9"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "place", "named"),
    [
        (3, 1, "statistics bit", "BatchNorm's statistics of rank 2 (HOST)"),
        (3, 3, "EMA bit", "the EMA of rank 2 (HOST)"),
        (2, 0, "weight bit", "the weights of rank 0 (HOST), rank 1 (HOST)"),
    ],
)
def test_ranks_that_drift_apart_are_named(forked, train_arguments, small_shards, tmp_path, ranks, stage, place, named):
    """The comparisons are after steps 2, 4, 6, and the checkpoint of step 3: the last one of equal ranks."""
    more = "optimizer.global_batch_size=24", "guard.compare_every_steps=2", f"engine.zero_stage={stage}"
    arguments = train_arguments(small_shards, tmp_path / "run", *SHORT, *more, "checkpoint.every_epochs=0.43")
    harm = [{"step": 4, "to": place, "rank": ranks - 1}]
    finished = forked(ranks, HARMED_RUN, *arguments, HARM=json.dumps(harm))
    assert finished.returncode == 1
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: after step 4 the ranks are not equal: {named.replace('HOST', socket.gethostname())}. A machine"
        " computes wrongly, or unlike models of GPUs round otherwise. The ranks were equal after step 2: remove"
        " checkpoints of later steps, and start again on other machines"
    )
    assert [path.name for path in layout.list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003"]


def test_a_fingerprint_changes_with_any_bit():
    torch.manual_seed(0)
    tensors = [torch.randn(3, 5), torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last), torch.tensor(7)]
    expected = fingerprint(tensors)
    assert expected.dtype == torch.float32
    assert ((expected >= 0) & (expected < 2**24) & (expected == expected.round())).all()
    for number in range(len(tensors)):
        for bit in range(32):
            changed = [other.clone() for other in tensors]
            words = changed[number] if number == 2 else changed[number].view(torch.int32)
            words[(0,) * words.dim()] ^= 1 << bit if bit < 31 else -(1 << 31)
            assert not torch.equal(fingerprint(changed), expected), (number, bit)
    assert not torch.equal(fingerprint(tensors[::-1]), expected)

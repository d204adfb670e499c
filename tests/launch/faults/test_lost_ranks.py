"""Ranks that are killed, and ranks that fail, in a run: what the others make of that, and who says it.

The ranks are real processes with a real group, whose store is rank 0's, as under deepspeed and srun. test_kills.py
kills those of training.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.distributed import connection_loss
from launch.interrupt import EXIT_FATAL, EXIT_RESUME
from launch.watchdog import HUNG_NAME, LOST_NAME

KILLED = -9
RANKS = """
import contextlib, os, signal, sys, threading
from datetime import timedelta
from pathlib import Path
from launch.interrupt import StopSignals, exit_process
signals = StopSignals().listen()

import torch
from launch.distributed import failed_rank_check, raise_on_all_ranks, run_distributed
from launch.watchdog import Watchdog

fate, victim, place, folder, port = sys.argv[1:]
os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")

def meet(rank, here):
    if here == place and rank == int(victim):
        if fate == "fails":
            raise RuntimeError("a mistake")
        os.kill(os.getpid(), signal.SIGKILL)
    # as in a collective of NCCL on one machine, which does not notice that another rank is gone
    if here in ("waiting", "unnoticed"):
        threading.Event().wait()
    torch.distributed.all_reduce(torch.ones(1))

def body(rank_info, device):
    rank = rank_info.rank
    signals.defer(failed_rank_check())
    torch.distributed.barrier()
    meet(rank, "start-up")
    with raise_on_all_ranks():
        watchdog = Watchdog(Path(folder), rank, rank_info.world_size, 2.0 if place == "unnoticed" else 450.0, "a start")
    if place == "unnoticed":  # as under plain srun, which leaves the other ranks alone
        signals.ignore()
        watchdog.arm()
    signals.defer(watchdog.status_without_rank)
    with contextlib.closing(watchdog), watchdog.ending_lost_runs():
        watchdog.beat(11, "computing")
        if place == "elsewhere" and rank == int(victim):
            watchdog._own.machine = "another"
            watchdog._show()
        torch.distributed.barrier()
        meet(rank, place)
    return 0

exit_process(run_distributed(body, "cpu", timedelta(hours=1)))
"""


@pytest.fixture
def end(forked, free_port, tmp_path):
    """Returns a function: how a rank ends, which, and where → (exit statuses, standard error, the run's folder)."""
    (tmp_path / "ranks.py").write_text(RANKS)

    def run(fate: str, victim: int, place: str) -> tuple[list[int], str, Path]:
        finished = forked(3, tmp_path / "ranks.py", fate, victim, place, tmp_path / "run", free_port)
        return finished.statuses, finished.stderr, tmp_path / "run"

    return run


@pytest.mark.parametrize(("victim", "place"), [(0, "training"), (1, "training"), (0, "waiting"), (2, "elsewhere")])
def test_one_rank_says_which_was_killed(end, victim, place):
    statuses, errors, run = end("is killed", victim, place)
    assert statuses.pop(victim) == KILLED
    assert statuses == [EXIT_RESUME, EXIT_RESUME], errors
    [line] = [line for line in errors.splitlines() if not line.startswith("SIGTERM: the run stops")]
    name = rf"rank {victim} \([^ ]+, process [0-9]+\)"
    if place == "elsewhere":
        name = r"a rank on another machine \(Connection (closed|reset) by peer.*\)"
    expected = rf"error: {name} gone in step 12, killed or out of memory; the same command goes on from the last .*"
    assert re.fullmatch(expected, line)
    start_id, slurm_start, lost = (run / "heartbeats" / LOST_NAME).read_text().splitlines()
    assert (start_id, slurm_start) == ("a start", "")
    assert lost in line


@pytest.mark.parametrize(("victim", "place"), [(0, "training"), (1, "training"), (0, "start-up"), (1, "start-up")])
def test_a_rank_that_fails_is_the_only_one_with_a_traceback(end, victim, place):
    """The run must not be started again for ever: no status is EXIT_RESUME, and nothing says that a rank is gone."""
    statuses, errors, run = end("fails", victim, place)
    assert statuses.pop(victim) == EXIT_FATAL
    assert statuses == [EXIT_FATAL, EXIT_FATAL], errors
    assert errors.count("Traceback") == 1
    assert errors.count("RuntimeError: a mistake\n") == 1
    assert not (run / "heartbeats" / LOST_NAME).exists()


def test_a_rank_that_has_failed_does_not_count_as_hung(end):
    """Its launcher does not end the others, which wait for it: they end with 1, as it did."""
    statuses, errors, run = end("fails", 1, "unnoticed")
    assert statuses == [EXIT_FATAL] * 3, errors
    assert re.search(
        r"^error: rank 1 \([^ ]+, process [0-9]+\) has failed, for the reason that it ", errors, re.MULTILINE
    )
    assert errors.count("Traceback") == 1
    assert not (run / "heartbeats" / HUNG_NAME).exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_during_the_start_up(end, victim):
    """Without heartbeats, rank 0's store knows whether a rank has failed: when it is gone, the run is not resumable."""
    statuses, errors, _ = end("is killed", victim, "start-up")
    assert statuses.pop(victim) == KILLED
    assert statuses[0] == (EXIT_FATAL if victim == 0 else EXIT_RESUME), errors
    assert statuses[1] in ({EXIT_FATAL} if victim == 0 else {EXIT_FATAL, EXIT_RESUME}), errors
    assert "Traceback" not in errors
    assert errors.count("error: ") <= 1


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (RuntimeError(f"{GLOO}pair.cc:538] Read error [10.0.0.7]:23692: Connection reset by peer"), "Connection reset"),
        (
            RuntimeError(f"{GLOO}pair.cc:547] Connection closed by peer [10.0.0.7]:21405"),
            "Connection closed by peer [1",
        ),
        (dist.DistBackendError("NCCL error in: x.cpp, remote process exited or there was a network"), "remote process"),
        (RuntimeError(f"{GLOO}pair.cc:538] Read error [10.0.0.7]:23692: Connection timed out"), "Connection timed out"),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), "Failed to recv"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "failed to recv"),
        (dist.DistNetworkError("The client socket has failed to connect to (node7, 29500)"), "failed to connect"),
        (RuntimeError("cannot read shard-00001.tar: Connection reset by peer"), None),
        (RuntimeError(f"[enforce fail at {GLOO}pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"), None),
        (dist.DistBackendError("NCCL error in: x.cpp, unhandled cuda error"), None),
        (torch.OutOfMemoryError("CUDA out of memory"), None),
    ],
)
def test_what_the_libraries_say_of_another_rank_that_is_gone(error, loss):
    found = connection_loss(error)
    assert found is None if loss is None else found.startswith(loss)

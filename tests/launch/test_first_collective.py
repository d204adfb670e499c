"""The first all-reduce of a run: ranks that do not come, and results that are wrong, in real groups."""

import re
import socket
from datetime import timedelta
from signal import SIGKILL

import pytest

from launch.distributed import run_distributed
from launch.first_collective import describe_missing
from launch.interrupt import EXIT_REFUSED, EXIT_RESUME

MEET = """
import os, signal, sys, threading
from datetime import timedelta
import torch.distributed as dist
from launch import distributed, first_collective

fault, victim, *port = sys.argv[1:]
if port:  # the store is rank 0's, as under deepspeed and srun
    os.environ.update(MASTER_PORT=port[0], TORCHELASTIC_USE_AGENT_STORE="False")
if fault != "absent":  # the first rank to end shall not end the others
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def die(numbers):
    store = dist.distributed_c10d._get_default_store()
    store.wait([f"launch: first collective entered {rank}" for rank in range(3)])
    os.kill(os.getpid(), signal.SIGKILL)

def fail(store, limit_seconds):
    raise dist.DistStoreError("Too many open files")

def check(device, check=distributed.check_first_collective):
    dist.barrier()
    if dist.get_rank() == int(victim):
        if fault == "absent":
            threading.Event().wait()
        if fault == "corrupt":
            all_reduce = dist.all_reduce
            dist.all_reduce = lambda numbers: all_reduce(numbers.add_(numbers == 7))  # a bit flips in its memory
        if fault == "killed":
            dist.all_reduce = die
        if fault == "own":
            first_collective._connect = fail
    check(device, 3 if fault == "absent" else 600)

distributed.check_first_collective = check
sys.exit(distributed.run_distributed(lambda rank_info, device: 7, "cpu", timedelta(hours=1)))
"""


@pytest.fixture
def meet(forked, free_port, tmp_path):
    """Returns a function: a fault, its rank, whether rank 0 has the store → three finished ranks."""
    (tmp_path / "script.py").write_text(MEET)
    return lambda fault, victim, own_store: forked(3, tmp_path / "script.py", fault, victim, *[free_port] * own_store)


def test_ranks_that_do_not_come_are_named(meet):
    finished = meet("absent", 1, own_store=True)
    assert finished.returncode == EXIT_REFUSED
    message = "rank 1 did not come to the first all-reduce within 3 s, unlike the others; see what these processes do"
    assert finished.stderr == f"error: {message}\n"


@pytest.mark.parametrize("own_store", [False, True])
def test_wrong_sums_are_said_once(meet, own_store):
    finished = meet("corrupt", 1, own_store)
    assert finished.statuses == [EXIT_REFUSED] * 3, finished.stderr
    message = (
        rf"the first all-reduce on rank [012] \({re.escape(socket.gethostname())}\) is wrong in 1 of 524288 sums; a"
        " host or the network corrupts data: try fewer hosts"
    )
    assert re.fullmatch(f"error: {message}\n", finished.stderr)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_leaves_a_run_that_can_be_started_again(meet, victim):
    finished = meet("killed", victim, own_store=True)
    assert finished.statuses.pop(victim) == -SIGKILL
    assert finished.statuses == [EXIT_RESUME] * 2, finished.stderr
    [line] = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    if victim == 0:
        assert re.fullmatch("error: gone in the first all-reduce, .*: rank 0 \\(.*\\); start again", line)
    else:
        assert re.fullmatch(
            "error: the first all-reduce on rank [02] .* lost another rank, .*; start again, and .*", line
        )


def test_a_rank_with_a_fault_of_its_own_says_so(meet):
    finished = meet("own", 2, own_store=True)
    assert finished.statuses[2] == EXIT_REFUSED, finished.stderr
    name = re.escape(f"rank 2 ({socket.gethostname()})")
    expected = f"^error: {name} cannot take part in the first all-reduce: Too many open files$"
    assert re.search(expected, finished.stderr, re.MULTILINE)


def test_ranks_that_came_are_named_with_their_hosts():
    text = describe_missing(["node1", "node1", "node2"], [True, False, False], 60)
    assert text.startswith("the first all-reduce has not ended within 60 s on rank 1 (node1), rank 2 (node2); see wh")


def test_a_single_rank_meets_nobody(no_launcher):
    assert run_distributed(lambda rank_info, device: 7, "cpu", timedelta(hours=1)) == 7

"""The first all-reduce of a run: ranks that do not come, and results that are wrong, in real groups."""

import re
import socket
from datetime import timedelta

import pytest

from launch.distributed import run_distributed
from launch.first_collective import describe_missing

MEET = """
import sys, threading
from datetime import timedelta
import torch.distributed as dist
from launch import distributed

def check(device, check=distributed.check_first_collective):
    dist.barrier()
    if dist.get_rank() == 1 and sys.argv[1] == "absent":
        threading.Event().wait()
    if dist.get_rank() == 1 and sys.argv[1] == "corrupt":
        all_reduce = dist.all_reduce
        dist.all_reduce = lambda numbers: all_reduce(numbers.add_(numbers == 7))  # a bit flips in this rank's memory
    check(device, 600 if sys.argv[1] == "corrupt" else 5)

distributed.check_first_collective = check
sys.exit(distributed.run_distributed(lambda rank_info, device: 7, "cpu", timedelta(hours=1)))
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "absent",
            "rank 1 did not come to the first all-reduce within 5 s, unlike the others; see what these processes do",
        ),
        (
            "corrupt",
            r"the first all-reduce on rank [012] \(HOST\) is wrong in 1 of 524288 sums; a host or the network corrupts"
            " data: try fewer hosts",
        ),
    ],
)
def test_one_message_says_why_the_ranks_do_not_meet(forked, tmp_path, fault, message):
    script = tmp_path / "script.py"
    script.write_text(MEET)
    finished = forked(3, script, fault)
    assert finished.returncode == 2
    assert re.fullmatch(f"error: {message.replace('HOST', re.escape(socket.gethostname()))}\n", finished.stderr)


def test_ranks_that_came_are_named_with_their_hosts():
    text = describe_missing(["node1", "node1", "node2"], [True, False, False], 60)
    assert text.startswith("the first all-reduce has not ended within 60 s on rank 1 (node1), rank 2 (node2); see wh")


def test_a_single_rank_meets_nobody(no_launcher):
    assert run_distributed(lambda rank_info, device: 7, "cpu", timedelta(hours=1)) == 7

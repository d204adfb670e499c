"""The start-up check: runs of which one rank has other code or another folder, and comparisons of ranks' records."""

import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.startup_check import (
    RankRecord,
    check_ranks,
    find_faults,
    find_other_kernels,
    find_warnings,
    find_wrong_clocks,
    hash_code,
    make_record,
    name_ranks,
)

ROOT = Path(__file__).parents[2]
GIB = 2**30

RANK_1_IS_ODD = """
import os, resource, socket, sys
fault, place, *words = sys.argv[1:]
odd = os.environ["RANK"] == "1"
if odd:
    socket.gethostname = lambda: "node7"
if odd and fault == "code":
    sys.path.insert(0, place)
    for name in [name for name in sys.modules if name.split(".")[0] == "launch"]:
        del sys.modules[name]
from launch import train
if odd and fault == "folder":
    os.chdir(place)
if odd and fault == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
sys.exit(train.main(words))
"""


@pytest.mark.parametrize(
    ("fault", "ranks", "message"),
    [
        (
            "code",
            3,
            r"the code of rank 1 \(node7\) is not that of the other ranks: launch/added.py, launch/schedule.py; start"
            " all ranks from the same commit",
        ),
        (
            "folder",
            2,
            "rank 1: node7 has another folder at PLACE/run than rank 0; choose an output on a file system that all"
            " hosts share, by its absolute path",
        ),
        (
            "full",
            2,
            "rank 1: node7 cannot write to the run's folder run: File too large; make it writable there, or choose"
            " another output",
        ),
    ],
)
def test_a_rank_on_an_odd_host_ends_all(forked, train_arguments, small_shards, tmp_path, fault, ranks, message):
    script, place, top = tmp_path / "script.py", tmp_path / "elsewhere", tmp_path / "top"
    script.write_text(RANK_1_IS_ODD)
    shutil.copytree(ROOT / "launch", place / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    with open(place / "launch" / "schedule.py", "a") as module:
        module.write("# changed\n")
    (place / "launch" / "added.py").touch()
    (place / "launch" / ".#plan.py").symlink_to("user@node7.4711:1")  # Emacs's lock
    top.mkdir()
    arguments = train_arguments(small_shards, "run", "optimizer.global_batch_size=24")
    arguments[1] = str(ROOT / arguments[1])
    in_top = "import os, runpy, sys; os.chdir(sys.argv[1]); sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0])"
    (tmp_path / "in_top.py").write_text(in_top)
    finished = forked(ranks, tmp_path / "in_top.py", top, script, fault, place, *arguments)
    assert finished.returncode == 2, finished.stderr
    assert re.fullmatch(f"error: {message.replace('PLACE', re.escape(str(place)))}\n", finished.stderr)
    passed = f"start-up check: {ranks} ranks on 2 hosts, same code and versions\n" in finished.stdout
    assert passed == (fault != "code")
    assert list(top.iterdir()) == []
    assert [path.name for path in place.iterdir()] == ["launch"]


SOFTWARE = {"torch": "2.11.0", "DALI": "2.4.0"}
EIGHT = [RankRecord(f"node{rank // 4}", SOFTWARE, "", "H100", "580.1", 79 * GIB, 80 * GIB) for rank in range(8)]


def changed(records: list[RankRecord], ranks: list[int], **fields: object) -> list[RankRecord]:
    return [replace(record, **fields) if rank in ranks else record for rank, record in enumerate(records)]


def test_equal_ranks_have_no_fault():
    assert find_faults(EIGHT) == find_warnings(EIGHT) == []
    assert find_wrong_clocks(["node0"] * 3, [100.0, 100.5, 110.0]) == []


def test_other_versions_are_faults():
    records = changed(EIGHT, [4, 5, 6, 7], software={"torch": "2.10.0"})
    records = changed(records, [3], software=SOFTWARE | {"torch": "2.9.1"})
    assert find_faults(records) == [
        "torch is 2.11.0 on ranks 0, 1, 2 (node0), 2.9.1 on rank 3 (node0), 2.10.0 on the other 4 ranks; install the"
        " same on all hosts, with pip install -r requirements.txt",
        "DALI is missing on ranks 4, 5, 6, 7 (node1), 2.4.0 on the other 4 ranks; install the same on all hosts, with"
        " pip install -r requirements.txt",
    ]


def test_unlike_gpus_and_taken_memory_are_warnings():
    records = changed(EIGHT, [5], gpu="A100", driver="535.2")
    records = changed(records, [2], free_bytes=12 * GIB)
    assert find_faults(records) == []
    assert find_warnings(records) == [
        "the GPU is A100 on rank 5 (node1), H100 on the other 7 ranks: all wait for the slowest, and unlike models may"
        " round otherwise, which guard.compare_every_steps takes for a fault",
        "NVIDIA's driver is 535.2 on rank 5 (node1), 580.1 on the other 7 ranks",
        "of the 80.0 GiB of the GPU of rank 2 (node0), 12.0 GiB are free: other processes hold the rest, left over from"
        " another run perhaps; nvidia-smi there shows them",
    ]


def test_wrong_clocks_are_named():
    clocks = [1e9, 1e9 + 0.1, 1e9 + 75, 1e9 - 3600]
    assert find_wrong_clocks(["node0", "node1", "node2", "node3"], clocks) == [
        "the clock of rank 2 (node2) is 75 s ahead of the others; set it by NTP",
        "the clock of rank 3 (node3) is 3600 s behind the others; set it by NTP",
    ]


def test_other_builds_of_the_kernels_are_warnings():
    files = [{"polaformer/a.so": "1", "polaformer/b.so": "1"}] * 2 + [{"polaformer/a.so": "2", "polaformer/b.so": "1"}]
    assert find_other_kernels(["node0", "node0", "node1"], files) == [
        "polaformer/a.so of rank 2 (node1) is another build than that of the other ranks"
    ]


def test_ranks_are_named_with_their_hosts():
    assert name_ranks([1, 4, 5], ["a", "b", "c", "d", "e", "e"]) == "rank 1 (b), ranks 4, 5 (e)"


def test_the_record_of_this_process(alone, capsys):
    files = hash_code()
    assert {"launch/train.py", "dataio/files.py", "polaformer/ops.py"} <= files.keys()
    assert {Path(path).suffix for path in files} <= {".py", ".cpp", ".cu", ".cuh", ".h", ".so"}
    record = make_record(alone, files)
    assert (record.host, record.software["torch"]) == (socket.gethostname(), torch.__version__)
    check_ranks(alone)
    assert capsys.readouterr() == ("", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_record_of_a_gpu():
    record = make_record(torch.device("cuda", 0), {})
    assert "compute capability" in record.gpu
    assert 0 < record.free_bytes <= record.total_bytes
    assert re.fullmatch(r"\d+\.\d+\.\d+", record.software["NCCL"])

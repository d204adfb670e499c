"""Rank and world size from every launcher, joining the process group, and errors that all ranks share."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from launch.distributed import (
    RankInfo,
    RunError,
    broadcast_object,
    init_distributed,
    raise_on_all_ranks,
    read_rank_info,
    run_distributed,
)
from launch.interrupt import EXIT_REFUSED

ROOT = Path(__file__).parents[2]
REPORT_RANK = Path(__file__).with_name("report_rank.py")
MINUTE = timedelta(minutes=1)

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
DEEPSPEED = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "CROSS_RANK": "1"}
# As Slurm 22.05 sets them, for the third of four nodes.
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "24", "SLURM_JOB_ID": "7"}
SALLOC = {"SLURM_NTASKS": "24", "SLURM_NPROCS": "24", "SLURM_JOB_ID": "7", "SLURM_TASKS_PER_NODE": "8(x2),4(x2)"}
STEP = {
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "24",
    "SLURM_STEP_NUM_TASKS": "24",
    "SLURM_JOB_ID": "7",
}
# An salloc shell on a cluster with use_interactive_step: a step of one task, in an allocation of more.
INTERACTIVE = STEP | BATCH | {"SLURM_STEP_NUM_TASKS": "1"}

REMEDY = "start the run with deepspeed, torchrun or srun, which set all of these, or unset them all"


@pytest.mark.parametrize(
    ("environ", "rank_info"),
    [
        ({"PATH": "/usr/bin"}, RankInfo(0, 0, 1, "python")),
        (TORCHRUN, RankInfo(5, 1, 8, "environment")),
        (DEEPSPEED, RankInfo(5, 1, 8, "environment")),
        (STEP, RankInfo(17, 1, 24, "srun")),
        (BATCH, RankInfo(0, 0, 1, "python")),
        (SALLOC, RankInfo(0, 0, 1, "python")),
        (INTERACTIVE, RankInfo(0, 0, 1, "srun")),
        (BATCH | DEEPSPEED, RankInfo(5, 1, 8, "environment")),
        (STEP | TORCHRUN, RankInfo(5, 1, 8, "environment")),
        (DEEPSPEED | TORCHRUN, RankInfo(5, 1, 8, "environment")),
    ],
)
def test_rank_and_world_size_of_each_launcher(environ, rank_info):
    assert read_rank_info(environ) == rank_info


def without(environ, name):
    return {key: value for key, value in environ.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "fault"),
    [
        *((without(TORCHRUN, name), f"{name} is not set although") for name in TORCHRUN),
        *((without(STEP, name), f"{name} is not set although") for name in ("SLURM_PROCID", "SLURM_LOCALID")),
        ({"LOCAL_RANK": "0"}, "RANK is not set although other variables of a launcher are"),
        (TORCHRUN | {"RANK": "-1"}, 'RANK is "-1", which is not a number'),
        (TORCHRUN | {"WORLD_SIZE": ""}, 'WORLD_SIZE is "", which is not a number'),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8 and local rank 1, which cannot be"),
        (DEEPSPEED | {"LOCAL_RANK": "6"}, "rank 5 of 8 and local rank 6, which cannot be"),
    ],
)
def test_incomplete_and_contradictory_variables_are_errors(environ, fault):
    with pytest.raises(ValueError, match=f"{re.escape(fault)}.*; {REMEDY}$"):
        read_rank_info(environ)


def test_an_unknown_device_type_is_an_error():
    with pytest.raises(ValueError, match='the device is "tpu"; use "cpu" or "cuda"'):
        init_distributed(read_rank_info({}), "tpu", MINUTE)


def test_a_rank_without_a_gpu_is_an_error():
    rank_info = RankInfo(rank=900, local_rank=900, world_size=1000, launcher="environment")
    with pytest.raises(RuntimeError, match="local rank 900 has no GPU, .*; start one rank per GPU"):
        init_distributed(rank_info, "cuda", MINUTE)


def test_without_scontrol_the_address_must_be_set(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[07-09]")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RuntimeError, match=r"the first host of gpu\[07-09\] is unknown .*; export its name as MASTER"):
        init_distributed(RankInfo(0, 0, 3, "srun"), "cpu", MINUTE)


HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("address", "kind", "fault"),
    [
        ({}, ValueError, f"MASTER_ADDR is not set although other variables of a launcher are; {REMEDY}"),
        ({"MASTER_ADDR": "127.0.0.1"}, ValueError, f"MASTER_PORT is not set although .*; {REMEDY}"),
        (HERE | {"MASTER_PORT": "http"}, ValueError, 'MASTER_PORT is "http", which is no port; use a number from 1 to'),
        (
            HERE | {"MASTER_PORT": "80000"},
            ValueError,
            'MASTER_PORT is "80000", which is no port; use a number from 1 to',
        ),
        (
            HERE | {"MASTER_ADDR": "no-such-host.invalid"},
            RuntimeError,
            "MASTER_ADDR is no-such-host.invalid, which this machine cannot resolve .*; set it to the address of",
        ),
    ],
)
def test_an_incomplete_address_is_an_error(no_launcher, address, kind, fault):
    """At once: PyTorch would wait for an unknown host as for a slow one."""
    os.environ.update(address)
    with pytest.raises(kind, match=f"^{fault}"):
        init_distributed(RankInfo(0, 0, 2, "environment"), "cpu", timedelta(hours=1))


@pytest.mark.parametrize(
    ("launcher", "variables", "remedy"),
    [
        ("environment", {"CROSS_RANK": "0"}, r"start it with deepspeed --master_port \d+"),
        ("environment", {}, r"set MASTER_PORT to another, like \d+"),
        ("srun", {}, r"export MASTER_PORT=\d+ before srun or sbatch"),
    ],
)
def test_a_taken_port_is_an_error(no_launcher, launcher, variables, remedy):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        os.environ.update(HERE | {"MASTER_PORT": port} | variables)
        with pytest.raises(RuntimeError, match=f"^port {port} is taken, by another run perhaps; {remedy}$"):
            init_distributed(RankInfo(0, 0, 2, launcher), "cpu", timedelta(hours=1))


def test_missing_ranks_are_an_error(no_launcher, free_port):
    os.environ.update(HERE | {"MASTER_PORT": str(free_port)})
    fault = (
        f"rank 0 did not meet the other ranks at 127.0.0.1, port {free_port}, within 0:00:01 .*; check that all 2 were"
        " started, and that this machine reaches that one"
    )
    with pytest.raises(RuntimeError, match=f"^{fault}$"):
        init_distributed(RankInfo(0, 0, 2, "environment"), "cpu", timedelta(seconds=1))


def clean_environment(folder, **more):
    """This process's environment without any launcher's variables, and an empty folder for compiled extensions."""
    launchers = ("SLURM_", "MASTER_", "LOCAL_", "DS_", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    return kept | ours | more


def report_ranks(launcher, device_type, folder, environ):
    """Runs report_rank.py under a launcher's command and returns what each rank found, by rank."""
    done = subprocess.run([*launcher, REPORT_RANK, device_type, folder], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def launcher_command(name, ranks, port):
    """torchrun or deepspeed of this Python's environment, even if that is not on the PATH."""
    command = str(Path(sys.executable).with_name(name))
    if name == "torchrun":
        return [command, "--standalone", f"--nproc-per-node={ranks}"]
    return [command, f"--num_accelerators={ranks}", "--master_addr=127.0.0.1", f"--master_port={port}"]


def test_plain_python_is_one_rank_with_its_own_port(tmp_path):
    # left over from another run, or exported by a batch script
    stale = {"MASTER_ADDR": "no-such-host", "MASTER_PORT": "1"}
    [found] = report_ranks([sys.executable], "cpu", tmp_path, clean_environment(tmp_path, **stale))
    assert (found["launcher"], found["group"], found["sum"]) == ("python", [0, 1], 1.0)
    assert found["master"][0] == "127.0.0.1"
    assert not (tmp_path / "extensions").exists(), "DeepSpeed compiled something"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_join_one_group(launcher, tmp_path, free_port):
    environ = clean_environment(tmp_path, DS_ACCELERATOR="cpu")
    ranks = report_ranks(launcher_command(launcher, 2, free_port), "cpu", tmp_path, environ)
    assert len(ranks) == 2
    for rank, found in enumerate(ranks):
        assert (found["rank"], found["local_rank"], found["world_size"]) == (rank, rank, 2)
        assert (found["launcher"], found["group"], found["sum"]) == ("environment", [rank, 2], 3.0)
        assert (found["device"], found["backend"], found["local_world_size"]) == ("cpu", "gloo", 2)


@pytest.mark.slow
def test_the_local_world_size_on_two_machines(tmp_path, free_port):
    """One of them sees another boot id."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    (tmp_path / "boot_id").write_text(boot_id.read_text()[::-1])
    elsewhere = ["unshare", "--mount", "sh", "-c", f'mount --bind {tmp_path / "boot_id"} {boot_id} && exec "$@"', "sh"]
    if subprocess.run([*elsewhere, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file for a process of its own")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": "3"}
    ranks = []
    try:
        for rank, local_rank, machine in ((0, 0, []), (1, 1, []), (2, 0, elsewhere)):
            environ = clean_environment(tmp_path, **address, RANK=str(rank), LOCAL_RANK=str(local_rank))
            ranks.append(subprocess.Popen([*machine, sys.executable, REPORT_RANK, "cpu", tmp_path], env=environ))
        while None in (states := [rank.poll() for rank in ranks]) and not any(states):
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    assert states == [0, 0, 0]
    assert [json.loads((tmp_path / f"{rank}.json").read_text())["local_world_size"] for rank in range(3)] == [2, 2, 1]


MEET_FAULTS = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
from launch.distributed import RunError, broadcast_object, raise_on_all_ranks
from launch.distributed import destroy_process_group, init_distributed, read_rank_info

rank_info = read_rank_info(os.environ)
init_distributed(rank_info, "cpu", timedelta(hours=1))

def met(*faults):
    try:
        with raise_on_all_ranks():
            if faults[rank_info.rank] is not None:
                raise faults[rank_info.rank]
    except RunError as error:
        return sorted(str(error).splitlines())

report = {
    "none": met(None, None),
    "second": met(None, ValueError("the second's")),
    "first": met(FileNotFoundError("the first's"), None),
    "alike": met(RuntimeError("everyone's"), OSError("everyone's")),
    "different": met(ValueError("one"), RuntimeError("other")),
    "none again": met(None, None),
    "from rank 0": str(broadcast_object({"path": Path("of", str(rank_info.rank))})),
}
Path(sys.argv[1], f"{rank_info.rank}.json").write_text(json.dumps(report))
destroy_process_group()
"""


def test_an_error_of_one_rank_is_raised_on_all(forked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(MEET_FAULTS)
    finished = forked(2, script, tmp_path)
    assert finished.returncode == 0, finished.stderr
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "none": None,
            "second": ["rank 1: the second's"],
            "first": ["rank 0: the first's"],
            "alike": ["everyone's"],
            "different": ["rank 0: one", "rank 1: other"],
            "none again": None,
            "from rank 0": "{'path': PosixPath('of/0')}",
        }


def test_the_error_of_a_single_rank_does_not_name_it(alone):
    with pytest.raises(RunError, match="^no such thing$"), raise_on_all_ranks():
        raise ValueError("no such thing")
    assert broadcast_object("mine") == "mine"


def test_other_exceptions_pass_through(alone):
    with pytest.raises(KeyError), raise_on_all_ranks():
        raise KeyError("name")


END_ALIKE = """
import sys, time
from datetime import timedelta
from launch.distributed import get_local_world_size, raise_on_all_ranks, run_distributed

def body(rank_info, device):
    assert get_local_world_size() == 2
    if sys.argv[1] == "status":
        return 7
    with raise_on_all_ranks():
        if sys.argv[1] == "error" and rank_info.rank == 1:
            raise ValueError("of rank 1")
    raise KeyError("a mistake")

fault = ValueError("of the arguments") if sys.argv[1] == "fault" else None
sys.exit(run_distributed(body, "cpu", timedelta(hours=1), title="a test", fault=fault))
"""


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("status", 7, ""),
        ("error", 2, "error: rank 1: of rank 1\n"),
        ("fault", 2, "error: of the arguments\n"),
    ],
)
def test_all_ranks_end_alike_and_rank_0_reports(forked, tmp_path, end, status, message):
    script = tmp_path / "script.py"
    script.write_text(END_ALIKE)
    finished = forked(2, script, end)
    assert (finished.returncode, finished.stderr) == (status, message)
    announced = "" if end == "fault" else "starting a test, world size 2 (cpu): loading DeepSpeed\n"
    assert finished.stdout == announced


def test_other_exceptions_end_a_rank_with_their_traceback(forked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(END_ALIKE)
    finished = forked(2, script, "mistake")
    assert finished.returncode == 1
    assert "KeyError: 'a mistake'" in finished.stderr


def test_a_single_rank_reports_a_fault_before_it_joins(no_launcher, capsys):
    def body(rank_info, device):
        raise AssertionError("is not called")

    assert run_distributed(body, "cpu", timedelta(hours=1), fault=ValueError("bad arguments")) == EXIT_REFUSED
    assert capsys.readouterr() == ("", "error: bad arguments\n")
    assert not torch.distributed.is_initialized()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_one_rank_per_gpu_joins_over_nccl(launcher, tmp_path, free_port):
    gpus = torch.cuda.device_count()
    ranks = report_ranks(launcher_command(launcher, gpus, free_port), "cuda", tmp_path, clean_environment(tmp_path))
    assert len(ranks) == gpus
    for rank, found in enumerate(ranks):
        assert (found["device"], found["backend"]) == (f"cuda:{rank}", "nccl")
        assert found["sum"] == gpus * (gpus + 1) / 2

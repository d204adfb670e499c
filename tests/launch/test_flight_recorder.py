"""NCCL's flight recorder: its variables, and files that PyTorch's own reader finds in a run's folder."""

import ctypes
import errno
import functools
import os
import pickle
import socket
import struct
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.flight_recorder.components.loader import read_dir

from launch import train
from launch.distributed import destroy_process_group, init_distributed, read_rank_info
from launch.flight_recorder import DUMP, PREFIX, configure, connect_to_recorder, write_dump, write_trace

ROOT = Path(__file__).parents[2]


def read_dumps(folder: Path) -> dict[int, list[str]]:
    """The names of collectives in a folder's dumps, by rank."""
    details, _ = read_dir(Namespace(trace_dir=str(folder), prefix=PREFIX))
    return {found["rank"]: [entry["profiling_name"] for entry in found["entries"]] for found in details.values()}


def test_the_variables_are_set_before_the_group_forms(no_launcher, monkeypatch, small_config, tmp_path, capsys):
    """On a machine that has lost its GPU."""
    monkeypatch.setattr(train, "default_device_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] = "50"
    assert train.main(["--config", str(small_config), "output=run"]) == 2
    assert "local rank 0 has no GPU" in capsys.readouterr().err
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/run/heartbeats/nccl-rank-"
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "50"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert not (tmp_path / "run").exists()


def test_values_of_the_user_stay(tmp_path):
    own = {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0", "TORCH_FR_DUMP_TEMP_FILE": "/elsewhere/"}
    environ = dict(own)
    configure(tmp_path, environ)
    assert environ == own


def test_pytorch_reads_the_files_beside_heartbeats(alone, tmp_path):
    """gloo's collectives are recorded in the same format."""
    group = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(3), group=group)
    (tmp_path / "rank-00012.json").touch()
    write_dump(tmp_path, 12)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-00012.json"], "nothing is written without NCCL"
    write_trace(tmp_path, 12, torch._C._distributed_c10d._dump_fr_trace())
    assert read_dumps(tmp_path)[12][-1] == "gloo:all_reduce"
    write_trace(tmp_path / "missing", 12, b"")


def test_a_dump_does_not_need_the_lock_of_python():
    """The main thread holds it until the answer has come: where NCCL blocks the dump, other threads still run."""
    with connect_to_recorder() as connection:
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 60, 0))
        connection.request("POST", DUMP)
        recv = ctypes.PyDLL(None, use_errno=True).recv
        received = functools.partial(recv, connection.sock.fileno(), ctypes.create_string_buffer(1), 1, socket.MSG_PEEK)
        while (count := received()) < 0 and ctypes.get_errno() == errno.EINTR:
            pass  # a signal, of a child that an earlier test left, say
        assert count == 1, os.strerror(ctypes.get_errno())
        response = connection.getresponse()
        assert response.status == 200
        assert {"version", "entries"} <= pickle.loads(response.read()).keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_dump_of_nccl(no_launcher, tmp_path):
    configure(tmp_path)
    device = init_distributed(read_rank_info(os.environ), "cuda", timedelta(hours=1))
    try:
        dist.all_reduce(torch.ones(3, device=device))
        write_dump(tmp_path, 0)
    finally:
        destroy_process_group()
    assert "nccl:all_reduce" in read_dumps(tmp_path)[0]

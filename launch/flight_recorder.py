"""NCCL's flight recorder: the last collectives of each rank, in a file beside the heartbeats when a run hangs.

    torchfrtrace RUN/heartbeats --prefix nccl-rank- --allow-incomplete-ranks

PyTorch records them in memory. It writes the files itself when a collective of NCCL times out, and launch.watchdog has
them written when a run hangs. With gloo there are none: PyTorch's command cannot analyse them.
"""

import os
import socket
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

import torch.distributed as dist

PREFIX = "nccl-rank-"  # of the files' names, which end with the rank
DUMP = "/handler/dump_nccl_trace_pickle"  # PyTorch's path of what it has recorded of NCCL
_COLLECTIVES = 2000  # that a rank records: dozens of steps


def configure(folder: Path, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables with which PyTorch records, and writes into a folder when a collective times out.

    To be called before the process group forms. Values that the user has set stay, under their old names too.
    """
    for name, old_name, value in (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", str(_COLLECTIVES)),
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder.absolute() / PREFIX)),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
    ):
        environ.setdefault(name, environ.get(old_name, value))


def dump_path(folder: Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return folder / f"{PREFIX}{rank}"


def write_dump(folder: Path, rank: int) -> None:
    """Write what this rank has recorded, if NCCL connects the ranks.

    May wait for ever where NCCL does, but lets other threads run. Raises RuntimeError if PyTorch refuses.
    """
    if dist.is_initialized() and dist.get_backend() == "nccl":
        with connect_to_recorder() as connection:
            connection.request("POST", DUMP)
            response = connection.getresponse()
            trace = response.read()
        if response.status != 200:
            raise RuntimeError(f"PyTorch's flight recorder answers {response.status}: {trace.decode(errors='replace')}")
        write_trace(folder, rank, trace)


@contextmanager
def connect_to_recorder() -> Iterator[HTTPConnection]:
    """Connect to PyTorch's server for debugging, which runs in threads of this process without Python's lock.

    PyTorch's function for the same holds the lock, so where NCCL blocks it, no thread could end the process any more.
    """
    from torch._C._distributed_c10d import _WorkerServer  # which another version of PyTorch may lack

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as client:
        server = _WorkerServer(f"{folder}/socket")  # prints that it listens
        client.connect(f"{folder}/socket")
        connection = HTTPConnection("localhost")
        connection.sock = client
        yield connection
        client.close()
        server.shutdown()


def write_trace(folder: Path, rank: int, trace: bytes) -> None:
    """Write a rank's file, unless the disk cannot take it."""
    with suppress(OSError):
        dump_path(folder, rank).write_bytes(trace)

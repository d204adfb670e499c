"""The ranks of a run: rank and world size, the process group, errors that all ranks share, and the exit status.

A run is started by torchrun or deepspeed (RANK, WORLD_SIZE and so on are set), by `srun` with one task per rank
(Slurm's step variables are set), or by plain `python` as a single process. `read_rank_info` tells them apart;
`init_distributed` sets the variables that DeepSpeed and torch read and joins the process group; `run_distributed` wraps
a whole command.
"""

import errno
import os
import secrets
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from launch.connection_loss import connection_loss
from launch.first_collective import check_first_collective
from launch.interrupt import EXIT_FATAL, EXIT_REFUSED, EXIT_RESUME, exit_process

_REMEDY = "start the run with deepspeed, torchrun or srun, which set all of these, or unset them all"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_FAILED_KEY, _LOST_KEY = "launch: a rank has failed", "launch: a rank is gone"  # in the group's store


@dataclass(frozen=True)
class RankInfo:
    """One of `world_size` processes; `rank` counts them all from 0, `local_rank` those on its host."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str  # "environment" (torchrun, deepspeed), "srun", or "python": started by hand


def read_rank_info(environ: Mapping[str, str]) -> RankInfo:
    """Return rank and world size of a process with this environment.

    RANK, LOCAL_RANK and WORLD_SIZE take precedence over Slurm's variables: torchrun and deepspeed may run inside an
    allocation. Batch scripts and salloc shells are not ranks, although Slurm sets SLURM_PROCID and SLURM_NTASKS there
    as well; only processes that `srun` starts have SLURM_STEP_NUM_TASKS.

    Raises ValueError if some of a launcher's variables are missing, are not numbers, or contradict each other.
    """
    if not environ.keys().isdisjoint({"RANK", "LOCAL_RANK", "WORLD_SIZE"}):
        rank_info = RankInfo(
            rank=_number(environ, "RANK"),
            local_rank=_number(environ, "LOCAL_RANK"),
            world_size=_number(environ, "WORLD_SIZE"),
            launcher="environment",
        )
    elif "SLURM_STEP_NUM_TASKS" in environ:
        rank_info = RankInfo(
            rank=_number(environ, "SLURM_PROCID"),
            local_rank=_number(environ, "SLURM_LOCALID"),
            world_size=_number(environ, "SLURM_STEP_NUM_TASKS"),
            launcher="srun",
        )
    else:
        rank_info = RankInfo(rank=0, local_rank=0, world_size=1, launcher="python")
    if not (rank_info.rank < rank_info.world_size and rank_info.local_rank <= rank_info.rank):
        raise ValueError(
            f"the environment says rank {rank_info.rank} of {rank_info.world_size} and local rank"
            f" {rank_info.local_rank}, which cannot be; {_REMEDY}"
        )
    return rank_info


def _number(environ: Mapping[str, str], name: str) -> int:
    if name not in environ:
        raise ValueError(f"{name} is not set although other variables of a launcher are; {_REMEDY}")
    if not environ[name].isdecimal():
        raise ValueError(f'{name} is "{environ[name]}", which is not a number; {_REMEDY}')
    return int(environ[name])


def init_distributed(rank_info: RankInfo, device_type: str, timeout: timedelta) -> torch.device:
    """Join the run's process group (NCCL for "cuda", gloo for "cpu") and return this rank's device.

    Every rank calls it, before anything imports DeepSpeed, which selects its accelerator when imported. `timeout`
    bounds the wait for other ranks, here and in every later collective. Sets the environment variables that DeepSpeed
    and torch read: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, DS_ACCELERATOR.

    Raises ValueError for another device type or an incomplete address, RuntimeError if no GPU is left for this rank,
    rank 0's host is unknown, its port is taken, or not all ranks connect.
    """
    if device_type not in _BACKENDS:
        raise ValueError(f'the device is "{device_type}"; use "cpu" or "cuda"')
    device = _select_device(rank_info, device_type)
    # DeepSpeed uses LOCAL_RANK as the device's index.
    local_rank = rank_info.local_rank if device.index is None else device.index
    os.environ.update(
        _rendezvous(rank_info, os.environ),
        RANK=str(rank_info.rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(rank_info.world_size),
        DS_ACCELERATOR=device_type,
    )
    _check_master_address(os.environ)
    import deepspeed

    # On CPUs, DeepSpeed would now compile an all-reduce that only inference uses: it takes most of a minute, and fails
    # without a compiler or ninja.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(_BACKENDS[device_type], auto_mpi_discovery=False, timeout=timeout, verbose=False)
    except RuntimeError as error:
        raise RuntimeError(_explain_init_failure(rank_info, timeout, error)) from error
    return device


def find_free_port() -> int:
    """Return a TCP port that is free, below the ephemeral ports of Linux."""
    while True:
        port = secrets.choice(range(10_000, 32_768))
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))  # at all addresses, as rank 0 will be; nobody can connect, since it does not listen
            return port


def destroy_process_group() -> None:
    """Leave the process group that `init_distributed` joined, if any; `init_distributed` may be called again."""
    if torch.distributed.is_initialized():
        import deepspeed

        deepspeed.comm.destroy_process_group()


def abort_process(error: Exception) -> NoReturn:
    """End this process because of `error`, without leaving the process group.

    With NCCL, leaving the group would wait for ranks that wait for this one; the launcher ends those. The status is
    EXIT_FATAL, after a traceback. Where the error is only that another rank is gone, one rank prints a line instead,
    and the status is EXIT_RESUME if that rank was killed.
    """
    loss = connection_loss(error)
    if loss is not None:
        exit_process(_report_loss(loss))
    traceback.print_exception(error)
    with suppress(RuntimeError, ValueError):
        store = _default_store()
        store.set(_FAILED_KEY, "")
        store.get(_FAILED_KEY)  # the others notice that this rank is gone, and must find it
    exit_process(EXIT_FATAL)


def _report_loss(loss: str) -> int:
    """Print, on one rank, that another is gone, unless it has failed and said why; return the exit status."""
    try:
        store = _default_store()
        if store.check([_FAILED_KEY]):
            return EXIT_FATAL
        if store.add(_LOST_KEY, 1) == 1:
            print(f"error: another rank is gone, killed or out of memory ({loss}); start again", file=sys.stderr)
    except RuntimeError:
        if dist.get_rank() == 1:
            print("error: rank 0 is gone: it has failed, if it says so above, or was killed", file=sys.stderr)
        return EXIT_FATAL
    return EXIT_RESUME


def failed_rank_check() -> Callable[[], int | None]:
    """Return a function: EXIT_FATAL if a rank has called `abort_process`, or rank 0, which knows, is gone; else None.

    It asks over a connection of its own, so it does not wait for another thread that waits for the store.
    """
    store = _default_store().clone()

    def status_without_rank() -> int | None:
        try:
            return EXIT_FATAL if store.check([_FAILED_KEY]) else None
        except RuntimeError:
            return EXIT_FATAL

    return status_without_rank


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _select_device(rank_info: RankInfo, device_type: str) -> torch.device:
    if device_type == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    # Slurm can bind one GPU to each task, which then sees only its own, as number 0.
    index = 0 if rank_info.launcher == "srun" and visible == 1 else rank_info.local_rank
    if index >= visible:
        raise RuntimeError(
            f"local rank {rank_info.local_rank} has no GPU, {visible} are visible to it;"
            f" start one rank per GPU, or choose the CPU"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _rendezvous(rank_info: RankInfo, environ: Mapping[str, str]) -> dict[str, str]:
    """Return MASTER_ADDR and MASTER_PORT if the launcher has not set them."""
    if rank_info.launcher == "environment":
        return {}
    if rank_info.world_size == 1:  # values in the environment are meant for other processes; port 0 is any free one
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return {
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"]),
        # below the ephemeral ports of Linux, and different for each job
        "MASTER_PORT": environ.get("MASTER_PORT") or str(10000 + int(environ["SLURM_JOB_ID"]) % 20000),
    }


def _check_master_address(environ: Mapping[str, str]) -> None:
    """Raise ValueError or RuntimeError if the address is invalid, where PyTorch would wait or give no reason."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environ.get(name):
            raise ValueError(f"{name} is not set although other variables of a launcher are; {_REMEDY}")
    host, port = environ["MASTER_ADDR"], environ["MASTER_PORT"]
    if not (port.isdecimal() and int(port) < 2**16):
        raise ValueError(f'MASTER_PORT is "{port}", which is no port; use a number from 1 to {2**16 - 1}')
    try:
        socket.getaddrinfo(host, int(port))
    except (OSError, UnicodeError) as error:
        raise RuntimeError(
            f"MASTER_ADDR is {host}, which this machine cannot resolve ({error}); set it to the address of rank 0's"
        ) from error


def _explain_init_failure(rank_info: RankInfo, timeout: timedelta, error: RuntimeError) -> str:
    """Describe in one line why the process group did not form, with this launcher's remedy."""
    host, port, fault = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], str(error).partition("\n")[0]
    if "EADDRINUSE" in fault:
        free = find_free_port()
        remedy = f"set MASTER_PORT to another, like {free}"
        if rank_info.launcher == "srun":
            remedy = f"export MASTER_PORT={free} before srun or sbatch"
        elif "CROSS_RANK" in os.environ:  # deepspeed's
            remedy = f"start it with deepspeed --master_port {free}"
        return f"port {port} is taken, by another run perhaps; {remedy}"
    return (
        f"rank {rank_info.rank} did not meet the other ranks at {host}, port {port}, within {timeout} ({fault}); check"
        f" that all {rank_info.world_size} were started, and that this machine reaches that one"
    )


def _first_host(nodelist: str) -> str:
    """Return the first host of Slurm's short form: `gpu[07-09]` → `gpu07`."""
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            f"the first host of {nodelist} is unknown ({error}); export its name as MASTER_ADDR before srun"
        ) from error
    return printed.split()[0]


class RunError(Exception):
    """An error of one rank that all ranks raise together; its text is what the command prints.

    disk_full: whether the reason is that there is no space for a file. `status` is the exit status of the command:
    EXIT_REFUSED, or EXIT_FATAL once training has begun.
    """

    def __init__(self, text: str, disk_full: bool = False) -> None:
        super().__init__(text)
        self.disk_full, self.status = disk_full, EXIT_REFUSED


@contextmanager
def raise_on_all_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Turn an error of one rank (ValueError, OSError, RuntimeError) inside the block into a RunError on every rank.

    Every rank enters the block; its end is a barrier. Without it, the other ranks would wait in their next collective
    for the one that failed.
    group: of all ranks; None is the default one.
    """
    fault = None
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        fault = str(error), getattr(error, "errno", None) in _DISK_FULL
    faults = gather_objects(fault, group)
    first_ranks: dict[str, int] = {}  # message → the first rank that has it
    for rank, found in enumerate(faults):
        if found is not None:
            first_ranks.setdefault(found[0], rank)
    if first_ranks:
        on_all = len(first_ranks) == 1 and None not in faults
        lines = [text if on_all else f"rank {rank}: {text}" for text, rank in first_ranks.items()]
        raise RunError("\n".join(lines), all(disk_full for _, disk_full in filter(None, faults)))


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's value on every rank; the values of other ranks are ignored."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, group=group)
    return values[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, in their order, on every rank."""
    values: list[Any] = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value, group)
    return values


def get_local_world_size() -> int:
    """Return how many ranks run on this rank's machine, containers included. Every rank calls it."""
    machine = Path("/proc/sys/kernel/random/boot_id").read_text()  # the same in all containers
    return gather_objects(machine).count(machine)


def default_device_type() -> str:
    """Return "cuda" if this process sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_distributed(
    body: Callable[[RankInfo, torch.device], int],
    device_type: str,
    timeout: timedelta,
    title: str | None = None,
    fault: Exception | None = None,
    settled: Callable[[], None] = lambda: None,
) -> int:
    """Join the process group, call `body` on every rank and leave the group; return `body`'s or an error's exit status.

    Errors print one message for all ranks: rank 0's, or that of a rank that could not join. An exception that is not
    a RunError ends the process by `abort_process`.
    title: what rank 0 announces before DeepSpeed is imported.
    fault: an error of this rank's arguments; `body` is not called on any rank.
    settled: called when all ranks know the exit status, and before any of them exits.
    """
    try:
        rank_info = read_rank_info(os.environ)
    except ValueError as error:  # each rank reports its own: there is no group yet
        return report_error(error)
    if fault is not None and rank_info.world_size == 1:
        return report_error(fault)
    if title is not None and fault is None:
        world = f"world size {rank_info.world_size} ({device_type})"
        print_rank_0(f"starting {title}, {world}: loading DeepSpeed", rank_info.rank)
    try:
        device = init_distributed(rank_info, device_type, timeout)
    except (ValueError, RuntimeError) as error:
        return report_error(error)
    check_first_collective(device)
    try:
        with raise_on_all_ranks():
            if fault is not None:
                raise fault
        status = body(rank_info, device)
    except RunError as error:
        report_error(error, rank_info.rank)
        status = error.status
    except Exception as error:
        abort_process(error)
    settled()
    if status:
        with suppress(RuntimeError):  # a rank may be gone
            dist.barrier()  # launchers end all ranks as soon as one fails: rank 0 reports first
    destroy_process_group()
    return status


def report_error(error: Exception, rank: int = 0) -> int:
    """Print an error on rank 0, and return the exit status for it."""
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_REFUSED


def print_rank_0(line: str, rank: int) -> None:
    """Print a line on rank 0, where there is no Monitor yet."""
    if rank == 0:
        print(line, flush=True)

"""The first collective of a run: an all-reduce that has to succeed within a minute, or the rank at fault is named.

A collective that one rank does not enter, or that the network does not carry, makes all ranks wait for
`engine.timeout_minutes`, and then gives no reason. Until this one has succeeded, the ranks hear of each other through
the store of the process group, which has served to form the group.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from launch.connection_loss import connection_loss
from launch.interrupt import EXIT_REFUSED, EXIT_RESUME

LIMIT_SECONDS = 60.0
_KEY = "launch: first collective"  # in the group's store, and the beginning of other keys
_REPORT_SECONDS = 10  # in which one rank finds out what is wrong, or prints it; the launcher ends all when one exits
_LEAVE_SECONDS = 2  # in which the others have seen that it is printed: the store goes with rank 0
_LONGEST_PAUSE = 0.1  # seconds between looks into the store
_NUMBERS = 2**19  # int64, 4 MiB: sent in pieces, as gradients are


def check_first_collective(device: torch.device, limit_seconds: float = LIMIT_SECONDS) -> None:
    """Sum known integers over all ranks; if that fails on any of them, end the process.

    Every rank calls it as soon as the group has formed. One of them prints the error: the first one that any rank has
    met, or for which ranks the others wait. The status is EXIT_RESUME if a rank is gone, and EXIT_REFUSED otherwise.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return
    try:
        store = _connect(_default_store(), limit_seconds)
        store.set(f"{_KEY} entered {rank}", socket.gethostname())
        threading.Thread(target=_sum_integers, args=(device,), name="first collective", daemon=True).start()
        # At the limit, the first rank asks the store for all; the others do too if that rank is lost meanwhile.
        if not _is_set(store, _KEY, limit_seconds) and (
            store.add(f"{_KEY} late", 1) == 1 or not _is_set(store, _KEY, _REPORT_SECONDS)
        ):
            _settle(store, describe_missing(*_progress(store, world_size), limit_seconds))
        fault = json.loads(store.get(_KEY))
    except RuntimeError as error:
        if connection_loss(error) is None:  # of this rank alone, such as a lack of file descriptors
            text = f"rank {rank} ({socket.gethostname()}) cannot take part in the first all-reduce"
            print(f"error: {text}: {_first_line(error)}", file=sys.stderr, flush=True)
            os._exit(EXIT_REFUSED)
        if rank == 1:  # rank 0 is gone, which does not end by itself before the others know why
            text = f"gone in the first all-reduce, killed or out of memory: rank 0 ({_first_line(error)}); start again"
            print(f"error: {text}", file=sys.stderr, flush=True)
        os._exit(EXIT_RESUME)
    if fault is not None:
        _end(store, **fault)


def describe_missing(hosts: list[str | None], passed: list[bool], seconds: float) -> str:
    """Say for whom the first collective waits.

    hosts: of the ranks that have entered it; None for the others. passed: whether it has ended on them.
    """
    absent = [f"rank {rank}" for rank, host in enumerate(hosts) if host is None]
    if absent:
        return (
            f"{', '.join(absent)} did not come to the first all-reduce within {seconds:g} s, unlike the others; see"
            " what these processes do"
        )
    waiting = [f"rank {rank} ({host})" for rank, host in enumerate(hosts) if not passed[rank]]
    return (
        f"the first all-reduce has not ended within {seconds:g} s on {', '.join(waiting)}; see whether these hosts"
        " reach the others, and over which interface: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose it, and"
        " NCCL_DEBUG=INFO shows it"
    )


def _sum_integers(device: torch.device) -> None:
    """Sum over all ranks, in a thread, and settle the check with the first error, or when the last rank is done."""
    rank, world_size, store = dist.get_rank(), dist.get_world_size(), _default_store()
    status = EXIT_REFUSED
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        numbers = torch.arange(_NUMBERS, device=device)
        expected = world_size * numbers + sum(range(world_size))
        numbers += rank
        dist.all_reduce(numbers)
        wrong = int((numbers != expected).sum())  # waits for the device
        fault = None
        if wrong:
            fault = f"is wrong in {wrong} of {_NUMBERS} sums; a host or the network corrupts data: try fewer hosts"
    except RuntimeError as error:
        fault = f"failed ({_first_line(error)}); see whether all hosts are up and reach each other"
        if loss := connection_loss(error):
            fault = f"lost another rank, killed or out of memory, or the network ({loss}); start again, and if it fails"
            fault, status = f"{fault} again, see whether all hosts are up and reach each other", EXIT_RESUME
    with suppress(RuntimeError):  # the check of the main thread meets the same
        if fault is not None:
            _settle(store, f"the first all-reduce on rank {rank} ({socket.gethostname()}) {fault}", status)
            return
        store.set(f"{_KEY} passed {rank}", "")
        if store.add(f"{_KEY} count", 1) == world_size:
            store.compare_set(_KEY, "", "null")


def _default_store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _connect(store: Any, limit_seconds: float) -> Any:
    """Return a connection of its own to the store, since the collective's thread waits in NCCL for the other.

    To be dropped after use: each is a file descriptor of rank 0.
    """
    timeout = store.timeout
    store.set_timeout(timedelta(seconds=limit_seconds))  # of the wait for a rank 0 that is gone
    try:
        return store.clone()
    finally:
        store.set_timeout(timeout)


def _is_set(store: Any, key: str, seconds: float) -> bool:
    """Wait for a key, and return whether it was set in time. The store's own wait would log a warning if not."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


def _settle(store: Any, text: str, status: int = EXIT_REFUSED) -> None:
    """Make this the error of all ranks, to be printed by this one, unless there is a result already."""
    store.compare_set(_KEY, "", json.dumps({"rank": dist.get_rank(), "text": text, "status": status}))


def _progress(store: Any, world_size: int) -> tuple[list[str | None], list[bool]]:
    """Return the hosts of the ranks that have entered the collective, and which ranks have left it."""
    entered = [f"{_KEY} entered {rank}" for rank in range(world_size)]
    hosts = [store.get(key).decode() if store.check([key]) else None for key in entered]
    return hosts, [store.check([f"{_KEY} passed {rank}"]) for rank in range(world_size)]


def _end(store: Any, rank: int, text: str, status: int) -> NoReturn:
    """End the process, whose main thread or collective may not be able to leave the group; `rank` prints the error."""
    reported, left = f"{_KEY} reported", f"{_KEY} all leave"
    with suppress(RuntimeError):
        if dist.get_rank() == rank:
            print(f"error: {text}", file=sys.stderr, flush=True)
            store.set(reported, "")
        _is_set(store, reported, _REPORT_SECONDS)
        if dist.get_rank() == 0:
            _is_set(store, left, _LEAVE_SECONDS)
        else:
            if store.add(f"{_KEY} leaving", 1) == dist.get_world_size() - 1:
                store.set(left, "")
            time.sleep(2 * _LONGEST_PAUSE)  # the others look, too, before the launcher ends rank 0
    os._exit(status)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

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
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from launch.interrupt import EXIT_REFUSED

LIMIT_SECONDS = 60.0
_KEY = "launch: first collective"  # in the group's store, and the beginning of other keys
_REPORT_SECONDS = 10  # in which one rank prints the error, before the others exit and the launcher ends all
_LONGEST_PAUSE = 0.1  # seconds between looks into the store
_NUMBERS = 2**19  # int64, 4 MiB: sent in pieces, as gradients are


def check_first_collective(device: torch.device, limit_seconds: float = LIMIT_SECONDS) -> None:
    """Sum known integers over all ranks; if that fails on any of them, end the process with status EXIT_REFUSED.

    Every rank calls it as soon as the group has formed. One of them prints the error: the first one that any rank has
    met, or for which ranks the others wait.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return
    # Connections of their own: NCCL's waits for the store would make others of this process wait.
    store: Any = dist.distributed_c10d._get_default_store()
    store, threads_store = store.clone(), store.clone()
    store.set(f"{_KEY} entered {rank}", socket.gethostname())
    threading.Thread(target=_sum_integers, args=(device, threads_store), name="first collective", daemon=True).start()
    try:
        if not _is_set(store, _KEY, limit_seconds):
            _settle(store, describe_missing(*_progress(store, world_size), limit_seconds))
        fault = json.loads(store.get(_KEY))
    except RuntimeError as error:
        fault = {"rank": 1, "text": f"the store of the process group is gone ({_first_line(error)}); is rank 0 alive?"}
    if fault is not None:
        _end(store, fault["text"], reports=rank == fault["rank"])


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


def _sum_integers(device: torch.device, store: Any) -> None:
    """Sum over all ranks, in a thread, and settle the check with the first error, or when the last rank is done."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
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
    with suppress(RuntimeError):  # the check of the main thread meets the same
        if fault is not None:
            _settle(store, f"the first all-reduce on rank {rank} ({socket.gethostname()}) {fault}")
            return
        store.set(f"{_KEY} passed {rank}", "")
        if store.add(f"{_KEY} count", 1) == world_size:
            store.set(_KEY, "null")


def _is_set(store: Any, key: str, seconds: float) -> bool:
    """Wait for a key, and return whether it was set in time. The store's own wait would log a warning if not."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return True


def _settle(store: Any, text: str) -> None:
    """Make this the error of all ranks, to be printed by this one, unless there is a result already."""
    store.compare_set(_KEY, "", json.dumps({"rank": dist.get_rank(), "text": text}))


def _progress(store: Any, world_size: int) -> tuple[list[str | None], list[bool]]:
    """Return the hosts of the ranks that have entered the collective, and which ranks have left it."""
    entered = [f"{_KEY} entered {rank}" for rank in range(world_size)]
    hosts = [store.get(key).decode() if store.check([key]) else None for key in entered]
    return hosts, [store.check([f"{_KEY} passed {rank}"]) for rank in range(world_size)]


def _end(store: Any, text: str, reports: bool) -> NoReturn:
    """End the process, whose main thread or collective may not be able to leave the group; print the error before."""
    with suppress(RuntimeError):
        if reports:
            print(f"error: {text}", file=sys.stderr, flush=True)
            store.set(f"{_KEY} reported", "")
        _is_set(store, f"{_KEY} reported", _REPORT_SECONDS)
    os._exit(EXIT_REFUSED)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]

"""Pools of worker processes that end with the command that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Give the block a pool of processes, which end at once if the block raises or this process is killed.

    They are forked here, before the block runs: that takes milliseconds, where a new interpreter with its imports takes
    tenths of a second, and they inherit this process's locks. Tasks must not depend on threads that this process has
    started. Raises RuntimeError if a worker is killed.
    """
    context = multiprocessing.get_context("fork")
    receiver, lifeline = context.Pipe(duplex=False)
    with receiver, lifeline, ProcessPoolExecutor(workers, context, _end_with_parent, (receiver, lifeline)) as pool:
        try:
            with sigint_blocked():  # workers inherit the mask, so that only the parent handles Ctrl-C
                pool.submit(os.getpid)  # the first task forks them all
            yield pool
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker was killed, most often because memory ran out; free some, or use fewer workers"
            ) from error
        except BaseException:
            lifeline.close()
            raise


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Defer Ctrl-C until the block ends; processes started inside never receive it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(receiver: Connection, lifeline: Connection) -> None:
    """End this worker when no process has the other end of `lifeline` open: the parent has closed it, or died."""
    lifeline.close()
    threading.Thread(target=lambda: (receiver.poll(None), os._exit(1)), daemon=True).start()

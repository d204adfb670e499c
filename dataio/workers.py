"""Processes that share the work of a command, and end with it."""

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
    return len(os.sched_getaffinity(0))


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end at once when the block raises or is interrupted, and when this process is killed.

    They are forked here, before the block: that takes milliseconds where a new interpreter with its imports takes
    tenths of a second, and they hold the locks that this process holds. What threads this process may have by
    now, the workers must not need. Raises RuntimeError if a worker is killed.
    """
    context = multiprocessing.get_context("fork")
    receiver, lifeline = context.Pipe(duplex=False)
    with receiver, lifeline, ProcessPoolExecutor(workers, context, _end_with_parent, (receiver, lifeline)) as pool:
        try:
            with sigint_blocked():  # workers inherit that; so the parent alone decides
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
    """Processes that are started inside never hear of Ctrl-C; this one does when the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(receiver: Connection, lifeline: Connection) -> None:
    """Ends this worker when no process has the other end of `lifeline`: the parent has closed it, or died."""
    lifeline.close()
    threading.Thread(target=lambda: (receiver.poll(None), os._exit(1)), daemon=True).start()

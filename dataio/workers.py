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

    Raises RuntimeError if one of them is killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, lifeline = context.Pipe(duplex=False)
    with receiver, lifeline, ProcessPoolExecutor(workers, context, _end_with_parent, (receiver,)) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker was killed, most often because memory ran out; free some, or use fewer workers"
            ) from error
        except BaseException:
            lifeline.close()
            raise


def _end_with_parent(lifeline: Connection) -> None:
    """Ends this worker when the other end of `lifeline` is closed, which the parent's death does as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    threading.Thread(target=lambda: (lifeline.poll(None), os._exit(1)), daemon=True).start()

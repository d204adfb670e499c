"""Worker processes that are killed, and those whose parent fails or is killed."""

import signal
import subprocess
import sys

import pytest

from dataio.workers import worker_pool

DEADLINE_SECONDS = 60

#: One worker is at work for longer than the deadline, the other idle. They inherit the standard output, which
#: therefore ends with the last of them.
STARTED = f"""
import time
from dataio.workers import worker_pool

with worker_pool(2) as pool:
    pool.submit(time.sleep, {2 * DEADLINE_SECONDS})
    pool.submit(print, "started", flush=True).result()
"""


def start(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_cores_are_those_that_the_process_may_use():
    code = """
import os
from dataio.workers import available_cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(available_cores())
"""
    assert start(code).communicate(timeout=DEADLINE_SECONDS) == ("1\n", "")


def test_a_killed_worker_is_an_error():
    message = "a worker was killed, most often because memory ran out; free some, or use fewer workers"
    with pytest.raises(RuntimeError, match=message), worker_pool(1) as pool:
        pool.submit(signal.raise_signal, signal.SIGKILL).result(DEADLINE_SECONDS)


def test_an_error_ends_all_workers_at_once():
    command = start(f'{STARTED}    raise ValueError("enough")\n')
    output, message = command.communicate(timeout=DEADLINE_SECONDS)
    assert output == "started\n"
    assert message.endswith("ValueError: enough\n")


def test_workers_end_with_a_parent_that_is_killed():
    command = start(STARTED)
    assert command.stdout.readline() == "started\n"
    command.kill()
    assert command.communicate(timeout=DEADLINE_SECONDS)[0] == ""

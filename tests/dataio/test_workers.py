"""Worker processes that are killed or interrupted, and those whose parent fails or is killed."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dataio.workers import worker_pool

#: One worker is at work for longer than a test may take, the other idle. They inherit the standard output, which
#: therefore ends with the last of them.
STARTED = """
import time
from dataio.workers import worker_pool

with worker_pool(2) as pool:
    pool.submit(time.sleep, 3600)
    pool.submit(print, "started", flush=True).result()
"""

#: Ctrl-C comes after a line of input: before, while and after the workers are forked.
INTERRUPTED = """
import sys, time
from dataio.workers import worker_pool

try:
    print("ready", flush=True)
    sys.stdin.readline()
    with worker_pool(4) as pool:
        pool.submit(time.sleep, 3600).result()
except KeyboardInterrupt:
    print("interrupted")
"""


def start(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_available_cores_obey_affinity():
    code = """
import os
from dataio.workers import available_cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(available_cores())
"""
    assert start(code).communicate() == ("1\n", "")


def test_a_killed_worker_is_an_error():
    message = "a worker was killed, most often because memory ran out; free some, or use fewer workers"
    with pytest.raises(RuntimeError, match=message), worker_pool(1) as pool:
        pool.submit(signal.raise_signal, signal.SIGKILL).result()


def test_an_error_ends_all_workers_at_once():
    command = start(f'{STARTED}    raise ValueError("enough")\n')
    output, message = command.communicate()
    assert output == "started\n"
    assert message.endswith("ValueError: enough\n")


@pytest.mark.parametrize("delay", [0, 0.001, 0.005, 0.02])
def test_workers_never_see_ctrl_c(delay):
    """A terminal sends it to all processes, also to those that have just been forked."""
    command = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert command.stdout.readline() == "ready\n"
    command.stdin.write("\n")
    command.stdin.flush()
    time.sleep(delay)
    os.killpg(command.pid, signal.SIGINT)
    assert command.communicate() == ("interrupted\n", "")


def test_workers_inherit_the_locks_of_their_parent(tmp_path):
    """A lock is free when the last of them has ended, so that none still writes when another command resumes."""
    path = tmp_path / "lock"
    code = STARTED.replace(
        "with worker_pool", f"lock = open({str(path)!r}, 'w'); fcntl.flock(lock, 2)\nwith worker_pool"
    )
    command = start(f"import fcntl{code}")
    assert command.stdout.readline() == "started\n"
    workers = psutil.Process(command.pid).children()
    assert len(workers) == 2
    command.send_signal(signal.SIGSTOP)  # it cannot end them
    with open(path) as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for worker in workers:
            worker.suspend()
        command.kill()
        command.wait()
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for worker in workers:
            worker.resume()
        fcntl.flock(lock, fcntl.LOCK_EX)
    command.communicate()


def test_workers_end_with_a_parent_that_is_killed():
    command = start(STARTED)
    assert command.stdout.readline() == "started\n"
    command.kill()
    assert command.communicate()[0] == ""

"""The lock on a run's folder with real processes: live owners keep it, dead ones are replaced."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from multiprocessing import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import psutil
import pytest

from launch.run_lock import LOCK_NAME, MISSED_HEARTBEATS, acquire, current_owner

ROOT = Path(__file__).parents[2]
HOLDER = """
import signal, sys
from pathlib import Path
from launch.run_lock import acquire
lock = acquire(Path(sys.argv[1]), heartbeat_seconds=0.01)
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def hold(environ, tmp_path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Returns a function: starts a process that holds the lock on tmp_path/run."""
    started = []

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, tmp_path / "run"]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def move_to_another_host(lock: Path) -> None:
    """Rewrites the machine that a lock names, in place; its owner's heartbeat continues."""
    with open(lock, "r+b") as file:
        owner = json.loads(file.readline())
        before = json.dumps(owner, ensure_ascii=False)
        owner["machine"] = owner["machine"][::-1]
        after = json.dumps(owner, ensure_ascii=False)
        assert len(after) == len(before)
        file.seek(0)
        file.write(after.encode())


def leave_lock(folder: Path, **changes: object) -> None:
    """Writes a lock of this process, with `changes` to its owner and without heartbeat."""
    owner = replace(current_owner(), **changes)
    (folder / LOCK_NAME).write_text(json.dumps(asdict(owner)) + "\n00000000000000000000\n")


def never(seconds: float) -> None:
    raise AssertionError("there is nothing to wait for")


def test_a_held_lock_is_an_error_that_names_the_owner(hold, folder):
    first = hold()
    owner = json.loads((folder / LOCK_NAME).read_text().splitlines()[0])
    with pytest.raises(RuntimeError) as error:
        acquire(folder, sleep=never)
    assert str(error.value) == (
        f"{folder} is in use by another run (process {first.pid} on {os.uname().nodename}, started {owner['started']});"
        " wait until that has ended, or choose another output"
    )


def test_a_stopped_owner_is_alive(hold, folder):
    first = hold()
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(RuntimeError, match="is in use by another run"):
        acquire(folder, sleep=never)


def test_a_copied_lock_expires_with_its_heartbeat(hold, folder, tmp_path):
    hold()
    shutil.copytree(folder, tmp_path / "copy")
    printed, looks = [], []
    acquire(tmp_path / "copy", printed.append, looks.append).release()
    assert looks == MISSED_HEARTBEATS * [5.0]
    assert len(printed) == 1
    with pytest.raises(RuntimeError, match="is in use by another run"):
        acquire(folder, sleep=never)


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_is_replaced_at_once(hold, folder, reaped):
    first = hold()
    first.kill()
    if reaped:
        first.wait()
    else:
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # its parent has not asked for its status
        assert psutil.Process(first.pid).status() == psutil.STATUS_ZOMBIE
    lock = acquire(folder, sleep=never)
    lock.check()
    lock.release()


def test_a_later_process_of_the_same_id_is_not_the_owner(folder):
    leave_lock(folder, born=current_owner().born - 1)
    acquire(folder, sleep=never).release()


def try_to_acquire(folder: Path, together: Barrier, verdicts: Queue) -> None:
    lock = None
    together.wait()
    with suppress(RuntimeError):
        lock = acquire(folder, sleep=lambda seconds: None)
    together.wait()  # until all have it or were refused
    has_it = False
    with suppress(RuntimeError):
        if lock is not None:
            lock.check()
            has_it = True
    verdicts.put(has_it)


def test_one_of_many_simultaneous_starts_gets_the_lock(folder):
    forks = multiprocessing.get_context("fork")
    for _ in range(10):
        leave_lock(folder, born=0)
        together, verdicts = forks.Barrier(4), forks.Queue()
        processes = [forks.Process(target=try_to_acquire, args=(folder, together, verdicts)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert sorted(verdicts.get() for _ in processes) == [False, False, False, True]
        (folder / LOCK_NAME).unlink()


def test_a_released_lock_leaves_nothing(tmp_path):
    acquire(tmp_path / "runs" / "new").release()
    assert not (tmp_path / "runs" / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").touch()
    acquire(tmp_path / "old").release()
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_the_lock_has_the_mode_that_the_umask_leaves(folder, umask):
    before = os.umask(umask)
    try:
        lock = acquire(folder)
    finally:
        os.umask(before)
    assert (folder / LOCK_NAME).stat().st_mode & 0o777 == 0o666 & ~umask
    lock.release()


def test_an_owner_on_another_host_without_heartbeat_is_dead(hold, folder):
    first = hold()
    first.kill()
    first.wait()
    move_to_another_host(folder / LOCK_NAME)
    printed, looks = [], []
    acquire(folder, printed.append, looks.append).release()
    assert looks == MISSED_HEARTBEATS * [5.0]
    assert len(printed) == 1
    assert f"is of process {first.pid} on" in printed[0]
    assert "up to 60 s to see if it lives" in printed[0]


def test_an_owner_on_another_host_with_heartbeat_is_alive(hold, folder):
    first = hold()
    move_to_another_host(folder / LOCK_NAME)

    looks = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        before = (folder / LOCK_NAME).read_bytes()
        while (folder / LOCK_NAME).read_bytes() == before:  # until it has beaten
            assert first.poll() is None
            time.sleep(0.01)

    with pytest.raises(RuntimeError, match=f"is in use by another run .process {first.pid} on"):
        acquire(folder, sleep=pause)
    assert len(looks) == 1


def test_an_owner_on_another_host_that_ends_meanwhile(hold, folder):
    hold()
    move_to_another_host(folder / LOCK_NAME)
    acquire(folder, sleep=lambda seconds: (folder / LOCK_NAME).unlink(missing_ok=True)).release()


@pytest.mark.parametrize(("restarts", "looks"), [(1, 0), (0, MISSED_HEARTBEATS)])
def test_a_requeued_job_takes_its_lock_over_at_once(folder, monkeypatch, restarts, looks):
    """But another step of the same job, not requeued, waits."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "north")
    leave_lock(folder, machine="another")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    waited = []
    acquire(folder, sleep=waited.append).release()
    assert len(waited) == looks


def test_the_same_job_id_of_another_cluster_is_another_job(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    leave_lock(folder, machine="another", job="south/17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    waited = []
    acquire(folder, sleep=waited.append).release()
    assert len(waited) == MISSED_HEARTBEATS


@pytest.mark.parametrize("content", [b"", b"{", b"[1]\n0\n", b'{"host": "old version"}\n', b"\xff\xfe"])
def test_a_malformed_lock_expires(folder, content):
    (folder / LOCK_NAME).write_bytes(content)
    waited = []
    acquire(folder, sleep=waited.append).release()
    assert len(waited) == MISSED_HEARTBEATS


def test_an_owner_notices_that_its_lock_was_taken_over(folder):
    frozen = acquire(folder, heartbeat_seconds=1e6)
    frozen.check()
    move_to_another_host(folder / LOCK_NAME)
    second = acquire(folder, sleep=lambda seconds: None)
    with pytest.raises(RuntimeError, match=rf"is no longer this run's: process {os.getpid()} on .* has taken it over;"):
        frozen.check()
    frozen.release()
    second.check()
    (folder / LOCK_NAME).unlink()
    with pytest.raises(RuntimeError, match="is no longer this run's: lock was removed; this process ends"):
        second.check()
    second.release()


@pytest.mark.parametrize(
    ("output", "words"), [("/sys/kernel", "denied|permitted"), ("/proc/run", "No such file"), (__file__, "File exists")]
)
def test_a_folder_without_write_permission_is_an_error(output, words):
    with pytest.raises(RuntimeError, match=f"cannot write to the run's folder {output}: .*({words}).*; make it"):
        acquire(Path(output))

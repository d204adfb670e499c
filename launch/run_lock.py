"""The lock on a run's folder: one run at a time writes there, on whatever machine it runs.

    RUN/lock      its owner (host, process, start, Slurm job) as a line of JSON, then a heartbeat counter

Locks of the operating system (flock, fcntl) end with their process, but not every network file system has them, a
server may keep those of a dead node, and they do not name their owner. This lock is therefore a file, created with
O_EXCL, which is atomic on local disks, NFS and Lustre. A file outlives its process; whether the owner is alive follows
from

    the process table   on the owner's machine, at once: from the process id and the start time, which a later process
                        with the same id does not share;
    Slurm               for a requeued job: Slurm ends a job before it starts it again;
    the counter         everywhere else: the owner increments it every 5 s, and is dead if 12 reads, 5 s apart, find it
                        unchanged. Reads are counted and no clocks compared: machines need not agree on the time, and
                        a file server that hangs for minutes makes nobody look dead.

A file whose inode number is not that of the file its owner created belongs to a copy of a run's folder; only the
counter tells whether it has an owner.

A dead owner's file is removed and a new one created. If two starts remove it at the same moment, or a frozen owner
wakes up, the file belongs to one of them only. `check` tells the others, before they write a checkpoint and again
before they rename it into place. One race remains: a process that freezes for more than a minute between this last
check and the rename replaces a checkpoint by another intact one of the same run.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from launch.distributed import raise_on_all_ranks

LOCK_NAME = "lock"
HEARTBEAT_SECONDS, MISSED_HEARTBEATS = 5.0, 12


@dataclass(frozen=True)
class LockOwner:
    """The process that holds a lock, which is rank 0 of a run. The fields are the keys in the file."""

    host: str
    process: int
    started: str  # the local time, for messages
    born: int | None  # the process's start in clock ticks since boot, from /proc; None if that is hidden
    machine: str  # boot id and PID namespace in which the process has this id
    job: str  # Slurm's cluster and job; empty outside of Slurm
    restarts: int  # how often Slurm has requeued the job
    token: str  # random, unique to this lock
    inode: int = 0  # inode of the file that was created; a copy has another

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {self.started}"


class RunLock:
    """A lock that this process holds; a thread writes its heartbeat until `release`."""

    def __init__(self, path: Path, file: int, owner: LockOwner, heartbeat_seconds: float) -> None:
        self._path, self._file, self._owner, self._heartbeat_seconds = path, file, owner, heartbeat_seconds
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RuntimeError if the lock was removed or taken over by a start that found this process dead."""
        other = _parse(_read(self._path))
        if other is None or other.token != self._owner.token:
            raise RuntimeError(
                f"{self._path.parent} is no longer this run's: "
                + (f"{other} has taken it over" if other else f"{self._path.name} was removed")
                + "; this process ends without writing there"
            )

    def release(self) -> None:
        """Remove the lock if it is still this process's, and the folder if it is empty then."""
        self._released.set()
        self._thread.join()
        os.close(self._file)
        with suppress(OSError, RuntimeError):
            self.check()
            self._path.unlink()
            self._path.parent.rmdir()

    def _heartbeat(self) -> None:
        beats, counter = 0, len(_line(self._owner))
        while not self._released.wait(self._heartbeat_seconds):
            beats += 1
            with suppress(OSError):  # the next heartbeat may succeed
                os.pwrite(self._file, b"%020d" % beats, counter)
                os.fsync(self._file)


def acquire(
    folder: Path,
    log: Callable[[str], None] = lambda line: None,
    sleep: Callable[[float], None] = time.sleep,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> RunLock:
    """Lock `folder`, which is created if it does not exist.

    log: prints a line before a long wait. sleep: waits for a number of seconds.
    Raises RuntimeError if a live run holds the lock, or the folder cannot be written to.
    """
    path, own = folder / LOCK_NAME, current_owner()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            created = _create(path, own)
        except OSError as error:
            raise RuntimeError(
                f"cannot write to the run's folder {folder}: {error.strerror}; make it writable, or choose another"
                " output"
            ) from error
        if created is not None:
            return RunLock(path, *created, heartbeat_seconds)
        content = _read(path)
        other = _parse(content)
        dead = _is_dead(other, own, path) if other else None
        if content is not None and dead is None:
            seconds = MISSED_HEARTBEATS * heartbeat_seconds
            log(f"{path} is of {other or 'an unknown run'}: up to {seconds:g} s to see if it lives")
            before, content = content, _watch(path, content, sleep, heartbeat_seconds)
            dead = content == before
        if content is None:
            continue  # its owner has just released it
        if not dead:
            raise RuntimeError(
                f"{folder} is in use by another run ({_parse(content) or path}); wait until that has ended, or choose"
                " another output"
            )
        if _read(path) == content:  # else another start has replaced it meanwhile
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold the lock on `folder` inside the block. Every rank enters and gets a function that checks the lock.

    Rank 0 holds it; on other ranks the check passes always.
    Raises RunError on every rank if another run holds the lock.
    """
    lock = None
    with raise_on_all_ranks():
        if dist.get_rank() == 0:
            lock = acquire(folder, log)
    try:
        yield lock.check if lock else lambda: None
    finally:
        if lock:
            lock.release()


def current_owner() -> LockOwner:
    """Return this process as the owner of a lock."""
    environ = os.environ
    job = environ.get("SLURM_JOB_ID", "")
    return LockOwner(
        host=socket.gethostname(),
        process=os.getpid(),
        started=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        born=start_ticks(os.getpid()),
        machine=process_table(),
        job=job and f"{environ.get('SLURM_CLUSTER_NAME', '')}/{job}",
        restarts=int(environ.get("SLURM_RESTART_COUNT") or 0),
        token=secrets.token_hex(8),
    )


def _create(path: Path, owner: LockOwner) -> tuple[int, LockOwner] | None:
    """Create a lock's file and return it, open, with the owner it names; None if there is one already."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except (FileExistsError, FileNotFoundError):  # the latter if another release has just removed the folder
        return None
    try:
        owner = replace(owner, inode=os.fstat(file).st_ino)
        os.write(file, _line(owner) + b"%020d\n" % 0)
        os.fsync(file)
    except OSError:
        os.close(file)
        path.unlink(missing_ok=True)
        raise
    return file, owner


def _line(owner: LockOwner) -> bytes:
    return json.dumps(asdict(owner), ensure_ascii=False).encode() + b"\n"


def _read(path: Path) -> bytes | None:
    """Return a lock's content, None if there is none. Opens the file each time: NFS shows others' writes on open."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes | None) -> LockOwner | None:
    """Return the owner that a lock names; None if the file is gone, is just being written, or is malformed."""
    try:
        return LockOwner(**json.loads((content or b"").partition(b"\n")[0]))
    except (ValueError, TypeError):
        return None


def _is_dead(other: LockOwner, own: LockOwner, path: Path) -> bool | None:
    """Return whether a lock's owner is dead; None if this machine cannot tell."""
    if other.machine == own.machine:
        if not is_alive(other.process, other.born):
            return True
        with suppress(FileNotFoundError):
            if path.stat().st_ino == other.inode:
                return False
        return None
    if other.job and other.job == own.job and other.restarts < own.restarts:
        return True
    return None


def is_alive(process: int, born: int | None) -> bool:
    """Return whether a process of this machine is alive. born: its `start_ticks`."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    ticks = start_ticks(process)
    return ticks is None or ticks == born


def process_table() -> str:
    """Return the boot id and PID namespace in which process ids of this process are valid."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def start_ticks(process: int) -> int | None:
    """Return a process's start in clock ticks; -1 if it is a zombie, None if its /proc entry is not readable."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


def _watch(path: Path, content: bytes, sleep: Callable[[float], None], heartbeat_seconds: float) -> bytes | None:
    """Return a lock's content as soon as it changes, or `content` after all reads."""
    for _ in range(MISSED_HEARTBEATS):
        sleep(heartbeat_seconds)
        latest = _read(path)
        if latest != content:
            return latest
    return content

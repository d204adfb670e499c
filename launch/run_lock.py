"""The lock on a run's folder: one run at a time writes there, on whatever machine it was started.

    RUN/lock      its owner (host, process, start, Slurm job) as a line of JSON, and a counter that beats

Locks of the operating system (flock, fcntl) end with their process, but not every network file system has them, a
server may keep those of a dead node, and they do not say who holds them. So the lock is a file, created with O_EXCL,
which is atomic on local disks, NFS and Lustre. A file outlives its process; whether the owner lives is told by

    the process table   on the owner's machine, at once: its id, and its start time, which a later process of the same
                        id does not share;
    Slurm               of a job that was requeued: Slurm has ended its former self before it starts it again;
    the counter         from anywhere else: the owner raises it every 5 s, and is dead once 12 looks, 5 s apart, saw it
                        stand still. Looks are counted and no clocks compared: machines need not agree on the time, and
                        a server that answers nobody for minutes kills nobody.

A file with another inode number than the one that its owner created belongs to a copy of a run's folder; only its
counter can tell whether anybody keeps it.

A dead owner's file is removed and a new one created. Should two starts remove it at the same moment, or a frozen owner
wake up, the file's name leads to one of them only. `check` tells the others, before they write a checkpoint and again
before they give it its name. What is left is a process that freezes for more than a minute between this last look and
the rename: it then puts a whole checkpoint of the same run in the place of another.
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
    """The process that holds a lock: rank 0 of a run."""

    host: str
    process: int
    started: str  # for people: the local time
    born: int  # in clock ticks since the machine's start, from /proc
    machine: str  # boot and namespace in which the process has this id
    job: str  # Slurm's cluster and job; empty outside of Slurm
    restarts: int  # how often Slurm has requeued the job
    token: str  # of this lock alone
    inode: int = 0  # of the file that was created: a copy of it has another

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, started {self.started}"


class RunLock:
    """A lock that this process holds, and keeps beating until `release`."""

    def __init__(self, path: Path, file: int, owner: LockOwner, heartbeat_seconds: float) -> None:
        self._path, self._file, self._owner, self._heartbeat_seconds = path, file, owner, heartbeat_seconds
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RuntimeError if another start has taken the lock over, which took this process for dead."""
        other = _parse(_read(self._path))
        if other is None or other.token != self._owner.token:
            raise RuntimeError(
                f"{self._path.parent} is no longer this run's: "
                + (f"{other} has taken it over" if other else f"{self._path.name} was removed")
                + "; this process ends without writing there"
            )

    def release(self) -> None:
        """Gives the lock back if it is still ours; a folder with nothing in it goes as well."""
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
            with suppress(OSError):  # the next may succeed
                os.pwrite(self._file, b"%020d" % beats, counter)
                os.fsync(self._file)


def acquire(
    folder: Path,
    log: Callable[[str], None] = lambda line: None,
    sleep: Callable[[float], None] = time.sleep,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> RunLock:
    """The lock on `folder`, which is made if need be.

    log: is told when it takes a while. sleep: waits for so many seconds.
    Raises RuntimeError if a run that lives has it, or the folder cannot be written to.
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
            log(
                f"{path} is of {other or 'an unknown run'}: up to {MISSED_HEARTBEATS * heartbeat_seconds:g} s to see if it lives"
            )
            before, content = content, _watch(path, content, sleep, heartbeat_seconds)
            dead = content == before
        if content is None:
            continue  # it has just been released
        if not dead:
            raise RuntimeError(
                f"{folder} is in use by another run ({_parse(content) or path}); wait until that has ended, or choose"
                " another output"
            )
        if _read(path) == content:  # else another start has replaced it meanwhile
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Inside, no other run writes to `folder`. Every rank enters, and gets a function that checks it; rank 0 holds it.

    Raises RunError on every rank if the folder is another's.
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
    """What is written into a lock of this process."""
    environ = os.environ
    job = environ.get("SLURM_JOB_ID", "")
    return LockOwner(
        host=socket.gethostname(),
        process=os.getpid(),
        started=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        born=_start_ticks(os.getpid()),
        machine=Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid"),
        job=job and f"{environ.get('SLURM_CLUSTER_NAME', '')}/{job}",
        restarts=int(environ.get("SLURM_RESTART_COUNT") or 0),
        token=secrets.token_hex(8),
    )


def _create(path: Path, owner: LockOwner) -> tuple[int, LockOwner] | None:
    """The new file, open, and what is written there of its owner; None if there is a file already."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except (FileExistsError, FileNotFoundError):  # the latter if its folder has just been removed with a lock
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
    """Opened anew, since NFS shows what others wrote to those who open a file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes | None) -> LockOwner | None:
    """The owner, unless the file is gone, is just being written, or is something else."""
    try:
        return LockOwner(**json.loads((content or b"").partition(b"\n")[0]))
    except (ValueError, TypeError):
        return None


def _is_dead(other: LockOwner, own: LockOwner, path: Path) -> bool | None:
    """None if that cannot be told from here."""
    if other.machine == own.machine:
        if not _is_alive(other):
            return True
        with suppress(FileNotFoundError):
            if path.stat().st_ino == other.inode:
                return False
        return None
    if other.job and other.job == own.job and other.restarts < own.restarts:
        return True
    return None


def _is_alive(owner: LockOwner) -> bool:
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    born = _start_ticks(owner.process)
    return born is None or born == owner.born


def _start_ticks(process: int) -> int | None:
    """The process's start in clock ticks; -1 if it has ended and only waits to be reaped, None if that is hidden."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if fields[0] in "ZX" else int(fields[19])


def _watch(path: Path, content: bytes, sleep: Callable[[float], None], heartbeat_seconds: float) -> bytes | None:
    """What a lock's file holds as soon as that is something else, or at the end of all looks."""
    for _ in range(MISSED_HEARTBEATS):
        sleep(heartbeat_seconds)
        latest = _read(path)
        if latest != content:
            return latest
    return content

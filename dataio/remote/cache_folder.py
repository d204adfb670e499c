"""A bounded folder of this machine in which the shards of remote data sets lie while they are needed.

    CACHE/lock                               held for a moment by whoever claims room or is done
    CACHE/3f2a…/samples.npy                  of the data set with this manifest's sha256; never evicted
    CACHE/3f2a…/shard-000007.tar             whole: it got this name when its sha256 was right, and a modification
                                             time that says so; its access time says when it was last asked for
    CACHE/3f2a…/.shard-000008.tar.N.claim    room for N bytes; whoever is fetching the shard holds a lock on it
    CACHE/3f2a…/.shard-000008.tar.partial    what has come of it

Any number of processes share the folder without knowing of each other. A shard in use is open and bears a shared lock,
which goes with its process; whoever needs room removes those without one, longest unused first. remote.py fetches,
cache.py says which shards, and when.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dataio.files import sha256_of, sync
from dataio.remote.fetch import Wait, fetch
from dataio.remote.options import CacheOptions, Remote, gib

_POLL_SECONDS, _LOCK_POLL_SECONDS = 0.05, 0.005
_OURS = re.compile(r"[0-9a-f]{16}")  # folders of data sets; whatever else lies in CACHE is not touched
#: Modification time of a file whose sha256 was right, which writing to it ends. No other file has it by accident.
_VERIFIED_NS = 981_173_106 * 10**9


@dataclass(frozen=True)
class Entry:
    """A file of the cache, as it will be."""

    path: Path
    bytes: int  # at most
    sha256: str

    @property
    def claim(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{self.bytes}.claim")

    @property
    def partial(self) -> Path:
        return _partial_of(self.claim)


@dataclass(frozen=True)
class Reserved:
    """An open, locked file of the cache: the whole one, or the claim of this process to fetch it."""

    file: int
    is_whole: bool


class _NoRoomError(Exception):
    """Everything in the cache is in use."""


def reserve(remote: Remote, entry: Entry, wait: Wait) -> Reserved:
    """The file, which nobody evicts before it is closed, or the right to fetch it, as soon as there is room.

    Raises RuntimeError if there is no room for it, if another process is fetching it until the wait ends, or soon after
    it is given up.
    """
    full = Wait(remote.cache.patience.room_seconds)
    with _explained(entry):
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = _open_whole(remote.cache, entry, wait)
            if file is not None:
                return Reserved(file, is_whole=True)
            try:
                claimed = _claim(remote.cache, entry, wait)
                if claimed is not None:
                    return Reserved(claimed, is_whole=False)
                full = Wait(remote.cache.patience.room_seconds)  # it is not, at this moment
                fault = (
                    f"another process is fetching {entry.path}, and has not got it after {wait.seconds:g} s; end it if"
                    " it was stopped, check server and network"
                )
            except _NoRoomError as error:
                fault = f"no room for {entry.path}: {error}"
            if not (wait.seconds_left and full.seconds_left):
                raise RuntimeError(fault)
            if wait.given_up.wait(_POLL_SECONDS):
                raise RuntimeError(f"{entry.path} is not needed any more")


def _partial_of(claim: Path) -> Path:
    return claim.with_suffix("").with_suffix(".partial")


@contextmanager
def _explained(entry: Entry) -> Iterator[None]:
    """An OSError inside ends as a RuntimeError."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"cannot keep {entry.path}: {error.strerror}; make the folder writable, or name another one, on a local"
            " disk, with data.cache, --cache"
        ) from error


def _open_whole(cache: CacheOptions, entry: Entry, wait: Wait) -> int | None:
    """The open and locked file if the cache has it, whole. One that was written to since it was verified is read."""
    try:
        file = os.open(entry.path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with _closed_on_error(file):
        _lock(file, fcntl.LOCK_SH, entry.path, cache, wait)
        status = os.fstat(file)
        if status.st_nlink > 0:  # else evicted between open and lock
            if status.st_mtime_ns == _VERIFIED_NS or _has_sha256(file, entry.sha256):
                _mark_verified(file)
                return file
            with _locked(cache, wait), suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), entry.path.stat()):  # else another process has fetched it anew
                    entry.path.unlink()
    os.close(file)
    return None


def _has_sha256(file: int, sha256: str) -> bool:
    """Whether an open file has it, and was not written to while it was read."""
    before = os.fstat(file).st_mtime_ns
    whole = sha256_of(os.dup(file)) == sha256
    return whole and os.fstat(file).st_mtime_ns in (before, _VERIFIED_NS)  # others may have found the same meanwhile


def _mark_verified(file: int) -> None:
    """As used now, too."""
    with suppress(PermissionError):  # of another user: it stays as it was
        os.utime(file, ns=(time.time_ns(), _VERIFIED_NS))


@contextmanager
def _closed_on_error(file: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(file)
        raise


def _claim(cache: CacheOptions, entry: Entry, wait: Wait) -> int | None:
    """The new, open and locked claim; None if the file is there by now, or being fetched.

    Raises _NoRoomError.
    """
    with _locked(cache, wait):
        if entry.path.exists() or not _remove_dead(entry.claim):
            return None
        _make_room(cache, entry.bytes)
        file = os.open(entry.claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        with _closed_on_error(file):
            fcntl.flock(file, fcntl.LOCK_EX)
        return file


@contextmanager
def _locked(cache: CacheOptions, wait: Wait) -> Iterator[None]:
    """Inside, no other process claims room, evicts, or lets a file appear."""
    with open(cache.folder / "lock", "a") as lock:
        _lock(lock.fileno(), fcntl.LOCK_EX, cache.folder / "lock", cache, wait)
        yield


def _lock(file: int, kind: int, path: Path, cache: CacheOptions, wait: Wait) -> None:
    """Raises RuntimeError if other processes do not let go of it: each holds it for a moment, unless it was stopped."""
    deadline = time.monotonic() + min(cache.patience.room_seconds, wait.seconds_left)
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"another process holds a lock on {path}; end it if it was stopped") from error
        if wait.given_up.wait(_LOCK_POLL_SECONDS):
            raise RuntimeError(f"what {path} is locked for is not needed any more")


def fill(remote: Remote, entry: Entry, reserved: Reserved, wait: Wait) -> int:
    """The open file, which nobody evicts before it is closed; fetched first if it is not there.

    Raises RuntimeError if it cannot be fetched.
    """
    if reserved.is_whole:
        return reserved.file
    try:
        with _explained(entry):
            try:
                fetch(remote, entry.path.name, entry.partial, entry.bytes, entry.sha256, wait)
                file = _publish(remote.cache, entry, wait)
            except BaseException:
                entry.partial.unlink(missing_ok=True)
                entry.claim.unlink(missing_ok=True)
                raise
            with _closed_on_error(file):
                sync(entry.path.parent)
        return file
    finally:
        os.close(reserved.file)


def _publish(cache: CacheOptions, entry: Entry, wait: Wait) -> int:
    """Gives what was fetched its name, in the place of its claim; the open and locked file."""
    file = os.open(entry.partial, os.O_RDONLY)
    with _closed_on_error(file):
        fcntl.flock(file, fcntl.LOCK_SH)
        _mark_verified(file)  # after its bytes are on disk: a crash may lose the mark, never what it says
        with _locked(cache, wait):  # or whoever counts at this moment may count it twice, or not at all
            entry.partial.rename(entry.path)
            entry.claim.unlink()
    return file


def _make_room(cache: CacheOptions, needed: int) -> None:
    """Evicts until `needed` more bytes fit within the cache's limit and on its disk. Raises _NoRoomError."""
    total, unwritten, shards = 0, 0, []  # bytes, claimed ones among them; bytes that the disk will have to take yet
    for folder in cache.folder.iterdir():
        if not _OURS.fullmatch(folder.name):
            continue
        for path in folder.iterdir():
            if path.suffix == ".claim":
                if not _remove_dead(path):
                    claimed = int(path.suffixes[-2][1:])
                    total += claimed
                    unwritten += max(0, claimed - _bytes_on_disk(_partial_of(path)))
            elif path.suffix == ".partial":  # which its claim stands for
                if not any(folder.glob(f"{path.stem}.*.claim")):
                    path.unlink(missing_ok=True)
            else:
                with suppress(FileNotFoundError):  # somebody tidies up
                    status = path.stat()
                    total += status.st_size
                    if path.suffix == ".tar":
                        shards.append((status.st_atime_ns, path, status.st_size))
    free = shutil.disk_usage(cache.folder).free - unwritten
    for _, path, size in sorted(shards):
        if total + needed <= cache.limit_bytes and needed <= free:
            return
        if _remove_unused(path):
            total, free = total - size, free + size
    if total + needed > cache.limit_bytes:
        raise _NoRoomError(
            f"all of the {gib(total)} there is in use, of {gib(cache.limit_bytes)} allowed, and {gib(needed)} are"
            " needed; raise data.cache_gib, --cache-gib, or let other runs have another data.cache, --cache"
        )
    if needed > free:
        raise _NoRoomError(
            f"its disk has {gib(max(0, free))} left and {gib(needed)} are needed; free some space, or let data.cache,"
            " --cache name a folder of another disk"
        )


def _bytes_on_disk(path: Path) -> int:
    """Of a file that may have holes, or not be there."""
    try:
        return 512 * path.stat().st_blocks
    except FileNotFoundError:
        return 0


def _remove_dead(claim: Path) -> bool:
    """Removes a claim, and what has come of it, unless its process is alive; whether it is gone."""
    if not _remove_unused(claim):
        return False
    _partial_of(claim).unlink(missing_ok=True)
    return True


def _remove_unused(path: Path) -> bool:
    """Removes a file unless a process holds a lock on it; whether it is gone."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)

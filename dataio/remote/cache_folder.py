"""A bounded folder of this machine in which the shards of remote data sets lie while they are needed.

    CACHE/lock                               held for a moment by whoever claims room or is done
    CACHE/3f2a…/samples.npy                  of the data set with this manifest's sha256; never evicted
    CACHE/3f2a…/shard-000007.tar             whole: it got this name when its sha256 was right, and a modification
                                             time that says so; its access time says when it was last asked for
    CACHE/3f2a…/.shard-000008.tar.N.claim    room for N bytes; whoever is fetching the shard holds a lock on it
    CACHE/3f2a…/.shard-000008.tar.partial    what has come of it

Any number of processes share the folder without knowing of each other. A shard in use is open and bears a shared lock,
which goes with its process; whoever needs room removes those without one, longest unused first. fetch.py fetches,
prefetch.py says which shards, and when.
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
from dataio.remote.fetch import Deadline, fetch
from dataio.remote.options import CacheOptions, Remote, format_gib

_POLL_SECONDS, _LOCK_POLL_SECONDS = 0.05, 0.005
_DATASET_FOLDER = re.compile(r"[0-9a-f]{16}")  # folders of data sets; whatever else lies in CACHE is not touched
#: Modification time of a file whose sha256 was right, which writing to it ends. No other file has it by accident.
_VERIFIED_NS = 981_173_106 * 10**9


@dataclass(frozen=True)
class CacheEntry:
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
class Reservation:
    """An open, locked file of the cache: the whole one, or the claim of this process to fetch it."""

    file: int
    is_whole: bool


class _CacheFullError(Exception):
    """Everything in the cache is in use."""


def reserve(remote: Remote, entry: CacheEntry, deadline: Deadline) -> Reservation:
    """The file, which nobody evicts before it is closed, or the right to fetch it, as soon as there is room.

    Raises RuntimeError if there is no room for it, if another process is fetching it until the wait ends, or soon after
    it is given up.
    """
    full = Deadline(remote.cache.retry_policy.eviction_timeout_seconds)
    with _oserror_as_runtimeerror(entry):
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = _open_whole(remote.cache, entry, deadline)
            if file is not None:
                return Reservation(file, is_whole=True)
            try:
                claimed = _claim(remote.cache, entry, deadline)
                if claimed is not None:
                    return Reservation(claimed, is_whole=False)
                full = Deadline(remote.cache.retry_policy.eviction_timeout_seconds)  # it is not, at this moment
                fault = (
                    f"another process is fetching {entry.path}, and has not got it after {deadline.seconds:g} s; end it if"
                    " it was stopped, check server and network"
                )
            except _CacheFullError as error:
                fault = f"no room for {entry.path}: {error}"
            if not (deadline.seconds_left and full.seconds_left):
                raise RuntimeError(fault)
            if deadline.cancelled.wait(_POLL_SECONDS):
                raise RuntimeError(f"{entry.path} is not needed any more")


def _partial_of(claim: Path) -> Path:
    return claim.with_suffix("").with_suffix(".partial")


@contextmanager
def _oserror_as_runtimeerror(entry: CacheEntry) -> Iterator[None]:
    """An OSError inside ends as a RuntimeError."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"cannot keep {entry.path}: {error.strerror}; make the folder writable, or name another one, on a local"
            " disk, with data.cache, --cache"
        ) from error


def _open_whole(cache: CacheOptions, entry: CacheEntry, deadline: Deadline) -> int | None:
    """The open and locked file if the cache has it, whole. One that was written to since it was verified is read."""
    try:
        file = os.open(entry.path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with _closed_on_error(file):
        _lock(file, fcntl.LOCK_SH, entry.path, cache, deadline)
        status = os.fstat(file)
        if status.st_nlink > 0:  # else evicted between open and lock
            if status.st_mtime_ns == _VERIFIED_NS or _has_sha256(file, entry.sha256):
                _mark_verified(file)
                return file
            with _locked(cache, deadline), suppress(FileNotFoundError):
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


def _claim(cache: CacheOptions, entry: CacheEntry, deadline: Deadline) -> int | None:
    """The new, open and locked claim; None if the file is there by now, or being fetched.

    Raises _CacheFullError.
    """
    with _locked(cache, deadline):
        if entry.path.exists() or not _remove_stale_claim(entry.claim):
            return None
        _evict(cache, entry.bytes)
        file = os.open(entry.claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        with _closed_on_error(file):
            fcntl.flock(file, fcntl.LOCK_EX)
        return file


@contextmanager
def _locked(cache: CacheOptions, deadline: Deadline) -> Iterator[None]:
    """Inside, no other process claims room, evicts, or lets a file appear."""
    with open(cache.folder / "lock", "a") as lock:
        _lock(lock.fileno(), fcntl.LOCK_EX, cache.folder / "lock", cache, deadline)
        yield


def _lock(file: int, kind: int, path: Path, cache: CacheOptions, deadline: Deadline) -> None:
    """Raises RuntimeError if other processes do not let go of it: each holds it for a moment, unless it was stopped."""
    ends_at = time.monotonic() + min(cache.retry_policy.eviction_timeout_seconds, deadline.seconds_left)
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > ends_at:
                raise RuntimeError(f"another process holds a lock on {path}; end it if it was stopped") from error
        if deadline.cancelled.wait(_LOCK_POLL_SECONDS):
            raise RuntimeError(f"what {path} is locked for is not needed any more")


def fetch_reserved(remote: Remote, entry: CacheEntry, reserved: Reservation, deadline: Deadline) -> int:
    """The open file, which nobody evicts before it is closed; fetched first if it is not there.

    Raises RuntimeError if it cannot be fetched.
    """
    if reserved.is_whole:
        return reserved.file
    try:
        with _oserror_as_runtimeerror(entry):
            try:
                fetch(remote, entry.path.name, entry.partial, entry.bytes, entry.sha256, deadline)
                file = _publish(remote.cache, entry, deadline)
            except BaseException:
                entry.partial.unlink(missing_ok=True)
                entry.claim.unlink(missing_ok=True)
                raise
            with _closed_on_error(file):
                sync(entry.path.parent)
        return file
    finally:
        os.close(reserved.file)


def _publish(cache: CacheOptions, entry: CacheEntry, deadline: Deadline) -> int:
    """Gives what was fetched its name, in the place of its claim; the open and locked file."""
    file = os.open(entry.partial, os.O_RDONLY)
    with _closed_on_error(file):
        fcntl.flock(file, fcntl.LOCK_SH)
        _mark_verified(file)  # after its bytes are on disk: a crash may lose the mark, never what it says
        with _locked(cache, deadline):  # or whoever counts at this moment may count it twice, or not at all
            entry.partial.rename(entry.path)
            entry.claim.unlink()
    return file


def _evict(cache: CacheOptions, needed: int) -> None:
    """Evicts until `needed` more bytes fit within the cache's limit and on its disk. Raises _CacheFullError."""
    total, unwritten, shards = 0, 0, []  # bytes, claimed ones among them; bytes that the disk will have to take yet
    for folder in cache.folder.iterdir():
        if not _DATASET_FOLDER.fullmatch(folder.name):
            continue
        for path in folder.iterdir():
            if path.suffix == ".claim":
                if not _remove_stale_claim(path):
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
        if _remove_if_unlocked(path):
            total, free = total - size, free + size
    if total + needed > cache.limit_bytes:
        raise _CacheFullError(
            f"all of the {format_gib(total)} there is in use, of {format_gib(cache.limit_bytes)} allowed, and {format_gib(needed)} are"
            " needed; raise data.cache_gib, --cache-gib, or let other runs have another data.cache, --cache"
        )
    if needed > free:
        raise _CacheFullError(
            f"its disk has {format_gib(max(0, free))} left and {format_gib(needed)} are needed; free some space, or let data.cache,"
            " --cache name a folder of another disk"
        )


def _bytes_on_disk(path: Path) -> int:
    """Of a file that may have holes, or not be there."""
    try:
        return 512 * path.stat().st_blocks
    except FileNotFoundError:
        return 0


def _remove_stale_claim(claim: Path) -> bool:
    """Removes a claim, and what has come of it, unless its process is alive; whether it is gone."""
    if not _remove_if_unlocked(claim):
        return False
    _partial_of(claim).unlink(missing_ok=True)
    return True


def _remove_if_unlocked(path: Path) -> bool:
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

"""Bounded cache folder of remote data sets, shared by any number of processes of a machine.

    CACHE/lock                               locked for a moment by any process that claims space or has fetched a file
    CACHE/3f2a…/samples.npy                  sample table of the data set with this manifest's sha256; never evicted
    CACHE/3f2a…/shard-000007.tar             complete shard, named so when its sha256 was right; its modification time
                                             marks it as verified, its access time is that of the last request
    CACHE/3f2a…/.shard-000008.tar.N.claim    N reserved bytes, locked by the process that is fetching the shard
    CACHE/3f2a…/.shard-000008.tar.partial    the bytes of it that have arrived

A shard in use is open under a shared lock, which ends with its process; a process that needs space removes the least
recently used shards without one. fetch.py transfers the files, prefetch.py chooses which shards are fetched, and when.
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
_DATASET_FOLDER = re.compile(r"[0-9a-f]{16}")  # folders of data sets; nothing else in CACHE is touched
#: Modification time that marks a file whose sha256 was right; writing to the file changes it.
_VERIFIED_NS = 981_173_106 * 10**9


@dataclass(frozen=True)
class CacheEntry:
    """A file that the cache has or will have."""

    path: Path
    bytes: int  # at most
    sha256: str

    @property
    def claim(self) -> Path:
        """Path of the file that reserves its bytes."""
        return self.path.with_name(f".{self.path.name}.{self.bytes}.claim")

    @property
    def partial(self) -> Path:
        """Path of the bytes that have arrived."""
        return _partial_of(self.claim)


@dataclass(frozen=True)
class Reservation:
    """An open and locked file of the cache: either the complete one, or this process's claim to fetch it."""

    file: int
    is_whole: bool


class _CacheFullError(Exception):
    """All files of the cache are in use."""


def reserve(remote: Remote, entry: CacheEntry, deadline: Deadline) -> Reservation:
    """Open a cached file, which is not evicted until it is closed; or claim the right to fetch it, when there is space.

    Raises RuntimeError if there is no space for it, if another process is still fetching it at the deadline, or soon
    after the deadline is cancelled.
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
                full = Deadline(remote.cache.retry_policy.eviction_timeout_seconds)  # the cache is not full now
                fault = (
                    f"another process is fetching {entry.path}, and has not finished after {deadline.seconds:g} s; end"
                    " it if it was stopped, check server and network"
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
    """Raise an OSError of the block as a RuntimeError with a remedy."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"cannot keep {entry.path}: {error.strerror}; make the folder writable, or name another one, on a local"
            " disk, with data.cache, --cache"
        ) from error


def _open_whole(cache: CacheOptions, entry: CacheEntry, deadline: Deadline) -> int | None:
    """Open and lock a file if the cache has it complete. It is hashed if it was written to since it was verified."""
    try:
        file = os.open(entry.path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with _closed_on_error(file):
        _lock(file, fcntl.LOCK_SH, entry.path, cache, deadline)
        status = os.fstat(file)
        if status.st_nlink > 0:  # else it was evicted between open and lock
            if status.st_mtime_ns == _VERIFIED_NS or _has_sha256(file, entry.sha256):
                _mark_verified(file)
                return file
            with _locked(cache, deadline), suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), entry.path.stat()):  # else another process has fetched it again
                    entry.path.unlink()
    os.close(file)
    return None


def _has_sha256(file: int, sha256: str) -> bool:
    """Hash an open file; False if it differs, or was written to meanwhile."""
    before = os.fstat(file).st_mtime_ns
    whole = sha256_of(os.dup(file)) == sha256
    return whole and os.fstat(file).st_mtime_ns in (before, _VERIFIED_NS)  # another process may have verified it too


def _mark_verified(file: int) -> None:
    """Mark a file as verified, and as used now."""
    with suppress(PermissionError):  # the file belongs to another user
        os.utime(file, ns=(time.time_ns(), _VERIFIED_NS))


@contextmanager
def _closed_on_error(file: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(file)
        raise


def _claim(cache: CacheOptions, entry: CacheEntry, deadline: Deadline) -> int | None:
    """Create, open and lock a claim; None if the file has appeared meanwhile, or another process is fetching it.

    Raises _CacheFullError.
    """
    with _locked(cache, deadline):
        if entry.path.exists() or not _remove_stale_claim(entry.claim):
            return None
        _evict(cache, entry.bytes)
        file = os.open(entry.claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with _closed_on_error(file):
            fcntl.flock(file, fcntl.LOCK_EX)
        return file


@contextmanager
def _locked(cache: CacheOptions, deadline: Deadline) -> Iterator[None]:
    """Lock the cache: no other process claims space, evicts, or publishes a file during the block."""
    with open(cache.folder / "lock", "a") as lock:
        _lock(lock.fileno(), fcntl.LOCK_EX, cache.folder / "lock", cache, deadline)
        yield


def _lock(file: int, kind: int, path: Path, cache: CacheOptions, deadline: Deadline) -> None:
    """Lock a file. Raises RuntimeError at the deadline: other processes hold it for a moment only, unless stopped."""
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
    """Open a reserved file, fetching it first if only its claim exists; it is not evicted until it is closed.

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
    """Rename a fetched file to its final name and remove its claim; return the open and locked file."""
    file = os.open(entry.partial, os.O_RDONLY)
    with _closed_on_error(file):
        fcntl.flock(file, fcntl.LOCK_SH)
        _mark_verified(file)  # its bytes are on disk by now: a crash may lose the mark, but never leave a wrong one
        with _locked(cache, deadline):  # else another process may count the file twice at this moment, or not at all
            entry.partial.rename(entry.path)
            entry.claim.unlink()
    return file


def _evict(cache: CacheOptions, needed: int) -> None:
    """Evict shards until `needed` more bytes fit into the cache's limit and on its disk. Raises _CacheFullError."""
    total, unwritten = 0, 0  # bytes of the cache with all claims; claimed bytes that are not on disk yet
    shards = []
    for folder in cache.folder.iterdir():
        if not _DATASET_FOLDER.fullmatch(folder.name):
            continue
        for path in folder.iterdir():
            if path.suffix == ".claim":
                if not _remove_stale_claim(path):
                    claimed = int(path.suffixes[-2][1:])
                    total += claimed
                    unwritten += max(0, claimed - _bytes_on_disk(_partial_of(path)))
            elif path.suffix == ".partial":  # counted with its claim
                if not any(folder.glob(f"{path.stem}.*.claim")):
                    path.unlink(missing_ok=True)
            else:
                with suppress(FileNotFoundError):  # somebody removed it meanwhile
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
            f"all of the {format_gib(total)} there is in use, of {format_gib(cache.limit_bytes)} allowed, and"
            f" {format_gib(needed)} are needed; raise data.cache_gib, --cache-gib, or let other runs have another"
            " data.cache, --cache"
        )
    if needed > free:
        raise _CacheFullError(
            f"its disk has {format_gib(max(0, free))} left and {format_gib(needed)} are needed; free some space, or let"
            " data.cache, --cache name a folder of another disk"
        )


def _bytes_on_disk(path: Path) -> int:
    """Return the bytes that a file takes on disk, without its holes; 0 if it does not exist."""
    try:
        return 512 * path.stat().st_blocks
    except FileNotFoundError:
        return 0


def _remove_stale_claim(claim: Path) -> bool:
    """Remove a claim and its partial file unless its process is alive; return whether it is gone."""
    if not _remove_if_unlocked(claim):
        return False
    _partial_of(claim).unlink(missing_ok=True)
    return True


def _remove_if_unlocked(path: Path) -> bool:
    """Remove a file unless a process has locked it; return whether it is gone."""
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

"""A bounded folder of this machine in which the shards of remote data sets lie while they are needed.

    CACHE/lock                               held for a moment by whoever claims room or is done
    CACHE/3f2a…/samples.npy                  of the data set with this manifest's sha256; never evicted
    CACHE/3f2a…/shard-000007.tar             whole: it got this name when its sha256 was right, and a modification
                                             time that says so; its access time says when it was last asked for
    CACHE/3f2a…/.shard-000008.tar.N.claim    room for N bytes; whoever is fetching the shard holds a lock on it
    CACHE/3f2a…/.shard-000008.tar.partial    what has come of it

Any number of processes share the folder without knowing of each other. A shard in use is open and bears a shared lock,
which goes with its process; whoever needs room removes those without one, longest unused first. remote.py fetches,
shards.py reads.
"""

import fcntl
import math
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dataio.files import sha256_of, sync
from dataio.index import (
    MANIFEST_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    Manifest,
    load_manifest,
    make_manifest,
    parse_manifest,
)
from dataio.remote import CacheOptions, Remote, fetch, is_url, read_remote, shown
from dataio.shards import ShardFiles, read_sample

_THREADS = 4
_POLL_SECONDS, _LOCK_POLL_SECONDS = 0.05, 0.005
_HEADER_BYTES = 4096  # of a .npy file, at most: NumPy writes 256 for SAMPLE_DTYPE
_OURS = re.compile(r"[0-9a-f]{16}")  # folders of data sets; whatever else lies in CACHE is not touched
#: Modification time of a file whose sha256 was right, which writing to it ends. No other file has it by accident.
_VERIFIED_NS = 981_173_106 * 10**9


def open_data(place: str | Path, cache: CacheOptions) -> Manifest:
    """The manifest of a packed folder, here or at a URL. Of a remote one the sample table is fetched, and no shard.

    Raises what `load_manifest` and `remote.fetch` raise.
    """
    if not is_url(place):
        return load_manifest(place)
    remote = Remote(str(place).rstrip("/"), cache)
    file, digest = parse_manifest(read_remote(remote, MANIFEST_NAME), shown(remote.address(MANIFEST_NAME)))
    folder = cache.folder.absolute() / digest[:16]
    table_bytes = _HEADER_BYTES + file.samples * SAMPLE_DTYPE.itemsize
    table = _Entry(folder / SAMPLES_NAME, table_bytes, file.samples_sha256)
    require_room(cache, {shown(remote.url): table.bytes})
    never = threading.Event()
    os.close(_fill(remote, table, _reserve(remote, table, never), never))
    return make_manifest(folder, file, digest, remote)


def open_shards(manifest: Manifest) -> "ShardFiles | ShardCache":
    """What reads the encoded images of a data set."""
    return ShardCache(manifest) if manifest.remote else ShardFiles(manifest)


def bytes_at_once(manifest: Manifest, shards: int) -> int:
    """The room that any so many shards take, one more (of a broken image's stand-in), and the sample table."""
    sizes = sorted((shard.bytes for shard in manifest.shards), reverse=True)
    return sum(sizes[: shards + 1]) + (manifest.folder / SAMPLES_NAME).stat().st_size


def require_room(cache: CacheOptions, needed: dict[str, int]) -> None:
    """Raises ValueError if the cache is too small for what is needed of it at once: bytes by data set."""
    whole = sum(needed.values())
    if whole > cache.limit_bytes:
        parts = ", ".join(f"{place} needs {_gib(count)}" for place, count in needed.items())
        raise ValueError(
            f"a cache of {_gib(cache.limit_bytes)} is too small, {parts} at a time; allow it"
            f" {math.ceil(100 * whole / 2**30) / 100:g} (data.cache_gib, --cache-gib), or lower data.window_shards"
        )


def _gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


@dataclass(frozen=True)
class _Entry:
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
class _Reserved:
    """An open, locked file of the cache: the whole one, or the claim of this process to fetch it."""

    file: int
    is_whole: bool


@dataclass
class _Held:
    """A shard that is asked for: its open file, as soon as it is there."""

    entry: _Entry
    file: "Future[int]" = field(default_factory=Future)
    given_up: threading.Event = field(default_factory=threading.Event)
    reserved: _Reserved | None = None

    @property
    def waits(self) -> bool:
        return not (self.file.running() or self.file.done())

    @property
    def failed(self) -> bool:
        return self.file.done() and self.file.exception() is not None


class ShardCache:
    """The encoded images of a remote data set. A few threads fetch the shards that were asked for, in that order.

    A shard that cannot be had is an error of the `read` that needs it, not of the threads that fetched ahead.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._held: dict[int, _Held] = {}
        self._queue: deque[int] = deque()  # those that no thread works on yet
        self._closed = False
        self._changed = threading.Condition()  # guards the three above
        self._turn = threading.Lock()  # room is claimed in the order of need
        for number in range(_THREADS):
            threading.Thread(target=self._work, name=f"shards-{number}", daemon=True).start()

    def hold(self, shards: Sequence[int]) -> None:
        """Fetches these shards, in this order, and keeps them from being evicted; gives up all others."""
        with self._changed:
            for shard in self._held.keys() - set(shards):
                self._give_up(shard)
            for shard in shards:
                if shard not in self._held or self._held[shard].failed:
                    self._held[shard] = _Held(self._entry(shard))
            self._queue = deque(shard for shard in shards if self._held[shard].waits)
            self._changed.notify_all()

    def read_ahead(self, samples: Sequence[int]) -> None:
        """What was fetched a moment ago is still in memory."""

    def read(self, sample: int) -> bytes:
        """The encoded image, as soon as its shard is there. Raises as `read_sample` and `remote.fetch` do."""
        shard = int(self._manifest.samples["shard"][sample])
        with self._changed:
            if self._closed:
                raise RuntimeError("the cache was closed; nothing can be read through it any more")
            if shard not in self._held:  # of a batch before: a stand-in is looked for
                self._held[shard] = _Held(self._entry(shard))
                self._queue.appendleft(shard)
                self._changed.notify()
            held = self._held[shard]
        error = held.file.exception()  # waits
        if error is not None:  # a new one: what is kept must not hold on to the frames that it passes through
            raise RuntimeError(str(error) or type(error).__name__) from error
        return read_sample(self._manifest, sample, held.file.result())

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for shard in list(self._held):
                self._give_up(shard)
            self._queue.clear()
            self._changed.notify_all()

    def _give_up(self, shard: int) -> None:
        held = self._held.pop(shard)
        held.given_up.set()
        if held.file.done() and not held.failed:
            os.close(held.file.result())

    def _entry(self, number: int) -> _Entry:
        shard = self._manifest.shards[number]
        return _Entry(self._manifest.folder / shard.name, shard.bytes, shard.sha256)

    def _work(self) -> None:
        while True:
            with self._turn:
                held = self._take()
                if held is None:
                    return
                self._attempt(self._reserve, held)
            self._attempt(self._complete, held)

    def _take(self) -> _Held | None:
        """The next shard to work on; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            held = self._held[self._queue.popleft()]
            held.file.set_running_or_notify_cancel()
            return held

    def _attempt(self, part: Callable[[_Held], None], held: _Held) -> None:
        try:
            part(held)
        except BaseException as error:  # whatever it is, somebody may be waiting
            held.file.set_exception(error)

    def _reserve(self, held: _Held) -> None:
        held.reserved = _reserve(self._manifest.remote, held.entry, held.given_up)

    def _complete(self, held: _Held) -> None:
        if held.failed:
            return
        file = _fill(self._manifest.remote, held.entry, held.reserved, held.given_up)
        with self._changed:
            held.file.set_result(file)
            if held.given_up.is_set():
                os.close(file)


class _NoRoomError(Exception):
    """Everything in the cache is in use."""


def _reserve(remote: Remote, entry: _Entry, given_up: threading.Event) -> _Reserved:
    """The file, which nobody evicts before it is closed, or the right to fetch it, as soon as there is room.

    Raises RuntimeError if there is no room for it, if another process is fetching it and stands still, or soon after
    `given_up` is set.
    """
    patience = remote.cache.patience
    state, deadline = None, 0.0  # why it is not there yet, and until when it may stay so
    with _explained(entry):
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = _open_whole(remote.cache, entry)
            if file is not None:
                return _Reserved(file, is_whole=True)
            try:
                claimed = _claim(remote.cache, entry)
                if claimed is not None:
                    return _Reserved(claimed, is_whole=False)
                now, seconds = ("fetched by another", _progress(entry)), patience.others_seconds
                fault = f"another process is fetching {entry.path}, and gets nothing; end it if it was stopped"
            except _NoRoomError as error:
                now, seconds = ("no room",), patience.room_seconds
                fault = f"no room for {entry.path}: {error}"
            if now != state:
                state, deadline = now, time.monotonic() + seconds
            elif time.monotonic() > deadline:
                raise RuntimeError(fault)
            if given_up.wait(_POLL_SECONDS):
                raise RuntimeError(f"{entry.path} is not needed any more")


def _partial_of(claim: Path) -> Path:
    return claim.with_suffix("").with_suffix(".partial")


def _progress(entry: _Entry) -> tuple[int, ...]:
    """What changes as long as somebody writes what comes of a file."""
    try:
        status = entry.partial.stat()
    except FileNotFoundError:
        return ()
    return status.st_size, status.st_blocks, status.st_mtime_ns


@contextmanager
def _explained(entry: _Entry) -> Iterator[None]:
    """An OSError inside ends as a RuntimeError."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"cannot keep {entry.path}: {error.strerror}; make the folder writable, or name another one, on a local"
            " disk, with data.cache"
        ) from error


def _open_whole(cache: CacheOptions, entry: _Entry) -> int | None:
    """The open and locked file if the cache has it, whole. One that was written to since it was verified is read."""
    try:
        file = os.open(entry.path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with _closed_on_error(file):
        _lock(file, fcntl.LOCK_SH, entry.path, cache)
        status = os.fstat(file)
        if status.st_nlink > 0:  # else evicted between open and lock
            if status.st_mtime_ns == _VERIFIED_NS or _has_sha256(file, entry.sha256):
                _mark_verified(file)
                return file
            with _locked(cache), suppress(FileNotFoundError):
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


def _claim(cache: CacheOptions, entry: _Entry) -> int | None:
    """The new, open and locked claim; None if the file is there by now, or being fetched.

    Raises _NoRoomError.
    """
    with _locked(cache):
        if entry.path.exists() or not _remove_dead(entry.claim):
            return None
        _make_room(cache, entry.bytes)
        file = os.open(entry.claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        with _closed_on_error(file):
            fcntl.flock(file, fcntl.LOCK_EX)
        return file


@contextmanager
def _locked(cache: CacheOptions) -> Iterator[None]:
    """Inside, no other process claims room, evicts, or lets a file appear."""
    with open(cache.folder / "lock", "a") as lock:
        _lock(lock.fileno(), fcntl.LOCK_EX, cache.folder / "lock", cache)
        yield


def _lock(file: int, kind: int, path: Path, cache: CacheOptions) -> None:
    """Raises RuntimeError if other processes do not let go of it: each holds it for a moment, unless it was stopped."""
    deadline = time.monotonic() + cache.patience.room_seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"another process holds the lock of {path}; end it if it was stopped") from error
        time.sleep(_LOCK_POLL_SECONDS)


def _fill(remote: Remote, entry: _Entry, reserved: _Reserved, given_up: threading.Event) -> int:
    """The open file, which nobody evicts before it is closed; fetched first if it is not there.

    Raises RuntimeError if it cannot be fetched.
    """
    if reserved.is_whole:
        return reserved.file
    try:
        with _explained(entry):
            try:
                fetch(remote, entry.path.name, entry.partial, entry.bytes, entry.sha256, given_up)
                file = _publish(remote.cache, entry)
            except BaseException:
                entry.partial.unlink(missing_ok=True)
                entry.claim.unlink(missing_ok=True)
                raise
            with _closed_on_error(file):
                sync(entry.path.parent)
        return file
    finally:
        os.close(reserved.file)


def _publish(cache: CacheOptions, entry: _Entry) -> int:
    """Gives what was fetched its name, in the place of its claim; the open and locked file."""
    file = os.open(entry.partial, os.O_RDONLY)
    with _closed_on_error(file):
        fcntl.flock(file, fcntl.LOCK_SH)
        _mark_verified(file)  # after its bytes are on disk: a crash may lose the mark, never what it says
        with _locked(cache):  # or whoever counts at this moment may count it twice, or not at all
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
            elif path.suffix != ".partial":  # which is what a claim is for
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
            f"all of the {_gib(total)} there is in use, of {_gib(cache.limit_bytes)} allowed, and {_gib(needed)} are"
            " needed; raise data.cache_gib, or let other runs have another data.cache"
        )
    if needed > free:
        raise _NoRoomError(
            f"its disk has {_gib(max(0, free))} left and {_gib(needed)} are needed; free some space, or let data.cache"
            " name a folder of another disk"
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

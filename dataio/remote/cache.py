"""Remote data sets as if they lay here: their manifests, and the shards that a process needs soon, fetched by threads.

cache_folder.py says what lies where, and for how long. shards.py reads, whatever a shard came from.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, field

from dataio.manifest import (
    MANIFEST_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    Manifest,
    make_manifest,
    parse_manifest,
)
from dataio.remote.cache_folder import Entry, Reserved, fill, reserve
from dataio.remote.fetch import Wait, read_remote
from dataio.remote.options import CacheOptions, Remote
from dataio.shards import read_sample
from dataio.urls import shown

_THREADS = 4
_HEADER_BYTES = 4096  # of a .npy file, at most: NumPy writes 256 for SAMPLE_DTYPE


def open_remote(url: str, cache: CacheOptions) -> Manifest:
    """The manifest of a packed folder at a URL. The sample table is fetched, and no shard.

    Raises what `load_manifest` and `fetch` raise.
    """
    remote = Remote(url.rstrip("/"), cache)
    file, digest = parse_manifest(read_remote(remote, MANIFEST_NAME), shown(remote.address(MANIFEST_NAME)))
    folder = cache.folder.absolute() / digest[:16]
    table_bytes = _HEADER_BYTES + file.samples * SAMPLE_DTYPE.itemsize
    table = Entry(folder / SAMPLES_NAME, table_bytes, file.samples_sha256)
    cache.require_room({shown(remote.url): table.bytes})
    wait = Wait(cache.patience.file_seconds)
    os.close(fill(remote, table, reserve(remote, table, wait), wait))
    return make_manifest(folder, file, digest, remote)


@dataclass
class _Held:
    """A shard that is asked for: its open file, as soon as it is there."""

    entry: Entry
    file: "futures.Future[int]" = field(default_factory=futures.Future)
    given_up: threading.Event = field(default_factory=threading.Event)
    reserved: Reserved | None = None

    @property
    def waits(self) -> bool:
        return not (self.file.running() or self.file.done())

    @property
    def failed(self) -> bool:
        return self.file.done() and self.file.exception() is not None


class ShardCache:
    """The encoded images of a remote data set. A few threads fetch the shards that were asked for, in that order.

    A shard that cannot be had is an error of the `read` that needs it, not of the threads that fetched ahead; so is a
    batch that waits longer for its shards than Patience allows.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._held: dict[int, _Held] = {}
        self._queue: deque[int] = deque()  # those that no thread works on yet
        self._closed = False
        self._changed = threading.Condition()  # guards the three above
        self._turn = threading.Lock()  # room is claimed in the order of need
        self._batch_seconds = manifest.remote.cache.patience.batch_seconds
        self._seconds_left = self._batch_seconds  # that the batch may still wait
        for number in range(_THREADS):
            threading.Thread(target=self._work, name=f"shards-{number}", daemon=True).start()

    def hold(self, shards: Sequence[int]) -> None:
        """Begins a batch: fetches these shards, in this order, and keeps them; gives up all others."""
        self._seconds_left = self._batch_seconds
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
        """The encoded image, as soon as its shard is there. Raises as `read_sample` does; RuntimeError without it."""
        shard = int(self._manifest.samples["shard"][sample])
        with self._changed:
            if self._closed:
                raise RuntimeError("the cache was closed; nothing can be read through it any more")
            if shard not in self._held:  # of a batch before: a stand-in is looked for
                self._held[shard] = _Held(self._entry(shard))
                self._queue.appendleft(shard)
                self._changed.notify()
            held = self._held[shard]
        began = time.monotonic()
        if not futures.wait([held.file], self._seconds_left).done:
            raise RuntimeError(self._describe_wait(held))
        self._seconds_left = max(0.0, self._seconds_left - (time.monotonic() - began))
        error = held.file.exception()
        if error is not None:  # a new one: what is kept must not hold on to the frames that it passes through
            raise RuntimeError(str(error) or type(error).__name__) from error
        return read_sample(self._manifest, sample, held.file.result())

    def _describe_wait(self, held: _Held) -> str:
        remote = self._manifest.remote
        return (
            f"waited {self._batch_seconds:g} s for shards of a batch, at last for"
            f" {shown(remote.address(held.entry.path.name))}; check server and network, or read from fewer shards"
            f" (data.window_shards, --batch, --count){remote.cache.patience.longer}"
        )

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

    def _entry(self, number: int) -> Entry:
        shard = self._manifest.shards[number]
        return Entry(self._manifest.folder / shard.name, shard.bytes, shard.sha256)

    def _work(self) -> None:
        while True:
            with self._turn:
                held = self._take()
                if held is None:
                    return
                wait = Wait(self._manifest.remote.cache.patience.file_seconds, held.given_up)
                self._attempt(self._reserve, held, wait)
            self._attempt(self._complete, held, wait)

    def _take(self) -> _Held | None:
        """The next shard to work on; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            held = self._held[self._queue.popleft()]
            held.file.set_running_or_notify_cancel()
            return held

    def _attempt(self, part: Callable[[_Held, Wait], None], held: _Held, wait: Wait) -> None:
        try:
            part(held, wait)
        except BaseException as error:  # whatever it is, somebody may be waiting
            held.file.set_exception(error)

    def _reserve(self, held: _Held, wait: Wait) -> None:
        held.reserved = reserve(self._manifest.remote, held.entry, wait)

    def _complete(self, held: _Held, wait: Wait) -> None:
        if held.failed:
            return
        file = fill(self._manifest.remote, held.entry, held.reserved, wait)
        with self._changed:
            held.file.set_result(file)
            if held.given_up.is_set():
                os.close(file)

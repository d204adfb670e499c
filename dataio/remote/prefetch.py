"""Opening of remote data sets, and prefetching of the shards that a process needs next.

Threads fetch the shards into the cache (cache_folder.py), from where they are read as local ones are (shards.py).
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
from dataio.remote.cache_folder import CacheEntry, Reservation, fetch_reserved, reserve
from dataio.remote.fetch import Deadline, fetch_bytes
from dataio.remote.options import CacheOptions, Remote
from dataio.shards import read_sample
from dataio.urls import redact_url

_THREADS = 4
_HEADER_BYTES = 4096  # upper bound of a .npy file's header; NumPy writes 256 for SAMPLE_DTYPE


def open_remote(url: str, cache: CacheOptions) -> Manifest:
    """Open the manifest of a packed folder at a URL. The sample table is fetched, and no shard.

    Raises what `load_manifest` and `fetch` raise.
    """
    remote = Remote(url.rstrip("/"), cache)
    file, digest = parse_manifest(fetch_bytes(remote, MANIFEST_NAME), redact_url(remote.file_url(MANIFEST_NAME)))
    folder = cache.folder.absolute() / digest[:16]
    table_bytes = _HEADER_BYTES + file.samples * SAMPLE_DTYPE.itemsize
    table = CacheEntry(folder / SAMPLES_NAME, table_bytes, file.samples_sha256)
    cache.check_cache_size({redact_url(remote.url): table.bytes})
    deadline = Deadline(cache.retry_policy.file_timeout_seconds)
    os.close(fetch_reserved(remote, table, reserve(remote, table, deadline), deadline))
    return make_manifest(folder, file, digest, remote)


@dataclass
class _ShardFetch:
    """State of a requested shard: a future of its open file, cancellation, and its place in the cache."""

    entry: CacheEntry
    file: "futures.Future[int]" = field(default_factory=futures.Future)
    cancelled: threading.Event = field(default_factory=threading.Event)
    reserved: Reservation | None = None

    @property
    def is_queued(self) -> bool:
        return not (self.file.running() or self.file.done())

    @property
    def failed(self) -> bool:
        return self.file.done() and self.file.exception() is not None


class RemoteShards:
    """Encoded images of a remote data set. A few threads fetch the requested shards in the order of the requests.

    An error of a fetch is raised by the `read` that needs the shard, not by the threads that prefetch; so is the
    timeout of a batch that waits longer for its shards than RetryPolicy allows.
    """

    def __init__(self, manifest: Manifest) -> None:
        if manifest.remote is None:
            raise ValueError(f"{manifest.folder} is a local data set; read it with LocalShards")
        self._manifest, self._remote = manifest, manifest.remote
        self._fetches: dict[int, _ShardFetch] = {}
        self._queue: deque[int] = deque()  # shards that no thread has begun to fetch
        self._closed = False
        self._changed = threading.Condition()  # guards the three above
        self._reservation_lock = threading.Lock()  # space is claimed in the order of need
        self._batch_timeout_seconds = self._remote.cache.retry_policy.batch_timeout_seconds
        self._seconds_left = self._batch_timeout_seconds  # that the batch may still wait
        for number in range(_THREADS):
            threading.Thread(target=self._work, name=f"shards-{number}", daemon=True).start()

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin a batch: fetch these shards, in this order, and keep them in the cache; cancel all others."""
        self._seconds_left = self._batch_timeout_seconds
        with self._changed:
            for shard in self._fetches.keys() - set(shards):
                self._cancel(shard)
            for shard in shards:
                if shard not in self._fetches or self._fetches[shard].failed:
                    self._fetches[shard] = _ShardFetch(self._entry(shard))
            self._queue = deque(shard for shard in shards if self._fetches[shard].is_queued)
            self._changed.notify_all()

    def read_ahead(self, samples: Sequence[int]) -> None:
        """Do nothing: shards that were just fetched are in the page cache."""

    def read(self, sample: int) -> bytes:
        """Return the encoded image once its shard is there. Raises as `read_sample` does, or RuntimeError."""
        shard = int(self._manifest.samples["shard"][sample])
        with self._changed:
            if self._closed:
                raise RuntimeError("the cache was closed; nothing can be read through it any more")
            if shard not in self._fetches:  # a shard of an earlier batch, for which a substitute is needed
                self._fetches[shard] = _ShardFetch(self._entry(shard))
                self._queue.appendleft(shard)
                self._changed.notify()
            shard_fetch = self._fetches[shard]
        began = time.monotonic()
        if not futures.wait([shard_fetch.file], self._seconds_left).done:
            raise RuntimeError(self._describe_wait(shard_fetch))
        self._seconds_left = max(0.0, self._seconds_left - (time.monotonic() - began))
        error = shard_fetch.file.exception()
        if error is not None:  # a new error, since the stored one must not keep the frames alive that it passes
            raise RuntimeError(str(error) or type(error).__name__) from error
        return read_sample(self._manifest, sample, shard_fetch.file.result())

    def _describe_wait(self, shard_fetch: _ShardFetch) -> str:
        url = redact_url(self._remote.file_url(shard_fetch.entry.path.name))
        return (
            f"waited {self._batch_timeout_seconds:g} s for shards of a batch, at last for {url}; check server and"
            " network, or read from fewer shards (data.shuffle_window_shards, --batch-size,"
            f" --count){self._remote.cache.retry_policy.timeout_hint}"
        )

    def close(self) -> None:
        """Cancel all fetches and close all files; reading is an error from now on."""
        with self._changed:
            self._closed = True
            for shard in list(self._fetches):
                self._cancel(shard)
            self._queue.clear()
            self._changed.notify_all()

    def _cancel(self, shard: int) -> None:
        shard_fetch = self._fetches.pop(shard)
        shard_fetch.cancelled.set()
        if shard_fetch.file.done() and not shard_fetch.failed:
            os.close(shard_fetch.file.result())

    def _entry(self, number: int) -> CacheEntry:
        shard = self._manifest.shards[number]
        return CacheEntry(self._manifest.folder / shard.name, shard.bytes, shard.sha256)

    def _work(self) -> None:
        while True:
            with self._reservation_lock:
                shard_fetch = self._next_fetch()
                if shard_fetch is None:
                    return
                deadline = Deadline(self._remote.cache.retry_policy.file_timeout_seconds, shard_fetch.cancelled)
                self._attempt(self._reserve, shard_fetch, deadline)
            self._attempt(self._complete, shard_fetch, deadline)

    def _next_fetch(self) -> _ShardFetch | None:
        """Wait for the next shard to fetch; None after close()."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            shard_fetch = self._fetches[self._queue.popleft()]
            shard_fetch.file.set_running_or_notify_cancel()
            return shard_fetch

    def _attempt(
        self, part: Callable[[_ShardFetch, Deadline], None], shard_fetch: _ShardFetch, deadline: Deadline
    ) -> None:
        try:
            part(shard_fetch, deadline)
        except BaseException as error:  # whatever it is, a reader may be waiting for the outcome
            shard_fetch.file.set_exception(error)

    def _reserve(self, shard_fetch: _ShardFetch, deadline: Deadline) -> None:
        shard_fetch.reserved = reserve(self._remote, shard_fetch.entry, deadline)

    def _complete(self, shard_fetch: _ShardFetch, deadline: Deadline) -> None:
        if shard_fetch.reserved is None:  # _reserve has failed
            return
        file = fetch_reserved(self._remote, shard_fetch.entry, shard_fetch.reserved, deadline)
        with self._changed:
            shard_fetch.file.set_result(file)
            if shard_fetch.cancelled.is_set():
                os.close(file)

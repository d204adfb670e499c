"""Files from far away: an address below a URL → a whole, verified file on a local disk, or one clear error.

fsspec does the transport (s3://, gs://, https://, file:// and whatever else it has a package for). Here a transfer is
given its time, tried again with growing pauses, and checked. cache.py decides what is fetched, and when.
"""

import asyncio
import errno
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback

from dataio.files import sha256_of, sync

_Result = TypeVar("_Result")
_LONGEST_WAIT_SECONDS = 30
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED_STATUS = (400, 401, 403, 404, 410)  # of HTTP: the same question gets the same answer


@dataclass(frozen=True)
class Patience:
    """How long a server, or room on the disk, is waited for before that is an error."""

    attempts: int = 6
    first_wait_seconds: float = 0.5  # before the second attempt; twice as long before each later one
    silent_seconds: float = 30  # that a server may send nothing, or take to answer
    file_seconds: float = 240  # that a file may take, over all attempts: less than half of what ranks wait for a rank
    room_seconds: float = 60  # that shards in use may take up the cache

    @property
    def others_seconds(self) -> float:
        """Without progress in a file that another process is fetching: more than that process gives itself."""
        return 1.25 * self.file_seconds


@dataclass(frozen=True)
class CacheOptions:
    """The folder of this machine in which remote data sets lie, how much of them, and how long to try."""

    folder: Path
    limit_bytes: int
    patience: Patience = Patience()


@dataclass(frozen=True)
class Remote:
    """Where a data set is fetched from, and to. The URL may hold a password: print what `shown` makes of it."""

    url: str
    cache: CacheOptions

    def address(self, name: str) -> str:
        """Of one of its files: what follows a question mark (https://host/set?token=…) is asked for each of them."""
        folder, mark, query = self.url.partition("?") if self.url.startswith("http") else (self.url, "", "")
        return f"{folder.rstrip('/')}/{name}{mark}{query}"


class DamagedError(OSError):
    """What was fetched is not what the manifest names."""


class _GivenUpError(Exception):
    """Nobody waits for the file any more."""


class _Watch(Callback):
    """Ends a transfer that announces or has brought more bytes than it may, or is not needed any more."""

    def __init__(self, limit: int, given_up: threading.Event) -> None:
        super().__init__()
        self._limit, self._given_up = limit, given_up

    def set_size(self, size: int | None) -> None:
        """Of a transfer that begins; gcsfs may begin several, as it tries again by itself."""
        self.value = 0
        super().set_size(size)

    def call(self, *arguments: object, **more: object) -> None:
        if self._given_up.is_set():
            raise _GivenUpError("it is not needed any more")
        bytes_known = max(self.size or 0, self.value)
        if bytes_known > self._limit:
            raise DamagedError(f"it has {bytes_known} bytes or more, by the manifest at most {self._limit}")


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def shown(text: str) -> str:
    """A URL, or a text with some, for people: without name and password, and without what follows a question mark.

    A password may hold what should be written as %2F or %3F; so all up to the last @ goes, even that of a path.
    """
    text = re.sub(r"://\S*@", "://…@", text)
    return re.sub(r"(://[^?\s]*\?)\S+", r"\1…", text)


def read_remote(remote: Remote, name: str) -> bytes:
    """The content of a small file. Raises as `fetch` does."""

    def read(system: fsspec.AbstractFileSystem, path: str, seconds: float) -> bytes:
        return system.cat_file(path, **_limited(system, seconds))

    return _tried_again(remote, name, read, threading.Event())


def fetch(remote: Remote, name: str, target: Path, size: int, sha256: str, given_up: threading.Event) -> None:
    """Writes the file `name` to `target`: it has this sha256, and is on disk when this returns.

    size: in bytes, at most; what has more is given up with the first chunk beyond. Raises RuntimeError if the file
    cannot be had, with URL, fault and remedy, or, with the next bytes that come, when `given_up` is set; ValueError if
    the URL's protocol is unknown. The file system may remove `target` and write it anew between attempts.
    """

    def transfer(system: fsspec.AbstractFileSystem, path: str, seconds: float) -> None:
        watch = _Watch(size, given_up)
        if not isinstance(system, AsyncFileSystem):  # it may tell nothing on its way
            watch.set_size(system.size(path))
        watch.call()
        system.get_file(path, str(target), callback=watch, **_limited(system, seconds))
        if sha256_of(target) != sha256:
            raise DamagedError(f"{target.stat().st_size} bytes came, with another sha256 than the manifest's")
        sync(target)

    _tried_again(remote, name, transfer, given_up)


def _limited(system: fsspec.AbstractFileSystem, seconds: float) -> dict[str, float]:
    """The argument that limits a call; a file system that blocks as files do has none."""
    return {"timeout": max(seconds, 0.001)} if isinstance(system, AsyncFileSystem) else {}


def _tried_again(
    remote: Remote, name: str, action: Callable[[Any, str, float], _Result], given_up: threading.Event
) -> _Result:
    """What `action` returns at the first attempt that succeeds; it gets a file system, the path of `name`, seconds."""
    address, patience, attempts = remote.address(name), remote.cache.patience, 0
    place = shown(address)
    try:
        import tenacity  # needed here alone: who has shards on a local disk has no use for it

        system, path = _open_system(address, patience)
        deadline = time.monotonic() + patience.file_seconds
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(patience.attempts)
            | tenacity.stop_before_delay(patience.file_seconds)
            | tenacity.stop_when_event_set(given_up),
            wait=tenacity.wait_exponential(patience.first_wait_seconds, max=_LONGEST_WAIT_SECONDS),
            sleep=tenacity.sleep_using_event(given_up),
            reraise=True,
        ):
            attempts = attempt.retry_state.attempt_number
            with attempt:
                return action(system, path, deadline - time.monotonic())
    except ImportError as error:
        protocol = address.partition("://")[0]
        raise RuntimeError(
            f"cannot read {place}: {protocol}:// needs another package ({error});"
            " pip install aiohttp gcsfs s3fs tenacity"
        ) from error
    except Exception as error:  # each file system raises kinds of its own
        cause = error if place == address else None  # a traceback would show the whole URL
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise ValueError(f"cannot read {place}: {error}; use s3://, gs://, https:// or a folder") from cause
        raise RuntimeError(f"cannot fetch {place}: {_describe(error, attempts)}") from cause
    raise AssertionError("tenacity neither returned nor raised")


def _open_system(address: str, patience: Patience) -> tuple[fsspec.AbstractFileSystem, str]:
    """(the file system, the path on it) of an address; credentials and endpoints are where fsspec looks for them.

    Its retries are left to us, as far as they can be; the user's own settings in fsspec's configuration win.
    """
    protocol = address.partition("://")[0]
    seconds = patience.silent_seconds
    ours: dict[str, Any] = {}
    if protocol in ("http", "https"):
        ours["client_kwargs"] = {"timeout": _aiohttp_timeout(seconds)}
    elif protocol in ("gs", "gcs"):
        ours["requests_timeout"] = _aiohttp_timeout(seconds)
    elif protocol in ("s3", "s3a"):
        ours["config_kwargs"] = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 1}}
    configured = fsspec.config.conf.get(protocol, {})
    return fsspec.url_to_fs(address, **{name: value for name, value in ours.items() if name not in configured})


def _aiohttp_timeout(seconds: float) -> Any:
    """For a server that sends nothing; one that goes on sending may take its time."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may go better."""
    if isinstance(error, ImportError | FileNotFoundError | PermissionError) or not isinstance(error, Exception):
        return False
    return _http_status(error) not in _REFUSED_STATUS


def _http_status(error: Exception) -> int | None:
    """As far as the error says."""
    if str(error).startswith("Forbidden"):  # gcsfs keeps nothing else of it
        return 403
    return getattr(error, "status", None) or getattr(error, "code", None)


def _describe(error: Exception, attempts: int) -> str:
    """Fault and remedy."""
    fault = shown(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, _GivenUpError):
        return fault
    if isinstance(error, FileNotFoundError) or _http_status(error) in (404, 410):
        return "it is not there; check the address, and that the whole packed folder was copied to it"
    if isinstance(error, PermissionError) or _http_status(error) in (400, 401, 403):
        return f"access was refused ({fault}); check the credentials"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return (
            f"{os.strerror(error.errno)} in the cache; free some space, name a folder of a larger disk, or allow the"
            " cache fewer bytes"
        )
    if isinstance(error, DamagedError):
        return f"{fault}, attempts: {attempts}; copy it there again, or pack the folder again"
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        fault = f"the server was too slow or silent ({fault})"
    return (
        f"{fault}, attempts: {attempts}; check server and network, then start again: the run goes on from"
        " its last checkpoint"
    )

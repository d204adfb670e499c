"""Transfer of single files from a URL to the local disk, with timeouts, retries and verification.

fsspec does the transport (s3://, gs://, https://, file:// and whatever else it has a package for). prefetch.py chooses
what is fetched, cache_folder.py where it is kept.
"""

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback

from dataio.files import sha256_of, sync
from dataio.remote.options import Remote, RetryPolicy
from dataio.urls import redact_url

_Result = TypeVar("_Result")
_MAX_BACKOFF_SECONDS, _POLL_SECONDS = 30, 0.05
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PERMANENT_HTTP_STATUS = (400, 401, 403, 404, 410)  # another attempt gets the same answer


@dataclass(frozen=True)
class Deadline:
    """Time limit of a file, from its creation on, and an event that cancels the fetch earlier."""

    seconds: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, 0 after it."""
        return max(0.0, self.began + self.seconds - time.monotonic())

    def check(self) -> None:
        """Raise FetchCancelledError or FetchTimeoutError if it is over."""
        if self.cancelled.is_set():
            raise FetchCancelledError("it is not needed any more")
        if not self.seconds_left:
            raise FetchTimeoutError(f"it is not there after {self.seconds:g} s")


class FetchCancelledError(Exception):
    """The fetch was cancelled: nobody waits for the file any more."""


class FetchTimeoutError(Exception):
    """The deadline of a file has passed."""


class IntegrityError(OSError):
    """The fetched bytes are not those that the manifest names."""


class _TransferCallback(Callback):  # type: ignore[misc]  # fsspec has no type annotations
    """Aborts a transfer that announces or has brought more than `limit` bytes, or whose deadline has passed."""

    def __init__(self, limit: int, deadline: Deadline) -> None:
        super().__init__()
        self._limit, self._deadline = limit, deadline

    def set_size(self, size: int | None) -> None:
        """Set the size of a transfer that begins; gcsfs may begin several, as it has retries of its own."""
        self.value = 0
        super().set_size(size)

    def call(self, *arguments: object, **more: object) -> None:
        """Check the deadline and the limit; fsspec calls it with every chunk."""
        self._deadline.check()
        bytes_known = max(self.size or 0, self.value)
        if bytes_known > self._limit:
            raise IntegrityError(f"it has {bytes_known} bytes or more, by the manifest at most {self._limit}")


def fetch_bytes(remote: Remote, name: str) -> bytes:
    """Return the content of a small file. Raises as `fetch` does."""
    deadline = Deadline(remote.cache.retry_policy.file_timeout_seconds)

    def read(system: fsspec.AbstractFileSystem, path: str) -> bytes:
        if isinstance(system, AsyncFileSystem):
            return bytes(_run_with_deadline(system, system._cat_file(path), deadline))
        return bytes(system.cat_file(path))

    return _with_retries(remote, name, read, deadline)


def fetch(remote: Remote, name: str, target: Path, size: int, sha256: str, deadline: Deadline) -> None:
    """Fetch the file `name` to `target`; it has this sha256, and is on disk, when this returns.

    size: in bytes, at most; a larger file is aborted with the first chunk beyond. Raises RuntimeError, with URL, fault
    and remedy, if the file cannot be fetched, or soon after `deadline` is cancelled (for a file system without asyncio,
    with the next chunk); ValueError if the URL's protocol is unknown. The file system may remove `target` and write it
    again between attempts, but not once this has ended.
    """

    def transfer(system: fsspec.AbstractFileSystem, path: str) -> None:
        watch = _TransferCallback(size, deadline)
        if isinstance(system, AsyncFileSystem):
            _run_with_deadline(system, system._get_file(path, str(target), callback=watch), deadline)
        else:
            watch.set_size(system.size(path))  # such a file system may not report its progress
            system.get_file(path, str(target), callback=watch)
        if sha256_of(target) != sha256:
            raise IntegrityError(f"{target.stat().st_size} bytes came, with another sha256 than the manifest's")
        sync(target)

    _with_retries(remote, name, transfer, deadline)


def _run_with_deadline(system: AsyncFileSystem, work: Coroutine[Any, Any, _Result], deadline: Deadline) -> _Result:
    """Run a coroutine on the file system's event loop; return its result.

    It is cancelled at the deadline, and has ended when this raises.
    """

    async def watched() -> _Result:
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.wait([task], timeout=_POLL_SECONDS)
            try:
                deadline.check()
            except (FetchCancelledError, FetchTimeoutError):
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise
        return task.result()

    return asyncio.run_coroutine_threadsafe(watched(), system.loop).result()


def _with_retries(remote: Remote, name: str, action: Callable[[Any, str], _Result], deadline: Deadline) -> _Result:
    """Return the result of the first successful `action`, given a file system and the path of `name` on it."""
    address, retry_policy = remote.file_url(name), remote.cache.retry_policy
    redacted = redact_url(address)
    faults: list[BaseException] = []  # errors of all attempts but the last

    def note(state: "tenacity.RetryCallState") -> None:
        error = state.outcome.exception() if state.outcome else None
        if error:
            faults.append(error)

    try:
        import tenacity  # optional: installed for remote data sets alone

        system, path = _open_system(address, retry_policy)
        for attempt in tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_retryable),
            stop=tenacity.stop_after_attempt(retry_policy.max_attempts)
            | tenacity.stop_before_delay(deadline.seconds_left),
            wait=tenacity.wait_exponential(retry_policy.initial_backoff_seconds, max=_MAX_BACKOFF_SECONDS),
            sleep=tenacity.sleep_using_event(deadline.cancelled),
            before_sleep=note,
            reraise=True,
        ):
            with attempt:
                deadline.check()
                return action(system, path)
    except ImportError as error:
        protocol = address.partition("://")[0]
        raise RuntimeError(
            f"cannot read {redacted}: {protocol}:// needs another package ({error});"
            " pip install aiohttp gcsfs s3fs tenacity"
        ) from error
    except Exception as error:  # each file system has error types of its own
        cause = error if redacted == address else None  # a traceback would show the whole URL
        if isinstance(error, ValueError) and "Protocol not known" in str(error):
            raise ValueError(f"cannot read {redacted}: {error}; use s3://, gs://, https:// or a folder") from cause
        raise RuntimeError(f"cannot fetch {redacted}: {_describe(error, faults, retry_policy)}") from cause
    raise AssertionError("tenacity neither returned nor raised")


def _open_system(address: str, retry_policy: RetryPolicy) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return (file system, path on it) of a URL; credentials and endpoints are where fsspec looks for them.

    The retries of its package are turned off where they can be; the user's own settings in fsspec's configuration win.
    """
    protocol = address.partition("://")[0]
    seconds = retry_policy.read_timeout_seconds
    ours: dict[str, Any] = {}
    if protocol in ("http", "https"):
        ours["client_kwargs"] = {"timeout": _aiohttp_timeout(seconds)}
    elif protocol in ("gs", "gcs"):
        ours["requests_timeout"] = _aiohttp_timeout(seconds)
    elif protocol in ("s3", "s3a"):
        ours["config_kwargs"] = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"max_attempts": 1}}
    configured = fsspec.config.conf.get(protocol, {})
    system, path = fsspec.url_to_fs(address, **{name: value for name, value in ours.items() if name not in configured})
    return system, path


def _aiohttp_timeout(seconds: float) -> Any:
    """Make the timeout for a server that sends nothing; one that goes on sending is limited by the deadline."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)


def _is_retryable(error: BaseException) -> bool:
    """Tell whether another attempt may succeed."""
    permanent = ImportError, FileNotFoundError, PermissionError, FetchCancelledError, FetchTimeoutError
    if isinstance(error, permanent) or not isinstance(error, Exception):
        return False
    return _http_status(error) not in _PERMANENT_HTTP_STATUS


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status of an error; None if it has none."""
    if str(error).startswith("Forbidden"):  # all that gcsfs tells of it
        return 403
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _describe(error: BaseException, earlier: list[BaseException], retry_policy: RetryPolicy) -> str:
    """Describe an error with its remedy; `earlier` are the errors of the attempts before."""
    attempts = 1 + len(earlier)
    if isinstance(error, FetchCancelledError):
        return str(error)
    if isinstance(error, FetchTimeoutError):
        before = f", {_fault(earlier[-1])} before that" if earlier else ""
        return (
            f"{error}{before}, attempts: {attempts}; check server and network, or pack smaller shards"
            f" (--shard-mib){retry_policy.timeout_hint}"
        )
    if isinstance(error, FileNotFoundError) or _http_status(error) in (404, 410):
        return "it is not there; check the address, and that the whole packed folder was copied to it"
    if isinstance(error, PermissionError) or _http_status(error) in (400, 401, 403):
        return f"access was refused ({_fault(error)}); check the credentials"
    if isinstance(error, OSError) and error.errno is not None and error.errno in _NO_SPACE:
        return (
            f"{os.strerror(error.errno)} in the cache; free some space, name a folder of a larger disk, or allow the"
            " cache fewer bytes"
        )
    if isinstance(error, IntegrityError):
        return f"{_fault(error)}, attempts: {attempts}; copy it there again, or pack the folder again"
    return (
        f"{_fault(error)}, attempts: {attempts}; check server and network, then start again: the run resumes from"
        " its last checkpoint"
    )


def _fault(error: BaseException) -> str:
    """Format an error in one line and without secrets."""
    message = redact_url(" ".join(str(error).split())) or type(error).__name__
    return (
        f"the server was too slow or silent ({message})"
        if isinstance(error, TimeoutError | asyncio.TimeoutError)
        else message
    )

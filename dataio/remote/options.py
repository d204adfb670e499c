"""Where a remote data set is fetched from and to, how much of it is kept, and how long a server is waited for."""

import math
import os
import re
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dataio.urls import is_url


@dataclass(frozen=True)
class RetryPolicy:
    """How long a server, or room on the disk, is waited for before that is an error."""

    max_attempts: int = 6
    initial_backoff_seconds: float = 0.5  # before the second attempt; twice as long before each later one
    read_timeout_seconds: float = 30  # that a server may send nothing, or take to answer
    eviction_timeout_seconds: float = 60  # that shards in use may take up the cache
    file_timeout_seconds: float = (
        240  # that a file may take in all: for room, for another process that fetches it, to come
    )
    batch_timeout_seconds: float = 480  # that a batch may wait for all its files
    timeout_hint: str = ""  # how to allow more of both, ending a message


@dataclass(frozen=True)
class CacheOptions:
    """The folder of this machine in which remote data sets lie, how much of them, and how long to try."""

    folder: Path
    limit_bytes: int
    retry_policy: RetryPolicy = RetryPolicy()

    def check_cache_size(self, needed: dict[str, int]) -> None:
        """Raises ValueError if the cache is too small for what is needed of it at once: bytes by data set."""
        whole = sum(needed.values())
        if whole > self.limit_bytes:
            parts = ", ".join(f"{path_or_url} needs {format_gib(count)}" for path_or_url, count in needed.items())
            raise ValueError(
                f"a cache of {format_gib(self.limit_bytes)} is too small, {parts} at a time; allow it"
                f" {math.ceil(100 * whole / 2**30) / 100:g} (data.cache_gib, --cache-gib), or lower data.shuffle_window_shards"
            )


@dataclass(frozen=True)
class Remote:
    """Where a data set is fetched from, and to. The URL may hold a password: print what `redact_url` makes of it.

    Raises ValueError if there may be a blank in one.
    """

    url: str
    cache: CacheOptions

    def __post_init__(self) -> None:
        free_path = re.match(r"(file|s3a?|gc?s)://", self.url)  # in which @, ? and blanks mean nothing
        secret = r"^\w*://[^/]*\s[^/]*@" if free_path else r"\s[^@?]*[@?]|[@?].*\s"
        if re.search(secret, self.url, re.DOTALL):  # `redact_url` could not tell where it ends
            protocol = self.url.partition("://")[0]
            raise ValueError(f"{protocol}://… has a password or a token, and a blank; write it as %20")

    def file_url(self, name: str) -> str:
        """Of one of its files: what follows a question mark (https://host/set?token=…) is asked for each of them."""
        folder, mark, query = self.url.partition("?") if self.url.startswith("http") else (self.url, "", "")
        return f"{folder.rstrip('/')}/{name}{mark}{query}"


def format_gib(count: int) -> str:
    return f"{count / 2**30:.3g} GiB"


def cache_options(folder: Path | None, gib: float, *places: str) -> CacheOptions:
    """Where those of these data sets go that are remote: into `folder`, or one of this user's own.

    Raises ValueError or RuntimeError if that one is needed and is not theirs alone to write to.
    """
    if folder is None:
        folder = _default_cache_folder()
        if any(is_url(path_or_url) for path_or_url in places):
            _check_private(folder)
    return CacheOptions(folder, int(gib * 2**30))


def _default_cache_folder() -> Path:
    """In the user's folder for caches if one is set, else among temporary files: home may be small, and far away."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / "polaformer-shards"
    return Path(tempfile.gettempdir()) / f"polaformer-shards-{os.getuid()}"


def _check_private(folder: Path) -> None:
    """Makes the folder. What lies in it is trusted: nobody else may have made it, or may write to it."""
    remedy = "name a folder of your own with data.cache, --cache"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"cannot keep remote shards in {folder}: {error.strerror}; {remedy}") from error
    for owner in (folder.lstat().st_uid, folder.stat().st_uid):  # of a link, and of what it leads to
        if owner != os.getuid():
            raise ValueError(f"{folder}, the default for remote shards, belongs to user {owner}; {remedy}")
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{folder}, the default for remote shards, may be written to by other users; {remedy}")

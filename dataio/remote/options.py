"""Options of remote data sets: their URL, the local cache folder and its size, retries and timeouts."""

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
    """Attempts and timeouts of fetching, and of waiting for space in the cache."""

    max_attempts: int = 6
    initial_backoff_seconds: float = 0.5  # before the second attempt; doubles before each later one
    read_timeout_seconds: float = 30  # for a server that sends nothing
    eviction_timeout_seconds: float = 60  # for space, while shards in use fill the cache
    file_timeout_seconds: float = 240  # for one file in all: for space, for another process that fetches it, to come
    batch_timeout_seconds: float = 390  # for all files of a batch
    timeout_hint: str = ""  # end of a message: how to raise the last two


@dataclass(frozen=True)
class CacheOptions:
    """Folder of this machine that caches remote data sets, its maximum size, and the retry policy."""

    folder: Path
    limit_bytes: int
    retry_policy: RetryPolicy = RetryPolicy()

    def check_cache_size(self, needed: dict[str, int]) -> None:
        """Raise ValueError if the cache is too small for `needed`: the bytes needed at once, by data set."""
        whole = sum(needed.values())
        if whole > self.limit_bytes:
            parts = ", ".join(f"{path_or_url} needs {format_gib(count)}" for path_or_url, count in needed.items())
            raise ValueError(
                f"a cache of {format_gib(self.limit_bytes)} is too small, {parts} at a time; allow it"
                f" {math.ceil(100 * whole / 2**30) / 100:g} (data.cache_gib, --cache-gib), or lower"
                " data.shuffle_window_shards"
            )


@dataclass(frozen=True)
class Remote:
    """URL of a data set, and its cache. The URL may contain a password: messages print `redact_url` of it.

    Raises ValueError if a password or token may contain a blank.
    """

    url: str
    cache: CacheOptions

    def __post_init__(self) -> None:
        free_path = re.match(r"(file|s3a?|gc?s)://", self.url)  # @, ? and blanks have no meaning in its path
        secret = r"^\w*://[^/]*\s[^/]*@" if free_path else r"\s[^@?]*[@?]|[@?].*\s"
        if re.search(secret, self.url, re.DOTALL):  # `redact_url` could not tell where the secret ends
            protocol = self.url.partition("://")[0]
            raise ValueError(f"{protocol}://… has a password or a token, and a blank; write it as %20")

    def file_url(self, name: str) -> str:
        """Return the URL of one of its files; a query string (https://host/set?token=…) is kept for each of them."""
        folder, mark, query = self.url.partition("?") if self.url.startswith("http") else (self.url, "", "")
        return f"{folder.rstrip('/')}/{name}{mark}{query}"


def format_gib(count: int) -> str:
    """Format a number of bytes for messages."""
    return f"{count / 2**30:.3g} GiB"


def cache_options(folder: Path | None, gib: float, *paths_or_urls: str) -> CacheOptions:
    """Make the cache options for these data sets, of which some may be remote: in `folder`, or the user's default one.

    Raises ValueError or RuntimeError if the default folder is needed and others than this user may write to it.
    """
    if folder is None:
        folder = _default_cache_folder()
        if any(is_url(path_or_url) for path_or_url in paths_or_urls):
            _check_private(folder)
    return CacheOptions(folder, int(gib * 2**30))


def _default_cache_folder() -> Path:
    """Choose $XDG_CACHE_HOME if it is set, else the folder of temporary files: home may be small, or on a network."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / "polaformer-shards"
    return Path(tempfile.gettempdir()) / f"polaformer-shards-{os.getuid()}"


def _check_private(folder: Path) -> None:
    """Create a private folder. Its content is trusted, so nobody else may own it or have permission to write to it."""
    remedy = "name a folder of your own with data.cache, --cache"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"cannot keep remote shards in {folder}: {error.strerror}; {remedy}") from error
    for owner in (folder.lstat().st_uid, folder.stat().st_uid):  # a link's owner, and its target's
        if owner != os.getuid():
            raise ValueError(f"{folder}, the default for remote shards, belongs to user {owner}; {remedy}")
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{folder}, the default for remote shards, may be written to by other users; {remedy}")

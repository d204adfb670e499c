"""Fetching from real servers of HTTP, S3 and GCS that are slow, fail, break off, send other bytes, or are gone."""

import asyncio
import hashlib
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import fsspec.asyn
import pytest

from dataio.remote.fetch import Deadline, FetchTimeoutError, fetch, fetch_bytes
from dataio.remote.options import CacheOptions, Remote, RetryPolicy
from dataio.urls import is_url, redact_url

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FOREVER = 7200  # seconds, longer than a test may take
FAST_RETRIES = RetryPolicy(
    max_attempts=3, initial_backoff_seconds=0.01, read_timeout_seconds=FOREVER, file_timeout_seconds=FOREVER
)
# Where a server is silent. A slow machine may be taken for one that is, and is asked again.
SHORT_READ_TIMEOUT = replace(FAST_RETRIES, max_attempts=1000, read_timeout_seconds=0.5)


@dataclass(frozen=True)
class DeadlineUntil(Deadline):
    """A deadline that passes when a condition becomes true."""

    over: Callable[[], bool] = lambda: False

    @property
    def seconds_left(self) -> float:
        return 0.0 if self.over() else self.seconds


class Clock(threading.Event):
    """Replacement of `time` and of a deadline's event: waiting advances the clock and takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float) -> None:
        self.pauses.append(timeout)

    def monotonic(self) -> float:
        return sum(self.pauses)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder that the server serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "shard.tar").write_bytes(CONTENT)
    return folder


def remote(url: str, tmp_path: Path, retry_policy: RetryPolicy = FAST_RETRIES) -> Remote:
    return Remote(url, CacheOptions(tmp_path / "cache", 2**30, retry_policy))


def fetch_shard(source: Remote, tmp_path: Path) -> bytes:
    target = tmp_path / "shard.tar"
    fetch(source, "shard.tar", target, len(CONTENT), SHA256, Deadline(source.cache.retry_policy.file_timeout_seconds))
    return target.read_bytes()


def test_is_url():
    assert all(is_url(place) for place in ("s3://bucket/a", "gs://b", "https://host/a b", "file:///a"))
    assert not any(is_url(place) for place in ("data/train", "/data", Path("s3"), "C:/data", "."))


def test_fetch_over_http_and_from_files(http_server, folder, tmp_path):
    server = http_server(folder)
    for url in (server.url, folder.as_uri()):
        assert fetch_shard(remote(url, tmp_path), tmp_path) == CONTENT
        assert fetch_bytes(remote(url, tmp_path), "shard.tar") == CONTENT


@pytest.mark.parametrize("bucket", ["s3_url", "gs_url"])
def test_fetch_from_buckets(request, bucket, folder, tmp_path):
    url = request.getfixturevalue(bucket)(folder)
    assert fetch_shard(remote(url, tmp_path), tmp_path) == CONTENT
    assert fetch_bytes(remote(url, tmp_path), "shard.tar") == CONTENT


@pytest.mark.parametrize("fault", ["503", "500", "429", "reset", "half", "half unsaid", "wrong", "empty", "silent"])
def test_transient_faults_are_retried(http_server, folder, tmp_path, fault):
    server = http_server(folder)
    server.faults["shard.tar"] = [fault, fault]
    source = remote(server.url, tmp_path, SHORT_READ_TIMEOUT if fault == "silent" else FAST_RETRIES)
    assert fetch_shard(source, tmp_path) == CONTENT
    asked = server.requests.count("shard.tar")
    assert asked >= 3 if fault == "silent" else asked == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "503.*, attempts: 3; check server and network, then start again: the run resumes"),
        ("reset", "attempts: 3; check server and network"),
        ("half", "attempts: 3; check server and network"),
        (
            "half unsaid",
            "512000 bytes came, with another sha256 than the manifest's, attempts: 3; copy it there again",
        ),
        ("wrong", "1024000 bytes came, with another sha256 than the manifest's, attempts: 3; copy it there again"),
        ("empty", "0 bytes came, with another sha256 than the manifest's, attempts: 3; copy it there again"),
        ("silent", r"the server was too slow or silent \(.*\), attempts: 3; check server and network"),
    ],
)
def test_persistent_faults_are_one_error(http_server, folder, tmp_path, fault, message):
    server = http_server(folder)
    server.faults["shard.tar"] = [fault] * 9
    retry_policy = replace(FAST_RETRIES, read_timeout_seconds=0.5 if fault == "silent" else FOREVER)
    with pytest.raises(RuntimeError, match=f"^cannot fetch {server.url}/shard.tar: .*{message}") as raised:
        fetch_shard(remote(server.url, tmp_path, retry_policy), tmp_path)
    assert "\n" not in str(raised.value)
    asked = server.requests.count("shard.tar")
    if fault == "silent":
        assert asked <= 3  # a slow machine may give up before its server hears of it
    else:  # aiohttp asks once more by itself where a connection broke off without a word
        assert asked == (6 if fault == "reset" else 3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "it is not there; check the address, and that the whole packed folder was copied to it"),
        ("401", r"access was refused \(401.*\); check the credentials"),
        ("403", r"access was refused \(403.*\); check the credentials"),
    ],
)
def test_permanent_http_errors_are_not_retried(http_server, folder, tmp_path, fault, message):
    server = http_server(folder)
    server.faults["shard.tar"] = [fault] * 9
    with pytest.raises(RuntimeError, match=message):
        fetch_shard(remote(server.url, tmp_path), tmp_path)
    assert server.requests == ["shard.tar"]


def test_bucket_without_permission_is_not_retried(http_server, folder, tmp_path, monkeypatch):
    server = http_server(folder)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    server.faults["shard.tar?alt=media"] = server.faults["shard.tar"] = ["403"] * 9
    with pytest.raises(RuntimeError, match=r"gs://bucket/shard.tar: access was refused \(Forbidden.*; check the cred"):
        fetch_shard(remote("gs://bucket", tmp_path), tmp_path)
    assert len(server.requests) == 1


SECRETS = [("http://ann:hush@{}/set", "http://…@{}/set"), ("http://{}/set/?sig=hush&to=hush", "http://{}/set/?…")]


@pytest.mark.parametrize(("url", "hidden"), SECRETS)
def test_url_secrets_are_used_and_redacted(http_server, folder, tmp_path, url, hidden):
    server = http_server(shutil.copytree(folder, tmp_path / "root" / "set").parent)
    host = server.url.partition("://")[2]
    source, name = remote(url.format(host), tmp_path), "shard.tar" + "".join(url.partition("?")[1:])
    assert redact_url(source.url) == hidden.format(host)
    assert fetch_shard(source, tmp_path) == CONTENT
    assert server.requests == [name]
    assert server.credentials == {"Basic YW5uOmh1c2g=" if "@" in url else None}
    for fault in ("403", "404", "503", "silent", "reset", "empty"):
        server.faults[name] = [fault] * 9
        retry_policy = replace(FAST_RETRIES, read_timeout_seconds=0.5 if fault == "silent" else FOREVER)
        with pytest.raises(RuntimeError, match="cannot fetch") as raised:
            fetch_shard(remote(source.url, tmp_path, retry_policy), tmp_path)
        text = "".join(traceback.format_exception(raised.value))
        assert redact_url(source.file_url("shard.tar")) in text
        assert "hush" not in text


def test_redact_url():
    for text in ("s3://bucket/a", "file:///a/b c", "is it there? at https://host/a/b", "C:/a?b", "a@b"):
        assert redact_url(text) == text
    assert (
        redact_url("a: 'https://host/a?b=c', b: ftp://me:pass@word@host/a") == "a: 'https://host/a?… b: ftp://…@host/a"
    )
    for hush in ("h/ush", "h?ush", "h#ush", "h@ush"):  # as they should not be written
        assert redact_url(f"at https://ann:{hush}@host/a (404)") == "at https://…@host/a (404)"
    for hush in ("h'ush", "h/ush", "h?ush"):
        assert redact_url(f"at https://host/a?token={hush} (404)") == "at https://host/a?… (404)"


@pytest.mark.parametrize(
    "url",
    [
        *("https://ann:hu sh@host/a", "https://host/a?token=hu sh", "https://host/a b?token=hush"),
        *("sftp://a:hu\tsh@b/a", "sftp://a:hu/s h@b/a", "s3://a:hu sh@b/a"),
    ],
)
def test_blank_in_a_url_secret_is_an_error(tmp_path, url):
    """Messages could not tell where the secret ends."""
    with pytest.raises(ValueError, match="^(https|sftp|s3)://… has a password or a token, and a blank; write it"):
        remote(url, tmp_path)


def test_blanks_elsewhere_in_a_url(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "my images@2x?")
    assert fetch_shard(remote(f"file://{place}", tmp_path), tmp_path) == CONTENT
    for url in ("https://host/my images", "s3://bucket/my images@2x", "gs://bucket/what? no"):
        remote(url, tmp_path)


def test_timeout_names_the_error_before_it(http_server, folder, tmp_path):
    server = http_server(folder)
    server.faults["shard.tar"] = ["silent", *["drip"] * 9]
    retry_policy = replace(SHORT_READ_TIMEOUT, timeout_hint=", or raise engine.timeout_minutes")
    deadline = DeadlineUntil(FOREVER, over=lambda: len(server.requests) >= 2)
    fault = r"it is not there after 7200 s, the server was too slow or silent \(.*\) before that, attempts: \d+; check"
    with pytest.raises(RuntimeError, match=f"shard.tar: {fault} server .* shards .*, or raise engine.timeout_minutes$"):
        fetch(remote(server.url, tmp_path, retry_policy), "shard.tar", tmp_path / "x", len(CONTENT), SHA256, deadline)


CHUNK = 5 * 2**20  # of fsspec's HTTP, the largest


@pytest.mark.parametrize("kind", ["http", "http unsaid", "s3", "gs", "file"])
def test_too_large_a_file_is_aborted(http_server, s3_url, gs_url, folder, tmp_path, kind):
    (folder / "shard.tar").write_bytes(bytes(20 * CHUNK))
    server = http_server(folder)
    server.faults["shard.tar"] = ["whole unsaid"] * 9 if kind == "http unsaid" else []
    others = {"s3": lambda: s3_url(folder), "gs": lambda: gs_url(folder), "file": folder.as_uri}
    url = others.get(kind, lambda: server.url)()
    target = tmp_path / "shard.tar"
    with pytest.raises(RuntimeError, match=r"it has \d+ bytes or more, by the manifest at most 1024000, attempts: 3; "):
        fetch(remote(url, tmp_path), "shard.tar", target, len(CONTENT), SHA256, Deadline(FOREVER))
    left = target.stat().st_size if target.exists() else 0
    assert left <= (len(CONTENT) + CHUNK if kind == "http unsaid" else 0)


def test_missing_file_is_an_error(http_server, s3_url, gs_url, folder, tmp_path):
    for url in (http_server(folder).url, s3_url(folder), gs_url(folder), folder.as_uri()):
        with pytest.raises(RuntimeError, match=f"cannot fetch {url}/other: it is not there; check the address"):
            fetch_bytes(remote(url, tmp_path), "other")


@pytest.mark.parametrize("bucket", ["s3_url", "gs_url"])
def test_missing_bucket_is_an_error(request, bucket, folder, tmp_path):
    protocol, _, _ = request.getfixturevalue(bucket)(folder).partition("://")
    url = f"{protocol}://nobodys"
    with pytest.raises(RuntimeError, match=f"cannot fetch {url}/shard.tar: it is not there; check the address"):
        fetch_shard(remote(url, tmp_path), tmp_path)


def test_unreachable_server_is_an_error(free_port, tmp_path):
    with pytest.raises(RuntimeError, match=r"Cannot connect to host.*attempts: 3; check server and network"):
        fetch_shard(remote(f"http://127.0.0.1:{free_port}", tmp_path), tmp_path)


def test_backoff_doubles(http_server, folder, tmp_path):
    server = http_server(folder)
    server.faults["shard.tar"] = ["503"] * 3
    retry_policy = replace(FAST_RETRIES, max_attempts=4, initial_backoff_seconds=0.1)
    fetch_shard(remote(server.url, tmp_path, retry_policy), tmp_path)
    pauses = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert all(pause >= wait for pause, wait in zip(pauses, (0.1, 0.2, 0.4), strict=True))


def test_deadline():
    assert 3500 < Deadline(7200, began=time.monotonic() - 3600).seconds_left <= 3600
    Deadline(FOREVER).check()
    with pytest.raises(FetchTimeoutError, match="^it is not there after 2.5 s$"):
        Deadline(2.5, began=time.monotonic() - 2.5).check()


def test_endless_transfer_ends_at_the_deadline(http_server, folder, tmp_path, monkeypatch):
    """The server is never silent for long; at the deadline the transfer is aborted, and no further attempt begins."""
    server = http_server(folder)
    server.faults["shard.tar"] = ["drip"] * 9
    source = remote(server.url, tmp_path)

    def until_asked(seconds: float) -> Deadline:
        asked = len(server.requests)
        return DeadlineUntil(seconds, over=lambda: len(server.requests) > asked)

    monkeypatch.setattr("dataio.remote.fetch.Deadline", until_asked)
    fault = "shard.tar: it is not there after 7200 s, attempts: 1; check server and network, or pack smaller shards "
    with pytest.raises(RuntimeError, match=fault):
        fetch(source, "shard.tar", tmp_path / "shard.tar", len(CONTENT), SHA256, until_asked(FOREVER))
    with pytest.raises(RuntimeError, match=fault):
        fetch_bytes(source, "shard.tar")
    assert server.requests == ["shard.tar"] * 2


def test_no_attempt_begins_after_the_deadline(http_server, folder, tmp_path, monkeypatch):
    """The third attempt would begin after a pause of 4 s."""
    server, clock = http_server(folder), Clock()
    for user in ("dataio.remote.fetch.time", "tenacity.time"):
        monkeypatch.setattr(user, clock)
    server.faults["shard.tar"] = ["503"] * 9
    source = remote(server.url, tmp_path, replace(FAST_RETRIES, max_attempts=9, initial_backoff_seconds=2))
    deadline = Deadline(5, clock, clock.monotonic())
    with pytest.raises(RuntimeError, match="shard.tar: 503.* attempts: 2;"):
        fetch(source, "shard.tar", tmp_path / "shard.tar", len(CONTENT), SHA256, deadline)
    assert server.requests == ["shard.tar"] * 2
    assert clock.pauses == [2]


@pytest.mark.parametrize("fault", ["drip", "silent", "503"])
@pytest.mark.parametrize("protocol", ["http", "gs"])
def test_cancelling_ends_a_transfer(http_server, folder, tmp_path, monkeypatch, protocol, fault):
    """From a server that goes on sending, or is silent; or the pause before the next attempt, ours or gcsfs's own."""
    server = http_server(folder)
    url = server.url if protocol == "http" else google_api(server, folder, monkeypatch)
    server.faults["shard.tar"] = server.faults["shard.tar?alt=media"] = [fault] * 99
    monkeypatch.setattr("dataio.remote.fetch._MAX_BACKOFF_SECONDS", FOREVER)
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda _: asyncio.sleep(FOREVER)))
    source = remote(url, tmp_path, replace(FAST_RETRIES, initial_backoff_seconds=FOREVER))
    cancelled, target, others = threading.Event(), tmp_path / "shard.tar", tasks()

    def give_up_when_asked() -> None:
        while not server.requests:
            time.sleep(0.01)
        time.sleep(0.2)  # most often long enough for the answer, and the pause after it, to have begun
        cancelled.set()

    threading.Thread(target=give_up_when_asked, daemon=True).start()
    with pytest.raises(RuntimeError, match="shard.tar: it is not needed any more"):
        fetch(source, "shard.tar", target, len(CONTENT), SHA256, Deadline(2 * FOREVER, cancelled))
    target.write_bytes(b"of another")
    while tasks() - others:  # one that goes on would never end
        time.sleep(0.01)
    assert len(server.requests) == 1
    assert target.read_bytes() == b"of another"


def tasks() -> set[asyncio.Task]:
    """Return the unfinished tasks of fsspec's event loop."""

    async def look() -> set[asyncio.Task]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    return asyncio.run_coroutine_threadsafe(look(), fsspec.asyn.get_loop()).result()


def google_api(server, folder: Path, monkeypatch) -> str:
    """Return the URL under which gcsfs finds the server's files in `folder`."""
    served = folder / "download" / "storage" / "v1" / "b" / "bucket" / "o"
    served.parent.mkdir(parents=True)
    served.symlink_to(folder)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    return "gs://bucket"


def test_cancelled_fetch_makes_no_request(http_server, folder, tmp_path):
    server, cancelled = http_server(folder), threading.Event()
    cancelled.set()
    with pytest.raises(RuntimeError, match="shard.tar: it is not needed any more"):
        fetch(
            remote(server.url, tmp_path),
            "shard.tar",
            tmp_path / "x",
            len(CONTENT),
            SHA256,
            Deadline(FOREVER, cancelled),
        )
    assert server.requests == []


def test_unknown_protocol_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match="cannot read nfs3://host/a/x: Protocol not known: nfs3; use s3://, gs://, htt"
    ):
        fetch_bytes(remote("nfs3://host/a", tmp_path), "x")


WITHOUT = """
import sys
from pathlib import Path
sys.modules[sys.argv[1]] = None  # importing it fails as if it were not installed
from dataio.remote.options import CacheOptions, Remote
from dataio.remote.fetch import fetch_bytes

try:
    fetch_bytes(Remote(f"{sys.argv[2]}://h/a", CacheOptions(Path(), 0)), "x")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "protocol"),
    [("gcsfs", "gs"), ("s3fs", "s3"), ("aiohttp", "https"), ("tenacity", "https"), ("tenacity", "file")],
)
def test_missing_package_is_an_error(package, protocol):
    command = [sys.executable, "-c", WITHOUT, package, protocol]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"cannot read {protocol}://h/a/x: {protocol}:// needs another package (")
    assert package in said.partition("(")[2].partition(")")[0]
    assert said.endswith("); pip install aiohttp gcsfs s3fs tenacity\n")

"""Files fetched from real servers, over HTTP, S3 and GCS, that are slow, fail, break off, lie, or are gone."""

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
HASTY = RetryPolicy(
    max_attempts=3, initial_backoff_seconds=0.01, read_timeout_seconds=FOREVER, file_timeout_seconds=FOREVER
)
# Where a server is silent. A slow machine may be taken for one that is, and is asked again.
NERVOUS = replace(HASTY, max_attempts=1000, read_timeout_seconds=0.5)


@dataclass(frozen=True)
class WaitUntil(Deadline):
    """A wait whose time is over when something has happened."""

    over: Callable[[], bool] = lambda: False

    @property
    def seconds_left(self) -> float:
        return 0.0 if self.over() else self.seconds


class Clock(threading.Event):
    """In the place of `time` and of a wait's end: pauses move it on, and take no time."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def wait(self, timeout: float) -> None:
        self.pauses.append(timeout)

    def monotonic(self) -> float:
        return sum(self.pauses)


@pytest.fixture
def folder(tmp_path) -> Path:
    """What the server serves."""
    folder = tmp_path / "far"
    folder.mkdir()
    (folder / "shard.tar").write_bytes(CONTENT)
    return folder


def remote(url: str, tmp_path: Path, retry_policy: RetryPolicy = HASTY) -> Remote:
    return Remote(url, CacheOptions(tmp_path / "cache", 2**30, retry_policy))


def fetch_shard(source: Remote, tmp_path: Path) -> bytes:
    target = tmp_path / "shard.tar"
    fetch(source, "shard.tar", target, len(CONTENT), SHA256, Deadline(source.cache.retry_policy.file_timeout_seconds))
    return target.read_bytes()


def test_what_is_a_url():
    assert all(is_url(place) for place in ("s3://bucket/a", "gs://b", "https://host/a b", "file:///a"))
    assert not any(is_url(place) for place in ("data/train", "/data", Path("s3"), "C:/data", "."))


def test_over_http_and_from_files(http_server, folder, tmp_path):
    server = http_server(folder)
    for url in (server.url, folder.as_uri()):
        assert fetch_shard(remote(url, tmp_path), tmp_path) == CONTENT
        assert fetch_bytes(remote(url, tmp_path), "shard.tar") == CONTENT


@pytest.mark.parametrize("bucket", ["s3_url", "gs_url"])
def test_from_buckets(request, bucket, folder, tmp_path):
    url = request.getfixturevalue(bucket)(folder)
    assert fetch_shard(remote(url, tmp_path), tmp_path) == CONTENT
    assert fetch_bytes(remote(url, tmp_path), "shard.tar") == CONTENT


@pytest.mark.parametrize("fault", ["503", "500", "429", "reset", "half", "half unsaid", "wrong", "empty", "silent"])
def test_a_fault_that_passes_is_tried_again(http_server, folder, tmp_path, fault):
    server = http_server(folder)
    server.faults["shard.tar"] = [fault, fault]
    source = remote(server.url, tmp_path, NERVOUS if fault == "silent" else HASTY)
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
def test_a_fault_that_stays_is_one_error(http_server, folder, tmp_path, fault, message):
    server = http_server(folder)
    server.faults["shard.tar"] = [fault] * 9
    retry_policy = replace(HASTY, read_timeout_seconds=0.5 if fault == "silent" else FOREVER)
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
def test_what_asking_again_does_not_change_is_asked_once(http_server, folder, tmp_path, fault, message):
    server = http_server(folder)
    server.faults["shard.tar"] = [fault] * 9
    with pytest.raises(RuntimeError, match=message):
        fetch_shard(remote(server.url, tmp_path), tmp_path)
    assert server.requests == ["shard.tar"]


def test_a_bucket_that_refuses_is_asked_once(http_server, folder, tmp_path, monkeypatch):
    server = http_server(folder)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    server.faults["shard.tar?alt=media"] = server.faults["shard.tar"] = ["403"] * 9
    with pytest.raises(RuntimeError, match=r"gs://bucket/shard.tar: access was refused \(Forbidden.*; check the cred"):
        fetch_shard(remote("gs://bucket", tmp_path), tmp_path)
    assert len(server.requests) == 1


SECRETS = [("http://ann:hush@{}/set", "http://…@{}/set"), ("http://{}/set/?sig=hush&to=hush", "http://{}/set/?…")]


@pytest.mark.parametrize(("url", "hidden"), SECRETS)
def test_secrets_of_a_url_are_used_and_not_shown(http_server, folder, tmp_path, url, hidden):
    server = http_server(shutil.copytree(folder, tmp_path / "root" / "set").parent)
    host = server.url.partition("://")[2]
    source, name = remote(url.format(host), tmp_path), "shard.tar" + "".join(url.partition("?")[1:])
    assert redact_url(source.url) == hidden.format(host)
    assert fetch_shard(source, tmp_path) == CONTENT
    assert server.requests == [name]
    assert server.credentials == {"Basic YW5uOmh1c2g=" if "@" in url else None}
    for fault in ("403", "404", "503", "silent", "reset", "empty"):
        server.faults[name] = [fault] * 9
        retry_policy = replace(HASTY, read_timeout_seconds=0.5 if fault == "silent" else FOREVER)
        with pytest.raises(RuntimeError, match="cannot fetch") as raised:
            fetch_shard(remote(source.url, tmp_path, retry_policy), tmp_path)
        text = "".join(traceback.format_exception(raised.value))
        assert redact_url(source.file_url("shard.tar")) in text
        assert "hush" not in text


def test_what_is_shown_of_texts_with_urls():
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
def test_a_blank_in_a_secret_is_refused(tmp_path, url):
    """No message could tell where the secret ends."""
    with pytest.raises(ValueError, match="^(https|sftp|s3)://… has a password or a token, and a blank; write it"):
        remote(url, tmp_path)


def test_other_blanks_are_not(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "my images@2x?")
    assert fetch_shard(remote(f"file://{place}", tmp_path), tmp_path) == CONTENT
    for url in ("https://host/my images", "s3://bucket/my images@2x", "gs://bucket/what? no"):
        remote(url, tmp_path)


def test_what_came_before_the_end_of_its_time_is_told(http_server, folder, tmp_path):
    server = http_server(folder)
    server.faults["shard.tar"] = ["silent", *["drip"] * 9]
    retry_policy = replace(NERVOUS, timeout_hint=", or ask your grandmother")
    deadline = WaitUntil(FOREVER, over=lambda: len(server.requests) >= 2)
    fault = r"it is not there after 7200 s, the server was too slow or silent \(.*\) before that, attempts: \d+; check"
    with pytest.raises(RuntimeError, match=f"shard.tar: {fault} server .* shards .*, or ask your grandmother$"):
        fetch(remote(server.url, tmp_path, retry_policy), "shard.tar", tmp_path / "x", len(CONTENT), SHA256, deadline)


CHUNK = 5 * 2**20  # of fsspec's HTTP, the largest


@pytest.mark.parametrize("kind", ["http", "http unsaid", "s3", "gs", "file"])
def test_a_file_that_is_larger_than_it_may_be_is_not_fetched_whole(http_server, s3_url, gs_url, folder, tmp_path, kind):
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


def test_nothing_there(http_server, s3_url, gs_url, folder, tmp_path):
    for url in (http_server(folder).url, s3_url(folder), gs_url(folder), folder.as_uri()):
        with pytest.raises(RuntimeError, match=f"cannot fetch {url}/other: it is not there; check the address"):
            fetch_bytes(remote(url, tmp_path), "other")


@pytest.mark.parametrize("bucket", ["s3_url", "gs_url"])
def test_a_bucket_that_is_not_there(request, bucket, folder, tmp_path):
    protocol, _, _ = request.getfixturevalue(bucket)(folder).partition("://")
    url = f"{protocol}://nobodys"
    with pytest.raises(RuntimeError, match=f"cannot fetch {url}/shard.tar: it is not there; check the address"):
        fetch_shard(remote(url, tmp_path), tmp_path)


def test_no_server(free_port, tmp_path):
    with pytest.raises(RuntimeError, match=r"Cannot connect to host.*attempts: 3; check server and network"):
        fetch_shard(remote(f"http://127.0.0.1:{free_port}", tmp_path), tmp_path)


def test_pauses_grow(http_server, folder, tmp_path):
    server = http_server(folder)
    server.faults["shard.tar"] = ["503"] * 3
    retry_policy = replace(HASTY, max_attempts=4, initial_backoff_seconds=0.1)
    fetch_shard(remote(server.url, tmp_path, retry_policy), tmp_path)
    pauses = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert all(pause >= wait for pause, wait in zip(pauses, (0.1, 0.2, 0.4), strict=True))


def test_the_time_for_a_file():
    assert 3500 < Deadline(7200, began=time.monotonic() - 3600).seconds_left <= 3600
    Deadline(FOREVER).check()
    with pytest.raises(FetchTimeoutError, match="^it is not there after 2.5 s$"):
        Deadline(2.5, began=time.monotonic() - 2.5).check()


def test_a_server_that_never_ends(http_server, folder, tmp_path, monkeypatch):
    """It is not silent for long; the file takes longer than it may, and then no attempt begins."""
    server = http_server(folder)
    server.faults["shard.tar"] = ["drip"] * 9
    source = remote(server.url, tmp_path)

    def until_asked(seconds: float) -> Deadline:
        asked = len(server.requests)
        return WaitUntil(seconds, over=lambda: len(server.requests) > asked)

    monkeypatch.setattr("dataio.remote.fetch.Deadline", until_asked)
    fault = "shard.tar: it is not there after 7200 s, attempts: 1; check server and network, or pack smaller shards "
    with pytest.raises(RuntimeError, match=fault):
        fetch(source, "shard.tar", tmp_path / "shard.tar", len(CONTENT), SHA256, until_asked(FOREVER))
    with pytest.raises(RuntimeError, match=fault):
        fetch_bytes(source, "shard.tar")
    assert server.requests == ["shard.tar"] * 2


def test_no_attempt_begins_when_the_time_for_a_file_is_over(http_server, folder, tmp_path, monkeypatch):
    """The third would begin after a pause of 4 s."""
    server, clock = http_server(folder), Clock()
    for user in ("dataio.remote.fetch.time", "tenacity.time"):
        monkeypatch.setattr(user, clock)
    server.faults["shard.tar"] = ["503"] * 9
    source = remote(server.url, tmp_path, replace(HASTY, max_attempts=9, initial_backoff_seconds=2))
    deadline = Deadline(5, clock, clock.monotonic())
    with pytest.raises(RuntimeError, match="shard.tar: 503.* attempts: 2;"):
        fetch(source, "shard.tar", tmp_path / "shard.tar", len(CONTENT), SHA256, deadline)
    assert server.requests == ["shard.tar"] * 2
    assert clock.pauses == [2]


@pytest.mark.parametrize("fault", ["drip", "silent", "503"])
@pytest.mark.parametrize("protocol", ["http", "gs"])
def test_giving_up_ends_a_transfer(http_server, folder, tmp_path, monkeypatch, protocol, fault):
    """Of a server that goes on sending, or sends nothing; or the pause before the next attempt, ours or gcsfs's own."""
    server = http_server(folder)
    url = server.url if protocol == "http" else google_api(server, folder, monkeypatch)
    server.faults["shard.tar"] = server.faults["shard.tar?alt=media"] = [fault] * 99
    monkeypatch.setattr("dataio.remote.fetch._MAX_BACKOFF_SECONDS", FOREVER)
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda _: asyncio.sleep(FOREVER)))
    source = remote(url, tmp_path, replace(HASTY, initial_backoff_seconds=FOREVER))
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
    """What fsspec's thread has not ended yet."""

    async def look() -> set[asyncio.Task]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    return asyncio.run_coroutine_threadsafe(look(), fsspec.asyn.get_loop()).result()


def google_api(server, folder: Path, monkeypatch) -> str:
    """The URL under which gcsfs finds what the server has in `folder`."""
    served = folder / "download" / "storage" / "v1" / "b" / "bucket" / "o"
    served.parent.mkdir(parents=True)
    served.symlink_to(folder)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    return "gs://bucket"


def test_what_is_not_needed_any_more_is_not_asked_for(http_server, folder, tmp_path):
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


def test_a_protocol_that_nobody_knows(tmp_path):
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
def test_a_package_that_is_missing(package, protocol):
    command = [sys.executable, "-c", WITHOUT, package, protocol]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"cannot read {protocol}://h/a/x: {protocol}:// needs another package (")
    assert package in said.partition("(")[2].partition(")")[0]
    assert said.endswith("); pip install aiohttp gcsfs s3fs tenacity\n")

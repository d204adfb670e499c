"""The cache folder shared by processes: space, locks, stale and damaged files; with real processes and servers."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from dataio.files import sha256_of
from dataio.manifest import SAMPLES_NAME, Manifest
from dataio.remote.options import CacheOptions, RetryPolicy
from dataio.remote.prefetch import RemoteShards
from dataio.shards import open_dataset

FOREVER = 7200  # seconds, longer than a test may take
NO_TIMEOUTS = RetryPolicy(
    max_attempts=3,
    initial_backoff_seconds=0.01,
    read_timeout_seconds=FOREVER,
    eviction_timeout_seconds=FOREVER,
    file_timeout_seconds=FOREVER,
    batch_timeout_seconds=FOREVER,
)
pytestmark = pytest.mark.usefixtures("no_shard_thread_left")


@pytest.fixture
def cache(tmp_path) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", 2**30, NO_TIMEOUTS)


def names(shards: list[int]) -> set[str]:
    return {f"shard-{shard:06d}.tar" for shard in shards}


def test_least_recently_used_shards_are_evicted_and_none_in_use(
    http_server, served, local, tmp_path, cached, prefetch_and_read
):
    table = (local.folder / SAMPLES_NAME).stat().st_size
    limit = table + 5 * max(shard.bytes for shard in local.shards)
    manifest = open_dataset(http_server(served).url, CacheOptions(tmp_path / "cache", limit, NO_TIMEOUTS))
    one, other = RemoteShards(manifest), RemoteShards(manifest)
    prefetch_and_read(one, manifest, [0])
    for shard in (1, 2, 3):
        prefetch_and_read(other, manifest, [shard])
    prefetch_and_read(other, manifest, [1, 4])  # now 2 and 3 are the longest unused, and 0 is in use
    prefetch_and_read(other, manifest, [5, 6])
    held = {name for name in cached(manifest.remote.cache) if name.endswith(".tar")}
    assert names([0, 5, 6]) <= held
    assert held <= names([0, 1, 4, 5, 6])
    one.close()
    other.close()


def test_cache_full_of_shards_in_use(http_server, served, local, tmp_path, prefetch_and_read):
    """Another process uses them all; once it closes them, the same batch can be read."""
    table = (local.folder / SAMPLES_NAME).stat().st_size
    limit = table + sum(shard.bytes for shard in local.shards[:4])
    manifest = open_dataset(http_server(served).url, CacheOptions(tmp_path / "cache", limit, replace(NO_TIMEOUTS)))
    holder, other = RemoteShards(manifest), RemoteShards(manifest)
    prefetch_and_read(holder, manifest, [0, 1, 2, 3])
    fault = r"no room for .*shard-000009.tar: all of the .* there is in use, .* raise data"
    with short_timeouts(manifest), pytest.raises(RuntimeError, match=fault):
        prefetch_and_read(other, manifest, [9])
    prefetch_and_read(other, manifest, [0, 3])
    holder.close()
    prefetch_and_read(other, manifest, [0, 9])
    other.close()


@contextmanager
def short_timeouts(manifest: Manifest) -> Iterator[None]:
    """Wait for space and locks for a moment only, too short for a slow machine where they must be had."""
    retry_policy = manifest.remote.cache.retry_policy
    object.__setattr__(retry_policy, "eviction_timeout_seconds", 0.2)
    yield
    object.__setattr__(retry_policy, "eviction_timeout_seconds", FOREVER)


def in_time(manifest: Manifest, file_timeout_seconds: float) -> Manifest:
    """The same data set with `file_timeout_seconds` for each file."""
    cache = manifest.remote.cache
    retry_policy = replace(cache.retry_policy, file_timeout_seconds=file_timeout_seconds)
    return replace(manifest, remote=replace(manifest.remote, cache=replace(cache, retry_policy=retry_policy)))


def test_another_process_stopped_while_fetching(http_server, served, local, cache, prefetch_and_read):
    """It keeps its lock: an error at the file's deadline; once it has ended, the shard is fetched."""
    manifest = open_dataset(http_server(served).url, cache)
    impatient, patient = RemoteShards(in_time(manifest, 0.2)), RemoteShards(manifest)
    fault = (
        "^another process is fetching .*shard-000000.tar, and has not finished after 0.2 s; end it if it was stopped,"
    )
    claim = manifest.folder / f".shard-000000.tar.{local.shards[0].bytes}.claim"
    with stopped_process(claim):
        with pytest.raises(RuntimeError, match=fault):
            prefetch_and_read(impatient, manifest, [0])
        patient.prefetch([0])
    prefetch_and_read(patient, manifest, [0])
    impatient.close()
    patient.close()


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_files_have_the_modes_that_the_umask_leaves(http_server, served, cache, umask, prefetch_and_read):
    """Finished ones, and the claim of one that does not come."""
    server = http_server(served)
    before = os.umask(umask)
    try:
        manifest = open_dataset(server.url, cache)
        shards = RemoteShards(manifest)
        prefetch_and_read(shards, manifest, [1])
        server.faults["shard-000000.tar"] = ["silent"]
        shards.prefetch([0])
        while not list(manifest.folder.glob(".shard-000000.tar.*.claim")):
            time.sleep(0.01)
        modes = {path.name: path.stat().st_mode & 0o777 for path in cache.folder.rglob("*") if path.is_file()}
    finally:
        os.umask(before)
    assert len(modes) >= 4
    assert set(modes.values()) == {0o666 & ~umask}
    server.stop()
    shards.close()


@pytest.mark.parametrize("name", ["lock", "shard-000000.tar"])
def test_another_process_stopped_while_holding_a_lock(http_server, served, local, tmp_path, name, prefetch_and_read):
    """One of the locks that are held for a moment only."""
    manifest = open_dataset(http_server(served).url, CacheOptions(tmp_path / "cache", 2**30, replace(NO_TIMEOUTS)))
    shards = RemoteShards(manifest)
    prefetch_and_read(shards, manifest, [0])
    shards.prefetch([])
    path = tmp_path / "cache" / name if name == "lock" else manifest.folder / name
    fault = f"^another process holds a lock on {path}; end it"
    with stopped_process(path), short_timeouts(manifest), pytest.raises(RuntimeError, match=fault):
        prefetch_and_read(shards, manifest, [1 if name == "lock" else 0])
    prefetch_and_read(shards, manifest, [0, 1])
    shards.close()


def test_waiting_for_a_lock_ends_at_the_files_deadline(http_server, served, cache, await_shard_threads):
    manifest = open_dataset(http_server(served).url, cache)
    with stopped_process(cache.folder / "lock"):
        patient, impatient = RemoteShards(manifest), RemoteShards(in_time(manifest, 0.2))
        impatient.prefetch([0])
        patient.prefetch([0])
        with pytest.raises(RuntimeError, match="another process holds a lock on .*lock; end it if it was stopped"):
            impatient.read(0)
        impatient.close()
        patient.close()
        await_shard_threads()


@contextmanager
def stopped_process(locked: Path) -> Iterator[None]:
    """Start a process that locks a file and then does nothing."""
    command = [sys.executable, "-c", HOLD_LOCK, locked]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield
        finally:
            process.kill()


HOLD_LOCK = """
import fcntl, sys, time
with open(sys.argv[1], "ab") as locked:
    fcntl.flock(locked, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(3600)
"""


def test_disk_fills_up_while_a_shard_arrives(http_server, served, local, small_disk, cached):
    """Space is checked before, so that only a limit on the size of written files can fail later."""
    cache = CacheOptions(small_disk / "cache", 2**30)
    url = http_server(served).url
    fetching = subprocess.run([sys.executable, "-c", LIMITED, url, str(cache.folder)], capture_output=True, text=True)
    assert fetching.returncode == 0, fetching.stderr
    assert (
        "shard-000000.tar: File too large in the cache; free some space, name a folder of a larger" in fetching.stdout
    )
    assert not [name for name in cached(cache) if name.endswith((".tar", ".claim", ".partial"))]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from dataio.remote.prefetch import RemoteShards
from dataio.shards import open_dataset
from dataio.remote.options import CacheOptions, RetryPolicy

retry_policy = RetryPolicy(
    max_attempts=2,
    initial_backoff_seconds=0.01,
    read_timeout_seconds=3600,
    file_timeout_seconds=3600,
    batch_timeout_seconds=3600,
)
manifest = open_dataset(sys.argv[1], CacheOptions(Path(sys.argv[2]), 2**30, retry_policy))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
shards = RemoteShards(manifest)
shards.prefetch([0])
try:
    shards.read(0)
except RuntimeError as error:
    print(error)
"""


def test_cache_folder_without_write_permission(http_server, served, cache):
    cache.folder.write_text("a file")
    with pytest.raises(
        RuntimeError, match="cannot keep .*samples.npy: Not a directory; make the folder writable, or na"
    ):
        open_dataset(http_server(served).url, cache)


def test_stale_files_of_killed_processes_are_removed(http_server, served, cache, local, prefetch_and_read):
    manifest = open_dataset(http_server(served).url, cache)
    left, busy = (manifest.folder / f".{shard.name}.99.claim" for shard in local.shards[-2:])
    foreign = cache.folder / "photos" / "shard-000000.tar"
    foreign.parent.mkdir()
    unclaimed = manifest.folder / ".shard-000099.tar.partial"
    partials = [claim.with_name(claim.name.replace(".99.claim", ".partial")) for claim in (left, busy)]
    for path in (left, busy, foreign, unclaimed, *partials):
        path.write_bytes(b"x" * 99)
    with open(busy) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        shards = RemoteShards(manifest)
        for shard in range(len(local.shards) // 2):
            prefetch_and_read(shards, manifest, [shard])
        shards.close()
        assert (left.exists(), busy.exists(), foreign.exists()) == (False, True, True)
        assert [partial.exists() for partial in (unclaimed, *partials)] == [False, False, True]


def test_cached_shards_are_used_if_their_hash_is_right(http_server, served, cache, local, prefetch_and_read):
    server = http_server(served)
    manifest = open_dataset(server.url, cache)
    for shard, damage in ((0, 0), (1, 1)):
        content = bytearray((served / local.shards[shard].name).read_bytes())
        content[600] ^= damage
        path = manifest.folder / local.shards[shard].name
        path.write_bytes(content)
        os.utime(path, (1e9, 1e9))
    shards = RemoteShards(manifest)
    prefetch_and_read(shards, manifest, [0, 1])
    shards.close()
    assert [name for name in server.requests if name.endswith(".tar")] == ["shard-000001.tar"]
    content = (manifest.folder / "shard-000001.tar").read_bytes()
    assert content == (served / "shard-000001.tar").read_bytes()


def test_shard_overwritten_in_the_cache_is_fetched_again(http_server, served, local, tmp_path, prefetch_and_read):
    """By any process, after this one has read it; its size does not change."""
    server = http_server(served)
    manifest = open_dataset(server.url, CacheOptions(tmp_path / "cache", 2**30, NO_TIMEOUTS))
    shards = RemoteShards(manifest)
    prefetch_and_read(shards, manifest, [0, 1])
    with open(manifest.folder / "shard-000000.tar", "r+b") as file:
        file.seek(600)
        file.write(b"no photograph")
    prefetch_and_read(shards, manifest, [1])
    prefetch_and_read(shards, manifest, [0, 1])
    shards.close()
    assert (server.requests.count("shard-000000.tar"), server.requests.count("shard-000001.tar")) == (2, 1)
    assert (manifest.folder / "shard-000000.tar").read_bytes() == (served / "shard-000000.tar").read_bytes()


READING = """
import sys
from pathlib import Path
from dataio.remote.prefetch import RemoteShards
from dataio.shards import open_dataset
from dataio.remote.options import CacheOptions

manifest = open_dataset(sys.argv[1], CacheOptions(Path(sys.argv[2]), 2**30))
shards = RemoteShards(manifest)

def bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])

before = bytes_read()
shards.prefetch(range(len(manifest.shards)))
for number in range(len(manifest.shards)):
    shards.read(sum(manifest.shard_samples[:number]))
print(bytes_read() - before)
shards.close()
"""


@pytest.mark.parametrize("damaged", [True, False])
def test_two_processes_verify_the_same_shard(
    http_server, served, local, tmp_path, monkeypatch, prefetch_and_read, damaged
):
    """The slower one removes nothing that the faster one has fetched again, or verified, in the meantime."""
    server = http_server(served)
    manifest = open_dataset(server.url, CacheOptions(tmp_path / "cache", 2**30, NO_TIMEOUTS))
    faster, slower = RemoteShards(manifest), RemoteShards(manifest)
    prefetch_and_read(faster, manifest, [0])
    faster.prefetch([])
    path = manifest.folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:: -1 if damaged else 1])

    def hash_and_be_overtaken(file: int) -> str:
        digest = sha256_of(file)
        monkeypatch.undo()
        prefetch_and_read(faster, manifest, [0])
        return digest

    monkeypatch.setattr("dataio.remote.cache_folder.sha256_of", hash_and_be_overtaken)
    prefetch_and_read(slower, manifest, [0])
    assert server.requests.count(path.name) == (2 if damaged else 1)
    assert sha256_of(path) == local.shards[0].sha256
    faster.close()
    slower.close()


def test_verified_shards_are_not_hashed_again(served, local, tmp_path):
    """A later process reads only the samples that it needs, unless a shard's modification time has changed."""

    def bytes_read() -> int:
        command = [sys.executable, "-c", READING, served.as_uri(), str(tmp_path / "cache")]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    whole = sum(shard.bytes for shard in local.shards)
    assert bytes_read() > whole
    assert bytes_read() < whole / 4
    for path in tmp_path.glob("cache/*/*.tar"):
        path.touch()
    assert bytes_read() > whole
    assert bytes_read() < whole / 4

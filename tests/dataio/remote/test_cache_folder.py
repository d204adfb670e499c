"""The folder that processes share: room, locks, what others left or damaged in it. Real processes, real servers."""

import fcntl
import os
import subprocess
import sys
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
PATIENT = RetryPolicy(
    max_attempts=3,
    initial_backoff_seconds=0.01,
    read_timeout_seconds=FOREVER,
    eviction_timeout_seconds=FOREVER,
    file_timeout_seconds=FOREVER,
    batch_timeout_seconds=FOREVER,
)
pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture
def cache(tmp_path) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", 2**30, PATIENT)


def names(shards: list[int]) -> set[str]:
    return {f"shard-{shard:06d}.tar" for shard in shards}


def test_the_longest_unused_are_evicted_first_and_none_in_use(http_server, far, local, tmp_path, cached, hold_and_read):
    table = (local.folder / SAMPLES_NAME).stat().st_size
    limit = table + 5 * max(shard.bytes for shard in local.shards)
    manifest = open_dataset(http_server(far).url, CacheOptions(tmp_path / "cache", limit, PATIENT))
    one, other = RemoteShards(manifest), RemoteShards(manifest)
    hold_and_read(one, manifest, [0])
    for shard in (1, 2, 3):
        hold_and_read(other, manifest, [shard])
    hold_and_read(other, manifest, [1, 4])  # now 2 and 3 are the longest unused, and 0 is in use
    hold_and_read(other, manifest, [5, 6])
    held = {name for name in cached(manifest.remote.cache) if name.endswith(".tar")}
    assert names([0, 5, 6]) <= held
    assert held <= names([0, 1, 4, 5, 6])
    one.close()
    other.close()


def test_a_cache_full_of_shards_in_use(http_server, far, local, tmp_path, hold_and_read):
    """Another process holds them all; when it lets go, the same batch can be had."""
    table = (local.folder / SAMPLES_NAME).stat().st_size
    limit = table + sum(shard.bytes for shard in local.shards[:4])
    manifest = open_dataset(http_server(far).url, CacheOptions(tmp_path / "cache", limit, replace(PATIENT)))
    holder, other = RemoteShards(manifest), RemoteShards(manifest)
    hold_and_read(holder, manifest, [0, 1, 2, 3])
    fault = r"no room for .*shard-000009.tar: all of the .* there is in use, .* raise data"
    with hasty(manifest), pytest.raises(RuntimeError, match=fault):
        hold_and_read(other, manifest, [9])
    hold_and_read(other, manifest, [0, 3])
    holder.close()
    hold_and_read(other, manifest, [0, 9])
    other.close()


@contextmanager
def hasty(manifest: Manifest) -> Iterator[None]:
    """Inside, room and locks are waited for a moment only: too short for a slow machine where they must be had."""
    retry_policy = manifest.remote.cache.retry_policy
    object.__setattr__(retry_policy, "eviction_timeout_seconds", 0.2)
    yield
    object.__setattr__(retry_policy, "eviction_timeout_seconds", FOREVER)


def in_time(manifest: Manifest, file_timeout_seconds: float) -> Manifest:
    """The same data set with `file_timeout_seconds` for each file."""
    cache = manifest.remote.cache
    retry_policy = replace(cache.retry_policy, file_timeout_seconds=file_timeout_seconds)
    return replace(manifest, remote=replace(manifest.remote, cache=replace(cache, retry_policy=retry_policy)))


def test_another_process_that_stands_still_while_it_fetches(http_server, far, local, cache, hold_and_read):
    """It was stopped, and has its lock: an error when the shard's time is over; when it is ended, the shard."""
    manifest = open_dataset(http_server(far).url, cache)
    hasty, patient = RemoteShards(in_time(manifest, 0.2)), RemoteShards(manifest)
    fault = "^another process is fetching .*shard-000000.tar, and has not got it after 0.2 s; end it if it was stopped,"
    claim = manifest.folder / f".shard-000000.tar.{local.shards[0].bytes}.claim"
    with standing_still(claim):
        with pytest.raises(RuntimeError, match=fault):
            hold_and_read(hasty, manifest, [0])
        patient.prefetch([0])
    hold_and_read(patient, manifest, [0])
    hasty.close()
    patient.close()


@pytest.mark.parametrize("name", ["lock", "shard-000000.tar"])
def test_another_process_that_was_stopped_with_a_lock(http_server, far, local, tmp_path, name, hold_and_read):
    """Of those that are held for a moment."""
    manifest = open_dataset(http_server(far).url, CacheOptions(tmp_path / "cache", 2**30, replace(PATIENT)))
    shards = RemoteShards(manifest)
    hold_and_read(shards, manifest, [0])
    shards.prefetch([])
    path = tmp_path / "cache" / name if name == "lock" else manifest.folder / name
    fault = f"^another process holds a lock on {path}; end it"
    with standing_still(path), hasty(manifest), pytest.raises(RuntimeError, match=fault):
        hold_and_read(shards, manifest, [1 if name == "lock" else 0])
    hold_and_read(shards, manifest, [0, 1])
    shards.close()


def test_no_lock_is_waited_for_longer_than_for_its_shard(http_server, far, cache, await_their_end):
    manifest = open_dataset(http_server(far).url, cache)
    with standing_still(cache.folder / "lock"):
        patient, hasty = RemoteShards(manifest), RemoteShards(in_time(manifest, 0.2))
        hasty.prefetch([0])
        patient.prefetch([0])
        with pytest.raises(RuntimeError, match="another process holds a lock on .*lock; end it if it was stopped"):
            hasty.read(0)
        hasty.close()
        patient.close()
        await_their_end()


@contextmanager
def standing_still(locked: Path) -> Iterator[None]:
    """A process that holds a lock, and does nothing more."""
    command = [sys.executable, "-c", STANDING_STILL, locked]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield
        finally:
            process.kill()


STANDING_STILL = """
import fcntl, sys, time
with open(sys.argv[1], "ab") as locked:
    fcntl.flock(locked, fcntl.LOCK_EX)
    print("locked", flush=True)
    time.sleep(3600)
"""


def test_a_disk_that_fills_up_while_a_shard_arrives(http_server, far, local, small_disk, cached):
    """Its free space is taken between the look at it and the writing, by a limit that only writing meets."""
    cache = CacheOptions(small_disk / "cache", 2**30)
    url = http_server(far).url
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

retry_policy = RetryPolicy(max_attempts=2, initial_backoff_seconds=0.01, read_timeout_seconds=3600, file_timeout_seconds=3600, batch_timeout_seconds=3600)
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


def test_a_folder_that_cannot_be_written(http_server, far, cache):
    cache.folder.write_text("a file")
    with pytest.raises(
        RuntimeError, match="cannot keep .*samples.npy: Not a directory; make the folder writable, or na"
    ):
        open_dataset(http_server(far).url, cache)


def test_what_a_killed_process_left_is_removed_and_nothing_else(http_server, far, cache, local, hold_and_read):
    manifest = open_dataset(http_server(far).url, cache)
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
            hold_and_read(shards, manifest, [shard])
        shards.close()
        assert (left.exists(), busy.exists(), foreign.exists()) == (False, True, True)
        assert [partial.exists() for partial in (unclaimed, *partials)] == [False, False, True]


def test_what_an_earlier_process_left_is_used_if_it_is_whole(http_server, far, cache, local, hold_and_read):
    server = http_server(far)
    manifest = open_dataset(server.url, cache)
    for shard, damage in ((0, 0), (1, 1)):
        content = bytearray((far / local.shards[shard].name).read_bytes())
        content[600] ^= damage
        path = manifest.folder / local.shards[shard].name
        path.write_bytes(content)
        os.utime(path, (1e9, 1e9))
    shards = RemoteShards(manifest)
    hold_and_read(shards, manifest, [0, 1])
    shards.close()
    assert [name for name in server.requests if name.endswith(".tar")] == ["shard-000001.tar"]
    content = (manifest.folder / "shard-000001.tar").read_bytes()
    assert content == (far / "shard-000001.tar").read_bytes()


def test_what_is_written_to_in_place_is_fetched_again(http_server, far, local, tmp_path, hold_and_read):
    """By whatever process, after this one has read it; the size stays."""
    server = http_server(far)
    manifest = open_dataset(server.url, CacheOptions(tmp_path / "cache", 2**30, PATIENT))
    shards = RemoteShards(manifest)
    hold_and_read(shards, manifest, [0, 1])
    with open(manifest.folder / "shard-000000.tar", "r+b") as file:
        file.seek(600)
        file.write(b"no photograph")
    hold_and_read(shards, manifest, [1])
    hold_and_read(shards, manifest, [0, 1])
    shards.close()
    assert (server.requests.count("shard-000000.tar"), server.requests.count("shard-000001.tar")) == (2, 1)
    assert (manifest.folder / "shard-000000.tar").read_bytes() == (far / "shard-000000.tar").read_bytes()


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
def test_two_that_verify_a_shard(http_server, far, local, tmp_path, monkeypatch, hold_and_read, damaged):
    """The slower one removes nothing that the faster one has fetched meanwhile, or found to be whole."""
    server = http_server(far)
    manifest = open_dataset(server.url, CacheOptions(tmp_path / "cache", 2**30, PATIENT))
    faster, slower = RemoteShards(manifest), RemoteShards(manifest)
    hold_and_read(faster, manifest, [0])
    faster.prefetch([])
    path = manifest.folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:: -1 if damaged else 1])

    def hash_and_be_overtaken(file: int) -> str:
        digest = sha256_of(file)
        monkeypatch.undo()
        hold_and_read(faster, manifest, [0])
        return digest

    monkeypatch.setattr("dataio.remote.cache_folder.sha256_of", hash_and_be_overtaken)
    hold_and_read(slower, manifest, [0])
    assert server.requests.count(path.name) == (2 if damaged else 1)
    assert sha256_of(path) == local.shards[0].sha256
    faster.close()
    slower.close()


def test_a_later_process_reads_what_it_needs_of_an_earlier_ones_shards(far, local, tmp_path):
    """And not the rest, unless somebody has touched them: what that one verified is not hashed again."""

    def bytes_read() -> int:
        command = [sys.executable, "-c", READING, far.as_uri(), str(tmp_path / "cache")]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    whole = sum(shard.bytes for shard in local.shards)
    assert bytes_read() > whole
    assert bytes_read() < whole / 4
    for path in tmp_path.glob("cache/*/*.tar"):
        path.touch()
    assert bytes_read() > whole
    assert bytes_read() < whole / 4

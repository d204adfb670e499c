"""Remote training and evaluation through a cache smaller than the data set, bit-identical to local shards."""

import asyncio
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataio.augment.params import ImageOptions
from dataio.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from dataio.manifest import MANIFEST_NAME, SAMPLES_NAME, Manifest, load_manifest
from dataio.remote.fetch import Deadline
from dataio.remote.options import CacheOptions, RetryPolicy
from dataio.remote.prefetch import RemoteShards
from dataio.shards import open_dataset

CPU = torch.device("cpu")
IMAGE_OPTIONS = ImageOptions(image_size=32, threads=1)
WINDOW = 3
LOADER_OPTIONS = LoaderOptions(seed=7, global_batch_size=24, shuffle_window_shards=WINDOW)
FOREVER = 7200  # seconds, longer than a test may take
NO_TIMEOUTS = RetryPolicy(
    max_attempts=3,
    initial_backoff_seconds=FOREVER,
    read_timeout_seconds=FOREVER,
    eviction_timeout_seconds=FOREVER,
    file_timeout_seconds=FOREVER,
    batch_timeout_seconds=FOREVER,
)
FAST_RETRIES = replace(NO_TIMEOUTS, initial_backoff_seconds=0.01)
# Where a server is silent. A slow machine may be taken for one that is, and is asked again.
SHORT_READ_TIMEOUT = replace(FAST_RETRIES, max_attempts=1000, read_timeout_seconds=0.5)

pytestmark = pytest.mark.usefixtures("no_shard_thread_left")


@pytest.fixture(scope="module")
def expected(local) -> list[Batch]:
    """Two epochs of batches from local disk."""
    return list(itertools.islice(TrainLoader(local, IMAGE_OPTIONS, LOADER_OPTIONS, CPU), 2 * len(local) // 24))


def smallest_cache(local: Manifest) -> int:
    """Return the bytes that a step needs, with the window after it."""
    return LOADER_OPTIONS.required_cache_bytes(local)


@pytest.fixture
def cache(local, tmp_path) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", smallest_cache(local), FAST_RETRIES)


def assert_bit_identical(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        assert np.array_equal(one.samples, other.samples)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("kind", ["http", "s3", "gs", "file"])
def test_remote_training_is_bit_identical_to_local(
    http_server, s3_url, gs_url, served, cache, local, expected, kind, cached
):
    servers = {"http": lambda served: http_server(served).url, "s3": s3_url, "gs": gs_url, "file": Path.as_uri}
    url = servers[kind](served)
    manifest = open_dataset(f"{url}/", cache)
    assert (manifest.hash, manifest.location) == (local.hash, url)
    assert list(cached(cache)) == [SAMPLES_NAME]
    loader, batches = TrainLoader(manifest, IMAGE_OPTIONS, LOADER_OPTIONS, CPU), []
    for _ in expected:
        batches.append(next(loader))
        assert sum(cached(cache).values()) <= cache.limit_bytes
    assert_bit_identical(batches, expected)
    assert cache.limit_bytes < sum(shard.bytes for shard in local.shards) / 2


def test_url_with_a_token(http_server, served, cache, expected):
    """It is sent with every request, and in no message."""
    server = http_server(served)
    manifest = open_dataset(f"{server.url}/?token=hush", cache)
    assert manifest.location == f"{server.url}/?…"
    assert_bit_identical([next(TrainLoader(manifest, IMAGE_OPTIONS, LOADER_OPTIONS, CPU))], expected[:1])
    assert all(name.endswith("?token=hush") for name in server.requests)
    (served / MANIFEST_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"/manifest.json\?… is not a manifest"):
        open_dataset(f"{server.url}/?token=hush", cache)


def test_each_shard_is_fetched_once_an_epoch_for_all_ranks(http_server, served, cache, expected, local):
    """Four ranks share the cache."""
    server = http_server(served)
    options_of_ranks = [
        LoaderOptions(seed=7, global_batch_size=24, rank=rank, world_size=4, shuffle_window_shards=WINDOW)
        for rank in range(4)
    ]
    of_ranks = [
        TrainLoader(open_dataset(server.url, cache), IMAGE_OPTIONS, loader_options, CPU)
        for loader_options in options_of_ranks
    ]
    steps = len(local) // 24
    batches = [next(loader) for _ in range(steps) for loader in of_ranks]
    samples = np.concatenate([batch.samples for batch in expected[:steps]])
    images = torch.cat([batch.images for batch in expected[:steps]])
    assert np.array_equal(np.concatenate([batch.samples for batch in batches]), samples)
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)
    of_one_epoch = [server.requests.count(shard.name) for shard in local.shards]
    assert min(of_one_epoch) == 1
    assert sum(of_one_epoch) <= len(local.shards) + 2 * WINDOW  # of the next epoch, fetched ahead
    assert server.requests.count(SAMPLES_NAME) == 1


def test_large_cache_is_filled_once(http_server, served, local, expected, tmp_path):
    server = http_server(served)
    cache = CacheOptions(tmp_path / "cache", 2**30, FAST_RETRIES)
    batches = list(
        itertools.islice(
            TrainLoader(open_dataset(server.url, cache), IMAGE_OPTIONS, LOADER_OPTIONS, CPU), len(expected)
        )
    )
    assert_bit_identical(batches, expected)
    assert [server.requests.count(shard.name) for shard in local.shards] == [1] * len(local.shards)


def test_full_order_of_remote_shards(http_server, served, local, tmp_path):
    manifest = open_dataset(http_server(served).url, CacheOptions(tmp_path / "cache", 2**30, FAST_RETRIES))
    loader_options = LoaderOptions(seed=7, global_batch_size=24)
    batches, from_disk = (
        list(itertools.islice(TrainLoader(each, IMAGE_OPTIONS, loader_options, CPU), 5)) for each in (manifest, local)
    )
    assert_bit_identical(batches, from_disk)


@pytest.mark.parametrize("ranks", [1, 3])
def test_remote_evaluation(http_server, served, local, tmp_path, ranks, cached):
    cache = CacheOptions(tmp_path / "cache", EvalLoader.required_cache_bytes(local, 16, ranks), FAST_RETRIES)
    manifest = open_dataset(http_server(served).url, cache)
    for rank in range(ranks):
        from_disk, batches = (EvalLoader(each, IMAGE_OPTIONS, 16, rank, ranks, CPU) for each in (local, manifest))
        for _ in range(2):
            assert_bit_identical(list(batches), list(from_disk))
    assert sum(cached(cache).values()) <= cache.limit_bytes


RANK = """
import hashlib, sys
from pathlib import Path
import torch
from dataio.shards import open_dataset
from dataio.loader import TrainLoader, LoaderOptions
from dataio.augment.params import ImageOptions
from dataio.remote.options import CacheOptions, RetryPolicy

url, folder, limit, rank, ranks, steps = sys.argv[1:]
retry_policy = RetryPolicy(
    eviction_timeout_seconds=3600, file_timeout_seconds=3600, batch_timeout_seconds=3600, read_timeout_seconds=3600
)
manifest = open_dataset(url, CacheOptions(Path(folder), int(limit), retry_policy))
loader_options = LoaderOptions(
    seed=7, global_batch_size=24, rank=int(rank), world_size=int(ranks), shuffle_window_shards=3
)
loader = TrainLoader(manifest, ImageOptions(image_size=32, threads=1), loader_options, torch.device("cpu"))
for _ in range(int(steps)):
    batch = next(loader)
    print(batch.position, hashlib.sha256(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_processes_share_a_cache(http_server, served, cache, local, expected, cached):
    """Three that do not wait for each other, so that the fastest may be several windows ahead."""
    server = http_server(served)
    steps = len(expected)
    wide = 3 * cache.limit_bytes
    command = [sys.executable, "-c", RANK, server.url, str(cache.folder), str(wide)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "3", str(steps)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(3)
    ]
    lines = []
    try:
        for process in processes:
            out, err = process.communicate()
            assert process.returncode == 0, err
            lines += out.splitlines()
    finally:
        for process in processes:
            process.kill()
    digests = dict(line.split() for line in lines)
    assert len(digests) == 3 * steps
    for batch in expected:
        for rank in range(3):
            part = slice(8 * rank, 8 * rank + 8)
            digest = sha256(batch.images[part].numpy().tobytes() + batch.labels[part].numpy().tobytes())
            assert digests[str(batch.position + 8 * rank)] == digest
    assert sum(cached(cache).values()) <= wide
    assert not [name for name in cached(cache) if name.endswith((".claim", ".partial"))]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("fault", ["503", "reset", "half", "wrong", "silent"])
def test_server_with_transient_faults(http_server, served, cache, local, expected, fault):
    server = http_server(served)
    manifest = open_dataset(server.url, replace(cache, retry_policy=SHORT_READ_TIMEOUT) if fault == "silent" else cache)
    server.faults = {shard.name: [fault] for shard in local.shards[:: 6 if fault == "silent" else 2]}
    batches = list(itertools.islice(TrainLoader(manifest, IMAGE_OPTIONS, LOADER_OPTIONS, CPU), len(local) // 24))
    assert_bit_identical(batches, expected[: len(batches)])
    assert not any(server.faults.values())


def test_server_that_restarts(http_server, free_port, served, cache, expected):
    """Training continues from the cache, then raises an error, then resumes with the same batch."""
    server = http_server(served, free_port)
    loader = TrainLoader(open_dataset(server.url, cache), IMAGE_OPTIONS, LOADER_OPTIONS, CPU)
    batches = [next(loader)]
    server.stop()
    with pytest.raises(RuntimeError, match=r"cannot fetch http://127.*/shard-.*\.tar: Cannot connect .* attempts: 3"):
        batches.extend(loader)  # which has no end
    with pytest.raises(RuntimeError, match="cannot fetch"):
        next(loader)
    http_server(served, free_port)
    batches += itertools.islice(loader, len(expected) - len(batches))
    assert_bit_identical(batches, expected)


def test_remote_shard_with_another_hash(http_server, served, cache, local, cached):
    path = served / local.shards[5].name
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    loader = TrainLoader(open_dataset(http_server(served).url, cache), IMAGE_OPTIONS, LOADER_OPTIONS, CPU)
    with pytest.raises(
        RuntimeError, match="shard-000005.tar: .* bytes came, with another sha256 than the manifest's, att"
    ):
        list(itertools.islice(loader, len(local) // 24))
    assert path.name not in cached(cache)


def test_missing_remote_shard(http_server, served, cache, local):
    (served / local.shards[5].name).unlink()
    loader = TrainLoader(open_dataset(http_server(served).url, cache), IMAGE_OPTIONS, LOADER_OPTIONS, CPU)
    with pytest.raises(RuntimeError, match="shard-000005.tar: it is not there; check the address, and that the whole"):
        list(itertools.islice(loader, len(local) // 24))


def test_bad_sample_of_a_remote_shard_is_substituted(http_server, served, cache, local, overwrite):
    """It was packed so: the shard's hash is right. It is the last one of its shard, and the first is its substitute."""
    last = local.shard_samples[0] - 1
    overwrite(load_manifest(served), last, b"no image" * 8)
    fields = json.loads((served / MANIFEST_NAME).read_text())
    fields["shards"][0]["sha256"] = sha256((served / "shard-000000.tar").read_bytes())
    (served / MANIFEST_NAME).write_text(json.dumps(fields | {"sha256": ""}))
    manifest = open_dataset(http_server(served).url, cache)
    loader_options = LoaderOptions(seed=7, global_batch_size=24, shuffle_window_shards=WINDOW, max_bad_samples=1)
    batches, from_disk = (
        list(itertools.islice(TrainLoader(each, IMAGE_OPTIONS, loader_options, CPU), 17))
        for each in (manifest, load_manifest(served))
    )
    assert_bit_identical(batches, from_disk)
    met = [broken for batch in batches for broken in batch.substituted]
    assert {(broken.sample, broken.substitute, broken.reason) for broken in met} == {(last, 0, "not an image")}


@pytest.mark.parametrize("content", ["{", "", '{"format": 1}'])
def test_remote_file_that_is_not_a_manifest(http_server, served, cache, content):
    (served / MANIFEST_NAME).write_text(content)
    url = http_server(served).url
    with pytest.raises(ValueError, match=f"^{url}/manifest.json is not a manifest .*; pack the folder again"):
        open_dataset(url, cache)


def test_remote_sample_table_with_another_hash(http_server, served, cache, cached):
    rows = np.load(served / SAMPLES_NAME)
    rows["label"][3] = (rows["label"][3] + 1) % 10
    np.save(served / SAMPLES_NAME, rows)
    with pytest.raises(
        RuntimeError, match="samples.npy: .* bytes came, with another sha256 than the manifest's, attempt"
    ):
        open_dataset(http_server(served).url, cache)
    assert cached(cache) == {}


def test_too_small_a_cache_is_an_error_at_once(http_server, served, cache, local):
    server = http_server(served)
    small = CacheOptions(cache.folder, cache.limit_bytes - 1, FAST_RETRIES)
    manifest = open_dataset(server.url, small)
    message = (
        rf"a cache of .* GiB is too small, {server.url} needs .* GiB at a time; allow it 0.* \(data.cache_gib, --cache"
    )
    with pytest.raises(ValueError, match=message):
        TrainLoader(manifest, IMAGE_OPTIONS, LOADER_OPTIONS, CPU)
    few = open_dataset(
        server.url, CacheOptions(cache.folder, EvalLoader.required_cache_bytes(local, 16) - 1, FAST_RETRIES)
    )
    with pytest.raises(ValueError, match="is too small"):
        EvalLoader(few, IMAGE_OPTIONS, 16, 0, 8, CPU)
    assert not [name for name in server.requests if name.endswith(".tar")]
    with pytest.raises(
        ValueError, match="a cache of 1 GiB is too small, a needs 1 GiB, b needs 0.5 GiB at a time; allow it 1.5 "
    ):
        CacheOptions(cache.folder, 2**30).check_cache_size({"a": 2**30, "b": 2**29})


def test_required_cache_bytes_are_of_the_largest_shards(local):
    sizes = sorted(shard.bytes for shard in local.shards)
    table = (local.folder / SAMPLES_NAME).stat().st_size
    assert local.required_cache_bytes(2) == sum(sizes[-3:]) + table
    assert local.required_cache_bytes(1000) == sum(sizes) + table


@pytest.mark.parametrize("fault", ["half", "half unsaid", "503"])
def test_bucket_that_breaks_off(http_server, served, local, expected, tmp_path, monkeypatch, fault):
    """gcsfs has retries of its own, removes what it has written when it gives up, and adds up the bytes of all."""
    bucket = tmp_path / "root" / "download" / "storage" / "v1" / "b" / "bucket" / "o"
    bucket.parent.mkdir(parents=True)
    bucket.symlink_to(served)
    server = http_server(tmp_path / "root")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda _: asyncio.sleep(0.01)))  # 1 to 2 s
    for shard in local.shards[::3]:
        server.faults[f"{shard.name}?alt=media"] = [fault]
    manifest = open_dataset("gs://bucket", CacheOptions(tmp_path / "cache", smallest_cache(local), FAST_RETRIES))
    loader = TrainLoader(manifest, IMAGE_OPTIONS, LOADER_OPTIONS, CPU)
    assert_bit_identical([next(loader) for _ in expected], expected)
    assert not any(server.faults[name] for name in server.faults), "all were met"


def test_full_disk(http_server, served, local, expected, small_disk, await_shard_threads, monkeypatch):
    """Shards are also evicted if the disk is smaller than the cache may be. Without space for a window, an error."""
    cache, url = CacheOptions(small_disk / "cache", 2**30, FAST_RETRIES), http_server(served).url
    batches = list(
        itertools.islice(TrainLoader(open_dataset(url, cache), IMAGE_OPTIONS, LOADER_OPTIONS, CPU), len(local) // 24)
    )
    assert_bit_identical(batches, expected[: len(batches)])
    await_shard_threads()  # what they have open still takes room
    shutil.rmtree(cache.folder)
    (small_disk / "other").write_bytes(bytes(480_000))
    loader = TrainLoader(open_dataset(url, cache), IMAGE_OPTIONS, LOADER_OPTIONS, CPU)
    fault = r"no room for .*: its disk has .* left and .* are needed; free some space, or let data.cache, --cache name"
    with monkeypatch.context() as patch:
        patch.setattr(
            "dataio.remote.cache_folder.Deadline", lambda _: Deadline(0)
        )  # for room; all else may take its time
        with pytest.raises(RuntimeError, match=fault):
            next(loader)
    (small_disk / "other").unlink()
    assert_bit_identical([next(loader)], expected[:1])


def test_closed_loader_closes_its_shards(http_server, served, expected, tmp_path, await_shard_threads):
    """Its next batch can be read nevertheless. The other tests drop their loaders without closing them."""
    loader = TrainLoader(
        open_dataset(http_server(served).url, CacheOptions(tmp_path / "cache", 2**30, FAST_RETRIES)),
        IMAGE_OPTIONS,
        LOADER_OPTIONS,
        CPU,
    )
    batches = [next(loader)]
    assert any(thread.name.startswith("shards-") for thread in threading.enumerate())
    loader.close()
    await_shard_threads()
    batches.append(next(loader))
    assert_bit_identical(batches, expected[:2])


def test_closing_ends_waiting_threads(http_server, served, local, tmp_path, monkeypatch, prefetch_and_read):
    """They wait for a silent server, for the next attempt, and for space."""
    monkeypatch.setattr("dataio.remote.fetch._MAX_BACKOFF_SECONDS", FOREVER)
    server = http_server(served)
    retry_policy = replace(NO_TIMEOUTS, file_timeout_seconds=2 * FOREVER)  # else no attempt would follow
    manifest = open_dataset(server.url, CacheOptions(tmp_path / "cache", 250_000, retry_policy))
    server.faults = {shard.name: [fault] for shard, fault in zip(local.shards[1:3], ("silent", "503"), strict=True)}
    shards = RemoteShards(manifest)
    prefetch_and_read(shards, manifest, [0])
    shards.prefetch([0, 1, 2, 3, 4, 5])
    while not {"shard-000001.tar", "shard-000002.tar"} <= set(server.requests):
        time.sleep(0.01)
    shards.close()
    with pytest.raises(RuntimeError, match="the cache was closed"):
        shards.read(0)


def test_batch_timeout(http_server, served, local, tmp_path):
    """Each shard is within its own timeout, but there are too many."""
    server = http_server(served)
    server.faults = {shard.name: ["silent"] * 9 for shard in local.shards}
    retry_policy = replace(NO_TIMEOUTS, batch_timeout_seconds=0.2, timeout_hint=", or raise engine.timeout_minutes")
    shards = RemoteShards(open_dataset(server.url, CacheOptions(tmp_path / "cache", 2**30, retry_policy)))
    shards.prefetch([0, 1, 2])
    fault = f"^waited 0.2 s for shards of a batch, at last for {server.url}/shard-000000.tar; check server and network"
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=rf"{fault}, or read from fewer shards \(.*\), or raise engine.timeout_minutes$"
        ):
            shards.read(0)
    shards.close()


def test_batch_timeout_counts_waiting_only(http_server, served, local, tmp_path, monkeypatch, prefetch_and_read):
    """A substitute may be read long after its batch began."""
    manifest = open_dataset(http_server(served).url, CacheOptions(tmp_path / "cache", 2**30, NO_TIMEOUTS))
    shards = RemoteShards(manifest)
    prefetch_and_read(shards, manifest, [0])
    later = time.monotonic() + 2 * FOREVER
    monkeypatch.setattr("dataio.remote.prefetch.time", SimpleNamespace(monotonic=lambda: later))
    shards.read(sum(local.shard_samples[:3]))
    shards.close()


def test_process_ends_while_shards_are_fetched(http_server, served, tmp_path):
    """Threads that wait for a silent server do not keep it alive."""
    server = http_server(served)
    server.faults = {f"shard-{shard:06d}.tar": ["silent"] * 9 for shard in range(20)}
    command = [sys.executable, "-c", LEAVING, server.url, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            while "shard-000000.tar" not in server.requests:
                assert process.poll() is None
                time.sleep(0.01)
            process.stdin.close()
            assert process.wait() == 0
        finally:
            process.kill()


LEAVING = """
import sys
from pathlib import Path
from dataio.remote.prefetch import RemoteShards
from dataio.shards import open_dataset
from dataio.remote.options import CacheOptions, RetryPolicy

retry_policy = RetryPolicy(read_timeout_seconds=3600, file_timeout_seconds=3600)
shards = RemoteShards(open_dataset(sys.argv[1], CacheOptions(Path(sys.argv[2]), 2**30, retry_policy)))
shards.prefetch(range(10))
sys.stdin.read()
"""

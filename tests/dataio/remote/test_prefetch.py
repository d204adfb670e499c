"""Training and evaluation from servers through a cache that is too small for all: the same bits as from local disk."""

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
SMALL = ImageOptions(image_size=32, threads=1)
WINDOW = 3
PLAN = LoaderOptions(seed=7, global_batch_size=24, shuffle_window_shards=WINDOW)
FOREVER = 7200  # seconds, longer than a test may take
PATIENT = RetryPolicy(
    max_attempts=3,
    initial_backoff_seconds=FOREVER,
    read_timeout_seconds=FOREVER,
    eviction_timeout_seconds=FOREVER,
    file_timeout_seconds=FOREVER,
    batch_timeout_seconds=FOREVER,
)
HASTY = replace(PATIENT, initial_backoff_seconds=0.01)
# Where a server is silent. A slow machine may be taken for one that is, and is asked again.
NERVOUS = replace(HASTY, max_attempts=1000, read_timeout_seconds=0.5)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.fixture(scope="module")
def expected(local) -> list[Batch]:
    """Two epochs from local disk."""
    return list(itertools.islice(TrainLoader(local, SMALL, PLAN, CPU), 2 * len(local) // 24))


def tight(local: Manifest) -> int:
    """Bytes: just what a step needs, with the next window."""
    return PLAN.required_cache_bytes(local)


@pytest.fixture
def cache(local, tmp_path) -> CacheOptions:
    return CacheOptions(tmp_path / "cache", tight(local), HASTY)


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert np.array_equal(one.samples, other.samples)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("kind", ["http", "s3", "gs", "file"])
def test_training_from_afar_is_training_from_disk(
    http_server, s3_url, gs_url, far, cache, local, expected, kind, cached
):
    servers = {"http": lambda far: http_server(far).url, "s3": s3_url, "gs": gs_url, "file": Path.as_uri}
    url = servers[kind](far)
    manifest = open_dataset(f"{url}/", cache)
    assert (manifest.hash, manifest.location) == (local.hash, url)
    assert list(cached(cache)) == [SAMPLES_NAME]
    loader, got = TrainLoader(manifest, SMALL, PLAN, CPU), []
    for _ in expected:
        got.append(next(loader))
        assert sum(cached(cache).values()) <= cache.limit_bytes
    assert_same(got, expected)
    assert cache.limit_bytes < sum(shard.bytes for shard in local.shards) / 2


def test_a_url_with_a_token(http_server, far, cache, expected):
    """It goes with every request, and into no text."""
    server = http_server(far)
    manifest = open_dataset(f"{server.url}/?token=hush", cache)
    assert manifest.location == f"{server.url}/?…"
    assert_same([next(TrainLoader(manifest, SMALL, PLAN, CPU))], expected[:1])
    assert all(name.endswith("?token=hush") for name in server.requests)
    (far / MANIFEST_NAME).write_text("{")
    with pytest.raises(ValueError, match=r"/manifest.json\?… is not a manifest"):
        open_dataset(f"{server.url}/?token=hush", cache)


def test_each_shard_is_fetched_once_an_epoch_for_all_ranks(http_server, far, cache, expected, local):
    """Four ranks share the folder."""
    server = http_server(far)
    plans = [
        LoaderOptions(seed=7, global_batch_size=24, rank=rank, world_size=4, shuffle_window_shards=WINDOW)
        for rank in range(4)
    ]
    of_ranks = [TrainLoader(open_dataset(server.url, cache), SMALL, plan, CPU) for plan in plans]
    steps = len(local) // 24
    got = [next(loader) for _ in range(steps) for loader in of_ranks]
    samples = np.concatenate([batch.samples for batch in expected[:steps]])
    images = torch.cat([batch.images for batch in expected[:steps]])
    assert np.array_equal(np.concatenate([batch.samples for batch in got]), samples)
    assert torch.equal(torch.cat([batch.images for batch in got]), images)
    of_one_epoch = [server.requests.count(shard.name) for shard in local.shards]
    assert min(of_one_epoch) == 1
    assert sum(of_one_epoch) <= len(local.shards) + 2 * WINDOW  # of the next epoch, fetched ahead
    assert server.requests.count(SAMPLES_NAME) == 1


def test_a_cache_that_holds_all_is_filled_once(http_server, far, local, expected, tmp_path):
    server = http_server(far)
    cache = CacheOptions(tmp_path / "cache", 2**30, HASTY)
    got = list(itertools.islice(TrainLoader(open_dataset(server.url, cache), SMALL, PLAN, CPU), len(expected)))
    assert_same(got, expected)
    assert [server.requests.count(shard.name) for shard in local.shards] == [1] * len(local.shards)


def test_a_full_order_of_remote_shards(http_server, far, local, tmp_path):
    manifest = open_dataset(http_server(far).url, CacheOptions(tmp_path / "cache", 2**30, HASTY))
    plan = LoaderOptions(seed=7, global_batch_size=24)
    got, near = (list(itertools.islice(TrainLoader(each, SMALL, plan, CPU), 5)) for each in (manifest, local))
    assert_same(got, near)


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_from_afar(http_server, far, local, tmp_path, ranks, cached):
    cache = CacheOptions(tmp_path / "cache", EvalLoader.required_cache_bytes(local, 16, ranks), HASTY)
    manifest = open_dataset(http_server(far).url, cache)
    for rank in range(ranks):
        near, got = (EvalLoader(each, SMALL, 16, rank, ranks, CPU) for each in (local, manifest))
        for _ in range(2):
            assert_same(list(got), list(near))
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
retry_policy = RetryPolicy(eviction_timeout_seconds=3600, file_timeout_seconds=3600, batch_timeout_seconds=3600, read_timeout_seconds=3600)
manifest = open_dataset(url, CacheOptions(Path(folder), int(limit), retry_policy))
plan = LoaderOptions(seed=7, global_batch_size=24, rank=int(rank), world_size=int(ranks), shuffle_window_shards=3)
loader = TrainLoader(manifest, ImageOptions(image_size=32, threads=1), plan, torch.device("cpu"))
for _ in range(int(steps)):
    batch = next(loader)
    print(batch.position, hashlib.sha256(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_processes_share_a_cache(http_server, far, cache, local, expected, cached):
    """Three, none of which waits for another: the fastest may be several windows ahead."""
    server = http_server(far)
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
    got = dict(line.split() for line in lines)
    assert len(got) == 3 * steps
    for batch in expected:
        for rank in range(3):
            part = slice(8 * rank, 8 * rank + 8)
            digest = sha256(batch.images[part].numpy().tobytes() + batch.labels[part].numpy().tobytes())
            assert got[str(batch.position + 8 * rank)] == digest
    assert sum(cached(cache).values()) <= wide
    assert not [name for name in cached(cache) if name.endswith((".claim", ".partial"))]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("fault", ["503", "reset", "half", "wrong", "silent"])
def test_a_server_that_fails_now_and_then(http_server, far, cache, local, expected, fault):
    server = http_server(far)
    manifest = open_dataset(server.url, replace(cache, retry_policy=NERVOUS) if fault == "silent" else cache)
    server.faults = {shard.name: [fault] for shard in local.shards[:: 6 if fault == "silent" else 2]}
    got = list(itertools.islice(TrainLoader(manifest, SMALL, PLAN, CPU), len(local) // 24))
    assert_same(got, expected[: len(got)])
    assert not any(server.faults.values())


def test_a_server_that_dies_and_comes_back(http_server, free_port, far, cache, expected):
    """What is cached is still trained on; then an error; then the same batch again."""
    server = http_server(far, free_port)
    loader = TrainLoader(open_dataset(server.url, cache), SMALL, PLAN, CPU)
    got = [next(loader)]
    server.stop()
    with pytest.raises(RuntimeError, match=r"cannot fetch http://127.*/shard-.*\.tar: Cannot connect .* attempts: 3"):
        got.extend(loader)  # which has no end
    with pytest.raises(RuntimeError, match="cannot fetch"):
        next(loader)
    http_server(far, free_port)
    got += itertools.islice(loader, len(expected) - len(got))
    assert_same(got, expected)


def test_a_shard_that_is_not_what_the_manifest_names(http_server, far, cache, local, cached):
    path = far / local.shards[5].name
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    loader = TrainLoader(open_dataset(http_server(far).url, cache), SMALL, PLAN, CPU)
    with pytest.raises(
        RuntimeError, match="shard-000005.tar: .* bytes came, with another sha256 than the manifest's, att"
    ):
        list(itertools.islice(loader, len(local) // 24))
    assert path.name not in cached(cache)


def test_a_shard_that_is_missing(http_server, far, cache, local):
    (far / local.shards[5].name).unlink()
    loader = TrainLoader(open_dataset(http_server(far).url, cache), SMALL, PLAN, CPU)
    with pytest.raises(RuntimeError, match="shard-000005.tar: it is not there; check the address, and that the whole"):
        list(itertools.islice(loader, len(local) // 24))


def test_a_broken_image_of_a_remote_shard_is_replaced(http_server, far, cache, local, overwrite):
    """Packed with it: the shard's hash is right. The last one of a shard, whose stand-in is the first one."""
    last = local.shard_samples[0] - 1
    overwrite(load_manifest(far), last, b"no image" * 8)
    fields = json.loads((far / MANIFEST_NAME).read_text())
    fields["shards"][0]["sha256"] = sha256((far / "shard-000000.tar").read_bytes())
    (far / MANIFEST_NAME).write_text(json.dumps(fields | {"sha256": ""}))
    manifest = open_dataset(http_server(far).url, cache)
    plan = LoaderOptions(seed=7, global_batch_size=24, shuffle_window_shards=WINDOW, max_bad_samples=1)
    got, near = (
        list(itertools.islice(TrainLoader(each, SMALL, plan, CPU), 17)) for each in (manifest, load_manifest(far))
    )
    assert_same(got, near)
    met = [broken for batch in got for broken in batch.substituted]
    assert {(broken.sample, broken.substitute, broken.reason) for broken in met} == {(last, 0, "not an image")}


@pytest.mark.parametrize("content", ["{", "", '{"format": 1}'])
def test_a_manifest_that_is_none(http_server, far, cache, content):
    (far / MANIFEST_NAME).write_text(content)
    url = http_server(far).url
    with pytest.raises(ValueError, match=f"^{url}/manifest.json is not a manifest .*; pack the folder again"):
        open_dataset(url, cache)


def test_a_sample_table_that_is_not_what_the_manifest_names(http_server, far, cache, cached):
    rows = np.load(far / SAMPLES_NAME)
    rows["label"][3] = (rows["label"][3] + 1) % 10
    np.save(far / SAMPLES_NAME, rows)
    with pytest.raises(
        RuntimeError, match="samples.npy: .* bytes came, with another sha256 than the manifest's, attempt"
    ):
        open_dataset(http_server(far).url, cache)
    assert cached(cache) == {}


def test_a_cache_that_is_too_small_is_refused_at_once(http_server, far, cache, local):
    server = http_server(far)
    small = CacheOptions(cache.folder, cache.limit_bytes - 1, HASTY)
    manifest = open_dataset(server.url, small)
    message = (
        rf"a cache of .* GiB is too small, {server.url} needs .* GiB at a time; allow it 0.* \(data.cache_gib, --cache"
    )
    with pytest.raises(ValueError, match=message):
        TrainLoader(manifest, SMALL, PLAN, CPU)
    few = open_dataset(server.url, CacheOptions(cache.folder, EvalLoader.required_cache_bytes(local, 16) - 1, HASTY))
    with pytest.raises(ValueError, match="is too small"):
        EvalLoader(few, SMALL, 16, 0, 8, CPU)
    assert not [name for name in server.requests if name.endswith(".tar")]
    with pytest.raises(
        ValueError, match="a cache of 1 GiB is too small, a needs 1 GiB, b needs 0.5 GiB at a time; allow it 1.5 "
    ):
        CacheOptions(cache.folder, 2**30).check_cache_size({"a": 2**30, "b": 2**29})


def test_room_is_counted_with_the_largest_shards(local):
    sizes = sorted(shard.bytes for shard in local.shards)
    table = (local.folder / SAMPLES_NAME).stat().st_size
    assert local.required_cache_bytes(2) == sum(sizes[-3:]) + table
    assert local.required_cache_bytes(1000) == sum(sizes) + table


@pytest.mark.parametrize("fault", ["half", "half unsaid", "503"])
def test_a_bucket_that_breaks_off(http_server, far, local, expected, tmp_path, monkeypatch, fault):
    """gcsfs tries again by itself, removes what it has written when it gives up, and counts on."""
    served = tmp_path / "root" / "download" / "storage" / "v1" / "b" / "bucket" / "o"
    served.parent.mkdir(parents=True)
    served.symlink_to(far)
    server = http_server(tmp_path / "root")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=lambda _: asyncio.sleep(0.01)))  # 1 to 2 s
    for shard in local.shards[::3]:
        server.faults[f"{shard.name}?alt=media"] = [fault]
    manifest = open_dataset("gs://bucket", CacheOptions(tmp_path / "cache", tight(local), HASTY))
    loader = TrainLoader(manifest, SMALL, PLAN, CPU)
    assert_same([next(loader) for _ in expected], expected)
    assert not any(server.faults[name] for name in server.faults), "all were met"


def test_a_full_disk(http_server, far, local, expected, small_disk, await_their_end, monkeypatch):
    """A cache may be larger than its disk: shards are evicted for that as well. Without room for a window, an error."""
    cache, url = CacheOptions(small_disk / "cache", 2**30, HASTY), http_server(far).url
    got = list(itertools.islice(TrainLoader(open_dataset(url, cache), SMALL, PLAN, CPU), len(local) // 24))
    assert_same(got, expected[: len(got)])
    await_their_end()  # what they have open still takes room
    shutil.rmtree(cache.folder)
    (small_disk / "other").write_bytes(bytes(480_000))
    loader = TrainLoader(open_dataset(url, cache), SMALL, PLAN, CPU)
    fault = r"no room for .*: its disk has .* left and .* are needed; free some space, or let data.cache, --cache name"
    with monkeypatch.context() as patch:
        patch.setattr("dataio.remote.cache_folder.Deadline", lambda _: Deadline(0))  # for room; all else may take its time
        with pytest.raises(RuntimeError, match=fault):
            next(loader)
    (small_disk / "other").unlink()
    assert_same([next(loader)], expected[:1])


def test_a_closed_loader_holds_no_shard(http_server, far, expected, tmp_path, await_their_end):
    """It can still be asked for the next batch; all others of these tests are dropped without being closed."""
    loader = TrainLoader(
        open_dataset(http_server(far).url, CacheOptions(tmp_path / "cache", 2**30, HASTY)), SMALL, PLAN, CPU
    )
    got = [next(loader)]
    assert any(thread.name.startswith("shards-") for thread in threading.enumerate())
    loader.close()
    await_their_end()
    got.append(next(loader))
    assert_same(got, expected[:2])


def test_closing_ends_the_threads_that_wait(http_server, far, local, tmp_path, monkeypatch, hold_and_read):
    """For a server that is silent, between two attempts, and for room."""
    monkeypatch.setattr("dataio.remote.fetch._MAX_BACKOFF_SECONDS", FOREVER)
    server = http_server(far)
    retry_policy = replace(PATIENT, file_timeout_seconds=2 * FOREVER)  # else no attempt would follow
    manifest = open_dataset(server.url, CacheOptions(tmp_path / "cache", 250_000, retry_policy))
    server.faults = {shard.name: [fault] for shard, fault in zip(local.shards[1:3], ("silent", "503"), strict=True)}
    shards = RemoteShards(manifest)
    hold_and_read(shards, manifest, [0])
    shards.prefetch([0, 1, 2, 3, 4, 5])
    while not {"shard-000001.tar", "shard-000002.tar"} <= set(server.requests):
        time.sleep(0.01)
    shards.close()
    with pytest.raises(RuntimeError, match="the cache was closed"):
        shards.read(0)


def test_a_batch_waits_for_its_shards_as_long_as_it_may(http_server, far, local, tmp_path):
    """Each of them comes in time; there are too many."""
    server = http_server(far)
    server.faults = {shard.name: ["silent"] * 9 for shard in local.shards}
    retry_policy = replace(PATIENT, batch_timeout_seconds=0.2, timeout_hint=", or wait for Godot")
    shards = RemoteShards(open_dataset(server.url, CacheOptions(tmp_path / "cache", 2**30, retry_policy)))
    shards.prefetch([0, 1, 2])
    fault = f"^waited 0.2 s for shards of a batch, at last for {server.url}/shard-000000.tar; check server and network"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{fault}, or read from fewer shards \(.*\), or wait for Godot$"):
            shards.read(0)
    shards.close()


def test_a_batch_does_not_wait_while_others_are_trained_on(
    http_server, far, local, tmp_path, monkeypatch, hold_and_read
):
    """A stand-in may be asked for long after its batch was."""
    manifest = open_dataset(http_server(far).url, CacheOptions(tmp_path / "cache", 2**30, PATIENT))
    shards = RemoteShards(manifest)
    hold_and_read(shards, manifest, [0])
    later = time.monotonic() + 2 * FOREVER
    monkeypatch.setattr("dataio.remote.prefetch.time", SimpleNamespace(monotonic=lambda: later))
    shards.read(sum(local.shard_samples[:3]))
    shards.close()


def test_a_process_ends_while_shards_are_fetched(http_server, far, tmp_path):
    """No thread keeps it: the server is silent, and it has lots of retry_policy."""
    server = http_server(far)
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

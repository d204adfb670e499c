"""Bad samples: substitutes and the budget, whatever the number of ranks; and failures that are no image's fault."""

import dataclasses
import itertools
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.augment.params import ImageOptions
from dataio.augment.resize import Resizer
from dataio.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from dataio.manifest import Manifest, load_manifest
from dataio.pack.packer import pack
from dataio.sampler import samples_at

CPU = torch.device("cpu")
SMALL = ImageOptions(image_size=32, threads=2)  # with the default augmentation: RandAugment


def loaders(manifest: Manifest, ranks: int, options: ImageOptions = SMALL, **more) -> list[TrainLoader]:
    """One loader for each rank."""
    loader_options = LoaderOptions(seed=7, global_batch_size=24, world_size=ranks, **more)
    return [
        TrainLoader(manifest, options, dataclasses.replace(loader_options, rank=rank), CPU) for rank in range(ranks)
    ]


def next_steps(of_ranks: list[TrainLoader], steps: int) -> list[Batch]:
    """The batches of all ranks in these steps, in the order of positions."""
    return [next(loader) for _ in range(steps) for loader in of_ranks]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert np.array_equal(*(np.concatenate([batch.samples for batch in part]) for part in (got, expected)))
    for field in ("images", "labels"):
        assert torch.equal(*(torch.cat([getattr(batch, field) for batch in part]) for part in (got, expected)))


@pytest.fixture
def damaged(many_shards, tmp_path) -> Manifest:
    """Copy of `many_shards`, to damage after its manifest was read."""
    return load_manifest(shutil.copytree(many_shards, tmp_path / "damaged"))


def with_rows_replaced(manifest: Manifest, substitutes: dict[int, int]) -> Manifest:
    """The data set with some rows of its table replaced by others: what is decoded if those substitute for these."""
    samples = np.array(manifest.samples)
    for sample, other in substitutes.items():
        samples[sample] = manifest.samples[other]
    return dataclasses.replace(manifest, samples=samples)


def without_samples(batches: list[Batch]) -> list[Batch]:
    return [batch._replace(samples=np.zeros(0)) for batch in batches]


def samples_of_shard(manifest: Manifest, shard: int) -> range:
    first = sum(manifest.shard_samples[:shard])
    return range(first, first + manifest.shard_samples[shard])


@pytest.mark.parametrize(("ranks", "shuffle_window_shards"), [(1, None), (2, None), (3, 3), (8, 3)])
def test_next_sample_of_the_shard_substitutes_for_a_bad_one(damaged, overwrite, truncate, ranks, shuffle_window_shards):
    """Three in one batch of the first step, one whose next one is bad too, and the last one of a shard.

    Whatever the number of ranks, all other pixels are unchanged, and a substitute is transformed by the draws of its
    position, as the bad sample would have been.
    """
    ends = [samples_of_shard(damaged, shard)[-1] for shard in range(len(damaged.shards))]
    (first,) = next_steps(loaders(damaged, 1, shuffle_window_shards=shuffle_window_shards), 1)
    in_one_batch = [int(sample) for sample in first.samples if {sample, sample + 1}.isdisjoint(ends)][:3]
    pair = next(
        sample for sample in range(ends[-2] + 1, ends[-1]) if not {sample - 1, sample, sample + 1} & {*in_one_batch}
    )
    last = ends[4]
    substitutes = {sample: sample + 1 for sample in in_one_batch if sample + 1 not in in_one_batch}
    substitutes |= {sample: sample + 2 for sample in in_one_batch if sample + 1 in in_one_batch}
    substitutes |= {pair: pair + 2, pair + 1: pair + 2, last: ends[3] + 1}
    expected = next_steps(
        loaders(with_rows_replaced(damaged, substitutes), 1, shuffle_window_shards=shuffle_window_shards), 40
    )
    truncate(damaged, in_one_batch[0])
    overwrite(damaged, in_one_batch[1], b"no image" * 8)
    overwrite(damaged, in_one_batch[2], b"9", -512)  # only its name in the shard
    truncate(damaged, pair)
    truncate(damaged, pair + 1)
    truncate(damaged, last)
    got = next_steps(loaders(damaged, ranks, shuffle_window_shards=shuffle_window_shards, max_bad_samples=6), 40)
    assert_same(without_samples(got), without_samples(expected))
    rows = damaged.samples["label"]
    assert all(batch.labels.tolist() == rows[batch.samples].tolist() for batch in got)
    got_substitutes = [(bad.sample, bad.substitute) for batch in got for bad in batch.substituted]
    epochs = 40 * 24 / len(damaged)
    assert set(got_substitutes) == set(substitutes.items())
    assert all(int(epochs) <= got_substitutes.count(each) <= int(epochs) + 1 for each in got_substitutes)
    reasons = {bad.sample: bad.reason for batch in got for bad in batch.substituted}
    assert (reasons[in_one_batch[1]], reasons[in_one_batch[2]]) == ("not an image", "its shard has no label behind it")


@pytest.mark.slow
def test_which_crops_of_a_truncated_image_are_bad_does_not_depend_on_the_batch(shards, tmp_path, truncate):
    """The upper part of a JPEG can still be decoded: such crops stay, though others in their batch are substituted."""
    manifest = load_manifest(shutil.copytree(shards, tmp_path / "damaged"))
    for sample in range(0, len(manifest), 4):
        truncate(manifest, sample)
    options = SMALL.replace(crop_scale=(0.01, 0.05))
    alone = next_steps(loaders(manifest, 1, options=options, max_bad_samples=1000), 6)
    got_substitutes = {
        (batch.position + bad.batch_index, bad.substitute) for batch in alone for bad in batch.substituted
    }
    seen = np.concatenate([batch.samples for batch in alone])
    assert any(seen % 4 == 0)
    assert len(got_substitutes) > 5
    for ranks in (2, 8):
        split = next_steps(loaders(manifest, ranks, options=options, max_bad_samples=1000), 6)
        assert_same(split, alone)
        assert got_substitutes == {
            (batch.position + bad.batch_index, bad.substitute) for batch in split for bad in batch.substituted
        }


def test_more_bad_samples_than_are_allowed(damaged, overwrite):
    order = samples_at(7, np.arange(2 * len(damaged)), len(damaged))
    bad_samples = sorted(int(sample) for sample in order[:100:20])  # 5 in the first epoch
    for sample in bad_samples:
        overwrite(damaged, sample, b"no image" * 8)
    (loader,) = loaders(damaged, 1, max_bad_samples=5)
    counts = []
    while loader.state()["samples_seen"] < 2 * len(damaged):
        batch = next(loader)
        counts.append((batch.position // len(damaged), loader.bad_samples))  # a batch is a step here
    assert [max(count for epoch, count in counts if epoch == number) for number in (0, 1)] == [5, 5]
    assert min(count for epoch, count in counts if epoch == 1) < 5, "each epoch counts from 0"

    (loader,) = loaders(damaged, 1, max_bad_samples=3)
    named = ".*".join(f"sample {sample} .*: not an image" for sample in order[:61:20])
    for _ in range(2):  # a further next() meets it again
        with pytest.raises(
            RuntimeError, match=f"^more than 3 bad samples in epoch 0: .*{named}; check .* data.max_bad"
        ):
            next_steps([loader], 5)
        assert loader.state()["samples_seen"] == 48


def test_a_resumed_run_counts_from_0_and_has_the_same_substitutes(damaged, truncate):
    order = samples_at(7, np.arange(len(damaged)), len(damaged))
    for sample in (order[30], order[60]):
        truncate(damaged, int(sample))
    (loader,) = loaders(damaged, 1, max_bad_samples=2)
    next_steps([loader], 2)
    assert loader.bad_samples == 1
    state = loader.state()
    uninterrupted = next_steps([loader], 4)
    assert loader.bad_samples == 2
    resumed = loaders(damaged, 4, max_bad_samples=2)
    for one in resumed:
        one.restore(state)
    assert_same(next_steps(resumed, 4), uninterrupted)
    assert sum(one.bad_samples for one in resumed) == 1


def test_a_shard_without_any_decodable_image(damaged, overwrite):
    for sample in samples_of_shard(damaged, 3):
        overwrite(damaged, sample, b"no image" * 8)
    (loader,) = loaders(damaged, 1, max_bad_samples=1000)
    fault = r"cannot decode sample \d+ \(shard-000003.*: not an image, and no sample after it can stand for it; check"
    with pytest.raises(RuntimeError, match=fault):
        next_steps([loader], 20)


def test_a_bad_sample_is_met_again_by_a_further_next(damaged, overwrite):
    for sample in range(len(damaged)):
        overwrite(damaged, sample, b"no image" * 8)
    (loader,) = loaders(damaged, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot decode sample .*: not an image, .* and 19 more; check"):
            next(loader)
    assert loader.state()["samples_seen"] == 0


def test_an_image_of_another_size_than_was_packed(damaged, tmp_path):
    """It is a whole image, of which no crop may pass for one of the packed image."""
    samples = np.array(damaged.samples)
    samples["width"][:] += 60
    widened = dataclasses.replace(damaged, samples=samples)
    with pytest.raises(RuntimeError, match="it has 28×28 pixels where 88×28 were packed"):
        list(EvalLoader(widened, SMALL, 16, 0, 1, CPU))


def test_in_evaluation_a_bad_sample_is_an_error(damaged, overwrite):
    overwrite(damaged, 40, b"9", -512)
    with pytest.raises(RuntimeError, match=r"cannot decode sample 40 \(.*: its shard has no label behind it; check"):
        list(EvalLoader(damaged, SMALL, 16, 0, 1, CPU))


@pytest.mark.parametrize("max_bad_samples", [0, 10])
def test_a_shard_that_vanishes_is_an_error_and_no_bad_sample(damaged, max_bad_samples):
    path = damaged.folder / damaged.shards[2].name
    (loader,) = loaders(damaged, 1, max_bad_samples=max_bad_samples)
    next(loader)
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"cannot read sample .* \(shard-000002.*: its shard ends too early; check"):
        next_steps([loader], 20)
    path.write_bytes(content)
    next_steps([loader], 20)


@pytest.mark.parametrize("failures", [1, 30, 10**9], ids=["once", "some", "always"])
def test_a_failed_resize_is_not_taken_for_a_bad_sample(shards, monkeypatch, failures):
    """It is the host's fault, however long it lasts: memory runs out, here in the second batch."""
    calls, resize = itertools.count(), Resizer._resize

    def fail(*arguments: object) -> np.ndarray:
        if 8 <= next(calls) < 8 + failures:
            raise MemoryError("no memory for a crop")
        return resize(*arguments)

    monkeypatch.setattr(Resizer, "_resize", fail)
    loader_options = LoaderOptions(seed=0, global_batch_size=8, max_bad_samples=99)
    loader = TrainLoader(load_manifest(shards), SMALL, loader_options, CPU)
    with pytest.raises(RuntimeError, match="^cannot resize images on the CPU: MemoryError: no memory for a crop; free"):
        list(itertools.islice(loader, 5))
    assert loader.bad_samples == 0


@pytest.mark.parametrize(("size", "limit"), [((70000, 40), None), ((64, 48), 100)], ids=["wide", "beyond PIL's limit"])
def test_a_bad_image_of_any_size_is_substituted(tmp_path, truncate, monkeypatch, size, limit):
    """Even if a JPEG cannot be so large, or PIL takes it for a decompression bomb."""
    (tmp_path / "photos" / "class").mkdir(parents=True)
    for name, shape in (("broken", size), ("whole", (32, 32))):
        Image.effect_noise(shape, 50).convert("RGB").save(tmp_path / "photos" / "class" / f"{name}.png")
    manifest = pack(tmp_path / "photos", tmp_path / "packed")
    bad = int(manifest.samples["width"].argmax())
    truncate(manifest, bad)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    loader_options = LoaderOptions(seed=0, global_batch_size=2, max_bad_samples=1)
    batch = next(TrainLoader(manifest, ImageOptions(image_size=32), loader_options, CPU))
    assert [(each.sample, each.substitute) for each in batch.substituted] == [(bad, 1 - bad)]
    assert "data stream" in batch.substituted[0].reason  # broken or unrecognized, by the noise


LIMITED_MEMORY = """
import resource, sys
import torch
from dataio.manifest import load_manifest
from dataio.loader import TrainLoader, LoaderOptions
from dataio.augment.params import ImageOptions

loader_options = LoaderOptions(seed=0, global_batch_size=1, max_bad_samples=99)
options = ImageOptions(image_size=32, threads=1, prefetch_batches=1)
loader = TrainLoader(load_manifest(sys.argv[1]), options, loader_options, torch.device("cpu"))
next(loader)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[2]) * 2**20,) * 2)
try:
    for batch in loader:  # crops of 8 % or more of each image, until one takes too much memory
        assert not batch.substituted
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "suffix", "mib"),
    [
        *((6000, "jpg", 40), (6000, "png", 40)),
        *((6000, "webp", 190), (6000, "webp", 230), (6000, "jpg", 170), (12000, "jpg", 250)),
        (3000, "webp", 8),
    ],
)
def test_an_image_too_large_for_memory_is_not_taken_for_a_bad_sample(tmp_path, side, suffix, mib):
    """One of nine is large, and progressive if a JPEG. With 40 MiB left DALI cannot decode even a small one alone."""
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    for number in range(9):
        size = (side, side) if number == 4 else (64, 64)
        photo = Image.effect_noise((64, 64), 50).convert("RGB").resize(size)
        photo.save(folder / f"{number}.{suffix}", progressive=True, method=0)
    pack(tmp_path / "photos", tmp_path / "packed")
    command = [sys.executable, "-c", LIMITED_MEMORY, tmp_path / "packed", str(mib)]
    run = subprocess.run(command, capture_output=True, text=True)
    faults = (
        r"cannot decode sample \d \(.*\), nor a blank image of its size \(.*\)",
        "DALI failed on a batch, and on none of its images alone",
        "cannot resize images on the CPU",
    )
    assert re.match(f"({'|'.join(faults)}).*; free some memory", run.stdout), run.stdout + run.stderr

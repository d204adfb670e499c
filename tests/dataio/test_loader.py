"""Samples, pixels and labels of each rank: the same for any number of ranks and after a resume; decoded by DALI."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from dataio.augment.params import ImageOptions
from dataio.loader import Batch, EvalLoader, LoaderOptions, TrainLoader
from dataio.manifest import Manifest, check_labels, count_classes, load_manifest, map_labels
from dataio.sampler import samples_at

CPU = torch.device("cpu")
SMALL = ImageOptions(image_size=32, threads=2)  # with the default augmentation: RandAugment


@pytest.fixture(scope="module")
def manifest(shards) -> Manifest:
    """Photographs of many sizes: any other crop box or resize shows in the pixels."""
    return load_manifest(shards)


@pytest.fixture(scope="module")
def fashion_mnist(fashion_shards) -> Manifest:
    return load_manifest(fashion_shards / "train")


@pytest.fixture(scope="module")
def many(many_shards) -> Manifest:
    return load_manifest(many_shards)


def loaders(
    manifest: Manifest,
    ranks: int,
    gradient_accumulation_steps: int = 1,
    global_batch_size: int = 24,
    options=SMALL,
    **more,
) -> list[TrainLoader]:
    """One loader for each rank."""
    loader_options = LoaderOptions(
        seed=7,
        global_batch_size=global_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        world_size=ranks,
        **more,
    )
    return [
        TrainLoader(manifest, options, dataclasses.replace(loader_options, rank=rank), CPU) for rank in range(ranks)
    ]


def next_steps(of_ranks: list[TrainLoader], steps: int) -> list[Batch]:
    """The batches of all ranks in these steps, in the order of positions."""
    micro_steps = steps * of_ranks[0].loader_options.gradient_accumulation_steps
    return [next(loader) for _ in range(micro_steps) for loader in of_ranks]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert np.array_equal(*(np.concatenate([batch.samples for batch in part]) for part in (got, expected)))
    for field in ("images", "labels"):
        assert torch.equal(*(torch.cat([getattr(batch, field) for batch in part]) for part in (got, expected)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_each_epoch_has_each_sample_once(fashion_mnist, ranks):
    size = len(fashion_mnist)
    assert size % 24, "an epoch must end inside a step for this test to mean anything"
    batches = next_steps(loaders(fashion_mnist, ranks), -(-2 * size // 24))
    starts = [batch.position for batch in batches]
    assert starts == list(range(0, len(starts) * 24 // ranks, 24 // ranks))
    seen = np.concatenate([batch.samples for batch in batches])
    epochs = seen[:size], seen[size : 2 * size]
    assert all(np.array_equal(np.sort(epoch), np.arange(size)) for epoch in epochs)
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize("augmentation", ["rand-augment", "three-augment", "simple"])
def test_pixels_do_not_depend_on_ranks_or_accumulation(manifest, augmentation):
    """Over more than two epochs of photographs, on which each op shows."""
    options = SMALL.replace(augmentation=augmentation)
    alone = next_steps(loaders(manifest, 1, options=options), 5)
    for ranks, accumulation in ((2, 1), (3, 1), (4, 1), (8, 1), (1, 4), (2, 3)):
        assert_same(next_steps(loaders(manifest, ranks, accumulation, options=options), 5), alone)


def test_labels_are_those_of_the_samples(manifest):
    (batch,) = next_steps(loaders(manifest, 1), 1)
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == manifest.samples["label"][batch.samples].tolist()
    assert batch.images.shape == (24, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_has_another_crop_in_each_epoch(manifest):
    batches = next_steps(loaders(manifest, 1), 4)
    images = torch.cat([batch.images for batch in batches])
    samples = np.concatenate([batch.samples for batch in batches])
    first, second = np.flatnonzero(samples == samples[0])
    assert not torch.equal(images[first], images[second])


SWITCHES = [1, 2, 1, 3, 1, 4, 1, 8, 1, 2, 3, 2, 4, 2, 8, 2, 3, 4, 3, 8, 3, 4, 8, 4]


@pytest.mark.parametrize(
    ("shuffle_window_shards", "augmentation"),
    [pytest.param(None, "rand-augment", marks=pytest.mark.slow), (3, "simple")],
)
def test_resumes_between_1_2_3_4_and_8_ranks(many, shuffle_window_shards, augmentation):
    """Each number of ranks is followed by each other one, every two steps, over more than two epochs."""
    more = {
        "shuffle_window_shards": shuffle_window_shards,
        "options": SMALL.replace(augmentation=augmentation),
    }
    counts = set(SWITCHES)
    assert set(itertools.pairwise(SWITCHES)) == {(before, after) for before in counts for after in counts - {before}}
    steps = 2 * len(SWITCHES)
    assert len(many) % 24, "an epoch must end inside a step for this test to mean anything"
    alone = next_steps(loaders(many, 1, **more), steps)
    switched, state = [], loaders(many, 1, **more)[0].state()
    for ranks in SWITCHES:
        of_ranks = loaders(many, ranks, **more)
        for loader in of_ranks:
            loader.restore(json.loads(json.dumps(state)))
        switched += next_steps(of_ranks, 2)
        (state,) = {json.dumps(loader.state()) for loader in of_ranks}
        state = json.loads(state)
    assert_same(switched, alone)
    seen = np.concatenate([batch.samples for batch in switched])
    whole = len(seen) // len(many)
    assert whole >= 2
    for epoch in range(whole):
        part = seen[epoch * len(many) : (epoch + 1) * len(many)]
        assert np.array_equal(np.sort(part), np.arange(len(many)))


def test_a_window_is_read_before_the_next(many):
    """With three windows, each shard is read within one part of the epoch."""
    (loader,) = loaders(many, 1, shuffle_window_shards=-(-len(many.shards) // 3))
    order = np.concatenate([batch.samples for batch in next_steps([loader], len(many) // 24)])
    of_shard = [np.flatnonzero(many.samples["shard"][order] == shard) for shard in range(len(many.shards))]
    assert max(np.ptp(offsets) for offsets in of_shard) < len(many) / 2.5
    assert order.tolist() != sorted(order)


def test_the_state_is_small_and_restores_to_step_one_million(many):
    for shuffle_window_shards in (None, 16):
        (loader,) = loaders(many, 1, shuffle_window_shards=shuffle_window_shards)
        loader.restore({**loader.state(), "samples_seen": 24 * 10**6})
        batch = next(loader)
        assert batch.position == 24 * 10**6
        assert len(json.dumps(loader.state())) < 400


def test_a_run_of_one_rank_resumes_with_four_within_an_epoch(manifest):
    uninterrupted = next_steps(loaders(manifest, 1, global_batch_size=16), 7)
    (begun,) = loaders(manifest, 1, global_batch_size=16)
    next_steps([begun], 4)
    state = json.loads(json.dumps(begun.state()))
    expected = {"seed": 7, "samples_seen": 64, "manifest_hash": manifest.hash, "global_batch": 16, "order": "full"}
    assert state == expected
    assert state["samples_seen"] % len(manifest), "the run must stop within an epoch"
    resumed = loaders(manifest, 4, gradient_accumulation_steps=2, global_batch_size=16)
    for loader in resumed:
        loader.restore(state)
    assert_same(next_steps(resumed, 3), uninterrupted[4:])
    assert all(loader.state()["samples_seen"] == 7 * 16 for loader in resumed)


def test_the_state_counts_completed_steps(fashion_mnist):
    (loader,) = loaders(fashion_mnist, 1, gradient_accumulation_steps=3)
    seen = [loader.state()["samples_seen"]]
    for _ in range(7):
        next(loader)
        seen.append(loader.state()["samples_seen"])
    assert seen == [0, 0, 0, 24, 24, 24, 48, 48]


def test_restore_goes_back_and_far_ahead(manifest):
    (loader,) = loaders(manifest, 1)
    start = loader.state()
    first = next_steps([loader], 3)
    loader.restore(start)
    assert_same(next_steps([loader], 3), first)
    far = 24 * 10**9
    loader.restore({**start, "samples_seen": far})
    batch = next(loader)
    assert batch.position == far
    assert np.array_equal(batch.samples, samples_at(7, np.arange(far, far + 24), len(manifest)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"manifest_hash": "0123456789abcdef"},
            "manifest 0123456789ab, .* the folder it began with, or start a new run",
        ),
        ({"global_batch": 48}, "the run began with global batch 48, this is global batch 24; set it back to 48"),
        ({"seed": 8}, "the run began with seed 8, this is seed 7; set it back to 8, or start a new run"),
        (
            {"order": "windowed by 16 shards"},
            "the run began with order windowed by 16 shards, this is order full; set it back to windowed by 16 shards",
        ),
    ],
)
def test_the_state_of_another_run_is_refused(manifest, change, message):
    (loader,) = loaders(manifest, 1)
    with pytest.raises(ValueError, match=message):
        loader.restore({**loader.state(), "samples_seen": 48, **change})
    assert loader.state()["samples_seen"] == 0


def test_the_state_of_another_window_is_refused(many):
    (loader,) = loaders(many, 1, shuffle_window_shards=3)
    state = loader.state()
    for shuffle_window_shards, name in ((None, "full"), (4, "windowed by 4 shards")):
        with pytest.raises(ValueError, match=f"began with order windowed by 3 shards, this is order {name}; set it"):
            loaders(many, 1, shuffle_window_shards=shuffle_window_shards)[0].restore(state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"global_batch_size": 1000, "world_size": 8, "gradient_accumulation_steps": 2},
            "global batch 1000 is not divisible by 8 ranks × 2 accumulation; use 992 or 1008, or 5 or 10 ranks",
        ),
        (
            {"global_batch_size": 3, "world_size": 4},
            "global batch 3 is not divisible by 4 ranks × 1 accumulation; use 4, or 3 ranks",
        ),
        ({"global_batch_size": 0}, "global batch 0, .* must be at least 1"),
        ({"global_batch_size": 8, "seed": -1}, "seed -1 at least 0"),
        ({"global_batch_size": 8, "rank": 2, "world_size": 2}, "rank 2 is not one of 2 ranks; use 0 to 1"),
    ],
)
def test_global_batches_that_cannot_be_split_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoaderOptions(**{"seed": 0, **fields})


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_evaluation_has_every_sample_once_in_order(fashion_mnist, ranks):
    of_ranks = [EvalLoader(fashion_mnist, SMALL, 16, rank, ranks, CPU) for rank in range(ranks)]
    batches = [list(loader) for loader in of_ranks]
    assert [len(loader) for loader in of_ranks] == [len(part) for part in batches]
    seen = np.concatenate([batch.samples for batch in itertools.chain(*batches)])
    assert np.array_equal(seen, np.arange(len(fashion_mnist)))
    shares = [sum(len(batch.samples) for batch in part) for part in batches]
    assert max(shares) - min(shares) <= 1
    for batch in itertools.chain(*batches):
        assert batch.position == batch.samples[0]
        assert len(batch.images) == len(batch.labels) == len(batch.samples) <= 16
        assert batch.labels.tolist() == fashion_mnist.samples["label"][batch.samples].tolist()


def test_evaluation_can_be_repeated_and_abandoned(manifest):
    loader = EvalLoader(manifest, SMALL, 10, 0, 1, CPU)
    whole = list(loader)
    next(iter(loader))
    assert_same(list(loader), whole)


def test_a_rank_beyond_the_samples_has_no_batch(manifest):
    ranks = len(manifest) + 1
    of_ranks = [EvalLoader(manifest, SMALL, 4, rank, ranks, CPU) for rank in range(ranks)]
    (empty,) = (loader for loader in of_ranks if len(loader) == 0)
    assert list(empty) == []
    assert sum(len(loader) for loader in of_ranks) == len(manifest)


@pytest.mark.parametrize(
    ("batch_size", "rank", "message"),
    [(0, 0, "the evaluation batch is 0; use at least 1"), (4, 3, "rank 3 is not one of 2 ranks; use 0 to 1")],
)
def test_evaluation_refuses_invalid_batches_and_ranks(manifest, batch_size, rank, message):
    with pytest.raises(ValueError, match=message):
        EvalLoader(manifest, SMALL, batch_size, rank, 2, CPU)


def test_more_classes_than_the_model_has_outputs_are_refused(fashion_mnist):
    check_labels(fashion_mnist, 10)
    check_labels(fashion_mnist, 1000)
    with pytest.raises(ValueError, match="has 10 classes, the model has 7 outputs; set model.num_classes to 10"):
        check_labels(fashion_mnist, 7)


def test_labels_are_mapped_by_class_name(fashion_shards, manifest):
    """Whatever the order of the packed classes, and if one is missing; the name of a class without images is free."""
    train, val = (load_manifest(fashion_shards / part) for part in ("train", "val"))
    assert map_labels(val, train.classes, "train").tolist() == list(range(10))
    reversed_classes = dataclasses.replace(val, classes=val.classes[::-1])
    assert map_labels(reversed_classes, train.classes, "train").tolist() == list(range(9, -1, -1))
    expected = [batch.labels for batch in EvalLoader(val, SMALL, 16, 0, 1, CPU)]
    label_map = map_labels(reversed_classes, train.classes, "train")
    got = [batch.labels for batch in EvalLoader(val, SMALL, 16, 0, 1, CPU, label_map)]
    assert torch.equal(9 - torch.cat(got), torch.cat(expected))
    some = dataclasses.replace(val, samples=val.samples[val.samples["label"] != 3])
    assert (count_classes(val), count_classes(some)) == (10, 9)
    named = dataclasses.replace(some, classes=("Ankle_boot", "Bag", "Coat", "unheard of", *val.classes[4:]))
    assert map_labels(named, train.classes, "train").tolist() == [0, 1, 2, -1, *range(4, 10)]
    with pytest.raises(ValueError, match=f'class "{manifest.classes[0]}" of .* is not among the 10 classes of TRAIN, '):
        map_labels(manifest, train.classes, "TRAIN")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_on_the_gpu_are_close_to_those_on_the_cpu(manifest):
    loader_options = LoaderOptions(seed=7, global_batch_size=24)
    on_gpu = TrainLoader(manifest, SMALL, loader_options, torch.device("cuda"))
    on_cpu = TrainLoader(manifest, SMALL, loader_options, CPU)
    for _ in range(5):
        got, expected = next(on_gpu), next(on_cpu)
        assert got.images.device.type == got.labels.device.type == "cuda"
        assert np.array_equal(got.samples, expected.samples)
        assert torch.equal(got.labels.cpu(), expected.labels)
        assert (got.images.cpu() - expected.images).abs().mean() < 0.02  # about one level of 255

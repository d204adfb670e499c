"""Who gets which sample, on any number of ranks, before and after a resume; all batches are decoded by DALI."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from dataio.index import Manifest, load_manifest, samples_at
from dataio.loader import Batch, EvalLoader, TrainLoader, TrainPlan, check_labels, check_same_classes
from dataio.pipeline import ImageOptions

CPU = torch.device("cpu")
SMALL = ImageOptions(image_size=32, threads=2)


@pytest.fixture(scope="module")
def manifest(shards) -> Manifest:
    """Photographs of many sizes: a crop that is shifted or resized otherwise shows in the pixels."""
    return load_manifest(shards)


@pytest.fixture(scope="module")
def clothes(fashion_shards) -> Manifest:
    return load_manifest(fashion_shards / "train")


def loaders(manifest: Manifest, ranks: int, accumulation: int = 1, global_batch: int = 24) -> list[TrainLoader]:
    """One loader for each rank."""
    plan = TrainPlan(seed=7, global_batch=global_batch, accumulation=accumulation, ranks=ranks)
    return [TrainLoader(manifest, SMALL, dataclasses.replace(plan, rank=rank), CPU) for rank in range(ranks)]


def next_steps(of_ranks: list[TrainLoader], steps: int) -> list[Batch]:
    """What all ranks get in these steps, in the order of positions."""
    micro_steps = steps * of_ranks[0].plan.accumulation
    return [next(loader) for _ in range(micro_steps) for loader in of_ranks]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert np.array_equal(*(np.concatenate([batch.samples for batch in part]) for part in (got, expected)))
    for field in ("images", "labels"):
        assert torch.equal(*(torch.cat([getattr(batch, field) for batch in part]) for part in (got, expected)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_each_epoch_has_each_sample_once(clothes, ranks):
    size = len(clothes)
    assert size % 24, "an epoch must end inside a step for this test to mean anything"
    batches = next_steps(loaders(clothes, ranks), -(-2 * size // 24))
    starts = [batch.position for batch in batches]
    assert starts == list(range(0, len(starts) * 24 // ranks, 24 // ranks))
    seen = np.concatenate([batch.samples for batch in batches])
    epochs = seen[:size], seen[size : 2 * size]
    assert all(np.array_equal(np.sort(epoch), np.arange(size)) for epoch in epochs)
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize(("ranks", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 3)])
def test_pixels_do_not_depend_on_ranks_or_accumulation(manifest, ranks, accumulation):
    alone = next_steps(loaders(manifest, 1), 5)
    assert_same(next_steps(loaders(manifest, ranks, accumulation), 5), alone)


def test_labels_are_those_of_the_samples(manifest):
    (batch,) = next_steps(loaders(manifest, 1), 1)
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == manifest.samples["label"][batch.samples].tolist()
    assert batch.images.shape == (24, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_a_sample_is_cut_anew_in_each_epoch(manifest):
    batches = next_steps(loaders(manifest, 1), 4)
    images = torch.cat([batch.images for batch in batches])
    samples = np.concatenate([batch.samples for batch in batches])
    first, second = np.flatnonzero(samples == samples[0])
    assert not torch.equal(images[first], images[second])


def test_a_run_of_one_rank_goes_on_with_four_within_an_epoch(manifest):
    uninterrupted = next_steps(loaders(manifest, 1, global_batch=16), 7)
    (begun,) = loaders(manifest, 1, global_batch=16)
    next_steps([begun], 4)
    state = json.loads(json.dumps(begun.state()))
    assert state == {"seed": 7, "samples_seen": 64, "manifest_hash": manifest.hash, "global_batch": 16}
    assert state["samples_seen"] % len(manifest), "the run must stop within an epoch"
    resumed = loaders(manifest, 4, accumulation=2, global_batch=16)
    for loader in resumed:
        loader.restore(state)
    assert_same(next_steps(resumed, 3), uninterrupted[4:])
    assert all(loader.state()["samples_seen"] == 7 * 16 for loader in resumed)


def test_the_state_counts_whole_steps(clothes):
    (loader,) = loaders(clothes, 1, accumulation=3)
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
    ],
)
def test_the_state_of_another_run_is_refused(manifest, change, message):
    (loader,) = loaders(manifest, 1)
    with pytest.raises(ValueError, match=message):
        loader.restore({**loader.state(), "samples_seen": 48, **change})
    assert loader.state()["samples_seen"] == 0


def test_a_broken_image_is_met_again_by_a_further_next(manifest):
    samples = np.array(manifest.samples)
    samples["bytes"] = 10
    (loader,) = loaders(dataclasses.replace(manifest, samples=samples), 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot decode sample .*: Truncated File Read, .* and 19 more; check"):
            next(loader)
    assert loader.state()["samples_seen"] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"global_batch": 1000, "ranks": 8, "accumulation": 2},
            "global batch 1000 is not divisible by 8 ranks × 2 accumulation; use 992 or 1008",
        ),
        ({"global_batch": 3, "ranks": 4}, "global batch 3 is not divisible by 4 ranks × 1 accumulation; use 4"),
        ({"global_batch": 0}, "global batch 0, .* must be at least 1"),
        ({"global_batch": 8, "seed": -1}, "seed -1 at least 0"),
        ({"global_batch": 8, "rank": 2, "ranks": 2}, "rank 2 is not one of 2 ranks; use 0 to 1"),
    ],
)
def test_plans_that_cannot_be_dealt_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainPlan(**{"seed": 0, **fields})


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_evaluation_has_every_sample_once_in_order(clothes, ranks):
    of_ranks = [EvalLoader(clothes, SMALL, 16, rank, ranks, CPU) for rank in range(ranks)]
    batches = [list(loader) for loader in of_ranks]
    assert [len(loader) for loader in of_ranks] == [len(part) for part in batches]
    seen = np.concatenate([batch.samples for batch in itertools.chain(*batches)])
    assert np.array_equal(seen, np.arange(len(clothes)))
    shares = [sum(len(batch.samples) for batch in part) for part in batches]
    assert max(shares) - min(shares) <= 1
    for batch in itertools.chain(*batches):
        assert batch.position == batch.samples[0]
        assert len(batch.images) == len(batch.labels) == len(batch.samples) <= 16
        assert batch.labels.tolist() == clothes.samples["label"][batch.samples].tolist()


def test_evaluation_can_be_repeated_and_left_half_way(manifest):
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
    ("batch", "rank", "message"),
    [(0, 0, "the evaluation batch is 0; use at least 1"), (4, 3, "rank 3 is not one of 2 ranks; use 0 to 1")],
)
def test_evaluation_refuses_what_it_cannot_deal(manifest, batch, rank, message):
    with pytest.raises(ValueError, match=message):
        EvalLoader(manifest, SMALL, batch, rank, 2, CPU)


def test_labels_beyond_the_model_are_refused(clothes):
    check_labels(clothes, 10)
    check_labels(clothes, 1000)
    with pytest.raises(ValueError, match="has 10 classes and label 9, .* 7 outputs; set num_classes to 10"):
        check_labels(clothes, 7)


def test_other_classes_in_validation_are_refused(fashion_shards, manifest):
    train, val = (load_manifest(fashion_shards / part) for part in ("train", "val"))
    check_same_classes(train, val)
    with pytest.raises(ValueError, match=f'class 0 is "{train.classes[0]}" in .* and "{manifest.classes[0]}" in'):
        check_same_classes(train, manifest)
    shorter = dataclasses.replace(val, classes=val.classes[:9])
    with pytest.raises(ValueError, match=f'class 9 is "{train.classes[9]}" in .* and missing in .*; pack both'):
        check_same_classes(train, shorter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_are_on_the_gpu_and_nearly_those_of_the_cpu(manifest):
    plan = TrainPlan(seed=7, global_batch=24)
    on_gpu = TrainLoader(manifest, SMALL, plan, torch.device("cuda"))
    on_cpu = TrainLoader(manifest, SMALL, plan, CPU)
    for _ in range(5):
        got, expected = next(on_gpu), next(on_cpu)
        assert got.images.device.type == got.labels.device.type == "cuda"
        assert np.array_equal(got.samples, expected.samples)
        assert torch.equal(got.labels.cpu(), expected.labels)
        assert (got.images.cpu() - expected.images).abs().mean() < 0.02  # about one level of 255

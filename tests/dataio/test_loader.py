"""Who gets which sample, on any number of ranks, before and after a resume; all batches are decoded by DALI."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from dataio.augment.params import ImageOptions
from dataio.loader import Batch, EvalLoader, LoaderOptions, TrainLoader, check_labels, count_classes, map_labels
from dataio.manifest import Manifest, load_manifest
from dataio.sampler import samples_at

CPU = torch.device("cpu")
SMALL = ImageOptions(image_size=32, threads=2)  # with the default recipe: RandAugment


@pytest.fixture(scope="module")
def manifest(shards) -> Manifest:
    """Photographs of many sizes: a crop that is shifted or resized otherwise shows in the pixels."""
    return load_manifest(shards)


@pytest.fixture(scope="module")
def clothes(fashion_shards) -> Manifest:
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
    plan = LoaderOptions(
        seed=7,
        global_batch_size=global_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        world_size=ranks,
        **more,
    )
    return [TrainLoader(manifest, options, dataclasses.replace(plan, rank=rank), CPU) for rank in range(ranks)]


def next_steps(of_ranks: list[TrainLoader], steps: int) -> list[Batch]:
    """What all ranks get in these steps, in the order of positions."""
    micro_steps = steps * of_ranks[0].loader_options.gradient_accumulation_steps
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


@pytest.mark.parametrize("augmentation", ["rand-augment", "three-augment", "simple"])
def test_pixels_do_not_depend_on_ranks_or_accumulation(manifest, augmentation):
    """Through two epochs and a part; photographs, on which each operation shows."""
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


def test_a_sample_is_cut_anew_in_each_epoch(manifest):
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
def test_any_switch_between_1_2_3_4_and_8_ranks(many, shuffle_window_shards, augmentation):
    """Each number of ranks is followed by each other one, every two steps, through three epochs and a part."""
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
    """Of the shards of three windows, each is read in one stretch of the epoch."""
    (loader,) = loaders(many, 1, shuffle_window_shards=-(-len(many.shards) // 3))
    order = np.concatenate([batch.samples for batch in next_steps([loader], len(many) // 24)])
    of_shard = [np.flatnonzero(many.samples["shard"][order] == shard) for shard in range(len(many.shards))]
    assert max(np.ptp(places) for places in of_shard) < len(many) / 2.5
    assert order.tolist() != sorted(order)


def test_the_state_is_small_and_step_a_million_no_further_than_the_first(many):
    for shuffle_window_shards in (None, 16):
        (loader,) = loaders(many, 1, shuffle_window_shards=shuffle_window_shards)
        loader.restore({**loader.state(), "samples_seen": 24 * 10**6})
        batch = next(loader)
        assert batch.position == 24 * 10**6
        assert len(json.dumps(loader.state())) < 400


def test_a_run_of_one_rank_goes_on_with_four_within_an_epoch(manifest):
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


def test_the_state_counts_whole_steps(clothes):
    (loader,) = loaders(clothes, 1, gradient_accumulation_steps=3)
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


def test_another_window_is_refused(many):
    (loader,) = loaders(many, 1, shuffle_window_shards=3)
    state = loader.state()
    for shuffle_window_shards, name in ((None, "full"), (4, "windowed by 4 shards")):
        with pytest.raises(ValueError, match=f"began with order windowed by 3 shards, this is order {name}; set it"):
            loaders(many, 1, shuffle_window_shards=shuffle_window_shards)[0].restore(state)


def test_a_state_from_before_there_were_windows(many):
    (loader,) = loaders(many, 1)
    state = {name: value for name, value in loader.state().items() if name != "order"}
    loader.restore({**state, "samples_seen": 48})
    assert loader.state()["samples_seen"] == 48
    with pytest.raises(ValueError, match="the run began with order full, this is order windowed by 3 shards"):
        loaders(many, 1, shuffle_window_shards=3)[0].restore(state)


@pytest.fixture
def damaged(many_shards, tmp_path) -> Manifest:
    """A copy of `many_shards` to be damaged after its manifest was read."""
    return load_manifest(shutil.copytree(many_shards, tmp_path / "damaged"))


def as_if(manifest: Manifest, stand_ins: dict[int, int]) -> Manifest:
    """A data set in whose table some rows are others': what is decoded if those stand for these."""
    samples = np.array(manifest.samples)
    for sample, other in stand_ins.items():
        samples[sample] = manifest.samples[other]
    return dataclasses.replace(manifest, samples=samples)


def without_samples(batches: list[Batch]) -> list[Batch]:
    return [batch._replace(samples=np.zeros(0)) for batch in batches]


def shard_range(manifest: Manifest, shard: int) -> range:
    first = sum(manifest.shard_samples[:shard])
    return range(first, first + manifest.shard_samples[shard])


@pytest.mark.parametrize(("ranks", "shuffle_window_shards"), [(1, None), (2, None), (3, 3), (8, 3)])
def test_a_broken_image_is_replaced_by_the_next_of_its_shard(
    damaged, overwrite, truncate, ranks, shuffle_window_shards
):
    """Three in one batch of the first step, one whose next one is broken too, and the last one of a shard.

    Whatever the number of ranks, all other pixels stay as they were, and the stand-in is looked at as the broken one
    would have been.
    """
    ends = [shard_range(damaged, shard)[-1] for shard in range(len(damaged.shards))]
    (first,) = next_steps(loaders(damaged, 1, shuffle_window_shards=shuffle_window_shards), 1)
    together = [int(sample) for sample in first.samples if {sample, sample + 1}.isdisjoint(ends)][:3]
    pair = next(
        sample for sample in range(ends[-2] + 1, ends[-1]) if not {sample - 1, sample, sample + 1} & {*together}
    )
    last = ends[4]
    stand_ins = {sample: sample + 1 for sample in together if sample + 1 not in together}
    stand_ins |= {sample: sample + 2 for sample in together if sample + 1 in together}
    stand_ins |= {pair: pair + 2, pair + 1: pair + 2, last: ends[3] + 1}
    expected = next_steps(loaders(as_if(damaged, stand_ins), 1, shuffle_window_shards=shuffle_window_shards), 40)
    truncate(damaged, together[0])
    overwrite(damaged, together[1], b"no image" * 8)
    overwrite(damaged, together[2], b"9", -512)  # no more than its name in the shard
    truncate(damaged, pair)
    truncate(damaged, pair + 1)
    truncate(damaged, last)
    got = next_steps(loaders(damaged, ranks, shuffle_window_shards=shuffle_window_shards, max_bad_samples=6), 40)
    assert_same(without_samples(got), without_samples(expected))
    rows = damaged.samples["label"]
    assert all(batch.labels.tolist() == rows[batch.samples].tolist() for batch in got)
    met = [(broken.sample, broken.substitute) for batch in got for broken in batch.substituted]
    epochs = 40 * 24 / len(damaged)
    assert set(met) == set(stand_ins.items())
    assert all(int(epochs) <= met.count(each) <= int(epochs) + 1 for each in met)
    reasons = {broken.sample: broken.reason for batch in got for broken in batch.substituted}
    assert (reasons[together[1]], reasons[together[2]]) == ("not an image", "its shard has no label behind it")


@pytest.mark.slow
def test_which_views_of_a_truncated_image_are_broken_does_not_depend_on_the_batch(shards, tmp_path, truncate):
    """Of a JPEG, the upper part can still be decoded: such crops stay, though others in their batch are substituted."""
    manifest = load_manifest(shutil.copytree(shards, tmp_path / "damaged"))
    for sample in range(0, len(manifest), 4):
        truncate(manifest, sample)
    options = SMALL.replace(crop_scale=(0.01, 0.05))
    alone = next_steps(loaders(manifest, 1, options=options, max_bad_samples=1000), 6)
    met = {(batch.position + broken.batch_index, broken.substitute) for batch in alone for broken in batch.substituted}
    seen = np.concatenate([batch.samples for batch in alone])
    assert any(seen % 4 == 0)
    assert len(met) > 5
    for ranks in (2, 8):
        together = next_steps(loaders(manifest, ranks, options=options, max_bad_samples=1000), 6)
        assert_same(together, alone)
        assert met == {
            (batch.position + broken.batch_index, broken.substitute)
            for batch in together
            for broken in batch.substituted
        }


def test_more_broken_images_than_are_allowed(damaged, overwrite):
    order = samples_at(7, np.arange(2 * len(damaged)), len(damaged))
    broken = sorted(int(sample) for sample in order[:100:20])  # 5 in the first epoch
    for sample in broken:
        overwrite(damaged, sample, b"no image" * 8)
    (loader,) = loaders(damaged, 1, max_bad_samples=5)
    counts = []
    while loader.state()["samples_seen"] < 2 * len(damaged):
        batch = next(loader)
        counts.append((batch.position // len(damaged), loader.bad_samples))  # a batch is a step here
    assert [max(count for epoch, count in counts if epoch == number) for number in (0, 1)] == [5, 5]
    assert min(count for epoch, count in counts if epoch == 1) < 5, "each epoch begins anew"

    (loader,) = loaders(damaged, 1, max_bad_samples=3)
    named = ".*".join(f"sample {sample} .*: not an image" for sample in order[:61:20])
    for _ in range(2):  # met again by a further next()
        with pytest.raises(
            RuntimeError, match=f"^more than 3 broken images in epoch 0: .*{named}; check .* data.max_bad"
        ):
            next_steps([loader], 5)
        assert loader.state()["samples_seen"] == 48


def test_a_resumed_run_counts_anew_and_replaces_alike(damaged, truncate):
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


def test_a_shard_without_any_whole_image(damaged, overwrite):
    for sample in shard_range(damaged, 3):
        overwrite(damaged, sample, b"no image" * 8)
    (loader,) = loaders(damaged, 1, max_bad_samples=1000)
    fault = r"cannot decode sample \d+ \(shard-000003.*: not an image, and no sample after it can stand for it; check"
    with pytest.raises(RuntimeError, match=fault):
        next_steps([loader], 20)


def test_a_broken_image_is_met_again_by_a_further_next(damaged, overwrite):
    for sample in range(len(damaged)):
        overwrite(damaged, sample, b"no image" * 8)
    (loader,) = loaders(damaged, 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot decode sample .*: not an image, .* and 19 more; check"):
            next(loader)
    assert loader.state()["samples_seen"] == 0


def test_an_image_of_another_size_than_was_packed(damaged, tmp_path):
    """Its bytes are an image, and no smaller crop of it passes for the right one where the decoder can tell."""
    samples = np.array(damaged.samples)
    samples["width"][:] += 60
    grown = dataclasses.replace(damaged, samples=samples)
    with pytest.raises(RuntimeError, match="it has 28×28 pixels where 88×28 were packed"):
        list(EvalLoader(grown, SMALL, 16, 0, 1, CPU))


def test_in_an_evaluation_a_broken_image_is_an_error(damaged, overwrite):
    overwrite(damaged, 40, b"9", -512)
    with pytest.raises(RuntimeError, match=r"cannot decode sample 40 \(.*: its shard has no label behind it; check"):
        list(EvalLoader(damaged, SMALL, 16, 0, 1, CPU))


@pytest.mark.parametrize("max_bad_samples", [0, 10])
def test_a_shard_that_vanishes_is_an_error_and_no_broken_image(damaged, max_bad_samples):
    path = damaged.folder / damaged.shards[2].name
    (loader,) = loaders(damaged, 1, max_bad_samples=max_bad_samples)
    next(loader)
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"cannot read sample .* \(shard-000002.*: its shard ends too early; check"):
        next_steps([loader], 20)
    path.write_bytes(content)
    next_steps([loader], 20)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"global_batch_size": 1000, "world_size": 8, "gradient_accumulation_steps": 2},
            "global batch 1000 is not divisible by 8 ranks × 2 accumulation; use 992 or 1008",
        ),
        (
            {"global_batch_size": 3, "world_size": 4},
            "global batch 3 is not divisible by 4 ranks × 1 accumulation; use 4",
        ),
        ({"global_batch_size": 0}, "global batch 0, .* must be at least 1"),
        ({"global_batch_size": 8, "seed": -1}, "seed -1 at least 0"),
        ({"global_batch_size": 8, "rank": 2, "world_size": 2}, "rank 2 is not one of 2 ranks; use 0 to 1"),
    ],
)
def test_plans_that_cannot_be_dealt_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoaderOptions(**{"seed": 0, **fields})


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
    with pytest.raises(ValueError, match="has 10 classes, the model has 7 outputs; set model.num_classes to 10"):
        check_labels(clothes, 7)


def test_labels_follow_names(fashion_shards, manifest):
    """Whatever order the classes were packed in, and where one is missing; without images, a name means nothing."""
    train, val = (load_manifest(fashion_shards / part) for part in ("train", "val"))
    assert map_labels(val, train.classes, "train").tolist() == list(range(10))
    turned = dataclasses.replace(val, classes=val.classes[::-1])
    assert map_labels(turned, train.classes, "train").tolist() == list(range(9, -1, -1))
    expected = [batch.labels for batch in EvalLoader(val, SMALL, 16, 0, 1, CPU)]
    label_map = map_labels(turned, train.classes, "train")
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
def test_batches_are_on_the_gpu_and_nearly_those_of_the_cpu(manifest):
    plan = LoaderOptions(seed=7, global_batch_size=24)
    on_gpu = TrainLoader(manifest, SMALL, plan, torch.device("cuda"))
    on_cpu = TrainLoader(manifest, SMALL, plan, CPU)
    for _ in range(5):
        got, expected = next(on_gpu), next(on_cpu)
        assert got.images.device.type == got.labels.device.type == "cuda"
        assert np.array_equal(got.samples, expected.samples)
        assert torch.equal(got.labels.cpu(), expected.labels)
        assert (got.images.cpu() - expected.images).abs().mean() < 0.02  # about one level of 255

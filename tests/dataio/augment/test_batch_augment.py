"""Batch augmentation is bit-identical whatever ran before, and its targets match what is in the images."""

import random

import numpy as np
import pytest
import torch

from dataio.augment.batch_augment import BatchAugment, BatchAugmentOptions
from dataio.augment.params import ImageOptions
from dataio.loader import Batch, LoaderOptions, TrainLoader
from dataio.manifest import load_manifest

CLASSES = 10
GPU = pytest.param(
    "cuda",
    id="cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ],
)
OFF = BatchAugmentOptions(reprob=0, mixup=0, cutmix=0)
ONLY_MIX = BatchAugmentOptions(reprob=0, mixup_group_size=16)
POSITIONS = range(0, 40 * 16, 16)


@pytest.fixture(scope="module")
def photographs(shards) -> Batch:
    options, loader_options = ImageOptions(image_size=32, threads=2), LoaderOptions(seed=0, global_batch_size=16)
    return next(TrainLoader(load_manifest(shards), options, loader_options, torch.device("cpu")))


def at(batch: Batch, position: int, device: str = "cpu") -> Batch:
    """A copy of the batch, at another position."""
    images = batch.images.to(device, copy=True)
    return batch._replace(images=images, labels=batch.labels.to(device), position=position)


def augment(options: BatchAugmentOptions, seed: int = 3, device: str = "cpu", batch_size: int = 16) -> BatchAugment:
    return BatchAugment(options, CLASSES, seed, batch_size, torch.device(device))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_augmentation_is_bit_identical_whatever_ran_before(photographs, device):
    first = augment(BatchAugmentOptions(), device=device)
    expected = [first(at(photographs, position, device)) for position in POSITIONS]
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    second = augment(BatchAugmentOptions(), device=device)
    for position, (images, targets) in reversed(list(zip(POSITIONS, expected, strict=True))):
        got_images, got_targets = second(at(photographs, position, device))
        assert torch.equal(got_images, images)
        assert torch.equal(got_targets, targets)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_global_generators_continue_as_if_nothing_had_been_drawn(photographs, device):
    def drawn() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, device=device).item()]

    def seed() -> None:
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    seed()
    expected = drawn()
    seed()
    augment(BatchAugmentOptions(), device=device)(at(photographs, 0, device))
    assert drawn() == expected


def test_the_global_generators_are_restored_after_an_error(photographs):
    state = np.random.get_state()[1].tolist()
    odd = Batch(photographs.images[:5].clone(), photographs.labels[:5], photographs.samples[:5], 0)
    with pytest.raises(AssertionError, match="even"):  # timm's own
        augment(BatchAugmentOptions())(odd)
    assert np.random.get_state()[1].tolist() == state


def test_other_positions_and_seeds_have_other_draws(photographs):
    images = [
        augment(BatchAugmentOptions(), seed)(at(photographs, position))[0]
        for seed, position in ((3, 0), (3, 16), (4, 0))
    ]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def partners(rows: torch.Tensor) -> torch.Tensor:
    """The rows with the two of each pair exchanged: 1, 0, 3, 2, …"""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def lambda_of(targets: torch.Tensor, labels: torch.Tensor, smoothing: float) -> float:
    """The weight of each image itself, from the targets of a pair with different labels."""
    pair = int((labels != partners(labels)).nonzero()[0])
    return float((targets[pair, labels[pair]] - smoothing / CLASSES) / (1 - smoothing))


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_mixup_and_cutmix_both_occur_and_targets_have_their_lambda(photographs, device):
    plain, labels = photographs.images.to(device), photographs.labels.to(device)
    partner = partners(plain)
    cut = 0
    for position in POSITIONS:
        images, targets = augment(ONLY_MIX, device=device)(at(photographs, position, device))
        assert targets.dtype == torch.float32
        assert targets.shape == (16, CLASSES)
        assert torch.allclose(targets.sum(dim=1), torch.ones(16, device=device))
        weight = lambda_of(targets, labels, 0.1)
        if ((images == plain) | (images == partner)).all():
            cut += 1
            own = (images == plain).all(dim=(0, 1)).float().mean().item()
            assert own == pytest.approx(weight, abs=1e-4)
        else:
            assert torch.allclose(images, weight * plain + (1 - weight) * partner, atol=1e-4)
    assert 10 <= cut <= 30, "cutmix and mixup are equally likely"


def test_without_mixing_the_targets_are_smoothed_and_the_images_untouched(photographs):
    odd = Batch(photographs.images[:5], photographs.labels[:5], photographs.samples[:5], 0)
    images, targets = augment(OFF, batch_size=5)(odd)
    assert torch.equal(images, photographs.images[:5])
    expected = torch.nn.functional.one_hot(odd.labels, CLASSES) * 0.9 + 0.01
    assert torch.allclose(targets, expected)
    assert targets.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "cuts"),
    [
        ({"mixup": 0}, True),
        ({"cutmix": 0}, False),
        ({"mixup_switch_prob": 1}, True),
        ({"mixup_switch_prob": 0}, False),
    ],
)
def test_mixup_and_cutmix_can_be_used_alone(photographs, options, cuts):
    partner = partners(photographs.images)
    for position in POSITIONS[:10]:
        images, _ = augment(ONLY_MIX.replace(**options))(at(photographs, position))
        assert ((images == photographs.images) | (images == partner)).all().item() == cuts


def test_smoothing_and_the_fraction_of_mixed_batches_are_as_configured(photographs):
    options = ONLY_MIX.replace(mixup_prob=0.3, label_smoothing=0.4)
    untouched = torch.nn.functional.one_hot(photographs.labels, CLASSES) * 0.6 + 0.04
    mixed = 0
    for position in POSITIONS:
        images, targets = augment(options)(at(photographs, position))
        assert targets.min() == pytest.approx(0.04)
        mixed += not torch.equal(images, photographs.images)
        assert torch.allclose(targets, untouched) == torch.equal(images, photographs.images)
    assert 5 <= mixed <= 20, "12 of 40 are expected"


def test_an_odd_batch_cannot_be_mixed():
    with pytest.raises(ValueError, match="batch of 7 images per rank .* in pairs; use 8, or set mixup and cutmix to 0"):
        augment(BatchAugmentOptions(), batch_size=7)


@pytest.mark.parametrize("group", [-2, 0, 1, 15])
def test_a_mixup_group_has_an_even_size(group):
    with pytest.raises(ValueError, match="images are mixed in pairs, use an even number|greater than or equal to 1"):
        BatchAugmentOptions(mixup_group_size=group)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_images_and_targets_are_bit_identical_on_any_number_of_ranks(photographs, device, ranks):
    """In steps of 48 images. No batch of a rank is a group of 10; some begin or end within one, some hold several."""
    images, labels = (torch.cat([field] * 3).to(device) for field in (photographs.images, photographs.labels))
    options, size = BatchAugmentOptions(mixup_group_size=10), 48 // ranks
    for first in range(0, 20 * 48, 48):
        got = [
            augment(options, device=device, batch_size=size)(
                Batch(images[start : start + size].clone(), labels[start : start + size], None, first + start)
            )
            for start in range(0, 48, size)
        ]
        of_pairs = [
            augment(options, device=device, batch_size=2)(
                Batch(images[start : start + 2].clone(), labels[start : start + 2], None, first + start)
            )
            for start in range(0, 48, 2)
        ]
        for of_ranks, expected in zip(zip(*got, strict=True), zip(*of_pairs, strict=True), strict=True):
            assert torch.equal(torch.cat(of_ranks), torch.cat(expected))


def test_a_group_shares_its_draws_and_others_have_their_own(photographs):
    """Groups of 8 images, two in a batch. Only mixup: its lambdas all differ, while boxes of cutmix may be equal."""
    mixup, lambdas = augment(ONLY_MIX.replace(cutmix=0, mixup_group_size=8)), []
    for position in POSITIONS:
        _, targets = mixup(at(photographs, position))
        for group in (slice(0, 8), slice(8, 16)):
            pairs = photographs.labels[group] != partners(photographs.labels[group])
            own = targets[group].gather(1, photographs.labels[group, None])[pairs]
            assert len(own) > 0
            assert (own == own[0]).all()
            lambdas.append(own[0].item())
    assert len(set(lambdas)) == len(lambdas)


def test_random_erasing_fills_a_rectangle_of_a_quarter_of_the_images_with_noise(photographs):
    options = BatchAugmentOptions(mixup=0, cutmix=0)
    areas = []
    for position in POSITIONS:
        images, _ = augment(options)(at(photographs, position))
        assert images.is_contiguous(memory_format=torch.channels_last)
        for changed in (images != photographs.images).all(dim=1):
            rows, columns = changed.any(dim=1), changed.any(dim=0)
            assert torch.equal(changed, rows[:, None] & columns)
            areas.append(changed.float().mean().item())
    areas = np.array(areas)
    assert (areas > 0).mean() == pytest.approx(0.25, abs=0.05)
    assert areas[areas > 0].min() > 0.01
    assert areas.max() < 0.4

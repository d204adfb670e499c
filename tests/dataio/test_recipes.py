"""What is chosen, how often and how strongly, against timm's and torchvision's own draws; matrices by hand."""

import numpy as np
import pytest
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import ColorJitter

from dataio.augment.recipes import (
    AFFINE,
    COLOR_JITTER,
    DRAWS,
    RAND_AUGMENT,
    THREE_AUGMENT,
    Kind,
    Operations,
    RandAugment,
    color_jitter,
    have_matrices,
    matrices,
    no_operations,
    rand_augment,
    three_augment,
)
from dataio.sampler import draws_at
from launch.benchmark.parity import RECIPE, TIMM_NAMES, amounts_of, chi_square, largest_gap, our_draws, timm_draws

COUNT = 10_000
NEVER = 4.0  # standard deviations: exceeded by chance less than once in 10,000 times


def assert_alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Two samples of whole numbers from one distribution."""
    statistic, freedom = chi_square(ours, theirs)
    assert statistic < freedom + NEVER * (2 * max(freedom, 1)) ** 0.5


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Exceeded by chance once in 1000 times."""
    assert largest_gap(ours, theirs) < 1.95 * (1 / len(ours) + 1 / len(theirs)) ** 0.5


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment()),
        ("rand-m5-n3-p0.8-mstd2-inc1", RandAugment(magnitude=5, spread=2, layers=3, probability=0.8)),
        ("rand-m10-n1-p1-inc1", RandAugment(magnitude=10, spread=0, layers=1, probability=1)),
    ],
)
def test_operations_are_drawn_as_timm_draws_them(recipe, settings):
    ours, theirs = our_draws(settings, COUNT), timm_draws(recipe, COUNT)
    assert_alike(*(np.array([len(done) for done in part]) for part in (ours, theirs)))
    for place in range(settings.layers):
        assert_alike(*(np.array([done[place][0] for done in part if len(done) > place]) for part in (ours, theirs)))
    pairs = [[16 * done[0][0] + done[1][0] for done in part if len(done) > 1] for part in (ours, theirs)]
    if settings.layers > 1:
        assert_alike(*map(np.array, pairs))
    for kind in RAND_AUGMENT:
        amounts = amounts_of(ours, kind), amounts_of(theirs, kind)
        assert len(amounts[0]) > COUNT / 20
        assert_same_distribution(*amounts)


def test_all_of_timm_s_operations_are_there():
    names = [operation.name for operation in rand_augment_transform(RECIPE).ops]
    assert sorted(names) == sorted(TIMM_NAMES[kind] for kind in RAND_AUGMENT)


def test_a_draw_at_either_end_has_a_finite_amount():
    for draw in (0.0, 1 - 2**-53):
        kinds, amounts = rand_augment(np.full((3, 2 * DRAWS), draw), RandAugment(probability=1))
        assert np.isfinite(amounts).all()
        assert set(kinds.ravel()) == {RAND_AUGMENT[0] if draw == 0 else RAND_AUGMENT[-1]}


def test_probabilities_of_0_and_1():
    draws = draws_at(0, 0, 1000, 2 * DRAWS)
    assert (rand_augment(draws, RandAugment(probability=1)).kinds != Kind.NONE).all()
    never = rand_augment(draws, RandAugment(probability=0))
    assert all(np.array_equal(*pair) for pair in zip(never, no_operations(1000, 2), strict=True))


def test_an_image_s_operations_do_not_depend_on_the_others():
    draws = draws_at(7, 40, 30, 2 * DRAWS)
    together = rand_augment(draws, RandAugment())
    alone = [rand_augment(draws_at(7, position, 1, 2 * DRAWS), RandAugment()) for position in range(40, 70)]
    for field, of_each in zip(together, zip(*alone, strict=True), strict=True):
        assert np.array_equal(field, np.concatenate(of_each))


def test_color_jitter_is_drawn_as_torchvision_draws_it():
    kinds, amounts = color_jitter(draws_at(0, 0, COUNT, 3 * DRAWS), 0.3)
    jitter = ColorJitter(0.3, 0.3, 0.3)
    drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(COUNT)]
    orders = np.array([[number for number in order.tolist() if number < 3] for order, *_ in drawn])
    assert_alike(kinds @ [1, 20, 400], np.array(COLOR_JITTER)[orders] @ [1, 20, 400])
    for kind, theirs in zip(COLOR_JITTER, np.array([factors[:3] for _, *factors in drawn]).T, strict=True):
        assert_same_distribution(amounts[kinds == kind], theirs.astype(np.float32))


def test_color_jitter_stronger_than_1_stays_above_0():
    amounts = color_jitter(draws_at(0, 0, COUNT, 3 * DRAWS), 1.5).amounts
    assert 0 <= amounts.min() < 0.01
    assert 2.49 < amounts.max() <= 2.5


def test_three_augment_is_deit_s():
    kinds, amounts = three_augment(draws_at(0, 0, COUNT, DRAWS))
    counts = [int((kinds == kind).sum()) for kind in THREE_AUGMENT]
    assert sum(counts) == COUNT
    assert max(abs(count - COUNT / 3) for count in counts) < NEVER * (COUNT * 2 / 9) ** 0.5
    assert set(amounts[kinds == Kind.GREY]) == {0}
    assert set(amounts[kinds == Kind.SOLARIZE]) == {128}
    blurs = amounts[kinds == Kind.BLUR]
    assert_same_distribution(blurs, np.linspace(0.1, 2, 1_000_000))
    assert 0.1 <= blurs.min() < blurs.max() <= 2


def test_what_is_no_matrix_has_the_identity():
    kinds = np.array([[kind for kind in Kind if kind not in (*AFFINE, Kind.SHARPNESS)]], dtype=np.int32)
    got = matrices(Operations(kinds, np.full(kinds.shape, 3, np.float32)), 64, np.array([True]))
    assert np.array_equal(got, np.broadcast_to(np.eye(3), got.shape))


@pytest.mark.parametrize("kind", AFFINE)
def test_operations_of_mirrored_images_are_mirrored(kind):
    """Where a point goes in the mirrored image is where its mirror image goes."""
    operations = Operations(np.full((1, 1), kind, np.int32), np.full((1, 1), 0.37, np.float32))
    plain, mirrored = (matrices(operations, 64, np.array([flip]))[0, 0] for flip in (False, True))
    there = plain @ [10, 20, 1]
    assert mirrored @ [64 - 10, 20, 1] == pytest.approx([64 - there[0], there[1], 1], abs=1e-4)
    assert not np.allclose(plain, mirrored) or kind == Kind.TRANSLATE_Y


def test_sharpening_leaves_uniform_images():
    operations = Operations(np.full((1, 2), Kind.SHARPNESS, np.int32), np.array([[0.1, 1.9]], np.float32))
    assert matrices(operations, 64, np.array([False])).sum(axis=(2, 3)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("recipe", [RAND_AUGMENT, THREE_AUGMENT, COLOR_JITTER])
def test_what_has_no_matrix_needs_none(recipe):
    kinds = np.array([recipe], dtype=np.int32)
    operations = Operations(kinds, np.full(kinds.shape, 0.3, np.float32))
    found = matrices(operations, 64, np.array([True]))
    assert (found != np.eye(3)).any() == have_matrices(recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"magnitude": 11}, "rand_augment.magnitude is 11; use a number from 0 to 10"),
        ({"magnitude": -1}, "rand_augment.magnitude is -1; use a number from 0 to 10"),
        ({"spread": -0.5}, "rand_augment.spread is -0.5; use a finite number of at least 0"),
        ({"spread": float("inf")}, "rand_augment.spread is inf; use a finite number of at least 0"),
        ({"layers": 0}, "rand_augment.layers is 0; use at least 1, or the recipe simple"),
        ({"probability": 1.5}, "rand_augment.probability is 1.5; use a number from 0 to 1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RandAugment(**settings)

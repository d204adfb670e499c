"""Sampled ops and arguments against timm's and torchvision's own draws; op matrices against their definition."""

import numpy as np
import pytest
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import ColorJitter

from dataio.augment.policies import (
    AFFINE,
    COLOR_JITTER_OPS,
    DRAWS_PER_OP,
    RAND_AUGMENT_OPS,
    THREE_AUGMENT_OPS,
    Op,
    RandAugment,
    SampledOps,
    need_matrices,
    no_ops,
    op_matrices,
    sample_color_jitter,
    sample_rand_augment,
    sample_three_augment,
)
from dataio.options import parse_options
from dataio.sampler import draws_at
from launch.benchmark.parity import RECIPE, TIMM_NAMES, chi_square, ks_statistic, op_args_of, our_draws, timm_draws

COUNT = 10_000
MAX_DEVIATIONS = 4.0  # standard deviations: exceeded by chance less than once in 10,000 times


def assert_same_counts(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Chi-square test of two samples of integers."""
    statistic, freedom = chi_square(ours, theirs)
    assert statistic < freedom + MAX_DEVIATIONS * (2 * max(freedom, 1)) ** 0.5


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Kolmogorov-Smirnov test, whose limit is exceeded by chance once in 1000 times."""
    assert ks_statistic(ours, theirs) < 1.95 * (1 / len(ours) + 1 / len(theirs)) ** 0.5


@pytest.mark.parametrize(
    ("config_str", "settings"),
    [
        ("rand-m9-mstd0.5-inc1", RandAugment()),
        ("rand-m5-n3-p0.8-mstd2-inc1", RandAugment(magnitude=5, magnitude_std=2, num_layers=3, prob=0.8)),
        ("rand-m10-n1-p1-inc1", RandAugment(magnitude=10, magnitude_std=0, num_layers=1, prob=1)),
    ],
)
def test_rand_augment_is_distributed_as_timm_s(config_str, settings):
    ours, theirs = our_draws(settings, COUNT), timm_draws(config_str, COUNT)
    assert_same_counts(*(np.array([len(applied) for applied in part]) for part in (ours, theirs)))
    for layer in range(settings.num_layers):
        ops = [np.array([applied[layer][0] for applied in part if len(applied) > layer]) for part in (ours, theirs)]
        assert_same_counts(*ops)
    pairs = [[16 * applied[0][0] + applied[1][0] for applied in part if len(applied) > 1] for part in (ours, theirs)]
    if settings.num_layers > 1:
        assert_same_counts(*map(np.array, pairs))
    for op in RAND_AUGMENT_OPS:
        op_args = op_args_of(ours, op), op_args_of(theirs, op)
        assert len(op_args[0]) > COUNT / 20
        assert_same_distribution(*op_args)


def test_rand_augment_has_all_of_timm_s_ops():
    names = [op.name for op in rand_augment_transform(RECIPE).ops]
    assert sorted(names) == sorted(TIMM_NAMES[op] for op in RAND_AUGMENT_OPS)


def test_a_draw_at_either_end_has_a_finite_argument():
    for draw in (0.0, 1 - 2**-53):
        ops, op_args = sample_rand_augment(np.full((3, 2 * DRAWS_PER_OP), draw), RandAugment(prob=1))
        assert np.isfinite(op_args).all()
        assert set(ops.ravel()) == {RAND_AUGMENT_OPS[0] if draw == 0 else RAND_AUGMENT_OPS[-1]}


def test_probabilities_of_0_and_1():
    draws = draws_at(0, 0, 1000, 2 * DRAWS_PER_OP)
    assert (sample_rand_augment(draws, RandAugment(prob=1)).ops != Op.NONE).all()
    never = sample_rand_augment(draws, RandAugment(prob=0))
    assert all(np.array_equal(*pair) for pair in zip(never, no_ops(1000, 2), strict=True))


def test_the_ops_of_an_image_do_not_depend_on_the_others():
    draws = draws_at(7, 40, 30, 2 * DRAWS_PER_OP)
    together = sample_rand_augment(draws, RandAugment())
    alone = [
        sample_rand_augment(draws_at(7, position, 1, 2 * DRAWS_PER_OP), RandAugment()) for position in range(40, 70)
    ]
    for field, of_each in zip(together, zip(*alone, strict=True), strict=True):
        assert np.array_equal(field, np.concatenate(of_each))


def test_color_jitter_is_distributed_as_torchvision_s():
    ops, op_args = sample_color_jitter(draws_at(0, 0, COUNT, 3 * DRAWS_PER_OP), 0.3)
    jitter = ColorJitter(0.3, 0.3, 0.3)
    drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None) for _ in range(COUNT)]
    orders = np.array([[number for number in order.tolist() if number < 3] for order, *_ in drawn])
    assert_same_counts(ops @ [1, 20, 400], np.array(COLOR_JITTER_OPS)[orders] @ [1, 20, 400])
    for op, theirs in zip(COLOR_JITTER_OPS, np.array([factors[:3] for _, *factors in drawn]).T, strict=True):
        assert_same_distribution(op_args[ops == op], theirs.astype(np.float32))


def test_color_jitter_stronger_than_1_has_no_negative_factors():
    op_args = sample_color_jitter(draws_at(0, 0, COUNT, 3 * DRAWS_PER_OP), 1.5).op_args
    assert 0 <= op_args.min() < 0.01
    assert 2.49 < op_args.max() <= 2.5


def test_three_augment_is_distributed_as_deit_iii_s():
    ops, op_args = sample_three_augment(draws_at(0, 0, COUNT, DRAWS_PER_OP))
    counts = [int((ops == op).sum()) for op in THREE_AUGMENT_OPS]
    assert sum(counts) == COUNT
    assert max(abs(count - COUNT / 3) for count in counts) < MAX_DEVIATIONS * (COUNT * 2 / 9) ** 0.5
    assert set(op_args[ops == Op.GRAYSCALE]) == {0}
    assert set(op_args[ops == Op.SOLARIZE]) == {128}
    blurs = op_args[ops == Op.GAUSSIAN_BLUR]
    assert_same_distribution(blurs, np.linspace(0.1, 2, 1_000_000))
    assert 0.1 <= blurs.min() < blurs.max() <= 2


def test_ops_without_a_matrix_have_the_identity():
    ops = np.array([[op for op in Op if op not in (*AFFINE, Op.SHARPNESS)]], dtype=np.int32)
    got = op_matrices(SampledOps(ops, np.full(ops.shape, 3, np.float32)), 64, np.array([True]))
    assert np.array_equal(got, np.broadcast_to(np.eye(3), got.shape))


@pytest.mark.parametrize("op", AFFINE)
def test_affine_ops_of_mirrored_images_are_mirrored(op):
    """The mirrored map takes the mirror image of a point to the mirror image of its target."""
    sampled = SampledOps(np.full((1, 1), op, np.int32), np.full((1, 1), 0.37, np.float32))
    plain, mirrored = (op_matrices(sampled, 64, np.array([flip]))[0, 0] for flip in (False, True))
    there = plain @ [10, 20, 1]
    assert mirrored @ [64 - 10, 20, 1] == pytest.approx([64 - there[0], there[1], 1], abs=1e-4)
    assert not np.allclose(plain, mirrored) or op == Op.TRANSLATE_Y


def test_sharpness_filters_sum_to_1():
    sampled = SampledOps(np.full((1, 2), Op.SHARPNESS, np.int32), np.array([[0.1, 1.9]], np.float32))
    assert op_matrices(sampled, 64, np.array([False])).sum(axis=(2, 3)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("policy", [RAND_AUGMENT_OPS, THREE_AUGMENT_OPS, COLOR_JITTER_OPS])
def test_policies_need_matrices_if_an_op_has_one(policy):
    ops = np.array([policy], dtype=np.int32)
    sampled = SampledOps(ops, np.full(ops.shape, 0.3, np.float32))
    found = op_matrices(sampled, 64, np.array([True]))
    assert (found != np.eye(3)).any() == need_matrices(policy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"magnitude": 11}, "magnitude is 11: input should be less than or equal to 10"),
        ({"magnitude": -1}, "magnitude is -1: input should be greater than or equal to 0"),
        ({"magnitude_std": -0.5}, "magnitude_std is -0.5: input should be greater than or equal to 0"),
        ({"magnitude_std": float("inf")}, "magnitude_std is inf: input should be a finite number"),
        ({"num_layers": 0}, "num_layers is 0: input should be greater than or equal to 1"),
        ({"prob": 1.5}, "prob is 1.5: input should be less than or equal to 1"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        parse_options(RandAugment, **settings)

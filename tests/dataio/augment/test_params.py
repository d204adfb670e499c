"""Crop boxes against torchvision's, flips, and invalid options."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from dataio.augment.params import CROP_DRAWS, ImageOptions, random_resized_crops, train_params
from dataio.manifest import load_manifest
from dataio.options import parse_options
from dataio.sampler import draws_at
from launch.benchmark.parity import ks_statistic

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (400, 120), (90, 333)])
def test_crop_boxes_are_distributed_as_torchvision_s(width, height):
    count = 4000
    draws = draws_at(0, 0, count, CROP_DRAWS)
    ours = random_resized_crops(draws, np.full(count, width), np.full(count, height), SCALE, RATIO)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(count)])[:, [1, 0, 3, 2]]
    limit = 1.95 * (2 / count) ** 0.5  # exceeded by chance once in 1000 times
    for number, name in enumerate(("left", "top", "width", "height")):
        assert ks_statistic(ours[:, number], theirs[:, number]) < limit, name
    ratios = [crop_boxes[:, 2] / crop_boxes[:, 3] for crop_boxes in (ours, theirs)]
    areas = [crop_boxes[:, 2] * crop_boxes[:, 3] for crop_boxes in (ours, theirs)]
    assert ks_statistic(*ratios) < limit
    assert ks_statistic(*areas) < limit


@pytest.mark.parametrize(("width", "height"), [(1000, 40), (41, 1000), (1001, 333)])
def test_an_image_into_which_no_try_fits_has_torchvision_s_central_crop(width, height):
    whole = (1.0, 1.0)  # no crop box of the full area fits, whatever the draws
    ours = random_resized_crops(draws_at(0, 0, 3, CROP_DRAWS), np.full(3, width), np.full(3, height), whole, RATIO)
    top, left, cut_height, cut_width = RandomResizedCrop.get_params(torch.empty(3, height, width), whole, RATIO)
    assert ours.tolist() == [[left, top, cut_width, cut_height]] * 3


@pytest.mark.parametrize(("draw", "at_the_end"), [(0.0, False), (1 - 2**-53, True)])
def test_crop_boxes_reach_all_edges_of_the_image(draw, at_the_end):
    draws = draws_at(0, 0, 100, CROP_DRAWS)
    draws[:, 20:] = draw
    left, top, width, height = random_resized_crops(draws, np.full(100, 500), np.full(100, 375), SCALE, RATIO).T
    assert np.array_equal(left, (500 - width) * at_the_end)
    assert np.array_equal(top, (375 - height) * at_the_end)


@settings(max_examples=200)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.lists(st.floats(0, 1 - 2**-53), min_size=CROP_DRAWS, max_size=CROP_DRAWS),
)
def test_crop_boxes_lie_inside_the_image(width, height, draws):
    box = random_resized_crops(np.array([draws]), np.array([width]), np.array([height]), SCALE, RATIO)[0]
    assert box.min() >= 0
    assert box[2:].min() >= 1
    assert box[0] + box[2] <= width
    assert box[1] + box[3] <= height


def test_half_of_the_images_are_flipped(shards):
    rows = np.repeat(load_manifest(shards).samples, 200)
    params = train_params(rows, draws_at(3, 0, len(rows), CROP_DRAWS), ImageOptions(augmentation="simple"))
    assert params.flips.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation is 'cubic': input should be 'bicubic' or 'bilinear'"),
        ({"crop_mode": "long"}, "crop_mode is 'long': input should be 'squash' or 'center'"),
        (
            {"augmentation": "full"},
            "augmentation is 'full': input should be 'rand-augment', 'three-augment' or 'simple'",
        ),
        (
            {"augmentation": "simple", "color_jitter": -1},
            "color_jitter is -1: input should be greater than or equal to 0",
        ),
        (
            {"color_jitter": 0.4},
            "color_jitter is 0.4, and RandAugment replaces it; set it to 0, or augmentation to simple",
        ),
        ({"crop_pct": 1.5}, "crop_pct is 1.5: input should be less than or equal to 1"),
        ({"crop_scale": (0.5, 0.1)}, r"crop_scale is \[0.5, 0.1\]; give the smaller one first"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio.0 is 0.0: input should be greater than 0"),
        ({"image_size": 0}, "image_size is 0: input should be greater than or equal to 1"),
        ({"threads": 0}, "threads is 0: input should be greater than or equal to 1"),
        ({"prefetch_batches": 0}, "prefetch_batches is 0: input should be greater than or equal to 1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_options(ImageOptions, **options)

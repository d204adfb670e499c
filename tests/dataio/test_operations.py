"""Each operation of the DALI graph against timm's own function and PIL, on photographs."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.augment.operations import change_images
from dataio.augment.recipes import AFFINE, RAND_AUGMENT, Kind, Operations
from launch.benchmark.parity import FILL, differences, our_amounts, read_photographs, timm_amounts

INTERPOLATIONS = ["bicubic", "bilinear"]
NOT_AFFINE = {  # amounts: magnitude 9's, the extremes and what changes nothing; difference in levels: mean, most
    Kind.COLOR: ((0.19, 1.81, 0.1, 1.0, 0.01), 0.002, 1),
    Kind.CONTRAST: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.001, 1),
    Kind.BRIGHTNESS: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.001, 1),
    Kind.SHARPNESS: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.4, 80),
    Kind.AUTO_CONTRAST: ((0,), 0.02, 1),
    Kind.EQUALIZE: ((0,), 0.5, 1),
    Kind.POSTERIZE: ((0, 1, 2, 3, 4), 0, 0),
    Kind.INVERT: ((0,), 0, 0),
    Kind.SOLARIZE: ((0, 26, 128, 255, 256), 0, 0),
    Kind.SOLARIZE_ADD: ((0, 99, 110), 0, 0),
    Kind.GREY: ((0,), 0.001, 1),
    Kind.BLUR: ((0.1, 0.5, 1.0, 2.0), 0.4, 40),
}


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "gpu",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
        ),
    ]
)
def device(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return read_photographs([])


def operations(*stages: tuple[list[Kind], list[float]]) -> Operations:
    """Of each stage, the kinds and the amounts."""
    kinds, amounts = zip(*stages, strict=True)
    return Operations(np.array(kinds, np.int32).T, np.array(amounts, np.float32).T)


@pytest.mark.parametrize("kind", NOT_AFFINE, ids=lambda kind: kind.name)
def test_colours_and_filters_are_pil_s(kind, photographs, device):
    amounts, mean, most = NOT_AFFINE[kind]
    found = differences(photographs, kind, amounts, amounts, "bicubic", device)
    print(f"{kind.name}: {found.mean():.3f} levels on average, at most {found.max()}")
    assert found.mean() <= mean
    assert found.max() <= most
    if kind == Kind.SHARPNESS:  # PIL leaves the outermost pixels as they are
        assert found[:, 1:-1, 1:-1].max() <= 1


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kind", AFFINE, ids=lambda kind: kind.name)
def test_pixels_are_moved_as_in_pil(kind, interpolation, photographs, device):
    """The line where the image ends is drawn softly by DALI and hard by PIL: not more than 1 % of the pixels."""
    amounts = {Kind.ROTATE: (27, -27, 5)}.get(
        kind, (0.27, -0.27, 0.41) if "SHEAR" in kind.name else (0.405, -0.405, 0.1)
    )
    found = differences(photographs, kind, amounts, amounts, interpolation, device)
    print(f"{kind.name} {interpolation}: {found.mean():.3f} levels on average, at most {found.max()}")
    assert found.mean() <= (0.9 if interpolation == "bicubic" else 0.6)
    assert np.quantile(found, 0.99) <= 8


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kind", AFFINE, ids=lambda kind: kind.name)
def test_nothing_moves_at_amount_0(kind, interpolation, photographs, device):
    assert differences(photographs, kind, (0,), (0,), interpolation, device).max() == 0


def test_a_uniform_image_stays_uniform(device):
    """Nothing to stretch and nothing to equalize; 0 and 255 are the ends of the range."""
    images = [Image.new("RGB", (32, 32), color) for color in ((0, 0, 0), (255, 255, 255), (7, 130, 255))]
    for kind in (Kind.AUTO_CONTRAST, Kind.EQUALIZE, Kind.CONTRAST, Kind.SHARPNESS, Kind.BLUR):
        found = differences(images, kind, (1.0,), (1.0,), "bicubic", device)
        assert found.max() == 0, kind


def test_stages_follow_each_other_and_images_do_not_mix(photographs, device):
    """All pairs of operations in one batch: the same bits as in smaller batches, with one stage after the other."""
    pairs = [(first, second) for first in Kind for second in Kind]
    images = np.stack([np.asarray(photographs[number % 6].resize((32, 32))) for number in range(len(pairs))])
    amounts = {Kind.POSTERIZE: 2.0, Kind.SOLARIZE: 128.0, Kind.SOLARIZE_ADD: 100.0, Kind.BLUR: 1.0}
    kinds = list(zip(*pairs, strict=True))
    both = operations(*((of_stage, [amounts.get(kind, 0.3) for kind in of_stage]) for of_stage in kinds))
    together = change_images(images, both, FILL, "bicubic", device)
    assert np.array_equal(together[0], images[0])
    assert sum(not np.array_equal(*pair) for pair in zip(together, images, strict=True)) > 280
    for first in range(0, 20, 3):
        few = images[first::20]
        for stage in range(2):
            alone = Operations(*(field[first::20, stage : stage + 1] for field in both))
            few = change_images(few, alone, FILL, "bicubic", device)
        assert np.array_equal(together[first::20], few)


@pytest.mark.parametrize("magnitude", [0, 0.5, 3, 5.5, 9, 9.7, 10])
@pytest.mark.parametrize("kind", RAND_AUGMENT, ids=lambda kind: kind.name)
def test_a_magnitude_means_what_it_means_in_timm(kind, magnitude):
    assert our_amounts(kind, magnitude) == pytest.approx(timm_amounts(kind, magnitude), abs=1e-12)

"""Each op in the DALI graph against timm's own function and PIL, on photographs."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.augment.dali_ops import apply_ops
from dataio.augment.policies import AFFINE, RAND_AUGMENT_OPS, Op, SampledOps
from launch.benchmark.parity import FILL, differences, our_level_args, read_photographs, timm_level_args

INTERPOLATIONS = ["bicubic", "bilinear"]
NOT_AFFINE = {  # arguments: magnitude 9's, extremes, and one without effect; largest differences in levels: mean, any
    Op.COLOR: ((0.19, 1.81, 0.1, 1.0, 0.01), 0.002, 1),
    Op.CONTRAST: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.001, 1),
    Op.BRIGHTNESS: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.001, 1),
    Op.SHARPNESS: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.4, 80),
    Op.AUTO_CONTRAST: ((0,), 0.02, 1),
    Op.EQUALIZE: ((0,), 0.5, 1),
    Op.POSTERIZE: ((0, 1, 2, 3, 4), 0, 0),
    Op.INVERT: ((0,), 0, 0),
    Op.SOLARIZE: ((0, 26, 128, 255, 256), 0, 0),
    Op.SOLARIZE_ADD: ((0, 99, 110), 0, 0),
    Op.GRAYSCALE: ((0,), 0.001, 1),
    Op.GAUSSIAN_BLUR: ((0.1, 0.5, 1.0, 2.0), 0.4, 40),
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


def sampled_ops(*stages: tuple[list[Op], list[float]]) -> SampledOps:
    """Ops of a batch from (ops, arguments) of each stage."""
    ops, op_args = zip(*stages, strict=True)
    return SampledOps(np.array(ops, np.int32).T, np.array(op_args, np.float32).T)


@pytest.mark.parametrize("op", NOT_AFFINE, ids=lambda op: op.name)
def test_colours_and_filters_match_pil(op, photographs, device):
    op_args, mean, largest = NOT_AFFINE[op]
    found = differences(photographs, op, op_args, op_args, "bicubic", device)
    print(f"{op.name}: {found.mean():.3f} levels on average, at most {found.max()}")
    assert found.mean() <= mean
    assert found.max() <= largest
    if op == Op.SHARPNESS:  # PIL leaves the outermost pixels as they are
        assert found[:, 1:-1, 1:-1].max() <= 1


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("op", AFFINE, ids=lambda op: op.name)
def test_affine_ops_match_pil(op, interpolation, photographs, device):
    """DALI blends the image's edge with the fill colour, and PIL does not: at most 1 % of the pixels."""
    op_args = {Op.ROTATE: (27, -27, 5)}.get(op, (0.27, -0.27, 0.41) if "SHEAR" in op.name else (0.405, -0.405, 0.1))
    found = differences(photographs, op, op_args, op_args, interpolation, device)
    print(f"{op.name} {interpolation}: {found.mean():.3f} levels on average, at most {found.max()}")
    assert found.mean() <= (0.9 if interpolation == "bicubic" else 0.6)
    assert np.quantile(found, 0.99) <= 8


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("op", AFFINE, ids=lambda op: op.name)
def test_affine_ops_with_argument_0_change_nothing(op, interpolation, photographs, device):
    assert differences(photographs, op, (0,), (0,), interpolation, device).max() == 0


def test_a_uniform_image_stays_uniform(device):
    """There is nothing to stretch or equalize, at the ends of the range 0 to 255 either."""
    images = [Image.new("RGB", (32, 32), color) for color in ((0, 0, 0), (255, 255, 255), (7, 130, 255))]
    for op in (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.CONTRAST, Op.SHARPNESS, Op.GAUSSIAN_BLUR):
        found = differences(images, op, (1.0,), (1.0,), "bicubic", device)
        assert found.max() == 0, op


def test_stages_run_in_order_and_images_are_independent(photographs, device):
    """All pairs of ops in one batch are bit-identical to smaller batches, with one stage after the other."""
    pairs = [(first, second) for first in Op for second in Op]
    images = np.stack([np.asarray(photographs[number % 6].resize((32, 32))) for number in range(len(pairs))])
    op_args = {Op.POSTERIZE: 2.0, Op.SOLARIZE: 128.0, Op.SOLARIZE_ADD: 100.0, Op.GAUSSIAN_BLUR: 1.0}
    ops = list(zip(*pairs, strict=True))
    both = sampled_ops(*((of_stage, [op_args.get(op, 0.3) for op in of_stage]) for of_stage in ops))
    together = apply_ops(images, both, FILL, "bicubic", device)
    assert np.array_equal(together[0], images[0])
    assert sum(not np.array_equal(*pair) for pair in zip(together, images, strict=True)) > 280
    for first in range(0, 20, 3):
        few = images[first::20]
        for stage in range(2):
            alone = SampledOps(*(field[first::20, stage : stage + 1] for field in both))
            few = apply_ops(few, alone, FILL, "bicubic", device)
        assert np.array_equal(together[first::20], few)


@pytest.mark.parametrize("magnitude", [0, 0.5, 3, 5.5, 9, 9.7, 10])
@pytest.mark.parametrize("op", RAND_AUGMENT_OPS, ids=lambda op: op.name)
def test_arguments_at_a_magnitude_are_timm_s(op, magnitude):
    assert our_level_args(op, magnitude) == pytest.approx(timm_level_args(op, magnitude), abs=1e-12)

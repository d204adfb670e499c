"""Each operation of the DALI graph against timm's own function and PIL, on photographs."""

from pathlib import Path

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import pytest
import skimage
import torch
from nvidia.dali import pipeline_def
from PIL import Image

from dataio.operations import Stage, apply_stage
from dataio.recipes import AFFINE, Kind, Operations, matrices

SIZE = 224
FILL = (124, 116, 104)
KINDS = tuple(kind for kind in Kind if kind != Kind.NONE)
INTERPOLATIONS = {
    "bicubic": (types.INTERP_CUBIC, Image.Resampling.BICUBIC),
    "bilinear": (types.INTERP_LINEAR, Image.Resampling.BILINEAR),
}
NOT_AFFINE = {  # amounts: magnitude 9's, the extremes and what changes nothing; difference in levels: mean, most
    Kind.COLOR: ((0.19, 1.81, 0.1, 1.0, 0.0), 0.25, 1),
    Kind.CONTRAST: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.001, 1),
    Kind.BRIGHTNESS: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.001, 1),
    Kind.SHARPNESS: ((0.19, 1.81, 0.1, 1.0, 1.9), 0.4, 80),
    Kind.AUTO_CONTRAST: ((0,), 0.02, 1),
    Kind.EQUALIZE: ((0,), 0.5, 1),
    Kind.POSTERIZE: ((0, 1, 2, 3, 4), 0, 0),
    Kind.INVERT: ((0,), 0, 0),
    Kind.SOLARIZE: ((0, 26, 128, 255, 256), 0, 0),
    Kind.SOLARIZE_ADD: ((0, 99, 110), 0, 0),
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
    """Six of 224×224: four as they are, one that lacks dark and bright levels, and one that is almost grey."""
    images = []
    for file in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        with Image.open(Path(skimage.data_dir, file)) as opened:
            images.append(opened.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    images.append(images[0].point(lambda value: 50 + value // 2))
    images.append(Image.blend(images[1].convert("L").convert("RGB"), images[1], 0.1))
    return images


def changed(images: list[np.ndarray], stages: list[Operations], interpolation: int, device: str) -> np.ndarray:
    """The images after some stages of operations, each of which may be any: (B, S, S, 3) uint8."""
    size, upright = images[0].shape[0], np.zeros(len(images), dtype=bool)
    inputs = [
        np.ascontiguousarray(values[:, 0])
        for operations in stages
        for values in (operations.kinds, operations.amounts, matrices(operations, size, upright))
    ]

    @pipeline_def(
        enable_conditionals=True,
        batch_size=len(images),
        num_threads=2,
        device_id=0 if device == "gpu" else None,
        prefetch_queue_depth=1,
    )
    def definition():
        result = fn.external_source(lambda: images, layout="HWC")
        result = result.gpu() if device == "gpu" else result
        of_stages = fn.external_source(lambda: inputs, num_outputs=len(inputs))
        for number in range(0, len(inputs), 3):
            stage = Stage(*of_stages[number : number + 3])
            result = apply_stage(result, stage, KINDS, list(FILL), interpolation)
        return result

    (output,) = definition().run()
    return np.array((output.as_cpu() if device == "gpu" else output).as_tensor())


def operations(kinds: list[Kind], amounts: list[float]) -> Operations:
    return Operations(np.array(kinds, np.int32)[:, None], np.array(amounts, np.float32)[:, None])


def differences(photographs, kind, amounts, interpolation, device, in_pil) -> np.ndarray:
    """Levels between ours and PIL's, all amounts on all photographs: (amounts × photographs, S, S, 3)."""
    ours_by, pil_s_by = INTERPOLATIONS[interpolation]
    chosen = [(image, amount) for amount in amounts for image in photographs]
    wanted = operations([kind] * len(chosen), [amount for _, amount in chosen])
    got = changed([np.asarray(image) for image, _ in chosen], [wanted], ours_by, device)
    expected = [np.asarray(in_pil(image, kind, amount, FILL, pil_s_by)) for image, amount in chosen]
    return np.abs(got.astype(int) - np.stack(expected))


@pytest.mark.parametrize("kind", NOT_AFFINE, ids=lambda kind: kind.name)
def test_colours_and_filters_are_pil_s(kind, photographs, device, in_pil):
    amounts, mean, most = NOT_AFFINE[kind]
    found = differences(photographs, kind, amounts, "bicubic", device, in_pil)
    print(f"{kind.name}: {found.mean():.3f} levels on average, at most {found.max()}")
    assert found.mean() <= mean
    assert found.max() <= most
    if kind == Kind.SHARPNESS:  # PIL leaves the outermost pixels as they are
        assert found[:, 1:-1, 1:-1].max() <= 1


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kind", AFFINE, ids=lambda kind: kind.name)
def test_pixels_are_moved_as_in_pil(kind, interpolation, photographs, device, in_pil):
    """The line where the image ends is drawn softly by DALI and hard by PIL: not more than 1 % of the pixels."""
    amounts = {Kind.ROTATE: (27, -27, 5)}.get(
        kind, (0.27, -0.27, 0.41) if "SHEAR" in kind.name else (0.405, -0.405, 0.1)
    )
    found = differences(photographs, kind, amounts, interpolation, device, in_pil)
    print(f"{kind.name} {interpolation}: {found.mean():.3f} levels on average, at most {found.max()}")
    assert found.mean() <= (0.9 if interpolation == "bicubic" else 0.6)
    assert np.quantile(found, 0.99) <= 8


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kind", AFFINE, ids=lambda kind: kind.name)
def test_nothing_moves_at_amount_0(kind, interpolation, photographs, device, in_pil):
    assert differences(photographs, kind, (0,), interpolation, device, in_pil).max() == 0


def test_a_uniform_image_stays_uniform(device, in_pil):
    """Nothing to stretch and nothing to equalize; 0 and 255 are the ends of the range."""
    images = [Image.new("RGB", (32, 32), color) for color in ((0, 0, 0), (255, 255, 255), (7, 130, 255))]
    for kind in (Kind.AUTO_CONTRAST, Kind.EQUALIZE, Kind.CONTRAST, Kind.SHARPNESS, Kind.BLUR):
        found = differences(images, kind, (1.0,), "bicubic", device, in_pil)
        assert found.max() == 0, kind


def test_stages_follow_each_other_and_images_do_not_mix(photographs, device):
    """All pairs of operations in one batch: the same bits as in smaller batches, with one stage after the other."""
    pairs = [(first, second) for first in Kind for second in Kind]
    images = [np.asarray(photographs[number % 6].resize((32, 32))) for number in range(len(pairs))]
    amounts = {Kind.POSTERIZE: 2.0, Kind.SOLARIZE: 128.0, Kind.SOLARIZE_ADD: 100.0, Kind.BLUR: 1.0}
    stages = [operations(list(kinds), [amounts.get(kind, 0.3) for kind in kinds]) for kinds in zip(*pairs, strict=True)]
    together = changed(images, stages, types.INTERP_CUBIC, device)
    assert np.array_equal(together[0], images[0])
    assert sum(not np.array_equal(*pair) for pair in zip(together, images, strict=True)) > 280
    for first in range(0, 20, 3):
        few = images[first::20]
        for stage in stages:
            few = list(changed(few, [Operations(*(field[first::20] for field in stage))], types.INTERP_CUBIC, device))
        assert np.array_equal(together[first::20], few)

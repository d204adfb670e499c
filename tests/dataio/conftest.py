"""A class folder to spoil, and the operations of the recipes as timm and PIL do them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageFilter
from timm.data.auto_augment import NAME_TO_OP

from dataio.recipes import Kind

TIMM_NAMES = {
    Kind.ROTATE: "Rotate",
    Kind.SHEAR_X: "ShearX",
    Kind.SHEAR_Y: "ShearY",
    Kind.TRANSLATE_X: "TranslateXRel",
    Kind.TRANSLATE_Y: "TranslateYRel",
    Kind.COLOR: "ColorIncreasing",
    Kind.CONTRAST: "ContrastIncreasing",
    Kind.BRIGHTNESS: "BrightnessIncreasing",
    Kind.SHARPNESS: "SharpnessIncreasing",
    Kind.AUTO_CONTRAST: "AutoContrast",
    Kind.EQUALIZE: "Equalize",
    Kind.POSTERIZE: "PosterizeIncreasing",
    Kind.INVERT: "Invert",
    Kind.SOLARIZE: "SolarizeIncreasing",
    Kind.SOLARIZE_ADD: "SolarizeAdd",
}
WHOLE = (Kind.POSTERIZE, Kind.SOLARIZE, Kind.SOLARIZE_ADD)  # have integers for amounts
WITHOUT_AMOUNT = (Kind.AUTO_CONTRAST, Kind.EQUALIZE, Kind.INVERT)


@pytest.fixture
def source(photos, tmp_path) -> Path:
    """`photos` again, as hard links: to add to, to rename and to remove, not to write into its files."""
    return shutil.copytree(photos, tmp_path / "source", copy_function=os.link)


@pytest.fixture(scope="session")
def timm_names() -> dict[str, Kind]:
    """timm's name of each operation in `rand-m9-mstd0.5-inc1`, and ours."""
    return {name: kind for kind, name in TIMM_NAMES.items()}


@pytest.fixture(scope="session")
def in_pil() -> Callable[..., Image.Image]:
    """Returns a function: the image after an operation, done by timm's function or PIL's filter."""
    return _in_pil


def _in_pil(
    image: Image.Image, kind: Kind, amount: float, fill: tuple[int, int, int], resample: Image.Resampling
) -> Image.Image:
    if kind == Kind.NONE:
        return image
    if kind == Kind.BLUR:
        return image.filter(ImageFilter.GaussianBlur(float(amount)))
    if kind == Kind.POSTERIZE and amount == 0:  # an error since Pillow 13, and black before
        return Image.new(image.mode, image.size)
    amounts = () if kind in WITHOUT_AMOUNT else (int(amount),) if kind in WHOLE else (float(amount),)
    return NAME_TO_OP[TIMM_NAMES[kind]](image, *amounts, fillcolor=fill, resample=resample)

"""Which operations change the pixels of a training image after its crop and flip, as pure functions of draws.

RandAugment as timm's `rand-m9-mstd0.5-inc1` means it, 3-Augment as DeiT III has it, and torchvision's colour jitter.
Each is a few stages, and in a stage an image has at most one operation: a kind and an amount. operations.py does
them in the DALI graph; views.py has them drawn.

Axes: B images of a batch, L stages.
"""

import itertools
from dataclasses import dataclass
from enum import IntEnum
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Kind(IntEnum):
    """What an operation does, with PIL's name for it, and what its amount is."""

    NONE = 0
    ROTATE = 1  # degrees, counter-clockwise
    SHEAR_X = 2  # pixels to the left for each row downwards
    SHEAR_Y = 3  # pixels upwards for each column to the right
    TRANSLATE_X = 4  # share of the width, to the left
    TRANSLATE_Y = 5  # share of the height, upwards
    COLOR = 6  # factor above 0: 1 as it was, 2 twice as colourful
    CONTRAST = 7  # factor: 0 is the mean's grey
    BRIGHTNESS = 8  # factor: 0 is black
    SHARPNESS = 9  # factor: 0 is smoothed
    AUTO_CONTRAST = 10
    EQUALIZE = 11
    POSTERIZE = 12  # bits of each value that stay; 0 is black
    INVERT = 13
    SOLARIZE = 14  # threshold: values from it on are inverted
    SOLARIZE_ADD = 15  # levels added to values below 128
    BLUR = 16  # standard deviation of a Gaussian in pixels
    GREY = 17


#: The kinds that move pixels.
AFFINE = (Kind.ROTATE, Kind.SHEAR_X, Kind.SHEAR_Y, Kind.TRANSLATE_X, Kind.TRANSLATE_Y)

#: What a stage of each recipe chooses from, with equal chances. 3-Augment has one stage, colour jitter three.
RAND_AUGMENT = tuple(kind for kind in Kind if kind not in (Kind.NONE, Kind.BLUR, Kind.GREY))
THREE_AUGMENT = (Kind.GREY, Kind.SOLARIZE, Kind.BLUR)
COLOR_JITTER = (Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR)

DRAWS = 4  # uniform numbers that an image has for each stage

_TOP = 10.0  # the scale of magnitudes
_ORDERS = np.array(list(itertools.permutations(range(len(COLOR_JITTER)))))
_SHARP = np.diag([0.0, 1.0, 0.0])  # the filter that leaves an image as it is
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # PIL's ImageFilter.SMOOTH
_normal = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])


@dataclass(frozen=True)
class RandAugment:
    """RandAugment's numbers; the defaults are `rand-m9-mstd0.5-inc1`. Raises ValueError if one has no meaning."""

    magnitude: float = 9.0  # mean strength, from 0 to 10
    spread: float = 0.5  # standard deviation of the strength, which is then cut to 0–10
    layers: int = 2  # operations drawn for an image, one after the other
    probability: float = 0.5  # that an operation which was drawn is done

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= _TOP:
            raise ValueError(f"rand_augment.magnitude is {self.magnitude}; use a number from 0 to {_TOP:g}")
        if not 0 <= self.spread < np.inf:
            raise ValueError(f"rand_augment.spread is {self.spread}; use a finite number of at least 0")
        if self.layers < 1:
            raise ValueError(f"rand_augment.layers is {self.layers}; use at least 1, or the recipe simple")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"rand_augment.probability is {self.probability}; use a number from 0 to 1")


class Operations(NamedTuple):
    """What is done to each image of a batch, stage by stage."""

    kinds: np.ndarray  # (B, L) int32: of Kind
    amounts: np.ndarray  # (B, L) float32: as Kind says; 0 where it says nothing


def no_operations(images: int, stages: int) -> Operations:
    """For images that stay as they are."""
    return Operations(np.full((images, stages), Kind.NONE, dtype=np.int32), np.zeros((images, stages), np.float32))


def rand_augment(draws: np.ndarray, settings: RandAugment) -> Operations:
    """Operations of timm's RandAugment: L = layers, from (B, L × DRAWS) uniform in [0, 1).

    timm/data/auto_augment.py, with the increasing transforms; they are chosen with replacement.
    """
    chosen, done, strength, sign = draws.reshape(len(draws), settings.layers, DRAWS).transpose(2, 0, 1)
    kinds = np.array(RAND_AUGMENT)[_choose(chosen, len(RAND_AUGMENT))]
    levels = settings.magnitude + settings.spread * _normal(np.maximum(strength, 2.0**-54))  # infinite at 0
    amounts = rand_amounts(kinds, np.clip(levels, 0, _TOP), np.where(sign < 0.5, -1.0, 1.0))
    done = done < settings.probability
    return Operations(np.where(done, kinds, Kind.NONE).astype(np.int32), np.where(done, amounts, 0).astype(np.float32))


def rand_amounts(kinds: np.ndarray, levels: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The amount of each operation at a level in [0, 10], with the signs of those that have one."""
    share = levels / _TOP
    enhanced = np.maximum(0.1, 1 + signs * 0.9 * share)
    by_kind = {
        Kind.ROTATE: signs * 30 * share,
        Kind.SHEAR_X: signs * 0.3 * share,
        Kind.SHEAR_Y: signs * 0.3 * share,
        Kind.TRANSLATE_X: signs * 0.45 * share,
        Kind.TRANSLATE_Y: signs * 0.45 * share,
        Kind.COLOR: enhanced,
        Kind.CONTRAST: enhanced,
        Kind.BRIGHTNESS: enhanced,
        Kind.SHARPNESS: enhanced,
        Kind.POSTERIZE: 4 - np.floor(4 * share),
        Kind.SOLARIZE: 256 - np.floor(256 * share),
        Kind.SOLARIZE_ADD: np.floor(110 * share),
    }
    return np.select([kinds == kind for kind in by_kind], list(by_kind.values()), default=0.0)


def three_augment(draws: np.ndarray) -> Operations:
    """3-Augment's choice of grey, solarized from 128 on, or blurred: L = 1, from (B, DRAWS) uniform in [0, 1).

    Touvron et al., DeiT III, section 3.2; the blur has 0.1 to 2 pixels, as in their code.
    """
    chosen = _choose(draws[:, :1], len(THREE_AUGMENT))
    amounts = np.choose(chosen, [0.0, 128.0, 0.1 + 1.9 * draws[:, 1:2]])
    return Operations(np.array(THREE_AUGMENT, dtype=np.int32)[chosen], amounts.astype(np.float32))


def color_jitter(draws: np.ndarray, strength: float) -> Operations:
    """Brightness, contrast and colour of torchvision's ColorJitter, in any order: L = 3, from (B, L × DRAWS)."""
    order, share = draws.reshape(len(draws), len(COLOR_JITTER), DRAWS).transpose(2, 0, 1)[:2]
    order = _ORDERS[_choose(order[:, 0], len(_ORDERS))]
    lowest = max(0.0, 1 - strength)
    factors = lowest + (1 + strength - lowest) * share
    return Operations(np.array(COLOR_JITTER, dtype=np.int32)[order], factors.astype(np.float32))


def _choose(draws: np.ndarray, count: int) -> np.ndarray:
    """Uniform in [0, 1) → uniform in 0 … count - 1."""
    return (draws * count).astype(np.int64)


def have_matrices(kinds: tuple[Kind, ...]) -> bool:
    """Whether any of them is done by its matrix."""
    return any(kind in (*AFFINE, Kind.SHARPNESS) for kind in kinds)


def matrices(operations: Operations, size: int, mirrored: np.ndarray) -> np.ndarray:
    """(B, L, 3, 3) float32: of what an operation does where that is a matrix, and the identity elsewhere.

    AFFINE kinds: from (x, y, 1) in the changed image of `size` × `size` pixels to where its value is in the one
    before, both with (0, 0) at the corner of the first pixel. SHARPNESS: the filter. mirrored: (B,) bool, images that
    are only mirrored after their operations, which therefore go the other way round in them.
    """
    result = np.tile(np.eye(3), (*operations.kinds.shape, 1, 1))
    amounts = operations.amounts.astype(np.float64)
    for kind in AFFINE:
        here = operations.kinds == kind
        result[here] = _affine(kind, amounts[here], size)
    here = operations.kinds == Kind.SHARPNESS
    factors = amounts[here][:, None, None]
    result[here] = factors * _SHARP + (1 - factors) * _SMOOTH
    mirror = np.array([[-1, 0, size], [0, 1, 0], [0, 0, 1]])
    turned = np.isin(operations.kinds, AFFINE) & mirrored[:, None]
    result[turned] = mirror @ result[turned] @ mirror
    return result.astype(np.float32)


def _affine(kind: Kind, amounts: np.ndarray, size: int) -> np.ndarray:
    """The matrices of one AFFINE kind, as PIL has them: (N,) → (N, 3, 3)."""
    result = np.tile(np.eye(3), (len(amounts), 1, 1))
    if kind == Kind.SHEAR_X:
        result[:, 0, 1] = amounts
    elif kind == Kind.SHEAR_Y:
        result[:, 1, 0] = amounts
    elif kind == Kind.TRANSLATE_X:
        result[:, 0, 2] = amounts * size
    elif kind == Kind.TRANSLATE_Y:
        result[:, 1, 2] = amounts * size
    else:
        cosine, sine, centre = np.cos(np.radians(amounts)), np.sin(np.radians(amounts)), size / 2
        result[:, 0] = np.stack([cosine, -sine, centre * (1 - cosine + sine)], axis=1)
        result[:, 1] = np.stack([sine, cosine, centre * (1 - sine - cosine)], axis=1)
    return result

"""Which operations change the pixels of a training image after its crop and flip, as pure functions of draws.

RandAugment as timm's `rand-m9-mstd0.5-inc1` means it, 3-Augment as DeiT III has it, and torchvision's colour jitter.
Each is a few stages, and in a stage an image has at most one operation: an op and its argument. dali_ops.py does
them in the DALI graph; params.py has them drawn.

Axes: B images of a batch, L stages.
"""

import itertools
from enum import IntEnum
from statistics import NormalDist
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from dataio.options import Count, Fraction, NonNegative, Options


class Op(IntEnum):
    """What an operation does, with PIL's name for it, and what its op_arg is."""

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
    GAUSSIAN_BLUR = 16  # standard deviation of a Gaussian in pixels
    GRAYSCALE = 17


#: The ops that move pixels.
AFFINE = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)

#: What a stage of each recipe chooses from, with equal chances. 3-Augment has one stage, colour jitter three.
RAND_AUGMENT_OPS = tuple(op for op in Op if op not in (Op.NONE, Op.GAUSSIAN_BLUR, Op.GRAYSCALE))
THREE_AUGMENT_OPS = (Op.GRAYSCALE, Op.SOLARIZE, Op.GAUSSIAN_BLUR)
COLOR_JITTER_OPS = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR)

DRAWS_PER_OP = 4  # uniform numbers that an image has for each stage

_MAX_LEVEL = 10.0  # the scale of magnitudes
_ORDERS = np.array(list(itertools.permutations(range(len(COLOR_JITTER_OPS)))))
_SHARP = np.diag([0.0, 1.0, 0.0])  # the filter that leaves an image as it is
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # PIL's ImageFilter.SMOOTH
_normal = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])


class RandAugment(Options):
    """Settings of RandAugment; the defaults are timm's `rand-m9-mstd0.5-inc1`."""

    magnitude: Annotated[float, Field(ge=0, le=_MAX_LEVEL)] = 9.0  # mean level of the ops
    magnitude_std: NonNegative = 0.5  # standard deviation of the level, which is then clipped to 0 … 10
    num_layers: Count = 2  # ops drawn for an image, one after the other
    prob: Fraction = 0.5  # probability of applying an op that was drawn


class SampledOps(NamedTuple):
    """What is done to each image of a batch, stage by stage."""

    ops: np.ndarray  # (B, L) int32: of Op
    op_args: np.ndarray  # (B, L) float32: as Op says; 0 where it says nothing


def no_ops(images: int, stages: int) -> SampledOps:
    """For images that stay as they are."""
    return SampledOps(np.full((images, stages), Op.NONE, dtype=np.int32), np.zeros((images, stages), np.float32))


def sample_rand_augment(draws: np.ndarray, settings: RandAugment) -> SampledOps:
    """Ops of timm's RandAugment: L = num_layers, from (B, L × DRAWS_PER_OP) uniform in [0, 1).

    timm/data/auto_augment.py, with the increasing transforms; they are chosen with replacement.
    """
    chosen, done, strength, sign = draws.reshape(len(draws), settings.num_layers, DRAWS_PER_OP).transpose(2, 0, 1)
    ops = np.array(RAND_AUGMENT_OPS)[_choose(chosen, len(RAND_AUGMENT_OPS))]
    levels = settings.magnitude + settings.magnitude_std * _normal(np.maximum(strength, 2.0**-54))  # infinite at 0
    op_args = level_to_args(ops, np.clip(levels, 0, _MAX_LEVEL), np.where(sign < 0.5, -1.0, 1.0))
    done = done < settings.prob
    return SampledOps(np.where(done, ops, Op.NONE).astype(np.int32), np.where(done, op_args, 0).astype(np.float32))


def level_to_args(ops: np.ndarray, levels: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The op_arg of each operation at a level in [0, 10], with the signs of those that have one."""
    share = levels / _MAX_LEVEL
    enhanced = np.maximum(0.1, 1 + signs * 0.9 * share)
    by_kind = {
        Op.ROTATE: signs * 30 * share,
        Op.SHEAR_X: signs * 0.3 * share,
        Op.SHEAR_Y: signs * 0.3 * share,
        Op.TRANSLATE_X: signs * 0.45 * share,
        Op.TRANSLATE_Y: signs * 0.45 * share,
        Op.COLOR: enhanced,
        Op.CONTRAST: enhanced,
        Op.BRIGHTNESS: enhanced,
        Op.SHARPNESS: enhanced,
        Op.POSTERIZE: 4 - np.floor(4 * share),
        Op.SOLARIZE: 256 - np.floor(256 * share),
        Op.SOLARIZE_ADD: np.floor(110 * share),
    }
    return np.select([ops == op for op in by_kind], list(by_kind.values()), default=0.0)


def sample_three_augment(draws: np.ndarray) -> SampledOps:
    """3-Augment's choice of grey, solarized from 128 on, or blurred: L = 1, from (B, DRAWS_PER_OP) uniform in [0, 1).

    Touvron et al., DeiT III, section 3.2; the blur has 0.1 to 2 pixels, as in their code.
    """
    chosen = _choose(draws[:, :1], len(THREE_AUGMENT_OPS))
    op_args = np.choose(chosen, [0.0, 128.0, 0.1 + 1.9 * draws[:, 1:2]])
    return SampledOps(np.array(THREE_AUGMENT_OPS, dtype=np.int32)[chosen], op_args.astype(np.float32))


def sample_color_jitter(draws: np.ndarray, strength: float) -> SampledOps:
    """Brightness, contrast and colour of torchvision's ColorJitter, in any order: L = 3, from (B, L × DRAWS_PER_OP)."""
    order, share = draws.reshape(len(draws), len(COLOR_JITTER_OPS), DRAWS_PER_OP).transpose(2, 0, 1)[:2]
    order = _ORDERS[_choose(order[:, 0], len(_ORDERS))]
    lowest = max(0.0, 1 - strength)
    factors = lowest + (1 + strength - lowest) * share
    return SampledOps(np.array(COLOR_JITTER_OPS, dtype=np.int32)[order], factors.astype(np.float32))


def _choose(draws: np.ndarray, count: int) -> np.ndarray:
    """Uniform in [0, 1) → uniform in 0 … count - 1."""
    return (draws * count).astype(np.int64)


def need_matrices(ops: tuple[Op, ...]) -> bool:
    """Whether any of them is done by its matrix."""
    return any(op in (*AFFINE, Op.SHARPNESS) for op in ops)


def op_matrices(operations: SampledOps, size: int, mirrored: np.ndarray) -> np.ndarray:
    """(B, L, 3, 3) float32: of what an operation does where that is a matrix, and the identity elsewhere.

    AFFINE ops: from (x, y, 1) in the changed image of `size` × `size` pixels to where its value is in the one
    before, both with (0, 0) at the corner of the first pixel. SHARPNESS: the filter. mirrored: (B,) bool, images that
    are only mirrored after their operations, which therefore go the other way round in them.
    """
    result = np.tile(np.eye(3), (*operations.ops.shape, 1, 1))
    op_args = operations.op_args.astype(np.float64)
    for op in AFFINE:
        here = operations.ops == op
        result[here] = _affine(op, op_args[here], size)
    here = operations.ops == Op.SHARPNESS
    factors = op_args[here][:, None, None]
    result[here] = factors * _SHARP + (1 - factors) * _SMOOTH
    mirror = np.array([[-1, 0, size], [0, 1, 0], [0, 0, 1]])
    turned = np.isin(operations.ops, AFFINE) & mirrored[:, None]
    result[turned] = mirror @ result[turned] @ mirror
    return result.astype(np.float32)


def _affine(op: Op, op_args: np.ndarray, size: int) -> np.ndarray:
    """The matrices of one AFFINE op, as PIL has them: (N,) → (N, 3, 3)."""
    result = np.tile(np.eye(3), (len(op_args), 1, 1))
    if op == Op.SHEAR_X:
        result[:, 0, 1] = op_args
    elif op == Op.SHEAR_Y:
        result[:, 1, 0] = op_args
    elif op == Op.TRANSLATE_X:
        result[:, 0, 2] = op_args * size
    elif op == Op.TRANSLATE_Y:
        result[:, 1, 2] = op_args * size
    else:
        cosine, sine, centre = np.cos(np.radians(op_args)), np.sin(np.radians(op_args)), size / 2
        result[:, 0] = np.stack([cosine, -sine, centre * (1 - cosine + sine)], axis=1)
        result[:, 1] = np.stack([sine, cosine, centre * (1 - sine - cosine)], axis=1)
    return result

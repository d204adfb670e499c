"""Augmentation policies, sampled as ops and their arguments: RandAugment, 3-Augment and colour jitter.

RandAugment is timm's `rand-m9-mstd0.5-inc1`, 3-Augment is that of DeiT III, and the colour jitter is torchvision's.
Each is a sequence of stages, and in a stage an image passes at most one op. All functions are pure functions of
uniform draws. params.py calls them for the training images of a batch; dali_ops.py applies the ops in the DALI graph.

Axes: B images of a batch, L stages.
"""

import itertools
from enum import IntEnum
from statistics import NormalDist
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from dataio.options import Count, Fraction, NonNegative, Options


class Op(IntEnum):
    """Ops under PIL's and timm's names, each with the unit of its argument."""

    NONE = 0
    ROTATE = 1  # degrees, counter-clockwise
    SHEAR_X = 2  # pixels to the left for each row downwards
    SHEAR_Y = 3  # pixels upwards for each column to the right
    TRANSLATE_X = 4  # fraction of the width, to the left
    TRANSLATE_Y = 5  # fraction of the height, upwards
    COLOR = 6  # factor above 0: 1 leaves the image unchanged, 2 doubles its saturation
    CONTRAST = 7  # factor: 0 is the mean's grey
    BRIGHTNESS = 8  # factor: 0 is black
    SHARPNESS = 9  # factor: 0 is smoothed
    AUTO_CONTRAST = 10
    EQUALIZE = 11
    POSTERIZE = 12  # bits kept of each value; 0 is black
    INVERT = 13
    SOLARIZE = 14  # threshold from which on values are inverted
    SOLARIZE_ADD = 15  # levels added to values below 128
    GAUSSIAN_BLUR = 16  # standard deviation of a Gaussian in pixels
    GRAYSCALE = 17


#: Ops that move pixels, by an affine map.
AFFINE = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)

#: Ops of which each stage of a policy draws one, uniformly. 3-Augment has one stage; colour jitter has three stages,
#: which apply each of its ops once.
RAND_AUGMENT_OPS = tuple(op for op in Op if op not in (Op.NONE, Op.GAUSSIAN_BLUR, Op.GRAYSCALE))
THREE_AUGMENT_OPS = (Op.GRAYSCALE, Op.SOLARIZE, Op.GAUSSIAN_BLUR)
COLOR_JITTER_OPS = (Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR)

DRAWS_PER_OP = 4  # uniform draws of an image for each stage

_MAX_LEVEL = 10.0  # largest magnitude, as in timm
_ORDERS = np.array(list(itertools.permutations(range(len(COLOR_JITTER_OPS)))))
_IDENTITY_FILTER = np.diag([0.0, 1.0, 0.0])
_SMOOTH_FILTER = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # PIL's ImageFilter.SMOOTH
_normal = np.vectorize(NormalDist().inv_cdf, otypes=[np.float64])


class RandAugment(Options):
    """Options of RandAugment; the defaults are timm's `rand-m9-mstd0.5-inc1`."""

    magnitude: Annotated[float, Field(ge=0, le=_MAX_LEVEL)] = 9.0  # mean level of the ops
    magnitude_std: NonNegative = 0.5  # standard deviation of the level, which is then clipped to 0 … 10
    num_layers: Count = 2  # ops drawn for an image, one after the other
    prob: Fraction = 0.5  # probability of applying an op that was drawn


class SampledOps(NamedTuple):
    """Ops that each image of a batch passes, stage by stage, and their arguments."""

    ops: npt.NDArray[np.int32]  # (B, L): of Op
    op_args: npt.NDArray[np.float32]  # (B, L): in the unit that Op gives; 0 for an op without an argument


def no_ops(images: int, stages: int) -> SampledOps:
    """Return Op.NONE for every image and stage: images pass unchanged."""
    return SampledOps(np.full((images, stages), Op.NONE, dtype=np.int32), np.zeros((images, stages), np.float32))


def sample_rand_augment(draws: npt.NDArray[np.float64], settings: RandAugment) -> SampledOps:
    """Sample timm's RandAugment: L = num_layers, from (B, L × DRAWS_PER_OP) uniform in [0, 1).

    After timm/data/auto_augment.py with its increasing transforms; ops are drawn with replacement.
    """
    chosen, chance, level, sign = draws.reshape(len(draws), settings.num_layers, DRAWS_PER_OP).transpose(2, 0, 1)
    ops = np.array(RAND_AUGMENT_OPS)[_choose(chosen, len(RAND_AUGMENT_OPS))]
    levels = settings.magnitude + settings.magnitude_std * _normal(np.maximum(level, 2.0**-54))  # infinite at 0
    op_args = level_to_args(ops, np.clip(levels, 0, _MAX_LEVEL), np.where(sign < 0.5, -1.0, 1.0))
    applied = chance < settings.prob
    return SampledOps(
        np.where(applied, ops, Op.NONE).astype(np.int32), np.where(applied, op_args, 0).astype(np.float32)
    )


def level_to_args(
    ops: npt.NDArray[np.integer[Any]], levels: npt.NDArray[np.float64], signs: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Convert levels in [0, 10] to arguments of RandAugment's ops, as timm's LEVEL_TO_ARG does.

    signs: -1 or 1, for the ops whose argument is signed. All of one shape, which the result has too.
    """
    fraction = levels / _MAX_LEVEL
    enhanced = np.maximum(0.1, 1 + signs * 0.9 * fraction)
    args_by_op = {
        Op.ROTATE: signs * 30 * fraction,
        Op.SHEAR_X: signs * 0.3 * fraction,
        Op.SHEAR_Y: signs * 0.3 * fraction,
        Op.TRANSLATE_X: signs * 0.45 * fraction,
        Op.TRANSLATE_Y: signs * 0.45 * fraction,
        Op.COLOR: enhanced,
        Op.CONTRAST: enhanced,
        Op.BRIGHTNESS: enhanced,
        Op.SHARPNESS: enhanced,
        Op.POSTERIZE: 4 - np.floor(4 * fraction),
        Op.SOLARIZE: 256 - np.floor(256 * fraction),
        Op.SOLARIZE_ADD: np.floor(110 * fraction),
    }
    return np.select([ops == op for op in args_by_op], list(args_by_op.values()), default=0.0)


def sample_three_augment(draws: npt.NDArray[np.float64]) -> SampledOps:
    """Sample 3-Augment (Touvron et al., DeiT III, section 3.2): L = 1, from (B, DRAWS_PER_OP) uniform in [0, 1).

    Grayscale, solarize with threshold 128, or a Gaussian blur of 0.1 to 2 pixels as in the authors' code.
    """
    chosen = _choose(draws[:, :1], len(THREE_AUGMENT_OPS))
    op_args = np.choose(chosen, [0.0, 128.0, 0.1 + 1.9 * draws[:, 1:2]])
    return SampledOps(np.array(THREE_AUGMENT_OPS, dtype=np.int32)[chosen], op_args.astype(np.float32))


def sample_color_jitter(draws: npt.NDArray[np.float64], strength: float) -> SampledOps:
    """Sample torchvision's ColorJitter of brightness, contrast and saturation, in random order.

    L = 3, from (B, L × DRAWS_PER_OP) uniform in [0, 1). strength: the largest change of each factor from 1.
    """
    order, factor = draws.reshape(len(draws), len(COLOR_JITTER_OPS), DRAWS_PER_OP).transpose(2, 0, 1)[:2]
    order = _ORDERS[_choose(order[:, 0], len(_ORDERS))]
    lowest = max(0.0, 1 - strength)
    factors = lowest + (1 + strength - lowest) * factor
    return SampledOps(np.array(COLOR_JITTER_OPS, dtype=np.int32)[order], factors.astype(np.float32))


def _choose(draws: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Map uniform draws in [0, 1) to uniform integers in 0 … count - 1."""
    return (draws * count).astype(np.int64)


def need_matrices(ops: tuple[Op, ...]) -> bool:
    """Whether DALI applies any of these ops by a matrix: an affine map, or the filter of SHARPNESS."""
    return any(op in (*AFFINE, Op.SHARPNESS) for op in ops)


def op_matrices(sampled: SampledOps, size: int, mirrored: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Matrices of the ops that DALI applies by one, the identity for all others: (B, L, 3, 3) float32.

    AFFINE ops: the map from (x, y, 1) in the output of `size` × `size` pixels to (x, y, 1) in the input, both with
    (0, 0) at the corner of the first pixel. SHARPNESS: the 3×3 filter. mirrored: (B,) bool, images that DALI mirrors
    only after their ops, whose maps are therefore conjugated with the mirror.
    """
    result = np.tile(np.eye(3), (*sampled.ops.shape, 1, 1))
    op_args = sampled.op_args.astype(np.float64)
    for op in AFFINE:
        selected = sampled.ops == op
        result[selected] = _affine_matrices(op, op_args[selected], size)
    selected = sampled.ops == Op.SHARPNESS
    factors = op_args[selected][:, None, None]
    result[selected] = factors * _IDENTITY_FILTER + (1 - factors) * _SMOOTH_FILTER
    mirror = np.array([[-1, 0, size], [0, 1, 0], [0, 0, 1]])
    conjugated = np.isin(sampled.ops, AFFINE) & mirrored[:, None]
    result[conjugated] = mirror @ result[conjugated] @ mirror
    return result.astype(np.float32)


def _affine_matrices(op: Op, op_args: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Matrices of one AFFINE op, as PIL has them: arguments (N,) → (N, 3, 3)."""
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

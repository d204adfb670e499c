"""The operations of policies.py as a part of the DALI graph, for images on the CPU and on a GPU alike.

An image passes through the branch of its own operation and no other. Each computes what PIL does, as far as DALI has
the means. Besides pipeline.py only this file imports DALI.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dali_math
import nvidia.dali.types as types
from nvidia.dali import pipeline_def
from nvidia.dali.data_node import DataNode

from dataio.augment.policies import AFFINE, Op, SampledOps, op_matrices

INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}

# PIL cuts fractions off where DALI rounds: added before rounding. Half a level would send whole numbers down.
_TRUNCATION = -0.499


class Stage(NamedTuple):
    """The operations of a batch in one stage, on the CPU."""

    op: DataNode  # scalars, int32: of Op
    op_arg: DataNode  # scalars, float32: as Op says
    matrix: DataNode | None = None  # (3, 3) float32: as policies.op_matrices says; None where need_matrices denies it


Branch = Callable[[DataNode, Stage], DataNode]


def apply_stage(
    images: DataNode, stage: Stage, ops: tuple[Op, ...], fill: list[int], interpolation: types.DALIInterpType
) -> DataNode:
    """The images, (H, W, 3) uint8 as they came, after a stage that has operations of these ops.

    fill: R, G, B of what lies beyond the edges. For pipeline definitions with conditionals enabled.
    """
    warp = partial(_warp, fill=fill, interpolation=interpolation)
    branches: list[tuple[Op, Branch]] = []
    for op in sorted(ops):
        branch = warp if op in AFFINE else _BRANCHES[op]
        if not branches or branches[-1][1] is not branch:  # neighbours may share one
            branches.append((op, branch))
    if stage.op != int(Op.NONE):
        images = _switch(images, stage, branches)
    return images


def _switch(images: DataNode, stage: Stage, branches: list[tuple[Op, Branch]]) -> DataNode:
    """Sends each image through the last branch whose op is not above its own: a binary search, as `if` has 2 ways."""
    if len(branches) == 1:
        return branches[0][1](images, stage)
    middle = len(branches) // 2
    if stage.op < int(branches[middle][0]):
        images = _switch(images, stage, branches[:middle])
    else:
        images = _switch(images, stage, branches[middle:])
    return images


def _on_device_of(images: DataNode, numbers: DataNode) -> DataNode:
    """Numbers where the images are, for arithmetic and positional inputs; keyword arguments stay on the CPU."""
    return numbers.gpu() if images.device == "gpu" else numbers


def _warp(images: DataNode, stage: Stage, fill: list[int], interpolation: types.DALIInterpType) -> DataNode:
    """Faster than warp_affine, which has neither cubic interpolation nor a colour to fill with."""
    return fn.experimental.warp_perspective(
        images, matrix=stage.matrix, fill_value=fill, interp_type=interpolation, pixel_origin="corner"
    )


def _color(images: DataNode, stage: Stage) -> DataNode:
    """image + grey (1 / factor - 1), times the factor: turning floats into bytes costs most, and `brightness` least."""
    factor = dali_math.max(stage.op_arg, 1e-6)
    mixed = images + _grey_level(images) * _on_device_of(images, 1 / factor - 1)
    return fn.brightness(mixed, brightness=factor, brightness_shift=_TRUNCATION / 255, dtype=types.UINT8)


def _grey(images: DataNode, stage: Stage) -> DataNode:
    return fn.color_space_conversion(_grey_level(images), image_type=types.GRAY, output_type=types.RGB)


def _grey_level(images: DataNode) -> DataNode:
    """(H, W, 1) uint8, PIL's L."""
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _contrast(images: DataNode, stage: Stage) -> DataNode:
    centre = dali_math.floor(fn.reductions.mean(_grey_level(images)) + 0.5)
    if images.device == "cpu":  # a tenth of the arithmetic's time, but the centre may not lie on a GPU
        return fn.brightness_contrast(
            images, contrast=stage.op_arg, contrast_center=centre, brightness_shift=_TRUNCATION / 255
        )
    factor = _on_device_of(images, stage.op_arg)
    return _linear(images, factor, centre * (1 - factor))


def _brightness(images: DataNode, stage: Stage) -> DataNode:
    return fn.brightness(images, brightness=stage.op_arg, brightness_shift=_TRUNCATION / 255)


def _sharpness(images: DataNode, stage: Stage) -> DataNode:
    """PIL leaves the outermost pixels as they are; here they are filtered too."""
    return fn.filter(images, _on_device_of(images, stage.matrix))


def _auto_contrast(images: DataNode, stage: Stage) -> DataNode:
    lowest = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    highest = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    uniform = highest == lowest  # such a channel stays
    scale = 255.0 / (highest - lowest + uniform * _level(255))
    return _linear(images, scale, lowest * (highest > lowest) * -scale)


def _linear(images: DataNode, factor: DataNode, summand: DataNode) -> DataNode:
    return fn.cast(images * factor + (summand + _TRUNCATION), dtype=types.UINT8)


def _equalize(images: DataNode, stage: Stage) -> DataNode:
    """DALI counts the pixels up to and with a level, PIL those below it: the same on the inverted image."""
    return _level(255) - fn.equalize(_level(255) - images)


def _posterize(images: DataNode, stage: Stage) -> DataNode:
    kept = 256 - dali_math.pow(2.0, 8 - stage.op_arg)
    return images & _on_device_of(images, fn.cast(kept, dtype=types.UINT8))


def _invert_from_threshold(images: DataNode, stage: Stage) -> DataNode:
    """INVERT's op_arg, 0, is the threshold that inverts everything."""
    threshold = _on_device_of(images, fn.cast(stage.op_arg, dtype=types.INT32))  # up to 256
    return images ^ ((images >= threshold) * _level(255))


def _solarize_add(images: DataNode, stage: Stage) -> DataNode:
    added = _on_device_of(images, fn.cast(stage.op_arg, dtype=types.UINT8))
    return images + (images < _level(128)) * added  # at most 127 + 110


def _blur(images: DataNode, stage: Stage) -> DataNode:
    return fn.gaussian_blur(images, sigma=stage.op_arg)


def _level(value: int) -> types.ScalarConstant:
    """A constant that leaves arithmetic in uint8."""
    return types.Constant(value, dtype=types.UINT8)


_BRANCHES: dict[Op, Branch] = {
    Op.COLOR: _color,
    Op.CONTRAST: _contrast,
    Op.BRIGHTNESS: _brightness,
    Op.SHARPNESS: _sharpness,
    Op.AUTO_CONTRAST: _auto_contrast,
    Op.EQUALIZE: _equalize,
    Op.POSTERIZE: _posterize,
    Op.INVERT: _invert_from_threshold,
    Op.SOLARIZE: _invert_from_threshold,
    Op.SOLARIZE_ADD: _solarize_add,
    Op.GAUSSIAN_BLUR: _blur,
    Op.GRAYSCALE: _grey,
}


def apply_ops(
    images: np.ndarray, operations: SampledOps, fill: tuple[int, int, int], interpolation: str, device: str
) -> np.ndarray:
    """(B, S, S, 3) uint8 images after their operations, of any ops, in a graph of their own on "cpu" or "gpu"."""
    upright = np.zeros(len(images), dtype=bool)
    stages = (operations.ops, operations.op_args, op_matrices(operations, images.shape[1], upright))
    inputs = [np.ascontiguousarray(values[:, number]) for number in range(stages[0].shape[1]) for values in stages]
    ops = tuple(op for op in Op if op != Op.NONE)

    @pipeline_def(
        enable_conditionals=True,
        batch_size=len(images),
        num_threads=2,
        device_id=0 if device == "gpu" else None,
        prefetch_queue_depth=1,
    )
    def definition() -> DataNode:
        result = fn.external_source(lambda: list(images), layout="HWC")
        result = result.gpu() if device == "gpu" else result
        of_stages = fn.external_source(lambda: inputs, num_outputs=len(inputs))
        for first in range(0, len(inputs), 3):
            stage = Stage(*of_stages[first : first + 3])
            result = apply_stage(result, stage, ops, list(fill), INTERPOLATIONS[interpolation])
        return result

    (output,) = definition().run()
    return np.array((output.as_cpu() if device == "gpu" else output).as_tensor())

"""The ops of policies.py in the DALI graph, for images on the CPU and on a GPU alike.

Each image passes through the branch of its own op and no other. A branch computes what PIL does, as far as DALI's
operators allow.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import nvidia.dali.fn as fn
import nvidia.dali.math as dali_math
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.types import Constant, DALIDataType, DALIImageType, DALIInterpType, ScalarConstant

from dataio.augment.policies import AFFINE, Op, SampledOps, op_matrices

INTERPOLATIONS = {"bicubic": DALIInterpType.INTERP_CUBIC, "bilinear": DALIInterpType.INTERP_LINEAR}

# Added before rounding, as PIL truncates where DALI rounds. With -0.5 whole numbers would round down.
_TRUNCATION = -0.499


class Stage(NamedTuple):
    """Graph inputs of one stage: op, argument and matrix of each image of a batch, on the CPU."""

    op: DataNode  # scalars, int32: of Op
    op_arg: DataNode  # scalars, float32: in the unit that Op gives
    matrix: DataNode | None = None  # (3, 3) float32, see policies.op_matrices; None if policies.need_matrices is False


Branch = Callable[[DataNode, Stage], DataNode]


def apply_stage(
    images: DataNode, stage: Stage, ops: tuple[Op, ...], fill: list[int], interpolation: DALIInterpType
) -> DataNode:
    """Apply one stage, of these ops, to images (H, W, 3) uint8; for pipeline definitions with conditionals enabled.

    fill: R, G, B of pixels that AFFINE ops take from beyond the edges.
    """
    warp = partial(_warp, fill=fill, interpolation=interpolation)
    branches: list[tuple[Op, Branch]] = []
    for op in sorted(ops):
        branch = warp if op in AFFINE else _BRANCHES[op]
        if not branches or branches[-1][1] is not branch:  # neighbouring ops may share one
            branches.append((op, branch))
    if stage.op != int(Op.NONE):
        images = _switch(images, stage, branches)
    return images


def _switch(images: DataNode, stage: Stage, branches: list[tuple[Op, Branch]]) -> DataNode:
    """Send each image through the last branch whose op is not above its own: a binary search, as `if` has two ways."""
    if len(branches) == 1:
        return branches[0][1](images, stage)
    middle = len(branches) // 2
    if stage.op < int(branches[middle][0]):
        images = _switch(images, stage, branches[:middle])
    else:
        images = _switch(images, stage, branches[middle:])
    return images


def _on_device_of(images: DataNode, numbers: DataNode) -> DataNode:
    """Move numbers to the images' device, for arithmetic and positional inputs; keyword arguments stay on the CPU."""
    return numbers.gpu() if images.device == "gpu" else numbers


def _warp(images: DataNode, stage: Stage, fill: list[int], interpolation: DALIInterpType) -> DataNode:
    """Warp by warp_perspective: faster than warp_affine, which has neither cubic interpolation nor a fill colour."""
    return fn.experimental.warp_perspective(
        images, matrix=stage.matrix, fill_value=fill, interp_type=interpolation, pixel_origin="corner"
    )


def _color(images: DataNode, stage: Stage) -> DataNode:
    """Blend with grey, as (image + grey · (1 / factor - 1)) · factor.

    So `brightness` converts to uint8, where most of the time goes, and does it fastest.
    """
    factor = dali_math.max(stage.op_arg, 1e-6)
    blended = images + _luma(images) * _on_device_of(images, 1 / factor - 1)
    return fn.brightness(blended, brightness=factor, brightness_shift=_TRUNCATION / 255, dtype=DALIDataType.UINT8)


def _grayscale(images: DataNode, stage: Stage) -> DataNode:
    return fn.color_space_conversion(_luma(images), image_type=DALIImageType.GRAY, output_type=DALIImageType.RGB)


def _luma(images: DataNode) -> DataNode:
    """Convert to luma, PIL's mode L: (H, W, 1) uint8."""
    return fn.color_space_conversion(images, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY)


def _contrast(images: DataNode, stage: Stage) -> DataNode:
    centre = dali_math.floor(fn.reductions.mean(_luma(images)) + 0.5)
    if images.device == "cpu":  # takes a tenth of the time, but its centre may not lie on a GPU
        return fn.brightness_contrast(
            images, contrast=stage.op_arg, contrast_center=centre, brightness_shift=_TRUNCATION / 255
        )
    factor = _on_device_of(images, stage.op_arg)
    return _linear(images, factor, centre * (1 - factor))


def _brightness(images: DataNode, stage: Stage) -> DataNode:
    return fn.brightness(images, brightness=stage.op_arg, brightness_shift=_TRUNCATION / 255)


def _sharpness(images: DataNode, stage: Stage) -> DataNode:
    """Filter by the op's matrix, outermost pixels included, which PIL leaves unchanged."""
    assert stage.matrix is not None  # policies.need_matrices
    return fn.filter(images, _on_device_of(images, stage.matrix))


def _auto_contrast(images: DataNode, stage: Stage) -> DataNode:
    lowest = fn.reductions.min(images, axis_names="HW", keep_dims=True)
    highest = fn.reductions.max(images, axis_names="HW", keep_dims=True)
    uniform = highest == lowest  # such a channel stays unchanged
    scale = 255.0 / (highest - lowest + uniform * _level(255))
    return _linear(images, scale, lowest * (highest > lowest) * -scale)


def _linear(images: DataNode, factor: DataNode, summand: DataNode) -> DataNode:
    return fn.cast(images * factor + (summand + _TRUNCATION), dtype=DALIDataType.UINT8)


def _equalize(images: DataNode, stage: Stage) -> DataNode:
    """Equalize the inverted image, and invert the result.

    For each level, DALI counts the pixels up to and including it, PIL those below it; inversion exchanges the two.
    """
    return _level(255) - fn.equalize(_level(255) - images)


def _posterize(images: DataNode, stage: Stage) -> DataNode:
    kept = 256 - dali_math.pow(2.0, 8 - stage.op_arg)
    return images & _on_device_of(images, fn.cast(kept, dtype=DALIDataType.UINT8))


def _invert_from_threshold(images: DataNode, stage: Stage) -> DataNode:
    """Invert values from the threshold on; INVERT has argument 0, which inverts all."""
    threshold = _on_device_of(images, fn.cast(stage.op_arg, dtype=DALIDataType.INT32))  # up to 256
    return images ^ ((images >= threshold) * _level(255))


def _solarize_add(images: DataNode, stage: Stage) -> DataNode:
    added = _on_device_of(images, fn.cast(stage.op_arg, dtype=DALIDataType.UINT8))
    return images + (images < _level(128)) * added  # at most 127 + 110


def _blur(images: DataNode, stage: Stage) -> DataNode:
    return fn.gaussian_blur(images, sigma=stage.op_arg)


def _level(value: int) -> ScalarConstant:
    """Wrap a level as a uint8 constant, which keeps arithmetic in uint8."""
    constant: ScalarConstant = Constant(value, dtype=DALIDataType.UINT8)  # type: ignore[no-untyped-call]
    return constant


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
    Op.GRAYSCALE: _grayscale,
}


def apply_ops(
    images: npt.NDArray[np.uint8], sampled: SampledOps, fill: tuple[int, int, int], interpolation: str, device: str
) -> npt.NDArray[np.uint8]:
    """Apply ops to images (B, S, S, 3) in a graph of their own on "cpu" or "gpu", to compare them with other code's."""
    not_mirrored = np.zeros(len(images), dtype=bool)
    fields = (sampled.ops, sampled.op_args, op_matrices(sampled, images.shape[1], not_mirrored))
    inputs = [np.ascontiguousarray(field[:, stage]) for stage in range(sampled.ops.shape[1]) for field in fields]
    ops = tuple(op for op in Op if op != Op.NONE)

    @pipeline_def(
        enable_conditionals=True,
        batch_size=len(images),
        num_threads=2,
        device_id=0 if device == "gpu" else None,  # type: ignore[arg-type]  # DALI's type lacks its None
        prefetch_queue_depth=1,
    )
    def definition() -> DataNode:
        result: DataNode = fn.external_source(lambda: list(images), layout="HWC")
        result = result.gpu() if device == "gpu" else result
        nodes = fn.external_source(lambda: inputs, num_outputs=len(inputs))
        for first in range(0, len(inputs), 3):
            stage = Stage(*nodes[first : first + 3])
            result = apply_stage(result, stage, ops, list(fill), INTERPOLATIONS[interpolation])
        return result

    (output,) = definition().run()
    result: npt.NDArray[np.uint8] = np.array((output.as_cpu() if device == "gpu" else output).as_tensor())
    return result

"""The DALI graph from encoded images to normalised pixels on the training device, with its inputs and outputs.

It decodes a crop box, resizes it (on the CPU through augment/resize.py), applies the ops (augment/dali_ops.py), takes
the S×S crop, mirrors and normalises. All parameters come in with the batch, from augment/params.py, and DALI draws no
random number. So the pixels of a sample are a pure function of its parameters. decode.py feeds the graph.

Axes: B images of a batch, S the side of the square output images, L stages of ops.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali
import nvidia.dali.fn as fn
import torch
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray
from nvidia.dali.types import DALIDataType
from torch.utils.dlpack import from_dlpack

from dataio.augment import policies
from dataio.augment.dali_ops import INTERPOLATIONS, Stage, apply_stage
from dataio.augment.params import ImageOptions, TransformParams
from dataio.augment.policies import SampledOps
from dataio.augment.resize import Resizer

Feed = Callable[[], tuple[Any, ...]]

DALI_VERSION: str = nvidia.dali.__version__
DALI_ERRORS = (RuntimeError, MemoryError)  # the types that DALI raises


def pipeline_inputs(params: TransformParams, options: ImageOptions) -> tuple[npt.NDArray[Any], ...]:
    """Convert parameters to the graph's inputs, in its order, which follow the encoded images."""
    # DALI takes a crop's offset as a fraction of the margin, and rounds that back to whole pixels.
    margins = np.maximum(params.resize_to - options.image_size, 1)
    crop_positions = (params.crop_offsets / margins).astype(np.float32)
    return (
        np.ascontiguousarray(params.crop_boxes[:, 1::-1]),
        np.ascontiguousarray(params.crop_boxes[:, :1:-1]),
        params.resize_to.astype(np.float32),
        np.ascontiguousarray(crop_positions[:, 0]),
        np.ascontiguousarray(crop_positions[:, 1]),
        params.flips.astype(np.int32),
        *_stage_inputs(params, options),
    )


def _stage_inputs(params: TransformParams, options: ImageOptions) -> Iterator[npt.NDArray[Any]]:
    """Yield op, argument and, where an op may need it, matrix of one stage after the other."""
    matrices = policies.op_matrices(SampledOps(params.ops, params.op_args), options.image_size, params.flips)
    for stage, ops in enumerate(options.stages):
        yield np.ascontiguousarray(params.ops[:, stage])
        yield np.ascontiguousarray(params.op_args[:, stage])
        if policies.need_matrices(ops):
            yield np.ascontiguousarray(matrices[:, stage])


def _input_types(options: ImageOptions) -> list[tuple[DALIDataType, int]]:
    """List type and number of dimensions of each input of the graph, encoded images included."""
    result = [
        (DALIDataType.UINT8, 1),  # encoded image
        (DALIDataType.INT32, 1),  # crop box: top, left
        (DALIDataType.INT32, 1),  # crop box: height, width
        (DALIDataType.FLOAT, 1),  # resize to: height, width
        (DALIDataType.FLOAT, 0),  # crop position: top
        (DALIDataType.FLOAT, 0),  # crop position: left
        (DALIDataType.INT32, 0),  # flip
    ]
    for ops in options.stages:
        result += [(DALIDataType.INT32, 0), (DALIDataType.FLOAT, 0)]
        result += [(DALIDataType.FLOAT, 2)] * policies.need_matrices(ops)
    return result


def make_resizer(options: ImageOptions, device: torch.device) -> Resizer | None:
    """Create the resizer of a graph on the CPU; None on a GPU, where DALI resizes."""
    return Resizer(options.interpolation, options.threads) if device.type == "cpu" else None


def build_pipeline(
    options: ImageOptions, feed: Feed, max_batch_size: int, device: torch.device, resizer: Resizer | None
) -> Pipeline:
    """Build the graph for a device, CPU or GPU.

    feed: returns a batch's encoded images and `pipeline_inputs`; raises StopIteration after the last batch.
    resizer: of `make_resizer`.
    """
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    with _no_bytecode():
        return _decode_pipeline(
            options,
            feed,
            _input_types(options),
            resizer,
            batch_size=max_batch_size,
            num_threads=options.threads,
            device_id=device_id,
            prefetch_queue_depth=options.prefetch_batches,
            exec_dynamic=True,  # the executor that gives each batch memory of its own, see to_torch
        )


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Keep Python from writing bytecode.

    DALI translates a graph's functions to modules in the temporary folder, under a new name each time, and removes them
    but not their bytecode.
    """
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@pipeline_def(enable_conditionals=True)
def _decode_pipeline(
    options: ImageOptions,
    feed: Feed,
    inputs: list[tuple[DALIDataType, int]],
    resizer: Resizer | None,
) -> tuple[DataNode, DataNode]:
    """Define the graph: (images, height and width of the stored images). inputs: of `_input_types`."""
    encoded, starts, shapes, resize_to, tops, lefts, flips, *stage_inputs = fn.external_source(
        feed,
        num_outputs=len(inputs),
        dtype=[dtype for dtype, _ in inputs],
        ndim=[dimensions for _, dimensions in inputs],
    )
    crops, sizes = _decode_crops(encoded, starts, shapes, "cpu" if resizer else "mixed")
    if resizer:
        images = fn.python_function(crops, resize_to, function=resizer, batch_processing=True, output_layouts="HWC")
    else:
        images = fn.resize(  # type: ignore[assignment]  # DALI's type has all results that any input could lead to
            crops,
            size=resize_to,
            interp_type=INTERPOLATIONS[options.interpolation],
            antialias=True,
            subpixel_scale=False,
        )
    mean = [255 * value for value in options.mean]
    fill = [round(value) for value in mean]
    for ops in options.stages:
        count = 2 + policies.need_matrices(ops)
        stage, stage_inputs = Stage(*stage_inputs[:count]), stage_inputs[count:]
        images = apply_stage(images, stage, ops, fill, INTERPOLATIONS[options.interpolation])
    images = fn.crop_mirror_normalize(
        images,
        crop=(options.image_size, options.image_size),
        crop_pos_y=tops,
        crop_pos_x=lefts,
        mirror=flips,  # at no cost here; op_matrices accounts for it
        mean=mean,
        std=[255 * value for value in options.std],
        dtype=DALIDataType.FLOAT,
        output_layout="HWC",
    )
    return images, sizes


def _decode_crops(encoded: DataNode, starts: DataNode, shapes: DataNode, device: str) -> tuple[DataNode, DataNode]:
    """Decode crop boxes: (crops, height and width of the stored images). starts, shapes: height, width."""
    # Checked here because DALI 2.4.0's decoder crashes the process on an invalid header or a crop box beyond the
    # image.
    sizes = fn.peek_image_shape(encoded, adjust_orientation=False)[:2]
    fits = starts + shapes <= sizes
    crops = fn.decoders.image_slice(
        encoded,
        device=device,
        start=starts * fits,
        shape=shapes * fits + (fits == 0),
        axis_names="HW",
        adjust_orientation=False,  # PIL does not turn images by their EXIF tag either
        jpeg_fancy_upsampling=True,  # nvJPEG upsamples chroma as libjpeg, and so PIL, does
        hw_decoder_load=0.0,  # the hardware decoder would take a part of each batch: pixels would depend on it
    )
    return crops, sizes


def to_torch(output: Any, device: torch.device) -> torch.Tensor:
    """Convert DALI's (B, S, S, 3) output to (B, 3, S, S), whose memory is then channels_last.

    On the CPU the tensor is DALI's memory, handed over: DALI writes to it again only when the tensor is gone, and it
    outlives the pipeline. On a GPU DALI's memory would go back to it with the tensor, while PyTorch's stream may still
    read from it, so the batch is copied. Its memory is complete when share_outputs returns. The copy is queued on
    PyTorch's current stream, and copy_to_external makes DALI's stream wait for it before it writes to the buffer
    again. So release_outputs may follow at once, and whatever PyTorch queues after it on that stream sees the whole
    batch.
    """
    dense = output.as_tensor()
    if device.type == "cpu":
        return from_dlpack(dense).permute(0, 3, 1, 2)
    images = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    feed_ndarray(dense, images, cuda_stream=torch.cuda.current_stream(device))
    return images.permute(0, 3, 1, 2)

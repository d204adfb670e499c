"""The DALI graph, from encoded images to normalised pixels on the training device; and what goes in and comes out.

params.py says how each image is looked at, and DALI does the work: decode a window, resize it (on the CPU with the help
of resize.py), change its pixels by the operations of policies.py, cut out the crop, mirror, normalise. DALI draws
nothing by itself: every number comes in with the batch, so that the pixels of a sample are a pure function of its view.
decode.py feeds the graph. Only this file and dali_ops.py import DALI.

Axes: B images of a batch, S the side of the square images that come out, L stages of operations.
"""

from collections.abc import Callable, Iterator

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.pytorch import feed_ndarray

from dataio.augment import policies
from dataio.augment.dali_ops import INTERPOLATIONS, Stage, apply_stage
from dataio.augment.params import ImageOptions, TransformParams
from dataio.augment.policies import SampledOps
from dataio.augment.resize import Resizer

DALI_ERRORS = (RuntimeError, MemoryError)  # as which DALI's errors come


def pipeline_inputs(params: TransformParams, options: ImageOptions) -> tuple[np.ndarray, ...]:
    """What the graph takes beside the encoded images, in its order."""
    # DALI wants the crop's place as a share of the free margin, and rounds that back to whole pixels.
    margins = np.maximum(params.resize_to - options.image_size, 1)
    places = (params.crop_offsets / margins).astype(np.float32)
    return (
        np.ascontiguousarray(params.crop_boxes[:, 1::-1]),
        np.ascontiguousarray(params.crop_boxes[:, :1:-1]),
        params.resize_to.astype(np.float32),
        np.ascontiguousarray(places[:, 0]),
        np.ascontiguousarray(places[:, 1]),
        params.flips.astype(np.int32),
        *_stage_inputs(params, options),
    )


def _stage_inputs(params: TransformParams, options: ImageOptions) -> Iterator[np.ndarray]:
    """Op, op_arg and, where there is use for it, matrix of one stage after the other."""
    of_stages = policies.op_matrices(SampledOps(params.ops, params.op_args), options.image_size, params.flips)
    for number, ops in enumerate(options.stages):
        yield np.ascontiguousarray(params.ops[:, number])
        yield np.ascontiguousarray(params.op_args[:, number])
        if policies.need_matrices(ops):
            yield np.ascontiguousarray(of_stages[:, number])


def _input_types(options: ImageOptions) -> list[tuple[types.DALIDataType, int]]:
    """Type and number of dimensions of all that the graph takes."""
    result = [
        *((types.UINT8, 1), (types.INT32, 1), (types.INT32, 1), (types.FLOAT, 1)),
        *((types.FLOAT, 0), (types.FLOAT, 0), (types.INT32, 0)),
    ]
    for ops in options.stages:
        result += [(types.INT32, 0), (types.FLOAT, 0)] + [(types.FLOAT, 2)] * policies.need_matrices(ops)
    return result


def make_resizer(options: ImageOptions, device: torch.device) -> Resizer | None:
    """What scales on the CPU; on a GPU DALI does."""
    return Resizer(options.interpolation, options.threads) if device.type == "cpu" else None


def build_pipeline(
    options: ImageOptions, feed: Callable[[], tuple], max_batch: int, device: torch.device, resizer: Resizer | None
) -> Pipeline:
    """One graph for both kinds of device. `feed` gives a batch's inputs, or StopIteration after the last."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    return _pipeline(
        options,
        feed,
        _input_types(options),
        resizer,
        batch_size=max_batch,
        num_threads=options.threads,
        device_id=device_id,
        prefetch_queue_depth=options.prefetch_batches,
        exec_dynamic=True,  # the executor that gives each batch memory of its own, see to_torch
    )


@pipeline_def(enable_conditionals=True)
def _pipeline(
    options: ImageOptions,
    feed: Callable[[], tuple],
    inputs: list[tuple[types.DALIDataType, int]],
    resizer: Resizer | None,
) -> tuple[DataNode, DataNode]:
    """(images, their whole height and width). resizer: on the CPU; None for DALI's own on a GPU."""
    encoded, starts, shapes, resize_to, tops, lefts, flips, *operations = fn.external_source(
        feed,
        num_outputs=len(inputs),
        dtype=[dtype for dtype, _ in inputs],
        ndim=[dimensions for _, dimensions in inputs],
    )
    images, sizes = _decode_crops(encoded, starts, shapes, "cpu" if resizer else "mixed")
    if resizer:
        images = fn.python_function(images, resize_to, function=resizer, batch_processing=True, output_layouts="HWC")
    else:
        images = fn.resize(
            images,
            size=resize_to,
            interp_type=INTERPOLATIONS[options.interpolation],
            antialias=True,
            subpixel_scale=False,
        )
    mean = [255 * value for value in options.mean]
    fill = [round(value) for value in mean]
    for ops in options.stages:
        count = 2 + policies.need_matrices(ops)
        stage, operations = Stage(*operations[:count]), operations[count:]
        images = apply_stage(images, stage, ops, fill, INTERPOLATIONS[options.interpolation])
    images = fn.crop_mirror_normalize(
        images,
        crop=(options.image_size, options.image_size),
        crop_pos_y=tops,
        crop_pos_x=lefts,
        mirror=flips,  # free here; `matrices` has turned the operations accordingly
        mean=mean,
        std=[255 * value for value in options.std],
        dtype=types.FLOAT,
        output_layout="HWC",
    )
    return images, sizes


def _decode_crops(encoded: DataNode, starts: DataNode, shapes: DataNode, device: str) -> tuple[DataNode, DataNode]:
    """(the crop_boxes, whole height and width of their images). starts, shapes: height, width."""
    # What has no proper header fails here. The decoder (2.4.0) does not wait for its threads when it finds that, or
    # a window beyond the image, and the process dies.
    sizes = fn.peek_image_shape(encoded, adjust_orientation=False)[:2]
    fits = starts + shapes <= sizes
    crop_boxes = fn.decoders.image_slice(
        encoded,
        device=device,
        start=starts * fits,
        shape=shapes * fits + (fits == 0),
        axis_names="HW",
        adjust_orientation=False,  # PIL does not turn images by their EXIF tag either
        jpeg_fancy_upsampling=True,  # lets nvJPEG scale up chroma as libjpeg, and so PIL, does
        hw_decoder_load=0.0,  # else a share of each batch is decoded by other means: pixels would depend on the batch
    )
    return crop_boxes, sizes


def to_torch(output: object, device: torch.device) -> torch.Tensor:
    """DALI's (B, S, S, 3) output as (B, 3, S, S): its memory is channels_last as it stands.

    On the CPU the tensor is DALI's memory, handed over: DALI writes to it again only when the tensor is gone, and it
    outlives the pipeline. On a GPU DALI's memory would go back to it with the tensor, while PyTorch's stream may still
    read from it, so the batch is copied. It is complete when share_outputs has returned it. The copy is queued on
    PyTorch's current stream, and copy_to_external makes DALI's stream wait for it before it writes to the buffer
    again. So release_outputs may follow at once, and whatever PyTorch queues after it on that stream sees the whole
    batch.
    """
    dense = output.as_tensor()
    if device.type == "cpu":
        return torch.from_dlpack(dense).permute(0, 3, 1, 2)
    images = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    feed_ndarray(dense, images, cuda_stream=torch.cuda.current_stream(device))
    return images.permute(0, 3, 1, 2)

"""From the encoded images in shards to normalised batches on the training device, through one DALI graph.

loader.py says which samples. Here it is settled how each is looked at (its view), and DALI does the work: decode a
window, resize it, cut out the crop, mirror, normalise. DALI draws nothing by itself: every number comes in with
the batch, so that the pixels of a batch are a pure function of its request. Only this file imports DALI.

Axes: B images of a batch, S the side of the square images that come out.
"""

import errno
import io
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image, UnidentifiedImageError

from dataio.index import Manifest

_INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_EVAL_RESIZES = ("squash", "short")
_FAULTS_SHOWN = 5

#: Uniform draws of a training image: an area and an aspect ratio for each try, left, top, flip, and one spare.
DRAWS_PER_IMAGE = 24
_TRIES = 10  # as in torchvision's RandomResizedCrop
_LEFT, _TOP, _FLIP = 2 * _TRIES, 2 * _TRIES + 1, 2 * _TRIES + 2


@dataclass(frozen=True)
class ImageOptions:
    """How images are cut, scaled and decoded; the defaults are the official recipe.

    Raises ValueError if a value has no meaning.
    """

    size: int = 224  # pixels, both sides
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of R, G, B in [0, 1]: ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"  # or "bilinear"; both with antialiasing, as PIL has them
    crop_scale: tuple[float, float] = (0.08, 1.0)  # training: the crop's share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # training: the crop's width / height
    flip_probability: float = 0.5  # training
    eval_resize: str = "squash"  # both sides alike; "short": the short side, keeping the aspect ratio
    crop_fraction: float = 224 / 256  # evaluation: the crop's side / the side resized to; 1 is no crop
    threads: int = 4  # of the CPU, per rank
    prefetch_batches: int = 2  # under way while the caller computes

    def __post_init__(self) -> None:
        choices = {"interpolation": tuple(_INTERPOLATIONS), "eval_resize": _EVAL_RESIZES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {' or '.join(allowed)}")
        for name in ("size", "threads", "prefetch_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction is {self.crop_fraction}; use a number above 0, at most 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; use (smallest, largest) above 0, at most 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio is {self.crop_ratio}; use (smallest, largest) above 0")


class Views(NamedTuple):
    """How each image of a batch is looked at: a window of it is scaled, and S×S pixels are cut from that."""

    windows: np.ndarray  # (B, 4) int32: left, top, width, height in pixels of the stored image
    resized: np.ndarray  # (B, 2) int32: height and width that the window is scaled to, each ≥ S
    crops: np.ndarray  # (B, 2) int32: top and left of the S×S crop in the scaled window
    flips: np.ndarray  # (B,) bool: mirrored left to right at the end


class Request(NamedTuple):
    """A batch to be: the position of its first sample, (B,) int64 rows of the manifest, and their views."""

    position: int
    samples: np.ndarray
    views: Views


def crop_windows(
    draws: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Windows distributed as those of torchvision's RandomResizedCrop: (B, 4) int32, left, top, width, height.

    draws: (B, DRAWS_PER_IMAGE) uniform in [0, 1). widths, heights: (B,) pixels. scale: range of the window's share
    of the area. ratio: range of its width / height. The first of ten tries that fits into the image counts; if
    none does, the largest centred window whose shape lies within `ratio`.
    """
    widths, heights = widths.astype(np.int64)[:, None], heights.astype(np.int64)[:, None]
    areas = widths * heights * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
    flattest, longest = np.log(ratio)
    shapes = np.exp(flattest + (longest - flattest) * draws[:, _TRIES : 2 * _TRIES])
    tried = np.rint(np.sqrt(np.stack([areas * shapes, areas / shapes])))  # (2, B, tries): width, height
    fits = ((tried > 0) & (tried <= np.stack([widths, heights]))).all(axis=0)
    width, height = np.take_along_axis(tried, fits.argmax(axis=1)[None, :, None], axis=2)  # (B, 1) each
    left = np.floor(draws[:, _LEFT, None] * (widths - width + 1))
    top = np.floor(draws[:, _TOP, None] * (heights - height + 1))
    windows = np.concatenate([left, top, width, height], axis=1)
    fallback = _centre_windows(widths, heights, ratio)
    return np.where(fits.any(axis=1, keepdims=True), windows, fallback).astype(np.int32)


def _centre_windows(widths: np.ndarray, heights: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The whole image, less what makes it longer or taller than `ratio` allows: (B, 1) each → (B, 4)."""
    width = np.minimum(widths, np.rint(heights * ratio[1]))
    height = np.minimum(heights, np.rint(widths / ratio[0]))
    return np.concatenate([(widths - width) // 2, (heights - height) // 2, width, height], axis=1)


def train_views(rows: np.ndarray, draws: np.ndarray, options: ImageOptions) -> Views:
    """A random window scaled to S×S, and a random flip, from (B,) manifest rows and (B, DRAWS_PER_IMAGE)."""
    windows = crop_windows(draws, rows["width"], rows["height"], options.crop_scale, options.crop_ratio)
    resized = np.full((len(rows), 2), options.size, dtype=np.int32)
    return Views(windows, resized, np.zeros_like(resized), draws[:, _FLIP] < options.flip_probability)


def eval_views(rows: np.ndarray, options: ImageOptions) -> Views:
    """The whole image resized as `eval_resize` says, and its centre; rounded as timm and torchvision do."""
    sides = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
    side = int(options.size / options.crop_fraction)
    if options.eval_resize == "squash":
        resized = np.full_like(sides, side)
    else:
        resized = (side * sides / sides.min(axis=1, keepdims=True)).astype(np.int64)
    crops = np.rint((resized - options.size) / 2)  # half to even
    windows = np.concatenate([np.zeros_like(sides), sides[:, ::-1]], axis=1)
    flips = np.zeros(len(rows), dtype=bool)
    return Views(windows.astype(np.int32), resized.astype(np.int32), crops.astype(np.int32), flips)


class ShardFiles:
    """The encoded images of a packed folder. Each shard is opened once, and closed when this object goes.

    Raises RuntimeError if a shard cannot be opened.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        for shard in manifest.shards:
            try:
                self._files.append(os.open(manifest.folder / shard.name, os.O_RDONLY))
            except OSError as error:
                remedy = _check_folder(manifest)
                if error.errno == errno.EMFILE:
                    remedy = f"allow more than {len(manifest.shards)} with ulimit -n, or pack larger shards"
                raise RuntimeError(f"cannot open {shard.name}: {error.strerror}; {remedy}") from error

    def read(self, sample: int) -> bytes:
        """The encoded image. Raises RuntimeError, naming the sample, if it cannot be read whole."""
        row = self._manifest.samples[sample]
        wanted, fault = int(row["bytes"]), "its shard ends too early"
        try:
            data = os.pread(self._files[row["shard"]], wanted, int(row["offset"]))
        except OSError as error:
            data, fault = b"", error.strerror
        if len(data) != wanted:
            raise RuntimeError(
                f"cannot read {self._manifest.describe(sample)}: {fault}; {_check_folder(self._manifest)}"
            )
        return data


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _check_folder(manifest: Manifest) -> str:
    return f"check the folder with: python -m dataio.verify {manifest.folder}"


def decode_batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[Request],
    max_batch: int,
    device: torch.device,
) -> Iterator[tuple[Request, torch.Tensor]]:
    """Each request with its images: (B, 3, S, S) float32, normalised, channels_last, on `device`.

    nvJPEG decodes on a CUDA device, libjpeg on the CPU. While the caller has a batch, `prefetch_batches` more are
    under way. A request holds 1 to `max_batch` samples. Raises RuntimeError, naming the sample, if an image cannot
    be read or decoded; no batch follows then.
    """
    shards = ShardFiles(manifest)
    under_way: deque[Request] = deque()  # oldest first; DALI answers in this order

    def feed() -> tuple:
        request = next(requests)  # DALI takes its StopIteration for the end
        encoded = [np.frombuffer(shards.read(sample), dtype=np.uint8) for sample in request.samples]
        under_way.append(request)
        return encoded, *_graph_inputs(request.views, options.size)

    pipeline = _graph(options, feed, max_batch, device)
    pipeline.schedule_run()  # feeds and starts the first `prefetch_batches`; every later call, the next one
    while under_way:
        try:
            (output,) = pipeline.share_outputs()
        except RuntimeError as error:  # after which DALI's pipeline cannot be used again
            raise _decoding_error(manifest, shards, under_way[0].samples, error) from error
        images = _to_torch(output, device)
        pipeline.release_outputs()
        request = under_way.popleft()
        pipeline.schedule_run()
        yield request, images


def _graph_inputs(views: Views, size: int) -> tuple[np.ndarray, ...]:
    """What the graph takes beside the encoded images, in its order."""
    # DALI wants the crop's place as a share of the free margin, and rounds that back to whole pixels.
    margins = np.maximum(views.resized - size, 1)
    places = (views.crops / margins).astype(np.float32)
    return (
        np.ascontiguousarray(views.windows[:, :2]),
        np.ascontiguousarray(views.windows[:, 2:]),
        views.resized.astype(np.float32),
        np.ascontiguousarray(places[:, 0]),
        np.ascontiguousarray(places[:, 1]),
        views.flips.astype(np.int32),
    )


def _graph(options: ImageOptions, feed: Callable[[], tuple], max_batch: int, device: torch.device) -> Pipeline:
    """One graph for both kinds of device. `feed` gives a batch's inputs, or StopIteration after the last."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    pipeline = Pipeline(max_batch, options.threads, device_id, prefetch_queue_depth=options.prefetch_batches)
    with pipeline:
        encoded, starts, shapes, resized, tops, lefts, flips = fn.external_source(
            feed,
            num_outputs=7,
            ndim=[1, 1, 1, 1, 0, 0, 0],
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.FLOAT, types.INT32],
        )
        images = fn.decoders.image_slice(
            encoded,
            device="cpu" if device_id is None else "mixed",
            start=starts,
            shape=shapes,
            axis_names="WH",
            adjust_orientation=False,  # PIL does not turn images by their EXIF tag either
            jpeg_fancy_upsampling=True,  # lets nvJPEG scale up chroma as libjpeg, and so PIL, does
        )
        images = fn.resize(
            images,
            size=resized,
            interp_type=_INTERPOLATIONS[options.interpolation],
            antialias=True,
            subpixel_scale=False,
        )
        images = fn.crop_mirror_normalize(
            images,
            crop=(options.size, options.size),
            crop_pos_y=tops,
            crop_pos_x=lefts,
            mirror=flips,
            mean=[255 * mean for mean in options.mean],
            std=[255 * std for std in options.std],
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        pipeline.set_outputs(images)
    return pipeline


def _to_torch(output: object, device: torch.device) -> torch.Tensor:
    """DALI's (B, S, S, 3) output, copied once, as (B, 3, S, S): its memory is channels_last as it stands.

    On a GPU the batch is complete when share_outputs has returned it. The copy is queued on PyTorch's current
    stream, and copy_to_external makes DALI's stream wait for it before it writes to the buffer again. So
    release_outputs may follow at once, and whatever PyTorch queues after it on that stream sees the whole batch.
    """
    dense = output.as_tensor()
    images = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(dense, images, cuda_stream=stream)
    return images.permute(0, 3, 1, 2)


def _decoding_error(manifest: Manifest, shards: ShardFiles, samples: np.ndarray, error: RuntimeError) -> RuntimeError:
    """DALI does not say which image of a batch it failed on: names those that PIL cannot decode either."""
    faults = []
    for sample in samples:
        try:
            Image.open(io.BytesIO(shards.read(sample))).convert("RGB")
        except UnidentifiedImageError:
            faults.append(f"{manifest.describe(sample)}: not an image")
        except Exception as fault:  # PIL raises whatever its plugins raise, and a shard may be gone by now
            faults.append(f"{manifest.describe(sample)}: {fault}")
    if not faults:
        return RuntimeError(f"DALI failed on samples {samples.tolist()}, which PIL decodes: {error}")
    if len(faults) > _FAULTS_SHOWN:
        faults[_FAULTS_SHOWN:] = [f"and {len(faults) - _FAULTS_SHOWN} more"]
    return RuntimeError(
        f"cannot decode {', '.join(faults)}; {_check_folder(manifest)} and pack it again without broken images"
    )

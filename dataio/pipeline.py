"""From the encoded images in shards to normalised batches on the training device, through one DALI graph.

loader.py says which samples. Here it is settled how each is looked at (its view), and DALI does the work: decode a
window, resize it, change its pixels by the operations of recipes.py, cut out the crop, mirror, normalise. DALI draws
nothing by itself: every number comes in with the batch, so that the pixels of a sample are a pure function of its
view. Only this file and operations.py import DALI.

Axes: B images of a batch, S the side of the square images that come out, L stages of operations.
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
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image, UnidentifiedImageError

from dataio import recipes
from dataio.index import Manifest
from dataio.operations import Stage, apply_stage
from dataio.recipes import Kind, Operations, RandAugment

_INTERPOLATIONS = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
_EVAL_RESIZES = ("squash", "short")
_RECIPES = ("simple", "three-augment", "rand-augment")
_FAULTS_SHOWN = 5

#: Uniform draws of a training window: an area and an aspect ratio for each try, left, top, flip, and one spare.
WINDOW_DRAWS = 24
_TRIES = 10  # as in torchvision's RandomResizedCrop
_LEFT, _TOP, _FLIP = 2 * _TRIES, 2 * _TRIES + 1, 2 * _TRIES + 2


@dataclass(frozen=True)
class ImageOptions:
    """How images are cut, scaled and decoded; the defaults are the official recipe.

    Raises ValueError if a value has no meaning.
    """

    image_size: int = 224  # pixels, both sides
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of R, G, B in [0, 1]: ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"  # or "bilinear"; both with antialiasing, as PIL has them
    crop_scale: tuple[float, float] = (0.08, 1.0)  # training: the crop's share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # training: the crop's width / height
    flip_probability: float = 0.5  # training
    recipe: str = "rand-augment"  # training, between crop and normalising; or "three-augment", "simple": nothing
    rand_augment: RandAugment = RandAugment()
    color_jitter: float | None = None  # training: largest share by which colours change; None: the recipe's own
    eval_resize: str = "squash"  # both sides alike; "short": the short side, keeping the aspect ratio
    eval_crop_fraction: float = 224 / 256  # evaluation: the crop's side / the side resized to; 1 is no crop
    threads: int = 4  # of the CPU, per rank
    prefetch_batches: int = 2  # under way while the caller computes

    def __post_init__(self) -> None:
        choices = {"interpolation": tuple(_INTERPOLATIONS), "eval_resize": _EVAL_RESIZES, "recipe": _RECIPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {' or '.join(allowed)}")
        for name in ("image_size", "threads", "prefetch_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1")
        if not 0 < self.eval_crop_fraction <= 1:
            raise ValueError(f"eval_crop_fraction is {self.eval_crop_fraction}; use a number above 0, at most 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; use (smallest, largest) above 0, at most 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"crop_ratio is {self.crop_ratio}; use (smallest, largest) above 0")
        if self.color_jitter is not None and not 0 <= self.color_jitter < np.inf:
            raise ValueError(f"color_jitter is {self.color_jitter}; use a finite number of at least 0")
        if self.recipe == "rand-augment" and self.color_jitter:
            raise ValueError(
                f"color_jitter is {self.color_jitter}, and RandAugment replaces it; set it to 0, or recipe to simple"
            )

    @property
    def jitter(self) -> float:
        """Strength of the colour jitter, 0 without one; DeiT III's 0.3 after 3-Augment if nothing else is said."""
        if self.color_jitter is None:
            return 0.3 if self.recipe == "three-augment" else 0.0
        return self.color_jitter

    @property
    def stages(self) -> tuple[tuple[Kind, ...], ...]:
        """The operations that a training image passes: of each stage, the kinds that it may have."""
        of_recipe = {
            "simple": (),
            "three-augment": (recipes.THREE_AUGMENT,),
            "rand-augment": (recipes.RAND_AUGMENT,) * self.rand_augment.layers,
        }
        return of_recipe[self.recipe] + (recipes.COLOR_JITTER,) * len(recipes.COLOR_JITTER) * (self.jitter > 0)

    @property
    def draws_per_image(self) -> int:
        """Uniform draws that `train_views` takes."""
        return WINDOW_DRAWS + recipes.DRAWS * len(self.stages)


class Views(NamedTuple):
    """How each image of a batch is looked at: a window of it is scaled, S×S pixels are cut from that, and changed."""

    windows: np.ndarray  # (B, 4) int32: left, top, width, height in pixels of the stored image
    resized: np.ndarray  # (B, 2) int32: height and width that the window is scaled to, each ≥ S
    crops: np.ndarray  # (B, 2) int32: top and left of the S×S crop in the scaled window
    flips: np.ndarray  # (B,) bool: mirrored left to right before the operations
    kinds: np.ndarray  # (B, L) int32: the operations, see recipes.Operations
    amounts: np.ndarray  # (B, L) float32


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

    draws: (B, WINDOW_DRAWS or more) uniform in [0, 1). widths, heights: (B,) pixels. scale: range of the window's share
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
    """A random window scaled to S×S, a random flip, and the recipe's operations.

    rows: (B,) of the manifest. draws: (B, draws_per_image) uniform in [0, 1).
    """
    windows = crop_windows(draws, rows["width"], rows["height"], options.crop_scale, options.crop_ratio)
    resized = np.full((len(rows), 2), options.image_size, dtype=np.int32)
    flips = draws[:, _FLIP] < options.flip_probability
    return Views(windows, resized, np.zeros_like(resized), flips, *_operations(draws[:, WINDOW_DRAWS:], options))


def _operations(draws: np.ndarray, options: ImageOptions) -> Operations:
    """Those of the recipe, and of a colour jitter after it: (B, L × recipes.DRAWS) → (B, L)."""
    parts = [recipes.no_operations(len(draws), 0)]
    if options.jitter:
        draws, of_jitter = np.split(draws, [-recipes.DRAWS * len(recipes.COLOR_JITTER)], axis=1)
    if options.recipe == "rand-augment":
        parts.append(recipes.rand_augment(draws, options.rand_augment))
    elif options.recipe == "three-augment":
        parts.append(recipes.three_augment(draws))
    if options.jitter:
        parts.append(recipes.color_jitter(of_jitter, options.jitter))
    return Operations(*(np.concatenate(fields, axis=1) for fields in zip(*parts, strict=True)))


def eval_views(rows: np.ndarray, options: ImageOptions) -> Views:
    """The whole image resized as `eval_resize` says, and its centre; rounded as timm and torchvision do."""
    sides = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
    side = int(options.image_size / options.eval_crop_fraction)
    if options.eval_resize == "squash":
        resized = np.full_like(sides, side)
    else:
        resized = (side * sides / sides.min(axis=1, keepdims=True)).astype(np.int64)
    crops = np.rint((resized - options.image_size) / 2)  # half to even
    windows = np.concatenate([np.zeros_like(sides), sides[:, ::-1]], axis=1)
    flips = np.zeros(len(rows), dtype=bool)
    none = recipes.no_operations(len(rows), len(options.stages))
    return Views(windows.astype(np.int32), resized.astype(np.int32), crops.astype(np.int32), flips, *none)


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
        return encoded, *_graph_inputs(request.views, options.image_size)

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
        *_stage_inputs(views, size),
    )


def _stage_inputs(views: Views, size: int) -> Iterator[np.ndarray]:
    """Kind, amount and matrix of one stage after the other."""
    of_stages = recipes.matrices(Operations(views.kinds, views.amounts), size, views.flips)
    for number in range(views.kinds.shape[1]):
        for values in (views.kinds, views.amounts, of_stages):
            yield np.ascontiguousarray(values[:, number])


def _graph(options: ImageOptions, feed: Callable[[], tuple], max_batch: int, device: torch.device) -> Pipeline:
    """One graph for both kinds of device. `feed` gives a batch's inputs, or StopIteration after the last."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    return _definition(
        options,
        feed,
        "cpu" if device_id is None else "mixed",
        batch_size=max_batch,
        num_threads=options.threads,
        device_id=device_id,
        prefetch_queue_depth=options.prefetch_batches,
    )


@pipeline_def(enable_conditionals=True)
def _definition(options: ImageOptions, feed: Callable[[], tuple], decoder: str) -> DataNode:
    encoded, starts, shapes, resized, tops, lefts, flips, *operations = fn.external_source(
        feed,
        num_outputs=7 + 3 * len(options.stages),
        ndim=[1, 1, 1, 1, 0, 0, 0, *(0, 0, 2) * len(options.stages)],
        dtype=[
            *(types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.FLOAT, types.INT32),
            *(types.INT32, types.FLOAT, types.FLOAT) * len(options.stages),
        ],
    )
    images = fn.decoders.image_slice(
        encoded,
        device=decoder,
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
    mean = [255 * value for value in options.mean]
    for number, kinds in enumerate(options.stages):
        stage = Stage(*operations[3 * number : 3 * number + 3])
        fill = [round(value) for value in mean]
        images = apply_stage(images, stage, kinds, fill, _INTERPOLATIONS[options.interpolation])
    return fn.crop_mirror_normalize(
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


def _to_torch(output: object, device: torch.device) -> torch.Tensor:
    """DALI's (B, S, S, 3) output as (B, 3, S, S): its memory is channels_last as it stands.

    On the CPU the tensor is DALI's memory, handed over: DALI never writes to it again. On a GPU DALI's memory would
    go back to it with the tensor, while PyTorch's stream may still read from it, so the batch is copied. It is
    complete when share_outputs has returned it. The copy is queued on PyTorch's current stream, and copy_to_external
    makes DALI's stream wait for it before it writes to the buffer again. So release_outputs may follow at once, and
    whatever PyTorch queues after it on that stream sees the whole batch.
    """
    dense = output.as_tensor()
    if device.type == "cpu":
        return torch.from_dlpack(dense).permute(0, 3, 1, 2)
    images = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    feed_ndarray(dense, images, cuda_stream=torch.cuda.current_stream(device))
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

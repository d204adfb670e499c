"""From the encoded images in shards to normalised batches on the training device, through one DALI graph.

loader.py says which samples. Here it is settled how each is looked at (its view), and DALI does the work: decode a
window, resize it, change its pixels by the operations of recipes.py, cut out the crop, mirror, normalise. DALI draws
nothing by itself: every number comes in with the batch, so that the pixels of a sample are a pure function of its
view. Only this file and operations.py import DALI.

Axes: B images of a batch, S the side of the square images that come out, L stages of operations.
"""

import dataclasses
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
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
from dataio.cache import ShardCache, open_shards
from dataio.index import Manifest
from dataio.operations import INTERPOLATIONS, Stage, apply_stage
from dataio.recipes import Kind, Operations, RandAugment
from dataio.shards import BrokenSampleError, ShardFiles

_EVAL_RESIZES = ("squash", "short")
_RECIPES = ("simple", "three-augment", "rand-augment")
_FAULTS_SHOWN = 5
_NEIGHBOURS_TRIED = 100

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
        choices = {"interpolation": tuple(INTERPOLATIONS), "eval_resize": _EVAL_RESIZES, "recipe": _RECIPES}
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
    def plain(self) -> "ImageOptions":
        """The same without operations: a graph that is built in a tenth of the time."""
        return dataclasses.replace(self, recipe="simple", color_jitter=0.0)

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


class Replaced(NamedTuple):
    """A broken image: its place in the batch, its row of the manifest, why, and the row that stands for it."""

    place: int
    sample: int
    reason: str
    by: int


class Request(NamedTuple):
    """A batch to be: the position of its first sample, (B,) int64 rows of the manifest, and their views.

    shards: needed for it and soon after, in that order; only remote data sets care.
    """

    position: int
    samples: np.ndarray
    views: Views
    shards: tuple[int, ...] = ()
    replaced: tuple[Replaced, ...] = ()


#: A request, and what is to be replaced in it → the request with other samples and their views.
Replace = Callable[[Request, list[Replaced]], Request]


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


def decode_batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[Request],
    max_batch: int,
    device: torch.device,
    replace: Replace | None = None,
) -> Iterator[tuple[Request, torch.Tensor]]:
    """Each request with its images: (B, 3, S, S) float32, normalised, channels_last, on `device`.

    nvJPEG decodes on a CUDA device, libjpeg on the CPU. While the caller has a batch, `prefetch_batches` more are
    under way. A request holds 1 to `max_batch` samples. With `replace`, a broken image gives way to the next sample
    of its shard that can be decoded, and the request that comes back says so. Raises RuntimeError, naming the
    sample, if an image cannot be read, or cannot be decoded and is not to be replaced; no batch follows then.
    """
    with closing(open_shards(manifest)) as shards:
        bench = _Bench(manifest, shards, options, device, replace)
        batches = map(bench.load, requests)
        again: list[_Loaded] = []
        while True:
            under_way: deque[_Loaded] = deque()  # oldest first; DALI answers in this order
            try:
                yield from _decode(bench, chain(again, batches), under_way, max_batch)
                return
            except _DecodingError as error:  # after which DALI's pipeline cannot be used again
                again = bench.mend(under_way, error)


class _Loaded(NamedTuple):
    """A request and its encoded images."""

    request: Request
    encoded: list[np.ndarray]


class _DecodingError(Exception):
    """DALI's: it does not say which image of a batch it failed on."""


def _decode(
    bench: "_Bench", batches: Iterator[_Loaded], under_way: deque[_Loaded], max_batch: int
) -> Iterator[tuple[Request, torch.Tensor]]:
    """Each batch, decoded by one pipeline. Those that were fed and are not answered yet are in `under_way`."""

    def feed() -> tuple:
        under_way.append(next(batches))  # DALI takes its StopIteration for the end
        request, encoded = under_way[-1]
        return encoded, *_graph_inputs(request.views, bench.options, bench.device)

    pipeline = _graph(bench.options, feed, max_batch, bench.device)
    pipeline.schedule_run()  # feeds and starts the first `prefetch_batches`; every later call, the next one
    while under_way:
        try:
            (output,) = pipeline.share_outputs()
        except RuntimeError as error:
            raise _DecodingError(*error.args) from error
        images = _to_torch(output, bench.device)
        pipeline.release_outputs()
        request = under_way.popleft().request
        pipeline.schedule_run()
        yield request, images


@dataclass(frozen=True)
class _Bench:
    """Where encoded images are laid out, looked at one by one if DALI refused a batch, and broken ones replaced."""

    manifest: Manifest
    shards: ShardFiles | ShardCache
    options: ImageOptions
    device: torch.device
    replace: Replace | None

    def load(self, request: Request) -> _Loaded:
        """A request with its images as they lie in the shards."""
        self.shards.hold(request.shards)
        encoded, faults = [], {}
        for place, sample in enumerate(request.samples):
            try:
                encoded.append(_as_array(self.shards.read(sample)))
            except BrokenSampleError as error:
                encoded.append(_as_array(b""))
                faults[place] = str(error)
        loaded = _Loaded(request, encoded)
        return self._without(faults, loaded) if faults else loaded

    def mend(self, under_way: Iterable[_Loaded], error: Exception) -> list[_Loaded]:
        """The batches to be decoded again. Raises RuntimeError if none has a broken image, or it is not replaced."""
        mended, found = [], False
        for request, encoded in under_way:
            refused = _refused(encoded, request.views, self.options, self.device)
            faults = {place: self._reason(request.samples[place], encoded[place], refused[place]) for place in refused}
            mended.append(self._without(faults, _Loaded(request, encoded)))
            found = found or bool(faults)
        if not found:
            raise RuntimeError(f"DALI failed on a batch, and on none of its images alone: {error}") from error
        return mended

    def _without(self, faults: dict[int, str], loaded: _Loaded) -> _Loaded:
        """The batch with stand-ins for the images at these places."""
        request, encoded = loaded
        if not faults:
            return loaded
        if self.replace is None:
            raise self._error({int(request.samples[place]): reason for place, reason in faults.items()})
        replaced = []
        for place, reason in faults.items():
            sample = int(request.samples[place])
            by, encoded[place] = self._stand_in(sample, reason)
            replaced.append(Replaced(place, sample, reason, by))
        return _Loaded(self.replace(request, replaced), encoded)

    def _stand_in(self, sample: int, reason: str) -> tuple[int, np.ndarray]:
        """The next sample of the shard that can be decoded whole, after the last the first; and its encoded image.

        It depends on the broken sample alone, so that every rank and every resumed run chooses the same.
        """
        rows = self.manifest.samples
        first, end = np.searchsorted(rows["shard"], [rows["shard"][sample], rows["shard"][sample] + 1])
        for step in range(1, min(end - first, _NEIGHBOURS_TRIED + 1)):
            other = int(first + (sample - first + step) % (end - first))
            try:
                encoded = _as_array(self.shards.read(other))
            except BrokenSampleError:
                continue
            if not _refused([encoded], eval_views(rows[[other]], self.options), self.options, self.device):
                return other, encoded
        raise self._error({sample: f"{reason}, and no sample after it can stand for it"})

    def _reason(self, sample: int, encoded: np.ndarray, refusal: str) -> str:
        """Why an image cannot be decoded, in PIL's words: DALI has only numbers."""
        row = self.manifest.samples[sample]
        try:
            image = Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")
        except UnidentifiedImageError:
            return "not an image"
        except Exception as fault:  # PIL raises whatever its plugins raise
            return str(fault)
        if image.size != (row["width"], row["height"]):
            return f"it has {image.width}×{image.height} pixels where {row['width']}×{row['height']} were packed"
        said = refusal.partition("encountered:")[2].partition("Current pipeline")[0]
        return f"DALI refuses it, though PIL decodes it: {' '.join((said or refusal).split())}"

    def _error(self, faults: dict[int, str]) -> RuntimeError:
        """faults: reasons by sample."""
        named = [f"{self.manifest.describe(sample)}: {reason}" for sample, reason in faults.items()]
        if len(named) > _FAULTS_SHOWN:
            named[_FAULTS_SHOWN:] = [f"and {len(named) - _FAULTS_SHOWN} more"]
        return RuntimeError(
            f"cannot decode {', '.join(named)}; {self.manifest.remedy} and pack it again without broken images"
        )


def _as_array(encoded: bytes) -> np.ndarray:
    return np.frombuffer(encoded, dtype=np.uint8)


def _refused(encoded: list[np.ndarray], views: Views, options: ImageOptions, device: torch.device) -> dict[int, str]:
    """What DALI says against each of these images if it gets it alone, by place; nothing against most."""
    options = dataclasses.replace(options.plain, prefetch_batches=1)
    views = views._replace(kinds=views.kinds[:, :0], amounts=views.amounts[:, :0])  # which refuse nothing
    left = deque(range(len(encoded)))
    refused = {}

    def feed() -> tuple:
        place = left[0]
        return [encoded[place]], *_graph_inputs(Views(*(field[[place]] for field in views)), options, device)

    while left:
        pipeline = _graph(options, feed, 1, device)  # 15 ms on the CPU
        try:
            while left:
                pipeline.run()
                left.popleft()
        except RuntimeError as error:  # the end of this pipeline
            refused[left.popleft()] = str(error)
    return refused


def _graph_inputs(views: Views, options: ImageOptions, device: torch.device) -> tuple[np.ndarray, ...]:
    """What the graph takes beside the encoded images, in its order."""
    turned = _turned(views) & (device.type == "cpu")
    # DALI wants the crop's place as a share of the free margin, and rounds that back to whole pixels.
    margins = np.maximum(views.resized - options.image_size, 1)
    places = (views.crops / margins).astype(np.float32)
    return (
        np.ascontiguousarray(views.windows[:, :2]),
        np.ascontiguousarray(views.windows[:, 2:]),
        turned.astype(np.int32),
        np.where(turned[:, None], views.resized[:, ::-1], views.resized).astype(np.float32),
        np.ascontiguousarray(places[:, 0]),
        np.ascontiguousarray(places[:, 1]),
        views.flips.astype(np.int32),
        *_stage_inputs(views, options),
    )


def _turned(views: Views) -> np.ndarray:
    """(B,) bool: windows that are resized lying on their side, which takes the CPU less time.

    DALI starts with the axis that shrinks more. Along columns it uses vector instructions, along rows of uint8 it does
    not, and then takes longer than for turning the window over and back. The sums are the same.
    """
    width, height = views.windows[:, 2].astype(np.int64), views.windows[:, 3].astype(np.int64)
    return width * views.resized[:, 0] > height * views.resized[:, 1]


def _stage_inputs(views: Views, options: ImageOptions) -> Iterator[np.ndarray]:
    """Kind, amount and, where there is use for it, matrix of one stage after the other."""
    of_stages = recipes.matrices(Operations(views.kinds, views.amounts), options.image_size, views.flips)
    for number, kinds in enumerate(options.stages):
        yield np.ascontiguousarray(views.kinds[:, number])
        yield np.ascontiguousarray(views.amounts[:, number])
        if recipes.have_matrices(kinds):
            yield np.ascontiguousarray(of_stages[:, number])


def _input_types(options: ImageOptions) -> list[tuple[types.DALIDataType, int]]:
    """Type and number of dimensions of all that the graph takes."""
    result = [
        *((types.UINT8, 1), (types.INT32, 1), (types.INT32, 1), (types.INT32, 0), (types.FLOAT, 1)),
        *((types.FLOAT, 0), (types.FLOAT, 0), (types.INT32, 0)),
    ]
    for kinds in options.stages:
        result += [(types.INT32, 0), (types.FLOAT, 0)] + [(types.FLOAT, 2)] * recipes.have_matrices(kinds)
    return result


def _graph(options: ImageOptions, feed: Callable[[], tuple], max_batch: int, device: torch.device) -> Pipeline:
    """One graph for both kinds of device. `feed` gives a batch's inputs, or StopIteration after the last."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    return _definition(
        options,
        feed,
        _input_types(options),
        "cpu" if device_id is None else "mixed",
        batch_size=max_batch,
        num_threads=options.threads,
        device_id=device_id,
        prefetch_queue_depth=options.prefetch_batches,
        exec_dynamic=True,  # the executor that gives each batch memory of its own, see _to_torch
    )


@pipeline_def(enable_conditionals=True)
def _definition(
    options: ImageOptions, feed: Callable[[], tuple], inputs: list[tuple[types.DALIDataType, int]], decoder: str
) -> DataNode:
    encoded, starts, shapes, turned, resized, tops, lefts, flips, *operations = fn.external_source(
        feed,
        num_outputs=len(inputs),
        dtype=[dtype for dtype, _ in inputs],
        ndim=[dimensions for _, dimensions in inputs],
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
    if turned == 1:
        images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
    images = fn.resize(
        images,
        size=resized,
        interp_type=INTERPOLATIONS[options.interpolation],
        antialias=True,
        subpixel_scale=False,
    )
    if turned == 1:
        images = fn.transpose(images, perm=[1, 0, 2], transpose_layout=False)
    mean = [255 * value for value in options.mean]
    fill = [round(value) for value in mean]
    for kinds in options.stages:
        count = 2 + recipes.have_matrices(kinds)
        stage, operations = Stage(*operations[:count]), operations[count:]
        images = apply_stage(images, stage, kinds, fill, INTERPOLATIONS[options.interpolation])
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

    On the CPU the tensor is DALI's memory, handed over: DALI writes to it again only when the tensor is gone, and it
    outlives the pipeline. On a GPU DALI's memory would
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

"""How each image is looked at, as pure functions: its window, scale and crop, its flip, the sampled ops.

index.py draws the numbers, pipeline.py does what is said here. Nothing here imports PyTorch or DALI.

Axes: B images of a batch, S the side of the square images that come out, L stages of operations.
"""

from typing import Literal, NamedTuple

import numpy as np
from pydantic import model_validator
from typing_extensions import Self

from dataio.augment import policies
from dataio.augment.policies import Op, RandAugment, SampledOps
from dataio.options import Count, Fraction, NonNegative, Options, Positive, PositiveFraction

#: Uniform draws of a training window: an area and an aspect ratio for each try, left, top, flip, and one spare.
CROP_DRAWS = 24
_TRIES = 10  # as in torchvision's RandomResizedCrop
_LEFT, _TOP, _FLIP = 2 * _TRIES, 2 * _TRIES + 1, 2 * _TRIES + 2


class ImageOptions(Options):
    """How images are decoded, cropped, resized and augmented one by one; the defaults are the official recipe."""

    image_size: Count = 224  # pixels, height and width
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)  # random resized crop: share of the area
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # and its width / height
    hflip: Fraction = 0.5  # probability of a horizontal flip
    augmentation: Literal["rand-augment", "three-augment", "simple"] = "rand-augment"  # after crop and flip
    rand_augment: RandAugment = RandAugment()
    color_jitter: NonNegative | None = None  # largest change; null: 0.3 after three-augment, else none
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # both with antialiasing, as in PIL
    crop_mode: Literal["squash", "center"] = "squash"  # evaluation resizes both sides alike, or the short side
    crop_pct: PositiveFraction = 224 / 256  # evaluation: share of the resized side that is kept
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of R, G, B in [0, 1]: ImageNet's
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    threads: Count = 4  # CPU threads of each rank that decode
    prefetch_batches: Count = 2  # decoded ahead

    @model_validator(mode="after")
    def check_image_options(self) -> Self:
        for name in ("crop_scale", "crop_ratio"):
            smallest, largest = getattr(self, name)
            if smallest > largest:
                raise ValueError(f"{name} is {[smallest, largest]}; give the smaller one first")
        if self.augmentation == "rand-augment" and self.color_jitter:
            raise ValueError(
                f"color_jitter is {self.color_jitter}, and RandAugment replaces it; set it to 0, or augmentation to"
                " simple"
            )
        return self

    @property
    def jitter(self) -> float:
        """Strength of the colour jitter, 0 without one; DeiT III's 0.3 after 3-Augment if nothing else is said."""
        if self.color_jitter is None:
            return 0.3 if self.augmentation == "three-augment" else 0.0
        return self.color_jitter

    @property
    def stages(self) -> tuple[tuple[Op, ...], ...]:
        """The operations that a training image passes: of each stage, the ops that it may have."""
        stages: dict[str, tuple[tuple[Op, ...], ...]] = {
            "simple": (),
            "three-augment": (policies.THREE_AUGMENT_OPS,),
            "rand-augment": (policies.RAND_AUGMENT_OPS,) * self.rand_augment.num_layers,
        }
        jitter_stages = len(policies.COLOR_JITTER_OPS) if self.jitter else 0
        return stages[self.augmentation] + (policies.COLOR_JITTER_OPS,) * jitter_stages

    @property
    def without_ops(self) -> Self:
        """The same without operations: a graph that is built in a tenth of the time."""
        return self.replace(augmentation="simple", color_jitter=0.0)

    @property
    def draws_per_image(self) -> int:
        """Uniform draws that `train_params` takes."""
        return CROP_DRAWS + policies.DRAWS_PER_OP * len(self.stages)


class TransformParams(NamedTuple):
    """How each image of a batch is looked at: a window of it is scaled, S×S pixels are cut from that, and changed."""

    crop_boxes: np.ndarray  # (B, 4) int32: left, top, width, height in pixels of the stored image
    resize_to: np.ndarray  # (B, 2) int32: height and width that the window is scaled to, each ≥ S
    crop_offsets: np.ndarray  # (B, 2) int32: top and left of the S×S crop in the scaled window
    flips: np.ndarray  # (B,) bool: mirrored left to right before the operations
    ops: np.ndarray  # (B, L) int32: the operations, see policies.SampledOps
    op_args: np.ndarray  # (B, L) float32


def random_resized_crops(
    draws: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Windows distributed as those of torchvision's RandomResizedCrop: (B, 4) int32, left, top, width, height.

    draws: (B, CROP_DRAWS or more) uniform in [0, 1). widths, heights: (B,) pixels. scale: range of the window's share
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
    crop_boxes = np.concatenate([left, top, width, height], axis=1)
    fallback = _central_crops(widths, heights, ratio)
    return np.where(fits.any(axis=1, keepdims=True), crop_boxes, fallback).astype(np.int32)


def _central_crops(widths: np.ndarray, heights: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The whole image, less what makes it longer or taller than `ratio` allows: (B, 1) each → (B, 4)."""
    width = np.minimum(widths, np.rint(heights * ratio[1]))
    height = np.minimum(heights, np.rint(widths / ratio[0]))
    return np.concatenate([(widths - width) // 2, (heights - height) // 2, width, height], axis=1)


def train_params(rows: np.ndarray, draws: np.ndarray, options: ImageOptions) -> TransformParams:
    """A random window scaled to S×S, a random flip, and the sampled ops.

    rows: (B,) of the manifest. draws: (B, draws_per_image) uniform in [0, 1).
    """
    crop_boxes = random_resized_crops(draws, rows["width"], rows["height"], options.crop_scale, options.crop_ratio)
    resize_to = np.full((len(rows), 2), options.image_size, dtype=np.int32)
    flips = draws[:, _FLIP] < options.hflip
    return TransformParams(
        crop_boxes, resize_to, np.zeros_like(resize_to), flips, *_operations(draws[:, CROP_DRAWS:], options)
    )


def _operations(draws: np.ndarray, options: ImageOptions) -> SampledOps:
    """The ops of the augmentation, and of a colour jitter after it: (B, L × policies.DRAWS_PER_OP) → (B, L)."""
    parts = [policies.no_ops(len(draws), 0)]
    if options.jitter:
        draws, of_jitter = np.split(draws, [-policies.DRAWS_PER_OP * len(policies.COLOR_JITTER_OPS)], axis=1)
    if options.augmentation == "rand-augment":
        parts.append(policies.sample_rand_augment(draws, options.rand_augment))
    elif options.augmentation == "three-augment":
        parts.append(policies.sample_three_augment(draws))
    if options.jitter:
        parts.append(policies.sample_color_jitter(of_jitter, options.jitter))
    return SampledOps(*(np.concatenate(fields, axis=1) for fields in zip(*parts, strict=True)))


def eval_params(rows: np.ndarray, options: ImageOptions) -> TransformParams:
    """The whole image resized as `crop_mode` says, and its centre; rounded as timm and torchvision do."""
    sides = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
    side = int(options.image_size / options.crop_pct)
    if options.crop_mode == "squash":
        resize_to = np.full_like(sides, side)
    else:
        resize_to = (side * sides / sides.min(axis=1, keepdims=True)).astype(np.int64)
    crop_offsets = np.rint((resize_to - options.image_size) / 2)  # half to even
    crop_boxes = np.concatenate([np.zeros_like(sides), sides[:, ::-1]], axis=1)
    flips = np.zeros(len(rows), dtype=bool)
    none = policies.no_ops(len(rows), len(options.stages))
    return TransformParams(
        crop_boxes.astype(np.int32), resize_to.astype(np.int32), crop_offsets.astype(np.int32), flips, *none
    )

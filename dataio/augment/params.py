"""Per-image crop, resize, flip and op parameters, as pure functions; and the options that they follow.

sampler.py draws the random numbers, policies.py samples the ops, pipeline.py applies the parameters. Nothing here
imports PyTorch or DALI.

Axes: B images of a batch, S the side of the square output images, L stages of ops.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import model_validator
from typing_extensions import Self

from dataio.augment import policies
from dataio.augment.policies import Op, RandAugment, SampledOps
from dataio.options import Count, Fraction, NonNegative, Options, Positive, PositiveFraction

Rows = npt.NDArray[np.void]  # rows of a manifest, see manifest.SAMPLE_DTYPE
Draws = npt.NDArray[np.float64]  # uniform in [0, 1)

#: Draws for the crop box and flip of a training image: area and aspect ratio of each try, left, top, flip, one spare.
CROP_DRAWS = 24
_TRIES = 10  # as in torchvision's RandomResizedCrop
_LEFT, _TOP, _FLIP = 2 * _TRIES, 2 * _TRIES + 1, 2 * _TRIES + 2  # columns of the draws


class ImageOptions(Options):
    """Options of decoding, crop, resize and per-image augmentation; the defaults are the official recipe's."""

    image_size: Count = 224  # pixels, height and width
    crop_scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)  # random resized crop: fraction of the area
    crop_ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)  # random resized crop: width / height
    hflip: Fraction = 0.5  # probability of a horizontal flip
    augmentation: Literal["rand-augment", "three-augment", "simple"] = "rand-augment"  # after crop and flip
    rand_augment: RandAugment = RandAugment()
    color_jitter: NonNegative | None = None  # largest change of a factor; null: 0.3 after three-augment, else none
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # with antialiasing, as in PIL
    crop_mode: Literal["squash", "center"] = "squash"  # evaluation: resize both sides, or the short side, to one length
    crop_pct: PositiveFraction = 224 / 256  # evaluation: image_size / that length
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # mean R, G, B in [0, 1]: ImageNet's
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    threads: Count = 4  # CPU threads of each rank for decoding
    prefetch_batches: Count = 2  # decoded in advance

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
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
        """Strength of the colour jitter, 0 for none; by default 0.3 after 3-Augment, as in DeiT III."""
        if self.color_jitter is None:
            return 0.3 if self.augmentation == "three-augment" else 0.0
        return self.color_jitter

    @property
    def stages(self) -> tuple[tuple[Op, ...], ...]:
        """Stages that a training image passes, each with the ops from which one is drawn."""
        stages: dict[str, tuple[tuple[Op, ...], ...]] = {
            "simple": (),
            "three-augment": (policies.THREE_AUGMENT_OPS,),
            "rand-augment": (policies.RAND_AUGMENT_OPS,) * self.rand_augment.num_layers,
        }
        jitter_stages = len(policies.COLOR_JITTER_OPS) if self.jitter else 0
        return stages[self.augmentation] + (policies.COLOR_JITTER_OPS,) * jitter_stages

    @property
    def without_ops(self) -> Self:
        """These options with no op stages, whose graph takes a tenth of the time to build."""
        return self.replace(augmentation="simple", color_jitter=0.0)

    @property
    def draws_per_image(self) -> int:
        """Uniform draws that `train_params` takes for each image."""
        return CROP_DRAWS + policies.DRAWS_PER_OP * len(self.stages)


class TransformParams(NamedTuple):
    """Transform parameters of a batch: each crop box is resized, an S×S crop taken from it, flipped, and augmented."""

    crop_boxes: npt.NDArray[np.int32]  # (B, 4): left, top, width, height in pixels of the stored image
    resize_to: npt.NDArray[np.int32]  # (B, 2): height and width that the crop box is resized to, each ≥ S
    crop_offsets: npt.NDArray[np.int32]  # (B, 2): top and left of the S×S crop in the resized crop box
    flips: npt.NDArray[np.bool_]  # (B,): before the ops; the graph mirrors after them, and `op_matrices` compensates
    ops: npt.NDArray[np.int32]  # (B, L), see policies.SampledOps
    op_args: npt.NDArray[np.float32]  # (B, L)

    def select(self, indices: slice | Sequence[int] | npt.NDArray[np.int64]) -> "TransformParams":
        """Return the parameters of some images of the batch."""
        return TransformParams._make(field[indices] for field in self)

    @property
    def without_ops(self) -> "TransformParams":
        """These parameters for a graph without op stages, see ImageOptions.without_ops."""
        return self._replace(ops=self.ops[:, :0], op_args=self.op_args[:, :0])


def random_resized_crops(
    draws: Draws,
    widths: npt.NDArray[np.integer[Any]],
    heights: npt.NDArray[np.integer[Any]],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> npt.NDArray[np.int32]:
    """Crop boxes distributed as those of torchvision's RandomResizedCrop: (B, 4) int32, left, top, width, height.

    draws: (B, CROP_DRAWS or more). widths, heights: (B,) pixels. scale: range of the crop box's fraction of the area.
    ratio: range of its width / height. The first of ten tries that fits into the image counts; if none does, the
    largest central crop whose width / height lies within `ratio`.
    """
    widths, heights = widths.astype(np.int64)[:, None], heights.astype(np.int64)[:, None]
    areas = widths * heights * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
    lowest, highest = np.log(ratio)
    ratios = np.exp(lowest + (highest - lowest) * draws[:, _TRIES : 2 * _TRIES])
    tried = np.rint(np.sqrt(np.stack([areas * ratios, areas / ratios])))  # (2, B, tries): width, height
    fits = ((tried > 0) & (tried <= np.stack([widths, heights]))).all(axis=0)
    width, height = np.take_along_axis(tried, fits.argmax(axis=1)[None, :, None], axis=2)  # (B, 1) each
    left = np.floor(draws[:, _LEFT, None] * (widths - width + 1))
    top = np.floor(draws[:, _TOP, None] * (heights - height + 1))
    crop_boxes = np.concatenate([left, top, width, height], axis=1)
    fallback = _central_crops(widths, heights, ratio)
    return np.where(fits.any(axis=1, keepdims=True), crop_boxes, fallback).astype(np.int32)


def _central_crops(
    widths: npt.NDArray[np.int64], heights: npt.NDArray[np.int64], ratio: tuple[float, float]
) -> npt.NDArray[np.float64]:
    """Largest central crop boxes whose width / height lies within `ratio`: (B, 1) each → (B, 4)."""
    width = np.minimum(widths, np.rint(heights * ratio[1]))
    height = np.minimum(heights, np.rint(widths / ratio[0]))
    return np.concatenate([(widths - width) // 2, (heights - height) // 2, width, height], axis=1)


def train_params(rows: Rows, draws: Draws, options: ImageOptions) -> TransformParams:
    """Sample training's parameters: a random resized crop to S×S, a random flip, and ops.

    rows: (B,) of the manifest. draws: (B, draws_per_image).
    """
    crop_boxes = random_resized_crops(draws, rows["width"], rows["height"], options.crop_scale, options.crop_ratio)
    resize_to = np.full((len(rows), 2), options.image_size, dtype=np.int32)
    flips = draws[:, _FLIP] < options.hflip
    return TransformParams(
        crop_boxes, resize_to, np.zeros_like(resize_to), flips, *_sample_ops(draws[:, CROP_DRAWS:], options)
    )


def _sample_ops(draws: Draws, options: ImageOptions) -> SampledOps:
    """Sample the augmentation's ops, and a colour jitter's after them: (B, L × policies.DRAWS_PER_OP) → (B, L)."""
    parts = [policies.no_ops(len(draws), 0)]
    if options.jitter:
        draws, jitter_draws = np.split(draws, [-policies.DRAWS_PER_OP * len(policies.COLOR_JITTER_OPS)], axis=1)
    if options.augmentation == "rand-augment":
        parts.append(policies.sample_rand_augment(draws, options.rand_augment))
    elif options.augmentation == "three-augment":
        parts.append(policies.sample_three_augment(draws))
    if options.jitter:
        parts.append(policies.sample_color_jitter(jitter_draws, options.jitter))
    return SampledOps(*(np.concatenate(fields, axis=1) for fields in zip(*parts, strict=True)))


def eval_params(rows: Rows, options: ImageOptions) -> TransformParams:
    """Set evaluation's parameters: resize of the whole image by `crop_mode`, central crop, neither flip nor ops.

    rows: (B,) of the manifest. Sizes are rounded as in timm and torchvision.
    """
    sides = np.stack([rows["height"], rows["width"]], axis=1).astype(np.int64)
    side = int(options.image_size / options.crop_pct)
    if options.crop_mode == "squash":
        resize_to = np.full_like(sides, side)
    else:
        resize_to = (side * sides / sides.min(axis=1, keepdims=True)).astype(np.int64)
    crop_offsets = np.rint((resize_to - options.image_size) / 2)  # half to even
    crop_boxes = np.concatenate([np.zeros_like(sides), sides[:, ::-1]], axis=1)
    flips = np.zeros(len(rows), dtype=bool)
    no_ops = policies.no_ops(len(rows), len(options.stages))
    return TransformParams(
        crop_boxes.astype(np.int32), resize_to.astype(np.int32), crop_offsets.astype(np.int32), flips, *no_ops
    )

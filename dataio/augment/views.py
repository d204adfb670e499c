"""How each image is looked at, as pure functions: its window, scale and crop, its flip, the recipe's operations.

index.py draws the numbers, pipeline.py does what is said here. Nothing here imports PyTorch or DALI.

Axes: B images of a batch, S the side of the square images that come out, L stages of operations.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dataio.augment import recipes
from dataio.augment.recipes import Kind, Operations, RandAugment

_INTERPOLATIONS = ("bicubic", "bilinear")
_EVAL_RESIZES = ("squash", "short")
_RECIPES = ("simple", "three-augment", "rand-augment")

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
        choices = {"interpolation": _INTERPOLATIONS, "eval_resize": _EVAL_RESIZES, "recipe": _RECIPES}
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

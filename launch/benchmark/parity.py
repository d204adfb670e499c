"""Differences of our RandAugment from timm's, in pixels and in draws, as a Markdown table.

python -m launch.benchmark parity --output launch/benchmark/results/parity.md
python -m launch.benchmark parity cat.jpg dog.jpg --output runs/parity.md

The operations of dataio/augment/dali_ops.py are applied to images beside timm's functions and PIL's filters, and the
draws of dataio/augment/policies.py are counted beside those of timm's RandAugment. timm and PIL are the oracle here;
training needs neither. The images are scikit-image's unless others are named.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_transform

from dataio.augment.dali_ops import apply_ops
from dataio.augment.policies import (
    DRAWS_PER_OP,
    RAND_AUGMENT_OPS,
    Op,
    RandAugment,
    SampledOps,
    level_to_args,
    sample_rand_augment,
)
from dataio.files import user_path, write_file
from dataio.sampler import draws_at
from launch.benchmark.cli import start
from launch.benchmark.report import prepare_output
from launch.command_line import make_parser

RECIPE = "rand-m9-mstd0.5-inc1"
TIMM_NAMES = {
    Op.ROTATE: "Rotate",
    Op.SHEAR_X: "ShearX",
    Op.SHEAR_Y: "ShearY",
    Op.TRANSLATE_X: "TranslateXRel",
    Op.TRANSLATE_Y: "TranslateYRel",
    Op.COLOR: "ColorIncreasing",
    Op.CONTRAST: "ContrastIncreasing",
    Op.BRIGHTNESS: "BrightnessIncreasing",
    Op.SHARPNESS: "SharpnessIncreasing",
    Op.AUTO_CONTRAST: "AutoContrast",
    Op.EQUALIZE: "Equalize",
    Op.POSTERIZE: "PosterizeIncreasing",
    Op.INVERT: "Invert",
    Op.SOLARIZE: "SolarizeIncreasing",
    Op.SOLARIZE_ADD: "SolarizeAdd",
}
FILL = (124, 116, 104)  # ImageNet's mean colour, as timm fills with
MAGNITUDES = (3, 6, 9, 10)
DRAWN = 10_000

_SIZE = 224
_SEED = 1
_SIGNS_TRIED = 64  # timm tosses a coin for each sign
_UNIQUE_IMAGES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHOLE = (Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD)  # have integers for op_args
_WITHOUT_ARG = (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT)

AppliedOps = list[list[tuple[Op, float]]]  # for each image its operations with their op_args, in order


def apply_op_in_pil(image: Image.Image, op: Op, op_arg: float, interpolation: str = "bicubic") -> Image.Image:
    """Apply timm's function or PIL's filter to an image."""
    if op == Op.NONE:
        return image
    if op == Op.GRAYSCALE:
        return image.convert("L").convert("RGB")
    if op == Op.GAUSSIAN_BLUR:
        return image.filter(ImageFilter.GaussianBlur(float(op_arg)))
    if op == Op.POSTERIZE and op_arg == 0:  # an error since Pillow 13, and black before
        return Image.new(image.mode, image.size)
    op_args = () if op in _WITHOUT_ARG else (int(op_arg),) if op in _WHOLE else (float(op_arg),)
    apply: Any = NAME_TO_OP[TIMM_NAMES[op]]
    return apply(image, *op_args, fillcolor=FILL, resample=_RESAMPLING[interpolation])


def read_photographs(paths: list[Path], size: int = _SIZE) -> list[Image.Image]:
    """RGB images of `size` × `size` pixels; without paths, four of scikit-image's and two altered ones.

    Raises RuntimeError without scikit-image, OSError if an image cannot be read.
    """
    images = []
    for path in paths or _skimage_images():
        with Image.open(path) as opened:
            images.append(opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    if not paths:
        images.append(images[0].point(lambda value: 50 + value // 2))  # without dark and bright levels
        images.append(Image.blend(images[1].convert("L").convert("RGB"), images[1], 0.1))  # almost grey
    return images


def _skimage_images() -> list[Path]:
    try:
        import skimage  # not needed for images that are named
    except ImportError as error:
        raise RuntimeError("scikit-image is not installed; pip install scikit-image, or name images") from error
    return [Path(skimage.__file__).with_name("data") / file for file in _UNIQUE_IMAGES]


def differences(
    images: list[Image.Image], op: Op, ours: list[float], theirs: list[float], interpolation: str, device: str
) -> np.ndarray:
    """Absolute differences of our operation and timm's, in levels: (op_args × images, S, S, 3) int."""
    chosen = [image for _ in ours for image in images]
    op_args = np.repeat(np.array(ours, np.float32), len(images))[:, None]
    wanted = SampledOps(np.full(op_args.shape, op, np.int32), op_args)
    got = apply_ops(np.stack([np.asarray(image) for image in chosen]), wanted, FILL, interpolation, device)
    expected = [np.asarray(apply_op_in_pil(image, op, op_arg, interpolation)) for op_arg in theirs for image in images]
    return np.abs(got.astype(int) - np.stack(expected))


def timm_level_args(op: Op, magnitude: float) -> list[float]:
    """Arguments of timm's operation at a magnitude, with either sign: one or two numbers, the smaller first."""
    level_to_amount = LEVEL_TO_ARG[TIMM_NAMES[op]]
    if level_to_amount is None:
        return [0.0]
    return sorted({float(level_to_amount(magnitude, {})[0]) for _ in range(_SIGNS_TRIED)})


def our_level_args(op: Op, magnitude: float) -> list[float]:
    """Arguments of our operation at a magnitude, as `timm_level_args` returns timm's."""
    op_args = level_to_args(np.full(2, op), np.full(2, float(magnitude)), np.array([-1.0, 1.0]))
    return sorted(set(op_args.tolist()))


def timm_draws(recipe: str, count: int) -> AppliedOps:
    """Operations that timm's RandAugment draws for `count` images.

    Each "image" is the list of calls so far; timm's operations are replaced by functions that append to it.
    """
    transform = rand_augment_transform(recipe, {"translate_const": 100, "img_mean": FILL})
    ops = {name: op for op, name in TIMM_NAMES.items()}

    def note(op: Op, calls: list[tuple[Op, float]], *op_args: float, **_: object) -> list[tuple[Op, float]]:
        return [*calls, (op, float(op_args[0]) if op_args else 0.0)]

    for operation in transform.ops:
        operation.aug_fn = partial(note, ops[operation.name])
    states = random.getstate(), np.random.get_state()
    random.seed(_SEED)
    np.random.seed(_SEED)
    try:
        return [transform([]) for _ in range(count)]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def our_draws(settings: RandAugment, count: int) -> AppliedOps:
    """Operations that our RandAugment draws for `count` images."""
    operations = sample_rand_augment(draws_at(_SEED, 0, count, DRAWS_PER_OP * settings.num_layers), settings)
    return [
        [(Op(op), float(op_arg)) for op, op_arg in zip(*of_image, strict=True) if op != Op.NONE]
        for of_image in zip(*operations, strict=True)
    ]


def op_args_of(done: AppliedOps, op: Op) -> np.ndarray:
    """Arguments of an operation in all images, to five digits: ours are float32."""
    return np.round([op_arg for operations in done for other, op_arg in operations if other == op], 5)


def ks_statistic(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Two-sample Kolmogorov–Smirnov statistic: the largest distance of the empirical distribution functions."""
    pooled = np.concatenate([ours, theirs])
    shares = [np.searchsorted(np.sort(values), pooled, side="right") / len(values) for values in (ours, theirs)]
    return float(np.abs(shares[0] - shares[1]).max())


def chi_square(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, int]:
    """Chi-square statistic of homogeneity for two samples of integers, and its degrees of freedom."""
    values, indices = np.unique(np.concatenate([ours, theirs]), return_inverse=True)
    counts = np.stack([np.bincount(sample, minlength=len(values)) for sample in np.split(indices, [len(ours)])])
    expected = counts.sum(axis=0) * counts.sum(axis=1, keepdims=True) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum()), len(values) - 1


@dataclass(frozen=True)
class Row:
    """The comparison of one operation."""

    op: Op
    levels: tuple[tuple[float, int], ...]  # for each of MAGNITUDES: mean and largest difference, of 255
    done: tuple[int, int]  # times in DRAWN images: ours, timm's
    gap: float  # ks_statistic of the op_args; 0 where there is none


def measure(images: list[Image.Image], device: str = "cpu") -> list[Row]:
    """Compare each operation of RandAugment, in the order of Op."""
    ours, theirs = our_draws(RandAugment(), DRAWN), timm_draws(RECIPE, DRAWN)
    rows = []
    for op in RAND_AUGMENT_OPS:
        levels = []
        for magnitude in MAGNITUDES:
            op_args = our_level_args(op, magnitude), timm_level_args(op, magnitude)
            found = differences(images, op, *op_args, "bicubic", device)
            levels.append((float(found.mean()), int(found.max())))
        drawn = op_args_of(ours, op), op_args_of(theirs, op)
        rows.append(Row(op, tuple(levels), (len(drawn[0]), len(drawn[1])), ks_statistic(*drawn)))
    return rows


def render(rows: list[Row]) -> str:
    """Markdown document: the table and its explanation."""
    ours, theirs = our_draws(RandAugment(), DRAWN), timm_draws(RECIPE, DRAWN)
    lengths = [np.array([len(done) for done in part]) for part in (ours, theirs)]
    ops = [np.array([op for done in part for op, _ in done]) for part in (ours, theirs)]
    head = ["operation", *(f"magnitude {magnitude}" for magnitude in MAGNITUDES), "drawn: ours · timm", "op_args apart"]
    table = [head, ["---"] * len(head), *map(_cells, rows)]
    return _TEXT.format(
        recipe=RECIPE,
        size=_SIZE,
        drawn=DRAWN,
        table="\n".join(f"| {' | '.join(cells)} |" for cells in table),
        lengths=" · ".join(", ".join(map(str, np.bincount(part, minlength=3))) for part in lengths),
        of_lengths="{:.1f} ({} degrees of freedom)".format(*chi_square(*lengths)),
        of_kinds="{:.1f} ({} degrees of freedom)".format(*chi_square(*ops)),
        limit=1.95 * (2 / np.mean([row.done for row in rows])) ** 0.5,
    )


def _cells(row: Row) -> list[str]:
    levels = [f"{mean:.3f} · {largest}" for mean, largest in row.levels]
    gap = "" if row.op in _WITHOUT_ARG else f"{row.gap:.3f}"
    return [TIMM_NAMES[row.op], *levels, f"{row.done[0]} · {row.done[1]}", gap]


_TEXT = """# Our augmentation beside timm's

Written by `python -m launch.benchmark parity --output launch/benchmark/results/parity.md`; a test computes it again.

Each operation of `{recipe}`, ours in the DALI graph on the CPU and timm's in PIL, on images of {size}×{size}
pixels, bicubic, with timm's op_args for four magnitudes and both signs: **mean · largest difference** in levels of 255.
Then {drawn:,} images drawn by each: how often each operation was drawn, and the largest distance of the distribution
functions of its op_args (Kolmogorov–Smirnov; chance alone exceeds {limit:.3f} once in a thousand times).

{table}

Images with zero, one and two operations: {lengths}, ours · timm's: chi-square {of_lengths}.
The distribution over operations: chi-square {of_kinds}.

The large differences lie on lines one pixel wide: at the border of a rotated, sheared or translated image, DALI blends
with the fill colour and PIL does not; and PIL does not sharpen the outermost pixels. Posterizing to 0 bits (magnitude
10) gives black, as in PIL until version 13 made it an error. `data.interpolation` sets the interpolation of such moves;
timm by default chooses between bilinear and bicubic at random.
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the arguments; --help and errors exit."""
    parser = make_parser("python -m launch.benchmark parity", __doc__)
    add = parser.add_argument
    add("images", metavar="IMAGE", type=user_path, nargs="*", help="default: scikit-image's")
    add("--output", metavar="FILE.md", type=user_path, required=True, help="Markdown file to write")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="of our operations (default cpu)")
    return parser.parse_args(argv)


def resolve(arguments: argparse.Namespace) -> Callable[[], int]:
    """Read the images and return what compares. Raises RuntimeError without scikit-image, OSError for bad files."""
    images = read_photographs(arguments.images)
    return partial(_run, images, arguments.device, prepare_output(arguments.output))


def _run(images: list[Image.Image], device: str, path: Path) -> int:
    write_file(path, render(measure(images, device)).encode())
    print(f"wrote {path}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Write the table; returns the exit status."""
    return start(parse(argv), resolve)

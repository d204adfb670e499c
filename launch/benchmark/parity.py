"""How near our augmentation is to timm's, as a table: `python -m launch.benchmark.parity --out launch/benchmark/results/parity.md`.

The operations of dali_ops.py are done to photographs, beside timm's own functions and PIL's filters; and the draws
of policies.py are counted beside those of timm's RandAugment. timm and PIL are the oracle here, and nothing that
training needs. The photographs are scikit-image's unless others are named.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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

AppliedOps = list[list[tuple[Op, float]]]  # the operations done to each image, one after the other


def apply_op_in_pil(image: Image.Image, op: Op, op_arg: float, interpolation: str = "bicubic") -> Image.Image:
    """The image after an operation, done by timm's function or PIL's filter."""
    if op == Op.NONE:
        return image
    if op == Op.GRAYSCALE:
        return image.convert("L").convert("RGB")
    if op == Op.GAUSSIAN_BLUR:
        return image.filter(ImageFilter.GaussianBlur(float(op_arg)))
    if op == Op.POSTERIZE and op_arg == 0:  # an error since Pillow 13, and black before
        return Image.new(image.mode, image.size)
    op_args = () if op in _WITHOUT_ARG else (int(op_arg),) if op in _WHOLE else (float(op_arg),)
    return NAME_TO_OP[TIMM_NAMES[op]](image, *op_args, fillcolor=FILL, resample=_RESAMPLING[interpolation])


def read_photographs(paths: list[Path], size: int = _SIZE) -> list[Image.Image]:
    """RGB images of `size` × `size` pixels; of scikit-image's, if there is no path, four and two altered ones.

    Raises RuntimeError without scikit-image, OSError if an image cannot be read.
    """
    images = []
    for path in paths or _skimage_photographs():
        with Image.open(path) as opened:
            images.append(opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    if not paths:
        images.append(images[0].point(lambda value: 50 + value // 2))  # without dark and bright levels
        images.append(Image.blend(images[1].convert("L").convert("RGB"), images[1], 0.1))  # almost grey
    return images


def _skimage_photographs() -> list[Path]:
    try:
        import skimage  # only here: who names photographs does without
    except ImportError as error:
        raise RuntimeError("scikit-image is not installed; pip install scikit-image, or name photographs") from error
    return [Path(skimage.data_dir, file) for file in _UNIQUE_IMAGES]


def differences(
    images: list[Image.Image], op: Op, ours: list[float], theirs: list[float], interpolation: str, device: str
) -> np.ndarray:
    """Levels between our operation and timm's, with our op_args and its: (op_args × images, S, S, 3) int."""
    chosen = [image for _ in ours for image in images]
    op_args = np.repeat(np.array(ours, np.float32), len(images))[:, None]
    wanted = SampledOps(np.full(op_args.shape, op, np.int32), op_args)
    got = apply_ops(np.stack([np.asarray(image) for image in chosen]), wanted, FILL, interpolation, device)
    expected = [np.asarray(apply_op_in_pil(image, op, op_arg, interpolation)) for op_arg in theirs for image in images]
    return np.abs(got.astype(int) - np.stack(expected))


def timm_level_args(op: Op, magnitude: float) -> list[float]:
    """What timm gives an operation at a magnitude, with either sign: one or two numbers, the smaller first."""
    level_to_amount = LEVEL_TO_ARG[TIMM_NAMES[op]]
    if level_to_amount is None:
        return [0.0]
    return sorted({float(level_to_amount(magnitude, {})[0]) for _ in range(_SIGNS_TRIED)})


def our_level_args(op: Op, magnitude: float) -> list[float]:
    """The same of ours."""
    op_args = level_to_args(np.full(2, op), np.full(2, float(magnitude)), np.array([-1.0, 1.0]))
    return sorted(set(op_args.tolist()))


def timm_draws(recipe: str, count: int) -> AppliedOps:
    """What timm's RandAugment does to `count` images. Its operations note what they are called with, and hand the
    notes on as the image.
    """
    transform = rand_augment_transform(recipe, {"translate_const": 100, "img_mean": FILL})
    ops = {name: op for op, name in TIMM_NAMES.items()}

    def note(op: Op, notes: list, *op_args: float, **_: object) -> list:
        return [*notes, (op, float(op_args[0]) if op_args else 0.0)]

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
    """The same of ours."""
    operations = sample_rand_augment(draws_at(_SEED, 0, count, DRAWS_PER_OP * settings.num_layers), settings)
    return [
        [(Op(op), float(op_arg)) for op, op_arg in zip(*of_image, strict=True) if op != Op.NONE]
        for of_image in zip(*operations, strict=True)
    ]


def op_args_of(done: AppliedOps, op: Op) -> np.ndarray:
    """The op_args of an operation wherever it was done, to five digits: ours are float32."""
    return np.round([op_arg for operations in done for other, op_arg in operations if other == op], 5)


def ks_statistic(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kolmogorov's and Smirnov's statistic: the largest distance of the two empirical distribution functions."""
    places = np.concatenate([ours, theirs])
    shares = [np.searchsorted(np.sort(values), places, side="right") / len(values) for values in (ours, theirs)]
    return float(np.abs(shares[0] - shares[1]).max())


def chi_square(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, int]:
    """The statistic for two samples of whole numbers being of one distribution, and its degrees of freedom."""
    values, places = np.unique(np.concatenate([ours, theirs]), return_inverse=True)
    counts = np.stack([np.bincount(part, minlength=len(values)) for part in np.split(places, [len(ours)])])
    expected = counts.sum(axis=0) * counts.sum(axis=1, keepdims=True) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum()), len(values) - 1


@dataclass(frozen=True)
class Row:
    """What was found about one operation."""

    op: Op
    levels: tuple[tuple[float, int], ...]  # for each of MAGNITUDES: mean and largest difference, of 255
    done: tuple[int, int]  # times in DRAWN images: ours, timm's
    gap: float  # ks_statistic of the op_args; 0 where there is none


def measure(images: list[Image.Image], device: str = "cpu") -> list[Row]:
    """A row for each operation of RandAugment, in the order of Op."""
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
    """The table, in Markdown, with what belongs to it."""
    ours, theirs = our_draws(RandAugment(), DRAWN), timm_draws(RECIPE, DRAWN)
    lengths = [np.array([len(done) for done in part]) for part in (ours, theirs)]
    ops = [np.array([op for done in part for op, _ in done]) for part in (ours, theirs)]
    head = ["operation", *(f"magnitude {magnitude}" for magnitude in MAGNITUDES), "done: ours · timm", "op_args apart"]
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

Written by `python -m launch.benchmark.parity --out launch/benchmark/results/parity.md`; a test computes it again.

Each operation of `{recipe}`, ours in the DALI graph on the CPU and timm's in PIL, on photographs of {size}×{size}
pixels, bicubic, with timm's op_args for four magnitudes and both signs: **mean · largest difference** in levels of 255.
Then {drawn:,} images drawn by each: how often each operation was done, and the largest distance of the distribution
functions of its op_args (Kolmogorov and Smirnov; chance alone exceeds {limit:.3f} once in a thousand times).

{table}

None, one, two operations were done to {lengths} images, ours · timm's: chi-square {of_lengths}.
Which operations they were: chi-square {of_kinds}.

The large differences lie on lines one pixel wide: where a moved image ends, DALI blends with the fill colour and PIL
does not; and PIL does not sharpen the outermost pixels. Posterizing to 0 bits (magnitude 10) gives black, as in PIL
until version 13 made it an error. `data.interpolation` says how moved images are interpolated; timm's default is a
choice between bilinear and bicubic at random.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark.parity",
        description="Compares each operation of RandAugment with timm's, in pixels and in draws, and writes a table.",
    )
    parser.add_argument(
        "images", metavar="IMAGE", type=user_path, nargs="*", help="photographs (default: scikit-image's)"
    )
    parser.add_argument("--out", metavar="FILE", type=user_path, required=True, help="Markdown file to write")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="that does our operations")
    arguments = parser.parse_args(argv)
    try:
        rows = measure(read_photographs(arguments.images), arguments.device)
        write_file(arguments.out, render(rows).encode())
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

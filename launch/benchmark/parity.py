"""How near our augmentation is to timm's, as a table: `python -m dataio.parity --out dataio/parity.md`.

The operations of operations.py are done to photographs, beside timm's own functions and PIL's filters; and the draws
of recipes.py are counted beside those of timm's RandAugment. timm and PIL are the oracle here, and nothing that
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

from dataio.augment.operations import change_images
from dataio.augment.recipes import DRAWS, RAND_AUGMENT, Kind, Operations, RandAugment, rand_amounts, rand_augment
from dataio.files import user_path, write_file
from dataio.sampler import draws_at

RECIPE = "rand-m9-mstd0.5-inc1"
TIMM_NAMES = {
    Kind.ROTATE: "Rotate",
    Kind.SHEAR_X: "ShearX",
    Kind.SHEAR_Y: "ShearY",
    Kind.TRANSLATE_X: "TranslateXRel",
    Kind.TRANSLATE_Y: "TranslateYRel",
    Kind.COLOR: "ColorIncreasing",
    Kind.CONTRAST: "ContrastIncreasing",
    Kind.BRIGHTNESS: "BrightnessIncreasing",
    Kind.SHARPNESS: "SharpnessIncreasing",
    Kind.AUTO_CONTRAST: "AutoContrast",
    Kind.EQUALIZE: "Equalize",
    Kind.POSTERIZE: "PosterizeIncreasing",
    Kind.INVERT: "Invert",
    Kind.SOLARIZE: "SolarizeIncreasing",
    Kind.SOLARIZE_ADD: "SolarizeAdd",
}
FILL = (124, 116, 104)  # ImageNet's mean colour, as timm fills with
MAGNITUDES = (3, 6, 9, 10)
DRAWN = 10_000

_SIZE = 224
_SEED = 1
_SIGNS_TRIED = 64  # timm tosses a coin for each sign
_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHOLE = (Kind.POSTERIZE, Kind.SOLARIZE, Kind.SOLARIZE_ADD)  # have integers for amounts
_WITHOUT_AMOUNT = (Kind.AUTO_CONTRAST, Kind.EQUALIZE, Kind.INVERT)

Done = list[list[tuple[Kind, float]]]  # the operations done to each image, one after the other


def in_pil(image: Image.Image, kind: Kind, amount: float, interpolation: str = "bicubic") -> Image.Image:
    """The image after an operation, done by timm's function or PIL's filter."""
    if kind == Kind.NONE:
        return image
    if kind == Kind.GREY:
        return image.convert("L").convert("RGB")
    if kind == Kind.BLUR:
        return image.filter(ImageFilter.GaussianBlur(float(amount)))
    if kind == Kind.POSTERIZE and amount == 0:  # an error since Pillow 13, and black before
        return Image.new(image.mode, image.size)
    amounts = () if kind in _WITHOUT_AMOUNT else (int(amount),) if kind in _WHOLE else (float(amount),)
    return NAME_TO_OP[TIMM_NAMES[kind]](image, *amounts, fillcolor=FILL, resample=_RESAMPLING[interpolation])


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
    return [Path(skimage.data_dir, file) for file in _PHOTOGRAPHS]


def differences(
    images: list[Image.Image], kind: Kind, ours: list[float], theirs: list[float], interpolation: str, device: str
) -> np.ndarray:
    """Levels between our operation and timm's, with our amounts and its: (amounts × images, S, S, 3) int."""
    chosen = [image for _ in ours for image in images]
    amounts = np.repeat(np.array(ours, np.float32), len(images))[:, None]
    wanted = Operations(np.full(amounts.shape, kind, np.int32), amounts)
    got = change_images(np.stack([np.asarray(image) for image in chosen]), wanted, FILL, interpolation, device)
    expected = [np.asarray(in_pil(image, kind, amount, interpolation)) for amount in theirs for image in images]
    return np.abs(got.astype(int) - np.stack(expected))


def timm_amounts(kind: Kind, magnitude: float) -> list[float]:
    """What timm gives an operation at a magnitude, with either sign: one or two numbers, the smaller first."""
    level_to_amount = LEVEL_TO_ARG[TIMM_NAMES[kind]]
    if level_to_amount is None:
        return [0.0]
    return sorted({float(level_to_amount(magnitude, {})[0]) for _ in range(_SIGNS_TRIED)})


def our_amounts(kind: Kind, magnitude: float) -> list[float]:
    """The same of ours."""
    amounts = rand_amounts(np.full(2, kind), np.full(2, float(magnitude)), np.array([-1.0, 1.0]))
    return sorted(set(amounts.tolist()))


def timm_draws(recipe: str, count: int) -> Done:
    """What timm's RandAugment does to `count` images. Its operations note what they are called with, and hand the
    notes on as the image.
    """
    transform = rand_augment_transform(recipe, {"translate_const": 100, "img_mean": FILL})
    kinds = {name: kind for kind, name in TIMM_NAMES.items()}

    def note(kind: Kind, notes: list, *amounts: float, **_: object) -> list:
        return [*notes, (kind, float(amounts[0]) if amounts else 0.0)]

    for operation in transform.ops:
        operation.aug_fn = partial(note, kinds[operation.name])
    states = random.getstate(), np.random.get_state()
    random.seed(_SEED)
    np.random.seed(_SEED)
    try:
        return [transform([]) for _ in range(count)]
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def our_draws(settings: RandAugment, count: int) -> Done:
    """The same of ours."""
    operations = rand_augment(draws_at(_SEED, 0, count, DRAWS * settings.layers), settings)
    return [
        [(Kind(kind), float(amount)) for kind, amount in zip(*of_image, strict=True) if kind != Kind.NONE]
        for of_image in zip(*operations, strict=True)
    ]


def amounts_of(done: Done, kind: Kind) -> np.ndarray:
    """The amounts of an operation wherever it was done, to five digits: ours are float32."""
    return np.round([amount for operations in done for other, amount in operations if other == kind], 5)


def largest_gap(ours: np.ndarray, theirs: np.ndarray) -> float:
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

    kind: Kind
    levels: tuple[tuple[float, int], ...]  # for each of MAGNITUDES: mean and largest difference, of 255
    done: tuple[int, int]  # times in DRAWN images: ours, timm's
    gap: float  # largest_gap of the amounts; 0 where there is none


def measure(images: list[Image.Image], device: str = "cpu") -> list[Row]:
    """A row for each operation of RandAugment, in the order of Kind."""
    ours, theirs = our_draws(RandAugment(), DRAWN), timm_draws(RECIPE, DRAWN)
    rows = []
    for kind in RAND_AUGMENT:
        levels = []
        for magnitude in MAGNITUDES:
            amounts = our_amounts(kind, magnitude), timm_amounts(kind, magnitude)
            found = differences(images, kind, *amounts, "bicubic", device)
            levels.append((float(found.mean()), int(found.max())))
        drawn = amounts_of(ours, kind), amounts_of(theirs, kind)
        rows.append(Row(kind, tuple(levels), (len(drawn[0]), len(drawn[1])), largest_gap(*drawn)))
    return rows


def render(rows: list[Row]) -> str:
    """The table, in Markdown, with what belongs to it."""
    ours, theirs = our_draws(RandAugment(), DRAWN), timm_draws(RECIPE, DRAWN)
    lengths = [np.array([len(done) for done in part]) for part in (ours, theirs)]
    kinds = [np.array([kind for done in part for kind, _ in done]) for part in (ours, theirs)]
    head = ["operation", *(f"magnitude {magnitude}" for magnitude in MAGNITUDES), "done: ours · timm", "amounts apart"]
    table = [head, ["---"] * len(head), *map(_cells, rows)]
    return _TEXT.format(
        recipe=RECIPE,
        size=_SIZE,
        drawn=DRAWN,
        table="\n".join(f"| {' | '.join(cells)} |" for cells in table),
        lengths=" · ".join(", ".join(map(str, np.bincount(part, minlength=3))) for part in lengths),
        of_lengths="{:.1f} ({} degrees of freedom)".format(*chi_square(*lengths)),
        of_kinds="{:.1f} ({} degrees of freedom)".format(*chi_square(*kinds)),
        limit=1.95 * (2 / np.mean([row.done for row in rows])) ** 0.5,
    )


def _cells(row: Row) -> list[str]:
    levels = [f"{mean:.3f} · {largest}" for mean, largest in row.levels]
    gap = "" if row.kind in _WITHOUT_AMOUNT else f"{row.gap:.3f}"
    return [TIMM_NAMES[row.kind], *levels, f"{row.done[0]} · {row.done[1]}", gap]


_TEXT = """# Our augmentation beside timm's

Written by `python -m dataio.parity --out dataio/parity.md`; a test computes it again.

Each operation of `{recipe}`, ours in the DALI graph on the CPU and timm's in PIL, on photographs of {size}×{size}
pixels, bicubic, with timm's amounts for four magnitudes and both signs: **mean · largest difference** in levels of 255.
Then {drawn:,} images drawn by each: how often each operation was done, and the largest distance of the distribution
functions of its amounts (Kolmogorov and Smirnov; chance alone exceeds {limit:.3f} once in a thousand times).

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
        prog="python -m dataio.parity",
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

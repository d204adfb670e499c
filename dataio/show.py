"""Grid of packed samples as a picture: `python -m dataio.show TARGET [--augmented] --out grid.png`.

The grid holds the first samples that a training run with this seed sees in the full (not windowed) order, with their
classes; with --augmented also as training sees them with the default augmentation, the authors' recipe. TARGET may be a
URL, whose shards are fetched into --cache.
"""

import argparse
import io
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from dataio.files import user_path
from dataio.manifest import Manifest, load_manifest
from dataio.options import parse_options
from dataio.pil import pil_without_limits
from dataio.remote.options import CacheOptions
from dataio.sampler import samples_at
from dataio.shards import open_dataset, open_shards
from dataio.urls import is_url, redact_url

_COLUMNS = 8
_TILE_INCHES, _TITLE_INCHES, _DPI = 1.6, 0.3, 100
_TITLE_LETTERS = 26
_LABELS_SHOWN = 2  # classes of a mixed image


class Tile(NamedTuple):
    """(H, W, 3) uint8 pixels, and the title above them."""

    pixels: npt.NDArray[np.uint8]
    title: str


def stored_tiles(manifest: Manifest, samples: npt.NDArray[np.int64]) -> list[Tile]:
    """Return the samples as they are packed, each with its class and size.

    samples: (n,) rows of the manifest. Raises RuntimeError, naming it, if a sample cannot be decoded.
    """
    tiles = []
    with closing(open_shards(manifest)) as shards:
        for sample in samples:
            row = manifest.samples[sample]
            shards.prefetch([int(row["shard"])])
            try:
                with pil_without_limits():
                    pixels = np.asarray(Image.open(io.BytesIO(shards.read(sample))).convert("RGB"))
            except Exception as error:  # PIL raises whatever its plugins raise
                raise RuntimeError(f"cannot draw {manifest.describe(sample)}: {error}; {manifest.remedy}") from error
            title = f"{_short(manifest.classes[row['label']])} {row['width']}×{row['height']}"
            tiles.append(Tile(pixels, title))
    return tiles


def augmented_tiles(manifest: Manifest, count: int, size: int, seed: int) -> list[Tile]:
    """Return the first `count` samples of a run as it trains on them, each with its classes and their shares.

    Raises ValueError if `count` is odd: images are mixed in pairs.
    """
    import torch  # PyTorch and DALI take seconds to import, and packed images need neither

    from dataio.augment.batch_augment import BatchAugment, BatchAugmentOptions
    from dataio.augment.params import ImageOptions
    from dataio.loader import LoaderOptions, TrainLoader

    device = torch.device("cpu")
    options, mix = parse_options(ImageOptions, image_size=size), BatchAugmentOptions()
    augment = BatchAugment(mix, len(manifest.classes), seed, count, device)
    with closing(TrainLoader(manifest, options, LoaderOptions(seed, count), device)) as loader:
        images, targets = augment(next(loader))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (options.mean, options.std))
    levels = (255 * (images * std + mean)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    smoothed = mix.label_smoothing / len(manifest.classes)
    return [
        Tile(pixels, _shares(manifest.classes, target, smoothed))
        for pixels, target in zip(levels, targets.numpy(), strict=True)
    ]


def _shares(classes: tuple[str, ...], target: npt.NDArray[np.float32], smoothed: float) -> str:
    """Name the classes whose share is more than what label smoothing gives to all."""
    labels = np.argsort(-target, kind="stable")[:_LABELS_SHOWN]
    return "\n".join(
        f"{_short(classes[label])} {target[label]:.2f}" for label in labels if target[label] > 1.5 * smoothed
    )


def _short(name: str) -> str:
    return name if len(name) <= _TITLE_LETTERS else f"{name[: _TITLE_LETTERS - 1]}…"


def draw_grid(rows: list[list[Tile]]) -> Figure:
    """Draw a figure with a row of tiles for each of `rows`."""
    columns = max(map(len, rows))
    lines = max(tile.title.count("\n") + 1 for row in rows for tile in row)
    heights = _TILE_INCHES + lines * _TITLE_INCHES
    figure = Figure(figsize=(columns * 1.1 * _TILE_INCHES, len(rows) * heights), dpi=_DPI)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(0.02, 0.01, 0.98, 1 - lines * _TITLE_INCHES / heights / len(rows), 0.1, lines * 0.2)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, row_axes in zip(rows, axes, strict=True):
        for tile, axis in zip(row, row_axes, strict=False):  # the last row may be shorter
            axis.imshow(tile.pixels)
            axis.set_title(tile.title, fontsize=7, parse_math=False)
    return figure


def show(
    target: str | Path,
    count: int,
    augmented: bool = False,
    size: int = 224,
    seed: int = 0,
    cache: CacheOptions | None = None,
) -> Figure:
    """Draw the first samples of a run; with `augmented`, each row of them above the same as training sees them.

    cache: for the shards of a target that is a URL. Raises as `open_dataset` does, and ValueError if an option is out
    of its range or missing.
    """
    if count < 1:
        raise ValueError(f"--count is {count}; use 1 or more")
    if is_url(target) and cache is None:
        raise ValueError(
            f"{redact_url(str(target))} is remote; name a folder for the shards that are fetched with --cache"
        )
    manifest = open_dataset(target, cache) if cache else load_manifest(target)
    count = min(count, len(manifest))
    if augmented:
        count += count % 2  # images are mixed in pairs
    before = stored_tiles(manifest, samples_at(seed, np.arange(count), len(manifest)))
    after = augmented_tiles(manifest, count, size, seed) if augmented else []
    rows = []
    for first in range(0, count, _COLUMNS):
        rows += [tiles[first : first + _COLUMNS] for tiles in (before, after) if tiles]
    return draw_grid(rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataio.show",
        description="Draws a grid of packed samples with their classes: the first ones of a run with this seed.",
    )
    parser.add_argument(
        "target", metavar="TARGET", type=os.path.expanduser, help="folder with a manifest.json, or the URL of a copy"
    )
    parser.add_argument("--out", metavar="FILE", type=user_path, required=True, help="picture to write, like grid.png")
    parser.add_argument(
        "--augmented",
        action="store_true",
        help="below each row of samples draw them as they are trained on: cropped, flipped, RandAugment, erased and"
        " mixed",
    )
    parser.add_argument("--count", type=int, default=16, help="number of samples (default: 16)")
    parser.add_argument("--size", type=int, default=224, help="pixels of an augmented image's side (default: 224)")
    parser.add_argument("--seed", type=int, default=0, help="the run's seed (default: 0)")
    parser.add_argument("--cache", metavar="FOLDER", type=user_path, help="for what is fetched, where TARGET is a URL")
    parser.add_argument("--cache-gib", metavar="N", type=float, default=64, help="size it may reach (default: 64)")
    arguments = parser.parse_args(argv)
    cache = CacheOptions(arguments.cache, int(arguments.cache_gib * 2**30)) if arguments.cache else None
    try:
        figure = show(arguments.target, arguments.count, arguments.augmented, arguments.size, arguments.seed, cache)
        figure.savefig(arguments.out)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

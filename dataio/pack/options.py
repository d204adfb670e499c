"""Options of packing: those of `python -m dataio.pack`, which launch/quickstart.py takes as well."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from dataio.files import user_path
from dataio.options import add_renamed_flag
from dataio.pack.image_checks import CHECKS, Downscale

SPLITS = ("train", "val")  # values of --split


@dataclass(frozen=True)
class PackOptions:
    """Options of a pack, named as on the command line. Raises ValueError if one is out of its range."""

    shard_mib: int = 256
    workers: int = 0  # 0: one per available core
    seed: int = 0
    check: str = "decode"
    resize: int | None = None  # pixels of the short side, at most
    quality: int | None = None  # quality of the JPEGs that --resize writes; None: 90
    skip_broken: bool = False
    val_percent: float | None = None
    split: str | None = None
    classes: Path | None = None
    max_megapixels: int = 500

    def __post_init__(self) -> None:
        if self.shard_mib < 1:
            raise ValueError(f"--shard-mib is {self.shard_mib}; use 1 or more (128 to 512 suits most disks)")
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}; use 1 or more, or 0 for one per core")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; use a number from 0 to 2**63 - 1")
        if self.check not in CHECKS:
            raise ValueError(f'--check is "{self.check}"; use {", ".join(CHECKS)}')
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"--resize is {self.resize}; use the pixels that the short side should have")
        if self.max_megapixels < 1:
            raise ValueError(f"--max-megapixels is {self.max_megapixels}; use 1 or more")
        if self.quality is not None and self.resize is None:
            raise ValueError("--quality is for the images that --resize makes smaller; give both or neither")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; use a number from 1 to 100 (above 95 gains nothing)")
        if (self.val_percent is None) != (self.split is None):
            raise ValueError("--val-percent and --split belong together; give both or neither")
        if self.val_percent is not None and not 0 < self.val_percent < 100:
            raise ValueError(f"--val-percent is {self.val_percent}; use a percentage between 0 and 100")
        if self.split not in (None, *SPLITS):
            raise ValueError(f'--split is "{self.split}"; use {" or ".join(SPLITS)}')

    def flags(self) -> Iterator[str]:
        """Yield the options that differ from the defaults, as the command takes them."""
        for field in fields(self):
            value, name = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value is True:
                yield name
            elif value != field.default:
                yield f"{name}={value}"

    @property
    def downscale(self) -> Downscale | None:
        """How large images are downscaled; None without --resize."""
        return None if self.resize is None else Downscale(self.resize, self.quality or 90)


def add_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of packing to a parser: all but --split, SOURCE and TARGET."""
    parser.add_argument(
        "--shard-mib",
        type=int,
        default=256,
        help="largest size of a shard (default: 256 MiB); a small SOURCE makes smaller ones, 64 of 16 MiB or more",
    )
    parser.add_argument("--workers", type=int, default=0, help="number of processes (default: one per core)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of storage (default: 0)")
    parser.add_argument(
        "--check",
        choices=CHECKS,
        default="decode",
        help="how each image is checked (default: decode). " + "; ".join(f"{name}: {CHECKS[name]}" for name in CHECKS),
    )
    parser.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="scale images whose short side is longer down to it, and store them as JPEG without metadata; all"
        " others are stored as they are",
    )
    parser.add_argument(
        "--max-megapixels",
        type=int,
        default=500,
        metavar="MILLIONS",
        help="larger images count as broken, since decoding takes 3 bytes of memory for each pixel (default: 500)."
        " DALI decodes JPEGs above 178 million too, but more slowly, after its first decoder logged an [ERROR]",
    )
    parser.add_argument("--quality", type=int, metavar="1-100", help="of the JPEGs that --resize writes (default: 90)")
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out and list files that are no images or do not pass the check; without it they are an error",
    )
    parser.add_argument(
        "--val-percent",
        type=float,
        metavar="PERCENT",
        help="hold out this percentage of each class for validation, and pack one --split: for images without a"
        " validation set, run twice with the same percentage. A hash of each image's path chooses them: at least one"
        " image of a class, and never all",
    )
    add_renamed_flag(parser, "--hold-out", "--val-percent")
    parser.add_argument(
        "--classes",
        type=user_path,
        metavar="FILE",
        help="names of the classes, one a line, from class 0 on; there may be more than have images (default: the"
        " folders' names in natural order, 2 before 10; of a WebDataset, those of its manifest.json, or what its .cls"
        " members say)",
    )

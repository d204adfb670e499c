"""Fashion-MNIST as class folders, as real images to start with: `python -m dataio.pack.fashion_mnist TARGET`.

TARGET/train/<class>/00000.png (60,000) and TARGET/val/<class>/… (10,000): clothes, 28×28 grey, 10 classes (Xiao, Rasul
and Vollgraf 2017, MIT licence). A file's name is the image's index in the original files, which come from Debian's
package dataset-fashion-mnist where it is installed, else from torchvision's download.
"""

import argparse
import gzip
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dataio.files import atomic_folder, user_path
from dataio.workers import available_cores, worker_pool

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SPLITS = {"train": 60_000, "val": 10_000}  # number of images
_IMAGES_PER_TASK = 5_000


@dataclass(frozen=True)
class LabeledImages:
    """(N, 28, 28) uint8 pixels, and for each image the folder name of its class."""

    pixels: npt.NDArray[np.uint8]
    classes: list[str]


def load_fashion_mnist() -> dict[str, LabeledImages]:
    """Load the splits "train" and "val". Raises RuntimeError if they can neither be found nor downloaded."""
    # Imported here: it takes seconds, and the worker processes do not need it.
    from torchvision.datasets import FashionMNIST

    # Class names become folder names: T-shirt/top → T-shirt_top
    names = [re.sub(r"[^\w-]+", "_", name) for name in FashionMNIST.classes]
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, "FashionMNIST", "raw")  # where torchvision's reader looks
        raw.mkdir(parents=True)
        for packed in DEBIAN_FOLDER.glob("*.gz"):
            with gzip.open(packed) as source, open(raw / packed.stem, "wb") as unpacked:
                shutil.copyfileobj(source, unpacked)
        try:
            splits = {name: FashionMNIST(root, train=name == "train", download=True) for name in SPLITS}
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"Fashion-MNIST is not in {DEBIAN_FOLDER} (Debian: apt-get install dataset-fashion-mnist) and"
                f" cannot be downloaded ({' '.join(str(error).split())}); take a folder with images of your own:"
                f" bash launch/quickstart.sh --data FOLDER"
            ) from error
    return {
        name: LabeledImages(data.data.numpy(), [names[target] for target in data.targets])
        for name, data in splits.items()
    }


def write_class_folders(target: Path) -> None:
    """Write TARGET/train and TARGET/val. Raises as `load_fashion_mnist` does, and ValueError if `target` exists."""
    with atomic_folder(target) as folder, worker_pool(available_cores()) as pool:
        tasks = []
        for name, images in load_fashion_mnist().items():
            for first in range(0, len(images.pixels), _IMAGES_PER_TASK):
                piece = slice(first, first + _IMAGES_PER_TASK)
                some = LabeledImages(images.pixels[piece], images.classes[piece])
                tasks.append(pool.submit(write_images, folder / name, some, first))
        for task in tasks:
            task.result()


def write_images(folder: Path, images: LabeledImages, first: int = 0) -> None:
    """Write the n-th image as FOLDER/<class>/<first + n>.png."""
    for name in set(images.classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (pixels, name) in enumerate(zip(images.pixels, images.classes, strict=True), first):
        # The fastest level of compression; a file takes one block of the disk at any.
        Image.fromarray(pixels).save(folder / name / f"{number:05d}.png", compress_level=1)


def is_complete(target: Path) -> bool:
    """Tell whether a folder holds all images of both splits, by their number."""
    return all(sum(1 for _ in (target / name).glob("*/*.png")) == count for name, count in SPLITS.items())


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dataio.pack.fashion_mnist",
        description="Writes the 60,000 + 10,000 images of Fashion-MNIST as class folders of PNG files.",
    )
    parser.add_argument("target", metavar="TARGET", type=user_path, help="folder to write; kept if it is complete")
    target = parser.parse_args(argv).target
    start = time.monotonic()
    if is_complete(target):
        print(f"{target} holds all of Fashion-MNIST already")
        return 0
    try:
        write_class_folders(target)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {sum(SPLITS.values())} images to {target} in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Generated input images of the benchmarks: crops of a few photographs that scikit-image and Matplotlib ship.

Each is cropped, scaled to about 500×375 pixels (ImageNet's most frequent size), mirrored and recoloured at random.
data.py and resume.py use them packed into shards of equal work, pack.py uses the files.
"""

import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from PIL import Image

from dataio.manifest import Manifest
from dataio.pack.options import PackOptions
from dataio.pack.packer import pack
from dataio.workers import available_cores, worker_pool

#: Class → file, in scikit-image's data folder or in Matplotlib's.
SOURCE_IMAGES = {
    "admiral": "grace_hopper.jpg",
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}
DESCRIPTION = (
    "crops of 6 photographs from scikit-image and Matplotlib, scaled to about 500×375 pixels, mirrored and recoloured,"
    " JPEG of quality 95"
)
_WIDTH, _HEIGHT = 500, 375
_QUALITY = 95
_LARGEST_SHARD = 15 * 2**20  # bytes; dataio.pack makes them no larger than 16 MiB of so few images


def make_images(folder: Path, images: int, cores: int) -> None:
    """Write `images` JPEG files into a class folder, bit-identical every time.

    Raises RuntimeError if scikit-image is not installed.
    """
    numbers = [range(start, images, cores) for start in range(cores)]
    for name in SOURCE_IMAGES:
        (folder / name).mkdir(parents=True)
    with worker_pool(cores) as pool:
        list(pool.map(_write, [folder] * cores, numbers))


def pack_images(folder: Path, images: int, cores: int) -> Manifest:
    """Pack that many generated images into `folder`/packed. Raises as `make_images` does."""
    source = folder / "photographs"
    make_images(source, images, cores)
    sizes = [path.stat().st_size + 4 * tarfile.BLOCKSIZE for path in source.glob("*/*")]  # in a shard, at most
    shards = cores * -(-sum(sizes) // (cores * _LARGEST_SHARD))  # each core gets as many
    equal_shards = max(1, (sum(sizes) / shards + max(sizes)) / 2**20)
    options = PackOptions(equal_shards, min(cores, available_cores()), check="none")  # type: ignore[arg-type]  # MiB
    return pack(source, folder / "packed", options)


def _write(folder: Path, numbers: Iterable[int]) -> None:
    pictures = {name: _open(file) for name, file in SOURCE_IMAGES.items()}
    names = list(SOURCE_IMAGES)
    for number in numbers:
        name = names[number % len(names)]
        draw = random.Random(number)  # noqa: S311  (the same images each time)
        _vary(pictures[name], draw).save(folder / name / f"{number:06d}.jpg", quality=_QUALITY)


def _open(file: str) -> Image.Image:
    try:
        import skimage  # a tool of the tests
    except ImportError as error:
        raise RuntimeError("scikit-image is not installed, which has the images; install it, or use --data") from error
    folders = Path(skimage.__file__).with_name("data"), Path(matplotlib.get_data_path(), "sample_data")
    [path] = [folder / file for folder in folders if (folder / file).is_file()]
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _vary(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Cut a window of the picture, 0.7 to 1 times as wide as it can be, in about 500×375 pixels and other colours."""
    width, height = (round(side * rng.uniform(0.85, 1.15)) for side in (_WIDTH, _HEIGHT))
    largest = min(picture.width / width, picture.height / height)
    scale = largest * rng.uniform(0.7, 1)
    left, top = rng.uniform(0, picture.width - scale * width), rng.uniform(0, picture.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    varied = picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if rng.random() < 0.5:
        varied = varied.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gains = [rng.uniform(0.7, 1.3) for _ in range(3)]
    table = [min(255, round(gain * level)) for gain in gains for level in range(256)]
    return varied.point(table)

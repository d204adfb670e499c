"""Real photographs for all tests, small and made once a session; and Ctrl-C for those that send it.

What photographs need is imported by their fixtures: the kernels' tests run where neither dataio's requirements nor
those of the other tests are installed.
"""

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
}
CROPS_PER_CLASS = 12

# A shell starts what it puts in the background deaf to Ctrl-C, and so would be the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# By default, Hypothesis fails slow examples.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


# Fixtures that take many seconds. Where several processes share the tests, all that use one go to the same process
# (of those that use two, to that of the first by name), so that it is made once.
EXPENSIVE = {
    "runs",
    "one",
    "trained_run",
    "cluster",
    "outcomes",
    "measured",
    "emulate_sanitized",
    "emulate",
    "emulate_depthwise",
    "emulate_depthwise_sanitized",
    "all_kernels",
    "rows",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # the last ones are short
        for item in items:
            for name in sorted(EXPENSIVE.intersection(item.fixturenames))[:1]:
                item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def hostile() -> str:
    """A file name from which a shell would create the file `created`, however it is quoted, and a line break."""
    words = "$(touch created)", "`touch created`", "; touch created", "'; touch created '", '"; touch created "'
    return " ".join((*words, "| touch created & #\\ * ?\ntouch created\n"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """Class folder of 48 crops of 4 photographs, 160 to 508 pixels a side: JPEG, and one each of PNG (with alpha),
    WebP, grey, CMYK and progressive JPEG, and a JPEG whose EXIF asks for a rotation by 90 degrees.
    """
    import skimage
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    for name, file in PHOTOGRAPHS.items():
        folder = root / name
        folder.mkdir()
        with Image.open(Path(skimage.data_dir, file)) as opened:
            photograph = opened.convert("RGB")
        for number in range(CROPS_PER_CLASS):
            width, height = 180 + 20 * number, 160 + 45 * (5 * number % CROPS_PER_CLASS)
            left, top = 4 * number, 2 * number
            box = (left, top, min(left + width, photograph.width), min(top + height, photograph.height))
            photograph.crop(box).save(folder / f"{number:02d}.jpg", quality=97)
    _vary_formats(root)
    return root


def _vary_formats(root: Path) -> None:
    from PIL import Image

    def replace(file: str, ending: str, mode: str, **options) -> None:
        old = root / file
        with Image.open(old) as opened:
            image = opened.convert(mode)
        old.unlink()
        image.save(old.with_suffix(ending), **options)

    rotation = Image.Exif()
    rotation[0x0112] = 6  # Orientation: turn by 90 degrees
    replace("astronaut/01.jpg", ".png", "RGBA")
    replace("cat/01.jpg", ".JPEG", "L")
    replace("coffee/01.jpg", ".jpg", "CMYK")
    replace("rocket/01.jpg", ".jpg", "RGB", exif=rotation)
    replace("rocket/02.jpg", ".webp", "RGB")
    replace("cat/02.jpg", ".jpg", "RGB", progressive=True)


@pytest.fixture(scope="session")
def shards(photos, tmp_path_factory) -> Path:
    """`photos`, packed into several shards."""
    from dataio.pack.packer import PackOptions, pack

    target = tmp_path_factory.mktemp("shards") / "photos"
    pack(photos, target, PackOptions(shard_mib=1))
    return target


@pytest.fixture(scope="session")
def fashion(tmp_path_factory) -> Path:
    """Class folder of 400 photographs of Fashion-MNIST, 10 classes, 28×28 grey PNG."""
    from dataio.pack.fashion_mnist import LabeledImages, load_fashion_mnist, write_images

    root = tmp_path_factory.mktemp("fashion")
    photographs = load_fashion_mnist()["val"]
    write_images(root, LabeledImages(photographs.pixels[:400], photographs.classes[:400]))
    return root


@pytest.fixture(scope="session")
def fashion_shards(fashion, tmp_path_factory) -> Path:
    """Folder with `train` and `val`: three quarters and one quarter of `fashion`, packed."""
    from dataio.pack.packer import PackOptions, pack

    root = tmp_path_factory.mktemp("fashion_shards")
    pack(fashion, root / "train", PackOptions(val_percent=25, split="train"))
    pack(fashion, root / "val", PackOptions(val_percent=25, split="val"))
    return root


@pytest.fixture(scope="session")
def many_shards(fashion, tmp_path_factory) -> Path:
    """`fashion`, packed into shards of about 24 images."""
    from dataio.pack.packer import PackOptions, pack

    target = tmp_path_factory.mktemp("many_shards") / "fashion"
    options = PackOptions()
    object.__setattr__(options, "shard_mib", 70 / 1024)  # the command's are of 1 MiB and more
    pack(fashion, target, options)
    return target

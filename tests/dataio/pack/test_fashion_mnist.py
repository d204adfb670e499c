"""Fashion-MNIST as class folders, and the error where it cannot be downloaded."""

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import FashionMNIST

from dataio.pack import fashion_mnist
from dataio.pack.fashion_mnist import LabeledImages, load_fashion_mnist, main, write_images


@pytest.fixture(scope="module")
def images():
    return load_fashion_mnist()


def test_all_images_are_loaded(images):
    for part, per_class in (("train", 6000), ("val", 1000)):
        pixels, classes = images[part].pixels, images[part].classes
        assert pixels.shape == (10 * per_class, 28, 28)
        assert pixels.dtype == np.uint8
        names, counts = np.unique(classes, return_counts=True)
        assert counts.tolist() == [per_class] * 10
        assert len(names) == len(FashionMNIST.classes)
        assert set(names) >= {"T-shirt_top", "Ankle_boot", "Sneaker"}


def test_labels_match_their_images(images):
    """The nearest class mean is right for two thirds of the images; by chance it would be for a tenth."""
    train, val = images["train"], images["val"]
    names = sorted(set(train.classes))
    labels = np.array(train.classes)
    means = np.stack([train.pixels[labels == name].mean(axis=0).ravel() for name in names])
    pixels = val.pixels.reshape(-1, 784).astype(float)
    nearest = ((means**2).sum(axis=1) - 2 * pixels @ means.T).argmin(axis=1)
    assert np.mean(np.array(names)[nearest] == np.array(val.classes)) > 0.6


def test_files_contain_the_pixels(images, tmp_path):
    some = LabeledImages(images["val"].pixels[:50], images["val"].classes[:50])
    write_images(tmp_path, some, first=100)
    files = sorted(tmp_path.glob("*/*.png"), key=lambda file: file.name)
    assert [file.name for file in files] == [f"{number:05d}.png" for number in range(100, 150)]
    assert [file.parent.name for file in files] == some.classes
    for file, pixels in zip(files, some.pixels, strict=True):
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.slow
def test_the_command_writes_all_and_keeps_what_is_complete(tmp_path, capsys):
    target = tmp_path / "fashion"
    assert main([str(target)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote 70000 images to {target} in ")
    assert len(list((target / "train").iterdir())) == len(list((target / "val").iterdir())) == 10
    file = target / "val" / "Bag" / "00018.png"
    changed = file.stat().st_mtime_ns
    assert main([str(target)]) == 0
    assert capsys.readouterr().out == f"{target} holds all of Fashion-MNIST already\n"
    assert file.stat().st_mtime_ns == changed

    file.unlink()
    assert main([str(target)]) == 2
    assert capsys.readouterr().err == f"error: {target} exists already; delete it or name another folder\n"


def test_neither_package_nor_download_is_an_error(tmp_path, monkeypatch, capsys):
    """Without Debian's files, and with a download address at which nothing answers."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    assert main([str(tmp_path / "target")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: Fashion-MNIST is not in {tmp_path / 'none'} (Debian: apt-get install dataset-fashion-mnist) and"
        f" cannot be downloaded ("
    )
    assert error.endswith("; take a folder with images of your own: bash launch/quickstart.sh --data FOLDER\n")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

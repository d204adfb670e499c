"""Packing of archives and WebDatasets, and the order of classes."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest
import webdataset
from torchvision.datasets import ImageFolder

from dataio.manifest import load_manifest, map_labels
from dataio.pack.__main__ import main
from dataio.pack.packer import PackOptions, pack
from dataio.verify import verify


@pytest.fixture
def numbered(source) -> Path:
    """Class folders 0 to 11."""
    for number in range(12):
        (source / f"{number}").mkdir()
        (source / "rocket" / f"{number:02d}.{'webp' if number == 2 else 'jpg'}").rename(source / f"{number}" / "0.img")
        (source / f"{number}" / "0.img").rename(source / f"{number}" / "0.jpg")
    for name in ("astronaut", "cat", "coffee", "rocket"):
        shutil.rmtree(source / name)
    return source


def test_natural_order_is_reported(numbered, tmp_path, capsys):
    assert main([str(numbered), str(tmp_path / "target")]) == 0
    assert load_manifest(tmp_path / "target").classes == tuple(map(str, range(12)))
    said = capsys.readouterr().err
    assert 'classes are in natural order, as in timm: class 2 is "2", where torchvision has "10"; --classes' in said


def test_classes_file_gives_torchvision_order(numbered, tmp_path, capsys, images_by_class, packed_images):
    """Re-sharding keeps that order, and data in natural order is evaluated by the names of its classes."""
    (tmp_path / "names").write_text("\n".join(sorted(os.listdir(numbered))))
    assert main([str(numbered), str(tmp_path / "target"), "--classes", str(tmp_path / "names")]) == 0
    classes = tuple(ImageFolder(numbered).classes)
    manifest = load_manifest(tmp_path / "target")
    assert manifest.classes == classes != tuple(map(str, range(12)))
    assert "natural order" not in capsys.readouterr().err
    assert packed_images(tmp_path / "target") == images_by_class(numbered.glob("*/*"))
    again = pack(tmp_path / "target", tmp_path / "again")
    assert again.classes == classes
    natural = pack(numbered, tmp_path / "natural")
    labels = map_labels(natural, manifest.classes, "target")  # which evaluation asks for
    assert [classes[label] for label in labels] == list(natural.classes)


def write_zip(path: Path, photos: Path) -> None:
    shutil.make_archive(str(path.with_suffix("")), "zip", photos)


def write_tar(path: Path, photos: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add(photos, arcname="photos")


@pytest.mark.parametrize(("name", "write"), [("photos.zip", write_zip), ("photos.tar", write_tar)])
def test_archives_pack_to_the_bytes_of_the_folder(name, write, photos, shards, tmp_path, contents):
    write(tmp_path / name, photos)
    assert main([str(tmp_path / name), str(tmp_path / "target"), "--shard-mib", "1", "--workers", "3"]) == 0
    assert contents(tmp_path / "target") == contents(shards)


def test_resharding(shards, tmp_path, packed_images):
    """Packed shards into larger ones, in another order."""
    manifest = pack(shards, tmp_path / "target", PackOptions(shard_mib=2, seed=5))
    assert len(manifest.shards) < len(load_manifest(shards).shards)
    assert manifest.classes == load_manifest(shards).classes
    assert packed_images(tmp_path / "target") == packed_images(shards)
    assert verify(tmp_path / "target", decode=True) == []


def test_webdataset_with_numeric_labels_and_a_classes_file(photos, tmp_path):
    """Classes without images are allowed, since numbers determine the classes."""
    with webdataset.ShardWriter(str(tmp_path / "s-%02d.tar"), maxcount=10, verbose=0) as writer:
        for number in range(3, 15):
            data = (photos / ("cat" if number % 2 else "coffee") / f"{number % 9 + 3:02d}.jpg").read_bytes()
            writer.write({"__key__": f"{number}", "jpg": data, "cls": 1 if number % 2 else 3})
    (tmp_path / "names").write_text("astronaut\ncat\ntea\ncoffee\n")
    source = tmp_path / "s-{00..01}.tar"
    assert main([str(source), str(tmp_path / "target"), "--classes", str(tmp_path / "names")]) == 0
    manifest = load_manifest(tmp_path / "target")
    assert manifest.classes == ("astronaut", "cat", "tea", "coffee")
    assert sorted(manifest.samples["label"].tolist()) == [1] * 6 + [3] * 6
    held_out = [pack(source, tmp_path / part, PackOptions(val_percent=40, split=part)) for part in ("train", "val")]
    assert sum(map(len, held_out)) == 12


def test_a_broken_image_in_an_archive_is_named(source, tmp_path, capsys):
    (source / "cat" / "cut.jpg").write_bytes((source / "cat" / "00.jpg").read_bytes()[:3000])
    write_zip(tmp_path / "photos.zip", source)
    assert main([str(tmp_path / "photos.zip"), str(tmp_path / "target")]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: broken image {tmp_path / 'photos.zip'}/cat/cut.jpg: it cannot be decoded: image file is truncated"
    )

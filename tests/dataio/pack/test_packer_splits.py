"""Splitting off validation images, and the manifests and reports of both splits, bit-identical to earlier ones."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dataio.manifest import load_manifest, parse_manifest
from dataio.pack.__main__ import main
from dataio.pack.packer import PackOptions, pack, read_report, split
from dataio.pack.source import find_images
from dataio.verify import verify


def test_train_and_val_share_out_the_images(fashion, fashion_shards, tmp_path, images_by_class, packed_images):
    train, val = packed_images(fashion_shards / "train"), packed_images(fashion_shards / "val")
    assert train + val == images_by_class(fashion.glob("*/*"))
    for name, images in by_class(fashion).items():
        assert sum(count for (of, _), count in val.items() if of == name) == int(len(images) / 4 + 0.5)
    assert load_manifest(fashion_shards / "train").classes == load_manifest(fashion_shards / "val").classes
    report = read_report(fashion_shards / "val")
    assert report.parts == {"kept": train.total(), "held-out": val.total()}
    pack(fashion, tmp_path / "val", PackOptions(val_percent=25, split="val", seed=9))
    assert packed_images(tmp_path / "val") == val  # the seed moves no image to the other split


def test_splits_of_shards_with_equal_names(fashion_shards, tmp_path):
    """Paths do not tell images apart there: of each class, half the images are in either split."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(fashion_shards / "val" / "shard-000000.tar", tmp_path / folder)
    found = find_images(f"{tmp_path}/{{a,b}}/shard-000000.tar")
    splits = split(found, 50)
    assert sum(map(len, splits.values())) == len(found.images)
    sizes = Counter(image.label for image in found.images)
    for images in splits.values():
        assert all(abs(2 * count - sizes[label]) <= 1 for label, count in Counter(i.label for i in images).items())


def by_class(folder: Path) -> dict[str, list[Path]]:
    return {one.name: sorted(one.iterdir()) for one in folder.iterdir()}


@pytest.fixture
def few(source, tmp_path) -> Path:
    """Classes of 1, 2, 3 and 12 images."""
    for name, count in (("astronaut", 1), ("cat", 2), ("coffee", 3)):
        for file in sorted((source / name).iterdir())[count:]:
            file.unlink()
    return source


@pytest.mark.parametrize(
    ("percent", "expected"), [(0.01, [1, 1, 1]), (10, [1, 1, 1]), (50, [1, 2, 6]), (99.99, [1, 2, 11])]
)
def test_each_class_of_two_images_has_one_in_both_splits(
    percent, expected, few, tmp_path, capsys, images_by_class, packed_images
):
    """A class of one image is trained on."""
    for name in ("train", "val"):
        assert main([str(few), str(tmp_path / name), "--val-percent", str(percent), "--split", name]) == 0
    train, val = (packed_images(tmp_path / name) for name in ("train", "val"))
    assert train + val == images_by_class(few.glob("*/*"))
    assert Counter(name for name, _ in val.elements()) == dict(zip(("cat", "coffee", "rocket"), expected, strict=True))
    assert "classes without images: 1 (astronaut)\n" in capsys.readouterr().err
    assert verify(tmp_path / "val") == []


def test_adding_an_image_moves_at_most_one_other(source):
    before = {image.path for image in split(find_images(source), 25)["val"]}
    shutil.copy(source / "cat" / "00.jpg", source / "cat" / "new.jpg")
    after = {image.path for image in split(find_images(source), 25)["val"]}
    assert len(after ^ before) <= 2  # the new one may take the place of another of its class
    moved = source.rename(source.with_name("moved"))
    assert {image.path for image in split(find_images(moved), 25)["val"]} == after


def test_nothing_to_hold_out_is_an_error(source, tmp_path):
    for file in source.glob("*/*"):
        if file.stem != "00":
            file.unlink()
    with pytest.raises(ValueError, match="no class of .* has two images, so that one could be held out; add some"):
        pack(source, tmp_path / "target", PackOptions(val_percent=10, split="train"))


def test_only_val_image_of_a_class_is_broken(few, tmp_path, capsys):
    """The class is left without one; in the training split that would be an error."""
    (file,) = (image.path for image in split(find_images(few), 10)["val"] if image.path.startswith("cat/"))
    (few / file).unlink()
    (few / file).write_bytes(b"no image")
    (few / "cat" / "notes").write_bytes(b"of the training split")
    assert main([str(few), str(tmp_path / "val"), "--val-percent=10", "--split=val", "--skip-broken"]) == 0
    manifest = load_manifest(tmp_path / "val")
    assert [broken.file for broken in manifest.broken] == [file]
    assert [manifest.classes[label] for label in sorted(set(manifest.samples["label"]))] == ["coffee", "rocket"]
    pack(few, tmp_path / "train", PackOptions(val_percent=10, split="train", skip_broken=True))
    assert [broken.file for broken in load_manifest(tmp_path / "train").broken] == ["cat/notes"]


def test_the_manifest_records_the_options(fashion_shards):
    fields = json.loads((fashion_shards / "val" / "manifest.json").read_text())
    assert (fields["seed"], fields["hold_out"], fields["part"]) == (0, 25, "held-out")


@pytest.fixture
def trees(tmp_path) -> Path:
    """Three classes of 5, 4 and 3 small images, a text, and a file that is no image."""
    for label, name in enumerate(("ash", "birch", "cedar")):
        (tmp_path / "trees" / name).mkdir(parents=True)
        for number in range(5 - label):
            pixels = bytes((37 * label + 11 * number + index) % 256 for index in range(64))
            (tmp_path / "trees" / name / f"{number}.pgm").write_bytes(b"P5\n8 8\n255\n" + pixels)
    (tmp_path / "trees" / "cedar" / "notes.txt").write_text("about cedars")
    (tmp_path / "trees" / "ash" / "movie.mp4").write_bytes(b"")
    return tmp_path / "trees"


#: manifest.json of `trees`, as `--hold-out 30 --part kept|held-out` wrote it before --val-percent and --split.
OLD_MANIFESTS = {
    "train": """{
 "format": 1,
 "seed": 3,
 "hold_out": 30,
 "part": "kept",
 "samples": 8,
 "samples_sha256": "0478fd186e0d13d5d0fcc9f47415f93f3bff469cb0bbd80129c8a2df5496abc3",
 "classes": [
  "ash",
  "birch",
  "cedar"
 ],
 "shards": [
  {
   "name": "shard-000000.tar",
   "bytes": 20480,
   "sha256": "fc2bc9d0061338726b294f961c877b1980bddea3f7cf8866561f5ee14c7d17cd",
   "samples": 8,
   "idx_sha256": "1d5e15c8c0a651f445bb02d597738e7d72214f19e3e9f238853be88204d5ec0a"
  }
 ],
 "broken": [
  {
   "file": "ash/movie.mp4",
   "reason": "its name ends with none of .bmp .j2k .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff\
 .webp"
  }
 ],
 "sha256": "00aa77718fef2cdd2d0ba3bd6d15bd0529359dbb88936439a16f1468785ac389"
}
""",
    "val": """{
 "format": 1,
 "seed": 3,
 "hold_out": 30,
 "part": "held-out",
 "samples": 4,
 "samples_sha256": "521b563c3dbe8a20334da6638b626d2db4333f22dee1ef4880af4718ad34f855",
 "classes": [
  "ash",
  "birch",
  "cedar"
 ],
 "shards": [
  {
   "name": "shard-000000.tar",
   "bytes": 10240,
   "sha256": "d59a4a054d1cf37d6dc35ff8b5b952aceb886ef1e8e5068ddd4852b7912d8f89",
   "samples": 4,
   "idx_sha256": "c4b48c400f3c44cc319808e3d2edd518e552352beb61d7946ca858ebefc65ee5"
  }
 ],
 "broken": [],
 "sha256": "b2c4ac2da39e639f96562e983b51cd408c4b8eee3cfad778f54ca566bf174ecb"
}
""",
}
OLD_REPORT = """{
 "check": "decode",
 "resize": null,
 "quality": null,
 "encoder": null,
 "resized": 0,
 "cmyk": [],
 "rotated": [],
 "parts": {
  "held-out": 4,
  "kept": 8
 },
 "ignored": 1
}
"""


@pytest.mark.parametrize("name", ["train", "val"])
def test_splits_are_bit_identical_to_those_of_the_old_options(name, trees, tmp_path):
    """The manifest contains the sha256 of all other files; old manifests and reports are read as before."""
    target = tmp_path / "target"
    manifest = pack(trees, target, PackOptions(val_percent=30, split=name, skip_broken=True, seed=3))
    assert (target / "manifest.json").read_text() == OLD_MANIFESTS[name]
    assert (target / "report.json").read_text() == OLD_REPORT
    file, digest = parse_manifest(OLD_MANIFESTS[name].encode(), "old")
    assert (file.hold_out, file.part, digest) == (30, {"train": "kept", "val": "held-out"}[name], manifest.hash)
    assert read_report(target).parts == {"kept": 8, "held-out": 4}
    assert verify(target, decode=True) == []

"""Levels of checking, downscaling, and unusual images of a pack."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dataio.manifest import load_manifest
from dataio.pack.__main__ import main
from dataio.pack.packer import PackOptions, pack, read_report
from dataio.verify import verify


@pytest.mark.parametrize("check", ["header", "none"])
def test_other_checks_store_the_same_bytes(check, photos, shards, tmp_path, contents):
    pack(photos, tmp_path / "target", PackOptions(shard_mib=1, check=check))
    ours, full = contents(tmp_path / "target"), contents(shards)
    assert json.loads(ours.pop("report.json"))["check"] == check
    assert json.loads(full.pop("report.json"))["check"] == "decode"
    assert ours == full


def test_each_check_finds_its_kind_of_damage(source, tmp_path):
    for name, size in (("cut.jpg", -100), ("cut.bmp", -100)):
        with Image.open(source / "cat" / "00.jpg") as image:
            image.save(source / "cat" / name)
        os.truncate(source / "cat" / name, (source / "cat" / name).stat().st_size + size)
    broken = {
        check: [file.file for file in pack(source, tmp_path / check, PackOptions(check=check, skip_broken=True)).broken]
        for check in ("decode", "header", "none")
    }
    assert broken == {"decode": ["cat/cut.bmp", "cat/cut.jpg"], "header": ["cat/cut.jpg"], "none": []}


def test_resize(photos, tmp_path, contents, images_by_class, packed_images):
    """Of photographs of 160 to 508 pixels, small ones keep their bytes, and the others get the short side asked for."""
    options = PackOptions(shard_mib=1, resize=200, quality=80)
    manifest = pack(photos, tmp_path / "target", options)
    assert verify(tmp_path / "target", decode=True) == []
    shorts = np.minimum(manifest.samples["width"], manifest.samples["height"])
    originals = images_by_class(photos.glob("*/*"))
    kept = packed_images(tmp_path / "target") & originals
    sides = {path: min(Image.open(path).size) for path in photos.glob("*/*")}
    small = [path for path, side in sides.items() if side <= 200]
    assert kept == images_by_class(small)
    assert 0 < len(small) < 48
    assert sorted(shorts.tolist()) == sorted(min(side, 200) for side in sides.values())
    report = read_report(tmp_path / "target")
    assert (report.resize, report.quality, report.resized) == (200, 80, 48 - len(small))
    assert (report.cmyk, report.rotated) == (["coffee/01.jpg"], ["rocket/01.jpg"])

    pack(photos, tmp_path / "again", replace(options, workers=3))
    assert contents(tmp_path / "again") == contents(tmp_path / "target")
    finer = pack(photos, tmp_path / "finer", replace(options, quality=None))
    assert finer.samples["bytes"].sum() > manifest.samples["bytes"].sum()


def test_text_files_are_counted_and_dangling_links_are_errors(source, tmp_path, capsys):
    (source / "cat" / "00.txt").write_text("about this cat")
    (source / "lost").symlink_to(source / "nowhere")
    assert main([str(source), str(tmp_path / "target")]) == 2
    assert "error: broken image" in (said := capsys.readouterr().err)
    assert f"{source}/lost: it is a link to nothing" in said
    (source / "lost").unlink()
    assert main([str(source), str(tmp_path / "target")]) == 0
    assert capsys.readouterr().err.startswith("texts and tables among the images, ignored: 1\n")
    assert read_report(tmp_path / "target").ignored == 1


def test_large_images(source, tmp_path, capsys):
    """PIL's limit of 179 megapixels (DecompressionBombError) has no effect, whereas --max-megapixels has."""
    Image.new("L", (14000, 13000)).save(source / "cat" / "large.png")
    message = (
        f"error: broken image {source}/cat/large.png: it has 14000×13000 pixels, more than the 100 million of"
        " --max-megapixels; allow 182, or make it smaller;"
    )
    for options in (["--check=none"], ["--check=header", "--resize=200"]):
        assert main([str(source), str(tmp_path / "target"), "--max-megapixels=100", *options]) == 2
        assert capsys.readouterr().err.startswith(message)
    large = {"resize": {"resize": 200}, "header": {"check": "header"}}
    for name, options in large.items():
        manifest = pack(source, tmp_path / name, PackOptions(**options))
        assert (manifest.samples["width"].max() == 14000) == (name == "header")
    assert main([str(source), str(tmp_path / "target"), "--max-megapixels=181", "--skip-broken"]) == 0
    assert [file.file for file in load_manifest(tmp_path / "target").broken] == ["cat/large.png"]
    assert Image.MAX_IMAGE_PIXELS < 182e6  # PIL's is as it was for everybody else


def test_unusual_images_are_reported(source, tmp_path, capsys):
    for number in range(4):
        shutil.copy(source / "rocket" / "01.jpg", source / "cat" / f"turned{number}.jpg")
    assert main([str(source), str(tmp_path / "target"), "--check", "none"]) == 0
    turned = ["cat/turned0.jpg", "cat/turned1.jpg", "cat/turned2.jpg", "cat/turned3.jpg", "rocket/01.jpg"]
    assert capsys.readouterr().err == (
        "CMYK images, trained on as RGB: 1 (coffee/01.jpg)\n"
        "images whose EXIF asks for a rotation, trained on as stored: 5 (cat/turned0.jpg, cat/turned1.jpg,"
        " cat/turned2.jpg, …; report.json lists them all)\n"
    )
    report = read_report(tmp_path / "target")
    assert (report.check, report.cmyk, report.rotated) == ("none", ["coffee/01.jpg"], turned)

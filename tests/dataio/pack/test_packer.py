"""Packing real photographs, read back with the tools that others use: webdataset, DALI's reader, wds2idx."""

import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image
from torchvision.datasets import ImageFolder
from wds2idx import IndexCreator

from dataio.files import staging_folder
from dataio.loader import map_labels
from dataio.manifest import SAMPLES_NAME, SkippedFile, load_manifest
from dataio.pack.__main__ import main
from dataio.pack.image_checks import FORMATS
from dataio.pack.packer import PackOptions, pack, read_report, split
from dataio.pack.source import find_images
from dataio.verify import verify


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def images_by_class(files) -> Counter:
    """(class, bytes) of each file, counted."""
    return Counter((file.parent.name, file.read_bytes()) for file in files)


def packed_images(folder: Path) -> Counter:
    """The same of a packed folder, by its sample table."""
    manifest = load_manifest(folder)
    shards = [(folder / shard.name).read_bytes() for shard in manifest.shards]
    return Counter(
        (manifest.classes[row["label"]], shards[row["shard"]][row["offset"] : row["offset"] + row["bytes"]])
        for row in manifest.samples
    )


# What is written


def test_the_sample_table_leads_to_every_image(photos, shards):
    assert packed_images(shards) == images_by_class(photos.glob("*/*"))


def test_sizes_are_those_of_the_stored_pixels(shards):
    """Also of the photograph whose EXIF asks for a rotation."""
    manifest = load_manifest(shards)
    rotated = 0
    for row in manifest.samples:
        with open(shards / manifest.shards[row["shard"]].name, "rb") as file:
            file.seek(row["offset"])
            image = Image.open(io.BytesIO(file.read(row["bytes"])))
        assert (row["width"], row["height"]) == image.size
        rotated += image.getexif().get(0x0112, 1) != 1
    assert rotated == 1


def test_storage_is_mixed_by_the_seed(photos, shards, tmp_path):
    labels = load_manifest(shards).samples["label"]
    assert len(set(labels[:12])) == 4
    other = pack(photos, tmp_path / "other", PackOptions(shard_mib=1, seed=1))
    assert other.samples["label"].tolist() != labels.tolist()
    assert packed_images(tmp_path / "other") == packed_images(shards)


def test_same_bytes_again_and_with_other_workers(photos, shards, tmp_path):
    for name, workers in (("one", 1), ("again", 1), ("three", 3)):
        pack(photos, tmp_path / name, PackOptions(shard_mib=1, workers=workers))
        assert contents(tmp_path / name) == contents(shards)


def test_shards_keep_to_their_size(shards, photos):
    sizes = [shard.bytes for shard in load_manifest(shards).shards]
    assert max(sizes) <= 2**20
    largest = max(file.stat().st_size for file in photos.glob("*/*"))
    assert min(sizes[:-1]) > 2**20 - largest - 4096 - 10240  # another image would not have fitted


def test_webdataset_reads_the_shards(photos, shards):
    manifest = load_manifest(shards)
    urls = [str(shards / shard.name) for shard in manifest.shards]
    read = Counter()
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        (image,) = (value for field, value in sample.items() if field in FORMATS.values())
        read[manifest.classes[int(sample["cls"])], image] += 1
    assert read == images_by_class(photos.glob("*/*"))


def test_dali_reads_the_shards_through_the_index(photos, shards):
    manifest = load_manifest(shards)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def reader():
        image, label = fn.readers.webdataset(
            paths=[str(shards / shard.name) for shard in manifest.shards],
            index_paths=[str(shards / shard.idx_name) for shard in manifest.shards],
            ext=[";".join(sorted(set(FORMATS.values()))), "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        return image, label

    pipeline = reader()
    pipeline.build()
    read = Counter()
    for _ in range(pipeline.reader_meta("reader")["epoch_size"]):
        image, label = (output.at(0).tobytes() for output in pipeline.run())
        read[manifest.classes[int(label)], image] += 1
    assert read == images_by_class(photos.glob("*/*"))


def test_the_index_is_what_wds2idx_writes(shards, tmp_path):
    for shard in load_manifest(shards).shards:
        with IndexCreator(str(shards / shard.name), str(tmp_path / "idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "idx").read_text() == (shards / shard.idx_name).read_text()


# What is refused


def test_broken_images_are_named(source, tmp_path, capsys):
    """Each kind alone ends the pack with one line, and nothing is left behind."""
    kinds = broken_files(source / "cat" / "00.jpg", source / "astronaut" / "01.png")
    for name, (content, reason) in kinds.items():
        file = source / "coffee" / name
        file.write_bytes(content)
        assert main([str(source), str(tmp_path / "target"), "--workers", "2"]) == 2
        output = capsys.readouterr()
        assert re.fullmatch(
            f"error: broken image {file}: {reason}; repair or remove it, or pack with --skip-broken to leave out"
            f" all such files\n",
            output.err,
        )
        assert output.out == ""
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        file.unlink()


def broken_files(jpeg: Path, png: Path) -> dict[str, tuple[bytes, str]]:
    gif = io.BytesIO()
    with Image.open(jpeg) as image:
        image.save(gif, "GIF")
    return {
        "cut.jpg": (jpeg.read_bytes()[:3000], r"it cannot be decoded: image file is truncated.*"),
        "cut.png": (png.read_bytes()[:-4], r"it cannot be decoded: .*"),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"not an image", "it is no image, or of an unknown format"),
        "gif.jpg": (gif.getvalue(), "it is a GIF, which DALI does not decode; convert it to JPEG or PNG"),
        "notes": (b"about coffee", r"its name ends with none of \.bmp .* \.webp"),
    }


def test_the_broken_image_named_does_not_depend_on_the_workers(source, tmp_path):
    for number in range(5):
        (source / "coffee" / f"broken{number}.jpg").write_bytes(b"no image")
    messages = set()
    for workers in (1, 2, 3):
        with pytest.raises(ValueError, match=r"broken image .*broken\d.jpg") as error:
            pack(source, tmp_path / "target", PackOptions(shard_mib=1, workers=workers))
        messages.add(str(error.value))
    assert len(messages) == 1


def test_skip_broken_lists_and_leaves_out(source, shards, tmp_path, capsys):
    kinds = broken_files(source / "cat" / "00.jpg", source / "astronaut" / "01.png")
    for name, (content, _) in kinds.items():
        (source / "coffee" / name).write_bytes(content)
    (source / "coffee" / "nowhere.jpg").symlink_to(source / "none.jpg")
    (source / "stray.jpg").write_bytes((source / "cat" / "00.jpg").read_bytes())
    reasons = {f"coffee/{name}": reason for name, (_, reason) in kinds.items()} | {
        "coffee/nowhere.jpg": "it is a link to nothing, or no regular file",
        "stray.jpg": "it lies in no class folder",
    }
    target = tmp_path / "target"
    assert main([str(source), str(target), "--skip-broken"]) == 0
    *lines, count = capsys.readouterr().err.splitlines()[2:]  # below the odd ones
    assert count == "skipped 8 broken files; manifest.json lists them all"
    broken = load_manifest(target).broken
    assert lines == [f"skipped {file.file}: {file.reason}" for file in broken]
    assert [file.file for file in broken] == sorted(reasons)
    for file in broken:
        assert re.fullmatch(reasons[file.file], file.reason)
    assert packed_images(target) == packed_images(shards)
    assert verify(target) == []


def test_names_that_are_not_utf_8(source, tmp_path):
    """A broken file's is written down so that everybody can read it; a class's would be a label's name."""
    (source / "cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no image")
    manifest = pack(source, tmp_path / "target", PackOptions(skip_broken=True))
    assert [file.file for file in manifest.broken] == ["cat/caf\\xe9.jpg"]
    os.rename(source / "cat", source / os.fsdecode(b"ch\xe2t"))
    with pytest.raises(ValueError, match=r'the name of class "ch\\xe2t" in .* is not UTF-8; rename the folder'):
        pack(source, tmp_path / "other", PackOptions(skip_broken=True))
    assert not (tmp_path / "other").exists()


def test_skip_broken_closes_the_gap_of_a_shard_without_images(source, shards, tmp_path):
    """A broken file larger than a shard would have had one for itself."""
    (source / "cat" / "large.jpg").write_bytes(b"no image" * 2**18)
    target = tmp_path / "target"
    manifest = pack(source, target, PackOptions(shard_mib=1, skip_broken=True))
    assert [shard.name for shard in manifest.shards] == [
        f"shard-{number:06d}.tar" for number in range(len(manifest.shards))
    ]
    assert sorted(contents(target)) == sorted(
        ["manifest.json", "report.json", SAMPLES_NAME]
        + [name for shard in manifest.shards for name in (shard.name, shard.idx_name)]
    )
    assert packed_images(target) == packed_images(shards)
    assert verify(target) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rex.jpg", "has only broken images; repair one or remove .*/dog"),
        ("rex.gif", r"has no images \(1 files of other kinds\); add some to .*/dog, remove that folder"),
    ],
)
def test_a_class_of_broken_files_only(name, message, source, tmp_path):
    (source / "dog").mkdir()
    (source / "dog" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=f'class "dog" {message}'):
        pack(source, tmp_path / "target", PackOptions(skip_broken=True))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_no_such_folder(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path / "target")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'none'} is not there; name a folder that holds a folder of images for each class, a zip"
        f" or tar of one, or the shards of a WebDataset\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_target_that_exists(photos, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main([str(photos), str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} exists already; delete it or name another folder\n"
    assert contents(tmp_path) == {"file": b"mine"}


def test_target_inside_the_source(source):
    with pytest.raises(ValueError, match="packed lies inside .*; choose a folder beside it"):
        pack(source, source / "packed")
    assert not (source / "packed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-mib", "0"], "--shard-mib is 0; use 1 or more (128 to 512 suits most disks)"),
        (["--workers", "-1"], "--workers is -1; use 1 or more, or 0 for one per core"),
        (["--seed", "-1"], "--seed is -1; use a number from 0 to 2**63 - 1"),
        (["--resize", "0"], "--resize is 0; use the pixels that the short side should have"),
        (["--quality", "80"], "--quality is for the images that --resize makes smaller; give both or neither"),
        (
            ["--resize", "64", "--quality", "101"],
            "--quality is 101; use a number from 1 to 100 (above 95 gains nothing)",
        ),
        (["--val-percent", "10"], "--val-percent and --split belong together; give both or neither"),
        (["--split", "train"], "--val-percent and --split belong together; give both or neither"),
        (
            ["--val-percent", "100", "--split", "train"],
            "--val-percent is 100.0; use a percentage between 0 and 100",
        ),
        (["--max-megapixels", "0"], "--max-megapixels is 0; use 1 or more"),
    ],
)
def test_options_that_cannot_be(options, message, photos, tmp_path, capsys):
    assert main([str(photos), str(tmp_path / "target"), *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_part_of_another_name():
    with pytest.raises(ValueError, match='--split is "rest"; use train or val'):
        PackOptions(val_percent=10, split="rest")


def test_check_of_another_name():
    with pytest.raises(ValueError, match='--check is "all"; use decode, header, none'):
        PackOptions(check="all")


def test_too_little_space(source, tmp_path, capsys):
    """A file of 4 TiB, of which the disk has none."""
    with open(source / "cat" / "huge.jpg", "wb") as file:
        file.truncate(2**42)
    target = tmp_path / "target"
    assert main([str(source), str(target), "--skip-broken"]) == 2
    message = capsys.readouterr().err
    free, needed = re.fullmatch(
        rf"error: {tmp_path} has ([\d,]+) MiB free, the shards need ([\d,]+) MiB; free some, or name a folder on a"
        r" larger disk\n",
        message,
    ).groups()
    assert 0 < int(free.replace(",", "")) < 2**22 < int(needed.replace(",", "")) < 2**22 + 10
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Two parts


def test_hold_out_splits_the_images(fashion, fashion_shards, tmp_path):
    kept, held_out = packed_images(fashion_shards / "train"), packed_images(fashion_shards / "val")
    assert kept + held_out == images_by_class(fashion.glob("*/*"))
    for name, images in by_class(fashion).items():
        assert sum(count for (of, _), count in held_out.items() if of == name) == int(len(images) / 4 + 0.5)
    assert load_manifest(fashion_shards / "train").classes == load_manifest(fashion_shards / "val").classes
    report = read_report(fashion_shards / "val")
    assert report.parts == {"train": kept.total(), "val": held_out.total()}
    pack(fashion, tmp_path / "val", PackOptions(val_percent=25, split="val", seed=9))
    assert packed_images(tmp_path / "val") == held_out  # the seed moves no image to the other part


def test_hold_out_of_shards_with_the_same_names(fashion_shards, tmp_path):
    """Where paths are no names of images: each class keeps at least one, and half of them."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(fashion_shards / "val" / "shard-000000.tar", tmp_path / folder)
    found = find_images(f"{tmp_path}/{{a,b}}/shard-000000.tar")
    parts = split(found, 50)
    assert sum(map(len, parts.values())) == len(found.images)
    sizes = Counter(image.label for image in found.images)
    for part in parts.values():
        assert all(abs(2 * count - sizes[label]) <= 1 for label, count in Counter(i.label for i in part).items())


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
def test_each_class_of_two_images_has_one_in_both_parts(percent, expected, few, tmp_path, capsys):
    """A class of one image is trained on."""
    for part in ("train", "val"):
        assert main([str(few), str(tmp_path / part), "--val-percent", str(percent), "--split", part]) == 0
    kept, held_out = (packed_images(tmp_path / part) for part in ("train", "val"))
    assert kept + held_out == images_by_class(few.glob("*/*"))
    assert Counter(name for name, _ in held_out.elements()) == dict(
        zip(("cat", "coffee", "rocket"), expected, strict=True)
    )
    assert "classes without images: 1 (astronaut)\n" in capsys.readouterr().err
    assert verify(tmp_path / "val") == []


def test_a_further_image_moves_no_other(source):
    before = {image.path for image in split(find_images(source), 25)["val"]}
    shutil.copy(source / "cat" / "00.jpg", source / "cat" / "new.jpg")
    after = {image.path for image in split(find_images(source), 25)["val"]}
    assert len(after ^ before) <= 2  # the new one may take the place of another of its class
    moved = source.rename(source.with_name("moved"))
    assert {image.path for image in split(find_images(moved), 25)["val"]} == after


def test_nothing_to_hold_out(source, tmp_path):
    for file in source.glob("*/*"):
        if file.stem != "00":
            file.unlink()
    with pytest.raises(ValueError, match="no class of .* has two images, so that one could be held out; add some"):
        pack(source, tmp_path / "target", PackOptions(val_percent=10, split="train"))


def test_the_only_image_held_out_of_a_class_is_broken(few, tmp_path, capsys):
    """The class is left without one; in the part that is trained on that would be an error."""
    (file,) = (image.path for image in split(find_images(few), 10)["val"] if image.path.startswith("cat/"))
    (few / file).unlink()
    (few / file).write_bytes(b"no image")
    (few / "cat" / "notes").write_bytes(b"of the kept part")
    assert main([str(few), str(tmp_path / "val"), "--val-percent=10", "--split=val", "--skip-broken"]) == 0
    manifest = load_manifest(tmp_path / "val")
    assert [broken.file for broken in manifest.broken] == [file]
    assert [manifest.classes[label] for label in sorted(set(manifest.samples["label"]))] == ["coffee", "rocket"]
    pack(few, tmp_path / "train", PackOptions(val_percent=10, split="train", skip_broken=True))
    assert [broken.file for broken in load_manifest(tmp_path / "train").broken] == ["cat/notes"]


# The order of classes


@pytest.fixture
def numbered(source) -> Path:
    """Classes 0 to 11."""
    for number in range(12):
        (source / f"{number}").mkdir()
        (source / "rocket" / f"{number:02d}.{'webp' if number == 2 else 'jpg'}").rename(source / f"{number}" / "0.img")
        (source / f"{number}" / "0.img").rename(source / f"{number}" / "0.jpg")
    for name in ("astronaut", "cat", "coffee", "rocket"):
        shutil.rmtree(source / name)
    return source


def test_natural_order_is_said(numbered, tmp_path, capsys):
    assert main([str(numbered), str(tmp_path / "target")]) == 0
    assert load_manifest(tmp_path / "target").classes == tuple(map(str, range(12)))
    said = capsys.readouterr().err
    assert 'classes are in natural order, as in timm: class 2 is "2", where torchvision has "10"; --classes' in said


def test_torchvisions_order_can_be_had(numbered, tmp_path, capsys):
    """And packed again it stays. Data in the other order is evaluated by names."""
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


# Other sources and ways to store


def write_zip(path: Path, photos: Path) -> None:
    shutil.make_archive(str(path.with_suffix("")), "zip", photos)


def write_tar(path: Path, photos: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.add(photos, arcname="photos")


@pytest.mark.parametrize(("name", "write"), [("photos.zip", write_zip), ("photos.tar", write_tar)])
def test_an_archive_gives_the_bytes_of_the_folder(name, write, photos, shards, tmp_path):
    write(tmp_path / name, photos)
    assert main([str(tmp_path / name), str(tmp_path / "target"), "--shard-mib", "1", "--workers", "3"]) == 0
    assert contents(tmp_path / "target") == contents(shards)


def test_resharding(shards, tmp_path):
    """Our own shards into larger ones, in another order."""
    manifest = pack(shards, tmp_path / "target", PackOptions(shard_mib=2, seed=5))
    assert len(manifest.shards) < len(load_manifest(shards).shards)
    assert manifest.classes == load_manifest(shards).classes
    assert packed_images(tmp_path / "target") == packed_images(shards)
    assert verify(tmp_path / "target", decode=True) == []


def test_a_webdataset_with_numbers_and_names(photos, tmp_path):
    """Classes without images are allowed where numbers say which class is which."""
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


@pytest.mark.parametrize("check", ["header", "none"])
def test_other_checks_store_the_same(check, photos, shards, tmp_path):
    pack(photos, tmp_path / "target", PackOptions(shard_mib=1, check=check))
    ours, full = contents(tmp_path / "target"), contents(shards)
    assert json.loads(ours.pop("report.json"))["check"] == check
    assert json.loads(full.pop("report.json"))["check"] == "decode"
    assert ours == full


def test_checks_let_more_or_less_through(source, tmp_path):
    for name, size in (("cut.jpg", -100), ("cut.bmp", -100)):
        with Image.open(source / "cat" / "00.jpg") as image:
            image.save(source / "cat" / name)
        os.truncate(source / "cat" / name, (source / "cat" / name).stat().st_size + size)
    broken = {
        check: [file.file for file in pack(source, tmp_path / check, PackOptions(check=check, skip_broken=True)).broken]
        for check in ("decode", "header", "none")
    }
    assert broken == {"decode": ["cat/cut.bmp", "cat/cut.jpg"], "header": ["cat/cut.jpg"], "none": []}


def test_resize(photos, tmp_path):
    """Photographs of 160 to 508 pixels: small ones keep their bytes, the others have the side that was asked for."""
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


def test_texts_are_counted_and_links_are_not_lost(source, tmp_path, capsys):
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
    """PIL's limit of 179 megapixels, which is a DecompressionBombError, does not count; ours does."""
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


def test_odd_images_are_reported(source, tmp_path, capsys):
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


# Ends that come early

MANY = 24  # times the photographs
LONG_PACK = ["--shard-mib", "2", "--workers", "2"]


@pytest.fixture(scope="module")
def many(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "many"
    for number in range(MANY):
        shutil.copytree(photos, folder / f"copy{number:02d}", copy_function=os.link)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(many, tmp_path_factory) -> dict[str, bytes]:
    """What packing `many` writes."""
    target = tmp_path_factory.mktemp("uninterrupted") / "target"
    assert main([str(many), str(target), *LONG_PACK]) == 0
    return contents(target)


# Says when it begins to list images, and stands still when so many shards are finished, until its input ends. Its
# workers have then written a further shard each.
STANDING_STILL = """
import os, sys
from dataio.pack import __main__ as command, packer as pack

def find_images(*arguments):
    print("listing", flush=True)
    return find(*arguments)

def write_shard(task):
    written = write(task)
    if int(task.path.stem.rpartition("-")[2]) >= finished:
        os.read(0, 1)
    return written

find, write, finished = pack.find_images, pack.write_shard, int(sys.argv[1])
pack.find_images, pack.write_shard = find_images, write_shard
sys.exit(command.main(sys.argv[2:]))
"""


def start_pack(many: Path, target: Path, *options: str, shards: int) -> subprocess.Popen:
    """A pack that lists images, and will stand still when so many shards are finished."""
    command = subprocess.Popen(
        [sys.executable, "-c", STANDING_STILL, str(shards), many, target, *LONG_PACK, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert command.stdout.readline() == "listing\n", command.communicate()
    return command


def pack_until(shards: int, many: Path, target: Path, *options: str) -> subprocess.Popen:
    """A pack that stands still: so many shards are finished."""
    command = start_pack(many, target, *options, shards=shards)
    while len(finished(target)) < shards:
        assert command.poll() is None, said(command)
        time.sleep(0.002)
    return command


def said(command: subprocess.Popen) -> tuple[str, str]:
    """All that it prints before it ends, on either output."""
    printed = command.stdout.read(), command.stderr.read()
    command.wait()
    return printed


def killed_pack(shards: int, many: Path, target: Path, *options: str) -> str:
    """What the command says whose process is killed when so many shards are finished."""
    command = pack_until(shards, many, target, *options)
    command.kill()
    return said(command)[1]


def finished(target: Path) -> dict[str, tuple[int, int]]:
    """The inode and time of change of each shard that an unfinished pack has noted as finished."""
    partial = staging_folder(target)
    if not (partial / "journal").exists():
        return {}
    shards = sorted((partial / "content").glob("*.tar"))[: (partial / "journal").read_bytes().count(b"\n") - 1]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


@pytest.mark.slow
def test_killed_again_and_again(many, uninterrupted, tmp_path):
    """SIGKILL after some shards, each time further on; no shard is written twice, and the bytes are the same."""
    target = tmp_path / "target"
    before: dict[str, tuple[int, int]] = {}
    for shards in (1, 3, 8, 14):
        message = killed_pack(shards, many, target)
        if before:
            assert re.fullmatch(rf"going on: {len(before)} of \d+ shards are finished\n", message)
        after = finished(target)
        assert len(after) == shards
        assert after.items() >= before.items()
        assert not target.exists()
        before = after
    assert main([str(many), str(target), *LONG_PACK]) == 0
    assert contents(target) == uninterrupted
    assert {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.glob("*.tar")
    }.items() >= before.items()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def kill_at(event: int, source: Path, target: Path) -> None:
    """Packs, and kills this process before the n-th time that it opens, renames or removes a file."""
    seen = 0

    def count(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (name == "open" and "w" in str(arguments[1])):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    pack(source, target, PackOptions(shard_mib=1, workers=2))
    os._exit(0)


@pytest.mark.slow
def test_killed_at_every_step(photos, shards, tmp_path):
    """Between any two changes to the disk, in a process of its own; then packed to the end."""
    expected = contents(shards)
    context = multiprocessing.get_context("fork")
    for event in itertools.count(1):
        target = tmp_path / f"{event}"
        process = context.Process(target=kill_at, args=(event, photos, target))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        noted = finished(target)
        if not target.exists():
            pack(photos, target, PackOptions(shard_mib=1))
            inodes = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.glob("*.tar")}
            assert inodes.items() >= noted.items()
            assert not staging_folder(target).exists()
        assert contents(target) == expected
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert event > 15


def test_a_shard_that_was_damaged_meanwhile_is_written_again(many, uninterrupted, tmp_path):
    target = tmp_path / "target"
    killed_pack(6, many, target)
    content = staging_folder(target) / "content"
    with open(content / "shard-000004.tar", "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert main([str(many), str(target), *LONG_PACK]) == 0
    assert contents(target) == uninterrupted


@pytest.mark.parametrize("spoil", [lambda line: line[:-30], lambda line: line.replace(b'"bytes"', b'"Bytes"')])
def test_a_spoiled_journal(spoil, many, uninterrupted, tmp_path, capsys):
    target = tmp_path / "target"
    killed_pack(6, many, target)
    journal = staging_folder(target) / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[4] = spoil(lines[4])
    journal.write_bytes(b"".join(lines))
    assert main([str(many), str(target), *LONG_PACK]) == 0
    assert capsys.readouterr().err.startswith("going on: 3 of ")
    assert contents(target) == uninterrupted


def interrupted_pack(many: Path, target: Path, shards: int = 3) -> str:
    """What the command says when Ctrl-C reaches all its processes after some shards."""
    command = pack_until(shards, many, target)
    os.killpg(command.pid, signal.SIGINT)
    output, message = said(command)
    assert command.returncode == 130
    assert output == ""
    return message


def test_ctrl_c_keeps_finished_shards(many, uninterrupted, tmp_path, capsys):
    target = tmp_path / "target"
    assert interrupted_pack(many, target) == (
        f"interrupted; {target} is not written; finished shards are kept in {staging_folder(target)}, and the same"
        f" command goes on from there\n"
    )
    assert main([str(many), str(target), *LONG_PACK, "--workers", "1"]) == 0
    assert capsys.readouterr().err.startswith("going on: ")
    assert contents(target) == uninterrupted


@pytest.mark.parametrize("delay", [0, 0.01, 0.03, None])
def test_ctrl_c_at_the_beginning(delay, many, tmp_path):
    """While images are listed, while workers are forked, while they write: one line, and nothing is left."""
    target = tmp_path / "target"
    command = start_pack(many, target, shards=0)
    if delay is None:
        while not any(staging_folder(target).glob("*.new")):
            assert command.poll() is None, said(command)
            time.sleep(0.002)
    else:
        time.sleep(delay)
    os.killpg(command.pid, signal.SIGINT)
    assert said(command) == ("", f"interrupted; {target} is not written\n")
    assert command.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--seed", "1"], "--seed"),
        (["--shard-mib", "3", "--resize", "1000"], "--shard-mib, --resize, --quality, version of Pillow"),
        (["--check", "none"], "--check"),
        (["--max-megapixels", "1"], "--max-megapixels"),
        (["--classes", "names"], "classes"),
        (["--val-percent", "50", "--split", "train"], "choice of images, --val-percent, --split"),
    ],
)
def test_other_options_start_anew(options, changed, many, tmp_path, capsys, monkeypatch):
    target = tmp_path / "target"
    monkeypatch.chdir(tmp_path)
    Path("names").write_text("\n".join(sorted(os.listdir(many), reverse=True)))
    interrupted_pack(many, target)
    assert main([str(many), str(target), *LONG_PACK, *options]) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == f"starting anew: the unfinished pack in {staging_folder(target)} had another {changed}"
    main([str(many), str(tmp_path / "expected"), *LONG_PACK, *options])
    assert contents(target) == contents(tmp_path / "expected")


def test_a_changed_source_starts_anew(many, source, tmp_path, capsys):
    target = tmp_path / "target"
    interrupted_pack(many, target)
    assert main([str(source), str(target)]) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        f"starting anew: the unfinished pack in {staging_folder(target)} had another source (its files, their sizes"
        " and times of change), classes, choice of images, --shard-mib"
    )
    assert packed_images(target) == images_by_class(source.glob("*/*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_skip_broken_goes_on_after_a_broken_image(many, tmp_path, capsys):
    """The shards before the broken image are kept, and used when it is to be skipped."""
    folder = shutil.copytree(many, tmp_path / "many", copy_function=os.link)
    for number in range(8):  # some shard other than the first ones has one of them first
        (folder / "copy00" / f"broken{number}.jpg").write_bytes(b"no image")
    target = tmp_path / "target"
    for seed in map(str, range(20)):
        shutil.rmtree(staging_folder(target), ignore_errors=True)
        assert main([str(folder), str(target), *LONG_PACK, "--seed", seed]) == 2
        error, *kept = capsys.readouterr().err.splitlines()
        if kept:
            break
    assert kept == [f"finished shards are kept in {staging_folder(target)}, and the same command goes on from there"]
    before = finished(target)
    assert len(before) >= 1
    assert main([str(folder), str(target), *LONG_PACK, "--seed", seed]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [error, *kept]

    assert main([str(folder), str(target), *LONG_PACK, "--seed", seed, "--skip-broken"]) == 0
    assert capsys.readouterr().err.startswith(f"going on: {len(before)} of ")
    assert len(load_manifest(target).broken) == 8
    assert (target / "shard-000000.tar").stat().st_ino == before["shard-000000.tar"][0]
    assert main([str(folder), str(tmp_path / "expected"), *LONG_PACK, "--seed", seed, "--skip-broken"]) == 0
    assert contents(target) == contents(tmp_path / "expected")


def test_skipped_images_of_finished_shards_are_not_forgotten(many, tmp_path, capsys):
    folder = shutil.copytree(many, tmp_path / "many", copy_function=os.link)
    for number in range(40):
        (folder / "copy00" / f"broken{number}.jpg").write_bytes(b"no image")
    target = tmp_path / "target"
    killed_pack(8, folder, target, "--skip-broken")
    assert main([str(folder), str(target), *LONG_PACK]) == 2
    going_on, error, _ = capsys.readouterr().err.splitlines()
    assert going_on.startswith("going on: ")
    assert re.match(rf"error: broken image {folder}/copy00/broken\d+.jpg: it is no image", error)
    assert main([str(folder), str(target), *LONG_PACK, "--skip-broken"]) == 0
    broken = load_manifest(target).broken
    assert len(broken) == 40
    assert broken[0] == SkippedFile("copy00/broken0.jpg", "it is no image, or of an unknown format")
    assert len(load_manifest(target)) == 48 * MANY


@pytest.mark.slow
def test_two_packs_at_once(many, uninterrupted, tmp_path, capsys):
    target = tmp_path / "target"
    command = pack_until(1, many, target)
    assert main([str(many), str(target), *LONG_PACK]) == 2
    assert capsys.readouterr().err == (  # not a word about the shards of the other
        f"error: another process is writing {target}; wait until it has ended, or name another folder\n"
    )
    command.communicate()
    assert command.returncode == 0
    assert contents(target) == uninterrupted


def test_a_killed_worker_is_an_error(many, tmp_path):
    target = tmp_path / "target"
    command = pack_until(3, many, target)
    psutil.Process(command.pid).children()[0].kill()
    _, message = said(command)
    assert command.returncode == 2
    assert message == (
        "error: a worker was killed, most often because memory ran out; free some, or use fewer workers\n"
        f"finished shards are kept in {staging_folder(target)}, and the same command goes on from there\n"
    )


def test_help_explains_each_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for option in (
        "SOURCE",
        "TARGET",
        "--shard-mib",
        "--workers",
        "--seed",
        "--check",
        "--resize",
        "--quality",
        "--skip-broken",
        "--val-percent",
        "--split",
        "--classes",
        "--max-megapixels",
    ):
        assert re.search(rf"^  {option}\b.*", text, re.MULTILINE), option


def test_the_manifest_records_the_options(fashion_shards):
    fields = json.loads((fashion_shards / "val" / "manifest.json").read_text())
    assert (fields["seed"], fields["hold_out"], fields["part"]) == (0, 25, "val")

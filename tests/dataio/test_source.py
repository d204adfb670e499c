"""Finding images and classes in folders, archives and WebDatasets, among other files."""

import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from dataio.index import load_manifest
from dataio.source import Source, find_images


def read(found: Source) -> dict[tuple[str, str], bytes]:
    """(class, path) of each image, and its bytes."""
    return {
        (found.classes[image.label], image.path): found.reader.read(image.bytes, image.place) for image in found.images
    }


# Class folders


def test_nested_linked_and_hidden_files(source):
    """Sub-folders and links belong to their class, hidden files and files beside the classes to none."""
    before = len(list(source.glob("*/*")))
    nested = source / "cat" / "indoors" / "old"
    nested.mkdir(parents=True)
    (source / "cat" / "03.jpg").rename(nested / "photo.jpg")
    (source / "cat" / "linked.jpg").symlink_to(source / "cat" / "04.jpg")
    (nested / "up").symlink_to(source / "cat")  # a circle
    (source / "dog").symlink_to(source / "rocket")
    (source / "cat" / ".hidden.jpg").write_bytes(b"no image")
    (source / ".hidden").mkdir()
    (source / "README.txt").write_text("about these photographs")
    found = find_images(source)
    assert len(found.images) == before + 1 + 12
    assert found.classes == ("astronaut", "cat", "coffee", "dog", "rocket")
    assert np.bincount([image.label for image in found.images]).tolist() == [12, 13, 12, 12, 12]
    assert found.broken == []
    assert read(found) == {
        (name, image.path): (source / image.path).read_bytes()
        for image in found.images
        for name in [image.path.partition("/")[0]]
    }


def test_images_without_class_folders(photos):
    with pytest.raises(ValueError, match="cat holds no class folders; put the images of each class into a folder"):
        find_images(photos / "cat")


def test_empty_class(source):
    (source / "dog").mkdir()
    with pytest.raises(ValueError, match='class "dog" has no images; add some to .*/dog or remove that folder'):
        find_images(source)
    (source / "dog" / "rex.gif").write_bytes(b"")
    with pytest.raises(ValueError, match=r'class "dog" has no images \(1 files of other kinds\); add some'):
        find_images(source)


def test_the_stamp_tells_changes(source):
    """Of names, sizes and times; but not where the folder lies."""
    stamps = [find_images(source).stamp]
    moved = source.rename(source.with_name("moved"))
    assert find_images(moved).stamp == stamps[0]
    image = moved / "cat" / "00.jpg"
    shutil.copy(moved / "cat" / "03.jpg", moved / "cat" / "new.jpg")
    stamps.append(find_images(moved).stamp)
    image.rename(image.with_name("renamed.jpg"))
    stamps.append(find_images(moved).stamp)
    (moved / "cat" / "new.jpg").touch()
    stamps.append(find_images(moved).stamp)
    (moved / "cat" / "new.jpg").write_bytes(image.with_name("renamed.jpg").read_bytes())
    stamps.append(find_images(moved).stamp)
    assert len(set(stamps)) == len(stamps)


# Archives of them


def write_zip(path: Path, source: Path, above: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(source.rglob("*")):
            archive.write(file, above + str(file.relative_to(source)))


def write_tar(path: Path, source: Path, above: str) -> None:
    with tarfile.open(path, "w") as archive:
        archive.add(source, arcname=above or ".")


@pytest.mark.parametrize("above", ["", "photos/", "data/of/photos/"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_archives_are_like_the_folder(write, above, source, tmp_path):
    """Also if folders lie around it, and with a Mac's files."""
    (source / "cat" / "indoors").mkdir()
    (source / "cat" / "03.jpg").rename(source / "cat" / "indoors" / "photo.jpg")
    (source / "stray.jpg").write_bytes(b"image")
    (source / "README.txt").write_text("about these photographs")
    (source / "cat" / "notes.txt").write_text("about cats")
    (source / "cat" / ".DS_Store").write_text("of a Mac")
    (source / "__MACOSX" / "cat").mkdir(parents=True)
    (source / "__MACOSX" / "cat" / "._00.jpg").write_text("of a Mac")
    write(tmp_path / "archive", source, above)
    shutil.rmtree(source / "__MACOSX")
    found, expected = find_images(tmp_path / "archive"), find_images(source)
    assert sorted(file.file for file in found.broken) == ["cat/notes.txt", "stray.jpg"]
    assert {*found.broken} == {*expected.broken}
    assert found.classes == expected.classes
    assert read(found) == read(expected)
    assert [(image.path, image.bytes) for image in found.images] == [
        (image.path, image.bytes) for image in expected.images
    ]


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_faults_of_class_folders_in_archives(write, source, tmp_path):
    write(tmp_path / "flat", source / "cat", "")
    with pytest.raises(ValueError, match="flat holds no class folders; put the images of each class into a folder"):
        find_images(tmp_path / "flat")
    (source / "dog").mkdir()
    write(tmp_path / "empty", source, "")
    with pytest.raises(ValueError, match='class "dog" has no images; add some to .*empty/dog or remove that folder'):
        find_images(tmp_path / "empty")


def test_an_archive_of_one_class(source, tmp_path):
    write_zip(tmp_path / "one.zip", source / "cat", "photos/cat/")
    found = find_images(tmp_path / "one.zip")
    assert (found.classes, len(found.images)) == (("cat",), 12)


def test_a_member_that_is_there_twice(photos, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            archive.add(photos / "cat" / "00.jpg", "cat/00.jpg")
    with pytest.raises(ValueError, match=r"a.tar holds cat/00.jpg twice; write that archive again with one of them"):
        find_images(tmp_path / "a.tar")


def test_a_compressed_tar_file(photos, tmp_path):
    subprocess.run(["tar", "czf", tmp_path / "a.tar.gz", "-C", photos, "."], check=True)
    with pytest.raises(ValueError, match=r"a.tar.gz is compressed \(gzip\), .*; unpack it first: gunzip"):
        find_images(tmp_path / "a.tar.gz")


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="none is not there; name a folder that holds a folder of images for each"):
        find_images(tmp_path / "none")


def test_class_names_for_a_class_folder(photos, tmp_path):
    with pytest.raises(ValueError, match="--classes names the classes of a WebDataset; in .* the folders name them"):
        find_images(photos, tmp_path / "names.txt")


# WebDatasets


@pytest.fixture
def samples(photos) -> list[tuple[str, bytes]]:
    """(class, image) of 24 JPEGs of 4 classes."""
    return [
        (name, (photos / name / f"{number:02d}.jpg").read_bytes())
        for number in range(3, 9)
        for name in ("rocket", "cat", "coffee", "astronaut")
    ]


def write_shards(pattern: Path, samples: list[dict]) -> None:
    with webdataset.ShardWriter(str(pattern), maxcount=10, verbose=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"{number:06d}"} | sample)


def images_of(found: Source) -> list[tuple[str, bytes]]:
    return [(name, data) for (name, _), data in read(found).items()]


@pytest.mark.parametrize("way", ["folder", "pattern", "file"])
def test_a_webdataset_with_class_names(way, samples, tmp_path):
    write_shards(tmp_path / "s-%03d.tar", [{"jpg": data, "cls": name, "json": {"a": 1}} for name, data in samples])
    if way == "file":
        (tmp_path / "s-001.tar").unlink()
    found = find_images(
        {"folder": tmp_path, "pattern": tmp_path / "s-{000..002}.tar", "file": tmp_path / "s-000.tar"}[way]
    )
    assert found.classes == ("astronaut", "cat", "coffee", "rocket")
    assert images_of(found) == (samples[:10] if way == "file" else samples)
    assert found.images[0].path == "s-000.tar/000000.jpg"


def test_a_webdataset_with_numbers(samples, tmp_path):
    """Classes without samples keep their place."""
    numbers = {"rocket": 0, "cat": 2, "coffee": 3, "astronaut": 5}
    write_shards(tmp_path / "%03d.tar", [{"jpeg": data, "cls": numbers[name]} for name, data in samples])
    found = find_images(tmp_path)
    assert found.classes == ("0", "1", "2", "3", "4", "5")
    assert images_of(found) == [(str(numbers[name]), data) for name, data in samples]
    names = tmp_path / "names.txt"
    names.write_text("rocket\ndog\ncat\ncoffee\ntea\nastronaut\nmoon\n")
    found = find_images(tmp_path, names)
    assert found.classes == ("rocket", "dog", "cat", "coffee", "tea", "astronaut", "moon")
    assert images_of(found) == samples


def test_names_decide_the_order_of_named_classes(samples, tmp_path):
    write_shards(tmp_path / "%03d.tar", [{"png": data, "cls": name} for name, data in samples])
    (tmp_path / "names").write_text("cat\nrocket\ncoffee\nastronaut\n")
    found = find_images(tmp_path, tmp_path / "names")
    assert found.classes == ("cat", "rocket", "coffee", "astronaut")
    assert images_of(found) == samples


def test_our_own_shards(shards, photos):
    """Their manifest has the names."""
    found, manifest = find_images(shards), load_manifest(shards)
    assert found.classes == manifest.classes
    assert [image.label for image in found.images] == manifest.samples["label"].tolist()
    assert sorted(images_of(found)) == sorted((path.parent.name, path.read_bytes()) for path in photos.glob("*/*"))


def write_tar_of(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            path.with_suffix(".member").write_bytes(data)
            tar.add(path.with_suffix(".member"), name)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["a.jpg", "a.cls", "b.jpg"], r"sample b has no .cls; a sample needs one image and its class, like b.jpg"),
        (["a.jpg", "a.cls", "b.cls"], r"sample b has 0 images; a sample needs one image and its class"),
        (["a.jpg", "a.cls", "a.png"], r"sample a has 2 images; a sample needs one image and its class"),
        (["a.jpg", "a.cls", "b.jpg", "b.cls", "a.jpg"], r"holds a.jpg twice; write that archive again with one"),
        (["a.jpg", "a.cls", "x/a.jpg", "x/a.cls", "x/a.cls"], r"holds x/a.cls twice"),
        (["a.jpg", "empty.cls", "empty.jpg", "a.cls"], r"empty.cls is empty; write the class's number or name"),
        (["notes.txt", "a.cls.txt", "b.cls", "b.jpg", "b.txt", "a.JPEG"], r"sample a has no .cls"),
    ],
)
def test_samples_that_are_not_whole(members, message, photos, tmp_path):
    data = (photos / "cat" / "00.jpg").read_bytes()
    contents = {"cls": b"cat", "jpg": data, "png": data}
    write_tar_of(
        tmp_path / "a.tar",
        [(name, b"" if name == "empty.cls" else contents.get(name.rpartition(".")[2], b"text")) for name in members],
    )
    with pytest.raises(ValueError, match=rf"a.tar: {message}|a.tar {message}"):
        find_images(tmp_path)


def test_the_same_keys_in_other_folders_and_shards(photos, tmp_path):
    data = (photos / "cat" / "00.jpg").read_bytes()
    members = [("x/1.jpg", data), ("x/1.cls", b"3"), ("y/1.cls", b"4\n"), ("y/1.jpg", data)]
    for name in ("a.tar", "b.tar"):
        write_tar_of(tmp_path / name, members)
    found = find_images(tmp_path)
    assert [(image.path, image.label) for image in found.images] == [
        (f"{shard}/{folder}/1.jpg", label) for shard in ("a.tar", "b.tar") for folder, label in (("x", 3), ("y", 4))
    ]


@pytest.mark.parametrize(
    ("label", "names", "message"),
    [
        ("2", "a\nb\n", r"has class 2, and names are known for 2 from 0 on; give a file with 3 lines to --classes"),
        ("9999999999", None, r"has class 9999999999, and names are known for 0 from 0 on"),
        ("dog", "cat\nrocket\n", r'has class "dog", which is none of the 2 names; add it to these'),
        ("dog", "cat\n\ndog\n", r'names: line 2 is "", empty or there twice; write a name a line'),
        ("dog", "cat\ndog\ncat\n", r'names: line 3 is "cat", empty or there twice'),
    ],
)
def test_classes_that_do_not_fit(label, names, message, photos, tmp_path):
    write_tar_of(tmp_path / "a.tar", [("1.jpg", (photos / "cat" / "00.jpg").read_bytes()), ("1.cls", label.encode())])
    if names is not None:
        (tmp_path / "names").write_text(names)
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path, tmp_path / "names" if names else None)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{000..002}.tar", r"001.tar is not there; correct the pattern .*/\{000..002\}.tar or copy that shard"),
        ("{000..002.tar", r"is no brace pattern \(.*\); write it like 'shard-\{000000..000041\}.tar'"),
    ],
)
def test_patterns_that_do_not_fit(pattern, message, shards, tmp_path):
    shutil.copy(shards / "shard-000000.tar", tmp_path / "000.tar")
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path / pattern)


def test_shards_without_samples(photos, tmp_path):
    write_tar_of(tmp_path / "a.tar", [("cat/1.json", b"{}")])
    with pytest.raises(ValueError, match=r"holds no samples: no member of its tar files ends with .cls"):
        find_images(tmp_path)

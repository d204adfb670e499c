"""Finding images and classes in folders, archives and WebDatasets, among other files."""

import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import natural_key as timm_key

from dataio.manifest import load_manifest
from dataio.pack.source import Source, find_images, read_names


def read(found: Source) -> dict[tuple[str, str], bytes]:
    """Return the bytes of each image, by (class, path)."""
    return {
        (found.classes[image.label], image.path): found.reader.read(image.bytes, image.locator)
        for image in found.images
    }


# Class folders


def test_folder_without_read_permission_is_an_error(source, tmp_path):
    """Tried as a user without privileges, since root may read everything."""
    source.chmod(0o755)
    (source / "cat").chmod(0o700)
    said = tmp_path / "said"
    with open(said, "w") as file:
        if (child := os.fork()) == 0:
            try:
                if os.getuid() == 0:
                    os.chroot(source)
                    os.setuid(65534)
                else:
                    (source / "cat").chmod(0)
                find_images(Path("/" if os.getuid() == 65534 else source))
            except ValueError as error:
                file.write(str(error))
            finally:
                file.flush()
                os._exit(0)
        os.waitpid(child, 0)
    (source / "cat").chmod(0o700)
    assert said.read_text().endswith("/cat may not be read by this user; make it readable")


def test_nested_linked_and_hidden_files(source):
    """Subfolders and links belong to their class; hidden files and files beside the classes are ignored."""
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


def test_images_without_class_folders_are_an_error(photos):
    with pytest.raises(ValueError, match="cat holds no class folders; put the images of each class into a folder"):
        find_images(photos / "cat")


def test_empty_class_is_an_error(source):
    (source / "dog").mkdir()
    with pytest.raises(ValueError, match='class "dog" has no images; add some to .*/dog, remove that folder, or name'):
        find_images(source)
    (source / "dog" / "rex.gif").write_bytes(b"")
    with pytest.raises(ValueError, match=r'class "dog" has no images \(1 files of other kinds\); add some'):
        find_images(source)


# Numbers, letters of both kinds, and names that differ in zeros or capitals alone, whose order timm leaves open.
ODD_NAMES = ["10", "9", "100", "09", "b2", "b10", "B1", "a", "A", "Z", "b", "x-1.5", "x-1.25", "é", "٣", "1 a", "1b"]


def test_class_order_equals_timms(photos, tmp_path):
    for name in ODD_NAMES:
        (tmp_path / name).mkdir()
        shutil.copy(photos / "cat" / "00.jpg", tmp_path / name)
    found = find_images(tmp_path)
    _, classes = find_images_and_targets(str(tmp_path))
    assert [timm_key(name) for name in found.classes] == [timm_key(name) for name in classes]
    assert sorted(found.classes) == sorted(ODD_NAMES)
    assert found.natural_order


def test_classes_file_gives_the_order_of_folders(source, tmp_path):
    """It may name further classes without images, and have Windows' line endings and byte order mark."""
    names = tmp_path / "names.txt"
    names.write_bytes("\ufeffrocket\r\ncoffee\r\ntea\r\ncat\r\nastronaut\r\n".encode())
    found = find_images(source, read_names(names))
    assert (found.classes, found.natural_order) == (("rocket", "coffee", "tea", "cat", "astronaut"), False)
    assert read(found).keys() == read(find_images(source)).keys()
    write_zip(tmp_path / "photos.zip", source, "")
    assert find_images(tmp_path / "photos.zip", read_names(names)).classes == found.classes
    (source / "tea").mkdir()
    assert find_images(source, found.classes).classes == found.classes
    (source / "milk").mkdir()
    with pytest.raises(
        ValueError, match='none of the 5 names of classes is "milk", a folder in .*; add it to the file'
    ):
        find_images(source, found.classes)
    for folder in ("rocket", "coffee", "cat", "astronaut"):
        shutil.rmtree(source / folder)
    with pytest.raises(ValueError, match='class "milk" has no images'):
        find_images(source, ["tea", "milk"])


def test_composed_and_decomposed_accents(source):
    """macOS writes accents as two characters, other systems as one."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    (source / "coffee").rename(source / apart)
    found = find_images(source)
    assert composed in found.classes
    assert all((source / image.path).is_file() for image in found.images)
    shutil.copytree(source / "cat", source / composed)
    with pytest.raises(ValueError, match="holds two folders caf., written with other Unicode characters; rename one"):
        find_images(source)


STRAY = ["Thumbs.db", "desktop.ini", "ehthumbs.db", ".DS_Store", "._00.jpg", "Icon\r", "@eaDir/00.jpg/THUMB_M.jpg"]
STRAY += ["__MACOSX/._00.jpg", ".ipynb_checkpoints/00-checkpoint.jpg", "lost+found/1.jpg", "Picasa.ini"]


@pytest.mark.parametrize("place", ["", "cat", "cat/indoors"])
def test_files_of_systems_and_viewers_are_ignored(place, source):
    expected = find_images(source)
    for name in STRAY:
        file = source / place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"of a system")
    found = find_images(source)
    assert (found.classes, found.images, found.broken, found.ignored) == (expected.classes, expected.images, [], 0)


def test_other_files_in_a_class(source):
    """Text files and tables are counted; images that DALI does not decode and all other files are broken."""
    for name in ("notes.txt", "00.JSON", "00.xml", "labels.csv", "a.gif", "b.HEIC", "movie.mp4", "no_ending"):
        (source / "cat" / name).write_bytes(b"")
    for name in ("c.jfif", "d.JPE", "e.JPEG", "f.Jpg"):
        shutil.copy(source / "cat" / "00.jpg", source / "cat" / name)
    found = find_images(source)
    assert (found.ignored, len(found.images)) == (4, 48 + 4)
    reasons = {file.file: file.reason for file in found.broken}
    assert reasons.keys() == {f"cat/{name}" for name in ("a.gif", "b.HEIC", "movie.mp4", "no_ending")}
    assert reasons["cat/a.gif"] == "DALI does not decode .gif files; convert it to JPEG or PNG"
    assert reasons["cat/b.HEIC"] == "DALI does not decode .heic files; convert it to JPEG or PNG"
    assert reasons["cat/movie.mp4"].startswith("its name ends with none of .bmp")


def test_class_folder_that_is_a_symlink(source, tmp_path):
    """A dangling one is an error, not a missing class."""
    (source / "cat").rename(tmp_path / "elsewhere")
    (source / "cat").symlink_to(tmp_path / "elsewhere")
    (source / "rocket" / "itself.jpg").symlink_to("itself.jpg")
    found = find_images(source)
    assert found.classes == ("astronaut", "cat", "coffee", "rocket")
    assert [file.file for file in found.broken] == ["rocket/itself.jpg"]
    (tmp_path / "elsewhere").rename(tmp_path / "gone")
    (source / "rocket" / "itself.jpg").unlink()
    assert [(file.file, file.reason[:20]) for file in find_images(source).broken] == [("cat", "it is a link to noth")]


def test_fingerprint_changes_with_the_source(source):
    """With names, sizes and modification times, but not with the location of the folder."""
    stamps = [find_images(source).fingerprint]
    moved = source.rename(source.with_name("moved"))
    assert find_images(moved).fingerprint == stamps[0]
    image = moved / "cat" / "00.jpg"
    shutil.copy(moved / "cat" / "03.jpg", moved / "cat" / "new.jpg")
    stamps.append(find_images(moved).fingerprint)
    image.rename(image.with_name("renamed.jpg"))
    stamps.append(find_images(moved).fingerprint)
    (moved / "cat" / "new.jpg").touch()
    stamps.append(find_images(moved).fingerprint)
    (moved / "cat" / "new.jpg").write_bytes(image.with_name("renamed.jpg").read_bytes())
    stamps.append(find_images(moved).fingerprint)
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
def test_archives_equal_their_folder(write, above, source, tmp_path):
    """Also below other folders, and with the files that macOS adds."""
    (source / "cat" / "indoors").mkdir()
    (source / "cat" / "03.jpg").rename(source / "cat" / "indoors" / "photo.jpg")
    (source / "stray.jpg").write_bytes(b"image")
    (source / "README.txt").write_text("about these photographs")
    (source / "cat" / "notes").write_text("about cats")
    (source / "cat" / ".DS_Store").write_text("of a Mac")
    (source / "__MACOSX" / "cat").mkdir(parents=True)
    (source / "__MACOSX" / "cat" / "._00.jpg").write_text("of a Mac")
    write(tmp_path / "archive", source, above)
    shutil.rmtree(source / "__MACOSX")
    found, expected = find_images(tmp_path / "archive"), find_images(source)
    assert sorted(file.file for file in found.broken) == ["cat/notes", "stray.jpg"]
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
    with pytest.raises(ValueError, match='class "dog" has no images; add some to .*empty/dog, remove that folder'):
        find_images(tmp_path / "empty")


def test_an_archive_of_one_class(source, tmp_path):
    write_zip(tmp_path / "one.zip", source / "cat", "photos/cat/")
    found = find_images(tmp_path / "one.zip")
    assert (found.classes, len(found.images)) == (("cat",), 12)


def test_duplicate_member_is_an_error(photos, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for _ in range(2):
            archive.add(photos / "cat" / "00.jpg", "cat/00.jpg")
    with pytest.raises(ValueError, match=r"a.tar holds cat/00.jpg twice; write that archive again with one of them"):
        find_images(tmp_path / "a.tar")


def test_a_compressed_tar_file(photos, tmp_path):
    subprocess.run(["tar", "czf", tmp_path / "a.tar.gz", "-C", photos, "."], check=True)
    with pytest.raises(ValueError, match=r"a.tar.gz is compressed \(gzip\), .*; unpack it first: gunzip"):
        find_images(tmp_path / "a.tar.gz")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none is not there; name a folder that holds a folder of images for each"):
        find_images(tmp_path / "none")


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
def test_webdataset_with_class_names(way, samples, tmp_path):
    write_shards(tmp_path / "s-%03d.tar", [{"jpg": data, "cls": name, "json": {"a": 1}} for name, data in samples])
    if way == "file":
        (tmp_path / "s-001.tar").unlink()
    found = find_images(
        {"folder": tmp_path, "pattern": tmp_path / "s-{000..002}.tar", "file": tmp_path / "s-000.tar"}[way]
    )
    assert found.classes == ("astronaut", "cat", "coffee", "rocket")
    assert images_of(found) == (samples[:10] if way == "file" else samples)
    assert found.images[0].path == "s-000.tar/000000.jpg"


def test_webdataset_with_numeric_labels(samples, tmp_path):
    """Classes without samples keep their labels."""
    numbers = {"rocket": 0, "cat": 2, "coffee": 3, "astronaut": 5}
    write_shards(tmp_path / "%03d.tar", [{"jpeg": data, "cls": numbers[name]} for name, data in samples])
    found = find_images(tmp_path)
    assert found.classes == ("0", "1", "2", "3", "4", "5")
    assert images_of(found) == [(str(numbers[name]), data) for name, data in samples]
    names = tmp_path / "names.txt"
    names.write_text("rocket\ndog\ncat\ncoffee\ntea\nastronaut\nmoon\n")
    found = find_images(tmp_path, read_names(names))
    assert found.classes == ("rocket", "dog", "cat", "coffee", "tea", "astronaut", "moon")
    assert images_of(found) == samples


def test_named_classes_are_in_natural_order(samples, tmp_path):
    names = {"rocket": "class 10", "cat": "class 9", "coffee": "class 100", "astronaut": "Class 1"}
    write_shards(tmp_path / "%03d.tar", [{"jpg": data, "cls": names[name]} for name, data in samples])
    found = find_images(tmp_path)
    assert (found.classes, found.natural_order) == (("Class 1", "class 9", "class 10", "class 100"), True)
    assert images_of(found) == [(names[name], data) for name, data in samples]


def test_classes_file_orders_named_labels(samples, tmp_path):
    write_shards(tmp_path / "%03d.tar", [{"png": data, "cls": name} for name, data in samples])
    (tmp_path / "names").write_text("cat\nrocket\ncoffee\nastronaut\n")
    found = find_images(tmp_path, read_names(tmp_path / "names"))
    assert found.classes == ("cat", "rocket", "coffee", "astronaut")
    assert images_of(found) == samples


def test_packed_shards_as_a_source(shards, photos):
    """Their manifest has the names of the classes."""
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
        (
            ["a.jpg", "empty.cls", "empty.jpg", "a.cls"],
            r"empty.cls is empty or has control characters; write the",
        ),
        (["notes.txt", "a.cls.txt", "b.cls", "b.jpg", "b.txt", "a.JPEG"], r"sample a has no .cls"),
    ],
)
def test_incomplete_samples_are_errors(members, message, photos, tmp_path):
    data = (photos / "cat" / "00.jpg").read_bytes()
    contents = {"cls": b"cat", "jpg": data, "png": data}
    write_tar_of(
        tmp_path / "a.tar",
        [(name, b"" if name == "empty.cls" else contents.get(name.rpartition(".")[2], b"text")) for name in members],
    )
    with pytest.raises(ValueError, match=rf"a.tar: {message}|a.tar {message}"):
        find_images(tmp_path)


def test_equal_keys_in_other_folders_and_shards(photos, tmp_path):
    data = (photos / "cat" / "00.jpg").read_bytes()
    members = [("x/1.jpg", data), ("x/1.cls", b"3"), ("y/1.cls", b"4\n"), ("y/1.jpg", data)]
    for name in ("a.tar", "b.tar"):
        write_tar_of(tmp_path / name, members)
    found = find_images(tmp_path)
    assert [(image.path, image.label) for image in found.images] == [
        (f"{shard}/{folder}/1.jpg", label) for shard in ("a.tar", "b.tar") for folder, label in (("x", 3), ("y", 4))
    ]


def test_keys_with_dots(photos, tmp_path):
    """Keys that differ after a dot, beside fields with several extensions."""
    data = (photos / "cat" / "00.jpg").read_bytes()
    names = [
        "2.5.jpg",
        "2.5.cls",
        "2.7.cls",
        "2.7.jpg",
        "v1.0/a.b.c.json",
        "v1.0/a.jpg",
        "v1.0/a.cls",
        "v1.0/a.seg.png",
    ]
    write_tar_of(tmp_path / "a.tar", [(name, b"3" if name.endswith("cls") else data) for name in names])
    found = find_images(tmp_path)
    assert [image.path for image in found.images] == ["a.tar/2.5.jpg", "a.tar/2.7.jpg", "a.tar/v1.0/a.jpg"]


@pytest.mark.parametrize(
    ("label", "names", "message"),
    [
        ("2", "a\nb\n", r"has class 2, and names are known for 2 from 0 on; give a file with 3 lines to --classes"),
        ("9999999999", None, r"has class 9999999999, and names are known for 0 from 0 on"),
        ("dog", "cat\nrocket\n", r'has class "dog", which is none of the 2 names; add it to these'),
        ("dog", "cat\n\ndog\n", r'names: line 2 is "", empty, there twice or with control characters; write a name a'),
        ("dog", "cat\ndog\ncat\n", r'names: line 3 is "cat", empty, there twice'),
    ],
)
def test_labels_that_do_not_match_the_classes(label, names, message, photos, tmp_path):
    write_tar_of(tmp_path / "a.tar", [("1.jpg", (photos / "cat" / "00.jpg").read_bytes()), ("1.cls", label.encode())])
    if names is not None:
        (tmp_path / "names").write_text(names)
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path, read_names(tmp_path / "names") if names else None)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{000..002}.tar", r"001.tar is not there; correct the pattern .*/\{000..002\}.tar or copy that shard"),
        ("{000..002.tar", r"is no brace pattern \(.*\); write it like 'shard-\{000000..000041\}.tar'"),
    ],
)
def test_brace_patterns_that_do_not_match(pattern, message, shards, tmp_path):
    shutil.copy(shards / "shard-000000.tar", tmp_path / "000.tar")
    with pytest.raises(ValueError, match=message):
        find_images(tmp_path / pattern)


def test_shards_without_samples_are_an_error(photos, tmp_path):
    write_tar_of(tmp_path / "a.tar", [("cat/1.json", b"{}")])
    with pytest.raises(ValueError, match=r"holds no samples: no member of its tar files ends with .cls"):
        find_images(tmp_path)

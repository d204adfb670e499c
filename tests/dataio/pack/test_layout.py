"""Splits and classes of data sets in folders and archives, by their usual names."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dataio.manifest import load_manifest
from dataio.pack.__main__ import main
from dataio.pack.layout import Layout, find_layout
from dataio.pack.packer import PackOptions, pack
from dataio.pack.source import find_images


def lay(root: Path, photos: Path, folders: list[str]) -> Path:
    """Put an image into each of these folders, but not into those whose name ends with /."""
    root.mkdir()
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        if not folder.endswith("/"):
            shutil.copy(photos / "cat" / f"{number % 9 + 3:02d}.jpg", root / folder)
    return root


def each(*parts: str) -> list[str]:
    return [f"{part}/{name}" for part in parts for name in ("cat", "dog")]


CASES = {
    "train and val": (each("train", "val"), "train", "val", []),
    "train and valid": (each("train", "valid"), "train", "valid", []),
    "train and validation": (each("train", "validation"), "train", "validation", []),
    "train and test": (each("train", "test"), "train", "test", []),
    "all three": (each("train", "valid", "test"), "train", "valid", ["test"]),
    "training": (each("training", "validation"), "training", "validation", []),
    "capitals": (each("Train", "VAL"), "Train", "VAL", []),
    "train alone": (each("train"), "train", None, []),
    "classes": (each("")[:2], "", None, []),
    "deeper": (each("photos/dataset/train", "photos/dataset/val"), "photos/dataset/train", "photos/dataset/val", []),
    "classes deeper": (each("photos/dataset"), "photos/dataset", None, []),
    "with annotations": ([*each("train", "val"), "annotations/"], "train", "val", ["annotations"]),
    "with a stray folder": ([*each("train", "val"), "__MACOSX/train/cat"], "train", "val", []),
    "flat": (["train", "test"], "train", "test", []),  # which packing refuses: no class folders
    "a class called train": (["bus", "car", "train"], "", None, []),
    "and one called test": (["bus", "train", "test"], "", None, []),
    "with folders in classes": (["bus/red", "train/steam"], "", None, []),
    "one class": (["cat"], "", None, []),
    "beside classes": ([*each("train", "test"), "extra"], "train", "test", ["extra"]),
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("case", CASES)
def test_layouts(case, kind, photos, tmp_path):
    folders, train, val, unused = CASES[case]
    root = lay(tmp_path / "set", photos, [folder.removeprefix("/") for folder in folders])
    if kind != "folder":
        root = Path(shutil.make_archive(str(tmp_path / "set"), kind, root))
    layout = find_layout(root)
    assert layout == Layout(
        root / train, None if val is None else root / val, tuple(root / folder for folder in unused)
    )
    if case != "flat" and val is not None:
        with pytest.raises(ValueError, match=f"{root}.* holds {layout.train.name} and {layout.val.name}, which are"):
            find_images(root)
        assert find_images(layout.val).classes == ("cat", "dog")
    if case != "flat":
        found = find_images(layout.train)
        assert found.classes[:1] in [("cat",), ("bus",)]
        assert all(found.reader.read(image.bytes, image.locator)[:2] == b"\xff\xd8" for image in found.images)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_splits_that_are_archives(kind, photos, tmp_path):
    root = lay(tmp_path / "set", photos, [])
    for part in ("Train", "test"):
        lay(tmp_path / part, photos, each("images"))
        shutil.make_archive(str(root / part), kind, tmp_path / part)
    assert find_layout(root) == Layout(root / f"Train.{kind}", root / f"test.{kind}")
    assert find_images(root / f"test.{kind}").classes == ("cat", "dog")


def test_an_archive_in_a_folder(photos, tmp_path):
    shutil.make_archive(str(tmp_path / "photos"), "zip", lay(tmp_path / "set", photos, each("all/train", "all/val")))
    root = lay(tmp_path / "download", photos, [])
    shutil.move(tmp_path / "photos.zip", root)
    inside = root / "photos.zip" / "all"
    assert find_layout(root) == Layout(inside / "train", inside / "val")
    expected = pack(tmp_path / "set" / "all" / "train", tmp_path / "expected")
    assert pack(inside / "train", tmp_path / "packed").hash == expected.hash
    with pytest.raises(ValueError, match=r"photos.zip holds no folder all/none; name one that it holds, or the"):
        find_images(inside / "none")


def test_a_folder_in_an_archive_gives_its_bytes(photos, tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(photos, "./data/train")
        archive.add(photos / "cat", "./data/val/cat")
    assert find_layout(tmp_path / "set.tar").val == tmp_path / "set.tar" / "data" / "val"
    packed = pack(tmp_path / "set.tar" / "data" / "train", tmp_path / "packed", PackOptions(shard_mib=1))
    assert packed.hash == pack(photos, tmp_path / "expected", PackOptions(shard_mib=1)).hash


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (each("train", "Train", "val"), "holds Train and train; rename one of them"),
        (each("val", "test"), "holds val, test and nothing to train on; call that split train"),
    ],
)
def test_ambiguous_layouts_are_errors(folders, message, photos, tmp_path):
    with pytest.raises(ValueError, match=message):
        find_layout(lay(tmp_path / "set", photos, folders))


def test_suggested_commands_for_splits_run(photos, tmp_path, capsys):
    root = lay(tmp_path / "it's #1", photos, each("training", "test"))
    assert main([str(root), str(tmp_path / "target")]) == 2
    said = capsys.readouterr().err
    assert "holds training and test, which are splits of a data set and no classes; pack each by itself: " in said
    command = said.partition("by itself: ")[2].strip().replace(" and python", " && python")
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command.replace("TARGET", "packed"), shell=True, cwd=tmp_path, env=environ, check=True)
    assert [len(load_manifest(tmp_path / "packed" / part)) for part in ("train", "val")] == [2, 2]


def test_symlink_to_a_parent_folder(photos, tmp_path):
    root = lay(tmp_path / "set", photos, ["cat/one", "dog/one"])
    (root / "cat" / "0up").symlink_to("..")
    assert pack(root, tmp_path / "target").classes == ("cat", "dog")

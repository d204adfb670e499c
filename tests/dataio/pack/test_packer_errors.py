"""Sources, targets and options that are errors, and broken images."""

import io
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from dataio.manifest import SAMPLES_NAME, load_manifest
from dataio.pack.__main__ import main
from dataio.pack.packer import PackOptions, pack
from dataio.verify import verify


def test_broken_images_are_named(source, tmp_path, capsys):
    """Each kind of broken image ends the pack with one line, and nothing is left behind."""
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


def test_skip_broken_lists_and_leaves_out(source, shards, tmp_path, capsys, packed_images):
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


def test_names_that_are_not_utf8(source, tmp_path):
    """The name of a broken file is escaped in the manifest; the name of a class is an error."""
    (source / "cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"no image")
    manifest = pack(source, tmp_path / "target", PackOptions(skip_broken=True))
    assert [file.file for file in manifest.broken] == ["cat/caf\\xe9.jpg"]
    os.rename(source / "cat", source / os.fsdecode(b"ch\xe2t"))
    with pytest.raises(ValueError, match=r'the name of class "ch\\xe2t" in .* is not UTF-8; rename the folder'):
        pack(source, tmp_path / "other", PackOptions(skip_broken=True))
    assert not (tmp_path / "other").exists()


def test_skip_broken_closes_the_gap_of_a_shard_without_images(source, shards, tmp_path, contents, packed_images):
    """A broken file larger than a shard would have filled one by itself."""
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
def test_class_of_only_broken_files_is_an_error(name, message, source, tmp_path):
    (source / "dog").mkdir()
    (source / "dog" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=f'class "dog" {message}'):
        pack(source, tmp_path / "target", PackOptions(skip_broken=True))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_source_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path / "target")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'none'} is not there; name a folder that holds a folder of images for each class, a zip"
        f" or tar of one, or the shards of a WebDataset\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_existing_target_is_an_error(photos, tmp_path, capsys, contents):
    (tmp_path / "file").write_text("mine")
    assert main([str(photos), str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} exists already; delete it or name another folder\n"
    assert contents(tmp_path) == {"file": b"mine"}


def test_target_inside_the_source_is_an_error(source):
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
def test_invalid_options(options, message, photos, tmp_path, capsys):
    assert main([str(photos), str(tmp_path / "target"), *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match='--split is "rest"; use train or val'):
        PackOptions(val_percent=10, split="rest")


def test_unknown_check_is_an_error():
    with pytest.raises(ValueError, match='--check is "all"; use decode, header, none'):
        PackOptions(check="all")


def test_too_little_disk_space_is_an_error(source, tmp_path, capsys):
    """A sparse file of 4 TiB is more than the disk can take."""
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


@pytest.mark.parametrize(("old", "new"), [("--hold-out", "--val-percent"), ("--part", "--split train or val")])
def test_options_of_earlier_versions_name_the_new_ones(tmp_path, capsys, old, new):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "target"), old, "10"])
    assert capsys.readouterr().err.endswith(f"error: {old} is now {new}\n")

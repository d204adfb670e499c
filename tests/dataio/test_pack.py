"""Packing real photographs, read back with the tools that others use: webdataset, DALI's reader, wds2idx."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image
from wds2idx import IndexCreator

from dataio.index import SAMPLES_NAME, load_manifest
from dataio.pack import PackOptions, main, pack
from dataio.source import FORMATS
from dataio.verify import verify

DEADLINE_SECONDS = 60


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
        "notes.txt": (b"about coffee", r"its name ends with none of \.bmp .* \.webp"),
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
    *lines, count = capsys.readouterr().err.splitlines()
    assert count == "skipped 8 broken files; manifest.json lists them all"
    broken = load_manifest(target).broken
    assert lines == [f"skipped {file.file}: {file.reason}" for file in broken]
    assert [file.file for file in broken] == sorted(reasons)
    for file in broken:
        assert re.fullmatch(reasons[file.file], file.reason)
    assert packed_images(target) == packed_images(shards)
    assert verify(target) == []


def test_skip_broken_closes_the_gap_of_a_shard_without_images(source, shards, tmp_path):
    """A broken file larger than a shard would have had one for itself."""
    (source / "cat" / "large.jpg").write_bytes(b"no image" * 2**18)
    target = tmp_path / "target"
    manifest = pack(source, target, PackOptions(shard_mib=1, skip_broken=True))
    assert [shard.name for shard in manifest.shards] == [
        f"shard-{number:06d}.tar" for number in range(len(manifest.shards))
    ]
    assert sorted(contents(target)) == sorted(
        ["manifest.json", SAMPLES_NAME] + [name for shard in manifest.shards for name in (shard.name, shard.idx_name)]
    )
    assert packed_images(target) == packed_images(shards)
    assert verify(target) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rex.jpg", "has only broken images; repair one or remove .*/dog"),
        ("rex.gif", r"has no images \(1 files of other kinds\); add some to .*/dog or remove that folder"),
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
        f"error: {tmp_path / 'none'} is not a folder; name one that holds a folder of images for each class\n"
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
        (["--hold-out", "10"], "--hold-out and --part belong together; give both or neither"),
        (["--part", "kept"], "--hold-out and --part belong together; give both or neither"),
        (
            ["--hold-out", "100", "--part", "kept"],
            "--hold-out is 100.0; use a percentage between 0 and 100",
        ),
        (
            ["--hold-out", "0.01", "--part", "kept"],
            'class "astronaut" has no image in the held-out part with --hold-out 0.01; use a larger percentage',
        ),
        (
            ["--hold-out", "99.99", "--part", "held-out"],
            'class "astronaut" has no image in the kept part with --hold-out 99.99; use a smaller percentage',
        ),
    ],
)
def test_options_that_cannot_be(options, message, photos, tmp_path, capsys):
    assert main([str(photos), str(tmp_path / "target"), *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert list(tmp_path.iterdir()) == []


def test_part_of_another_name():
    with pytest.raises(ValueError, match='--part is "rest"; use held-out or kept'):
        PackOptions(hold_out=10, part="rest")


# Two parts


def test_hold_out_splits_the_images(fashion, fashion_shards, tmp_path):
    kept, held_out = packed_images(fashion_shards / "train"), packed_images(fashion_shards / "val")
    assert kept + held_out == images_by_class(fashion.glob("*/*"))
    assert 60 < held_out.total() < 140  # 100 of 400 on average, deviation 9
    assert load_manifest(fashion_shards / "train").classes == load_manifest(fashion_shards / "val").classes
    pack(fashion, tmp_path / "val", PackOptions(hold_out=25, part="held-out", seed=9))
    assert packed_images(tmp_path / "val") == held_out  # the seed moves no image to the other part


# Ends that come early


def start_long_pack(photos: Path, folder: Path) -> subprocess.Popen:
    """The real command in the midst of packing 40 times the photographs into FOLDER/target."""
    many = folder / "many"
    for number in range(40):
        shutil.copytree(photos, many / "all" / f"copy{number}", copy_function=os.link)
    command = subprocess.Popen(
        [sys.executable, "-m", "dataio.pack", many, folder / "target", "--shard-mib", "2", "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def writing() -> int:
        """Shards that are begun and not ended: a worker that is still starting would not ignore Ctrl-C yet."""
        return len(list(folder.glob(".target.*.partial/*.tar"))) - len(list(folder.glob(".target.*.partial/*.idx")))

    until(lambda: writing() == 2 or command.poll() is not None)
    assert command.poll() is None, command.communicate()
    return command


def until(condition) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_pack_does_not_disturb_the_next(photos, tmp_path):
    command = start_long_pack(photos, tmp_path)
    workers = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    command.communicate(timeout=DEADLINE_SECONDS)
    assert len(workers) >= 2
    until(lambda: all(has_ended(worker) for worker in workers))
    assert not (tmp_path / "target").exists()
    assert len(list(tmp_path.glob(".target.*.partial"))) == 1

    assert main([str(photos), str(tmp_path / "target")]) == 0
    assert verify(tmp_path / "target") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "target"]


def test_ctrl_c_leaves_nothing(photos, tmp_path):
    command = start_long_pack(photos, tmp_path)
    os.killpg(command.pid, signal.SIGINT)
    _, message = command.communicate(timeout=DEADLINE_SECONDS)
    assert command.returncode == 130
    assert message == f"interrupted; nothing was written to {tmp_path / 'target'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["many"]


def test_a_killed_worker_is_an_error(photos, tmp_path):
    command = start_long_pack(photos, tmp_path)
    spawned = [
        child
        for child in psutil.Process(command.pid).children(recursive=True)
        if any("spawn_main" in word for word in child.cmdline())
    ]
    spawned[0].kill()
    _, message = command.communicate(timeout=DEADLINE_SECONDS)
    assert command.returncode == 2
    assert message == (
        "error: a worker was killed, most often because memory ran out; free some, or use fewer workers\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["many"]


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
        "--skip-broken",
        "--hold-out",
        "--part",
    ):
        assert re.search(rf"^  {option}\b.*", text, re.MULTILINE), option


def test_the_manifest_records_the_options(fashion_shards):
    fields = json.loads((fashion_shards / "val" / "manifest.json").read_text())
    assert (fields["seed"], fields["hold_out"], fields["part"]) == (0, 25, "held-out")

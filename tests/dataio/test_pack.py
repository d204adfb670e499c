"""Packing real photographs, read back with the tools that others use: webdataset, DALI's reader, wds2idx."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image
from wds2idx import IndexCreator

from dataio.index import SAMPLES_NAME, load_manifest
from dataio.pack import FORMATS, PackOptions, main, pack, read_image
from dataio.verify import verify

DEADLINE_SECONDS = 60


def copy_of(photos: Path, target: Path) -> Path:
    """The same class folder again, as links: to add to it, not to write into its files."""
    for file in photos.glob("*/*"):
        (target / file.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(file, target / file.parent.name / file.name)
    return target


@pytest.fixture
def source(photos, tmp_path):
    return copy_of(photos, tmp_path / "source")


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


def test_nested_linked_and_hidden_files(source, tmp_path):
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
    manifest = pack(source, tmp_path / "target")
    assert len(manifest) == before + 1 + 12
    assert manifest.classes == ("astronaut", "cat", "coffee", "dog", "rocket")
    assert np.bincount(manifest.samples["label"]).tolist() == [12, 13, 12, 12, 12]


def test_an_empty_target_is_free(photos, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    assert len(pack(photos, target)) == 48
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


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


def test_a_class_of_broken_images_only(source, tmp_path):
    (source / "dog").mkdir()
    (source / "dog" / "rex.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match='class "dog" has only broken images; repair one or remove .*/dog'):
        pack(source, tmp_path / "target", PackOptions(skip_broken=True))
    assert not (tmp_path / "target").exists()


def test_no_such_folder(tmp_path, capsys):
    assert main([str(tmp_path / "none"), str(tmp_path / "target")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'none'} is not a folder; name one that holds a folder of images for each class\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_images_without_class_folders(photos, tmp_path):
    with pytest.raises(ValueError, match="cat holds no class folders; put the images of each class into a folder"):
        pack(photos / "cat", tmp_path / "target")


def test_empty_class(source, tmp_path):
    (source / "dog").mkdir()
    with pytest.raises(ValueError, match='class "dog" has no images; add some to .*/dog or remove that folder'):
        pack(source, tmp_path / "target")
    (source / "dog" / "rex.gif").write_bytes(b"")
    with pytest.raises(ValueError, match=r'class "dog" has no images \(1 files of other kinds\); add some'):
        pack(source, tmp_path / "target", PackOptions(skip_broken=True))
    assert not (tmp_path / "target").exists()


def test_target_that_exists(photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{target} exists already; delete it or name another folder"):
            pack(photos, target)
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
        copy_of(photos, many / "all" / f"copy{number}")
    command = subprocess.Popen(
        [sys.executable, "-m", "dataio.pack", many, folder / "target", "--shard-mib", "2", "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: len(list(folder.glob(".target.*.partial/*.tar"))) > 2 or command.poll() is not None)
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


def test_a_running_pack_is_left_alone_by_another(photos, tmp_path):
    command = start_long_pack(photos, tmp_path)
    os.killpg(command.pid, signal.SIGSTOP)
    pack(photos, tmp_path / "target")
    assert len(list(tmp_path.glob(".target.*.partial"))) == 1
    os.killpg(command.pid, signal.SIGCONT)
    _, message = command.communicate(timeout=DEADLINE_SECONDS)
    assert command.returncode == 2
    assert message == f"error: {tmp_path / 'target'} exists already; delete it or name another folder\n"
    assert len(load_manifest(tmp_path / "target")) == 48
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


# One image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_keeps_its_stored_size(orientation, tmp_path, photos):
    """PIL turns TIFF files by their orientation, unlike all other formats; DALI gets the stored pixels."""
    rotation = Image.Exif()
    rotation[0x0112] = orientation
    with Image.open(photos / "cat" / "00.jpg") as image:
        size = image.size
        image.save(tmp_path / "turned.tif", exif=rotation)
    assert read_image(tmp_path / "turned.tif")[1:] == ("tiff", *size)


@pytest.mark.parametrize("ending", ["bmp", "jp2", "jpg", "pgm", "png", "tif", "webp"])
def test_dali_decodes_what_is_let_in(ending, tmp_path, photos):
    path = tmp_path / f"image.{ending}"
    with Image.open(photos / "cat" / "00.jpg") as image:
        grey = image.convert("L")
        grey.save(path)
    data, _, width, height = read_image(path)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decoder():
        return fn.decoders.image(fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)]), device="cpu")

    pipeline = decoder()
    pipeline.build()
    (decoded,) = pipeline.run()
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert (width, height) == grey.size
    assert np.abs(decoded.at(0).astype(int) - expected).mean() < 0.1


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

"""Tar files byte for byte as tarfile writes them, and images that change or vanish during packing."""

import hashlib
import io
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.pack.shard_writer import BrokenImageError, ShardTask, TarWriter, member_bytes, write_shard
from dataio.pack.source import find_images

NAMES = st.from_regex(r"[0-9]{8}\.[a-z0-9]{2,5}", fullmatch=True)
CONTENTS = st.one_of(st.binary(max_size=1100), st.integers(0, 3).map(lambda blocks: bytes(512 * blocks)))


def by_tarfile(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@settings(max_examples=60)
@given(st.lists(st.tuples(NAMES, CONTENTS), max_size=30))
def test_tar_files_equal_those_of_tarfile(members):
    out = io.BytesIO()
    writer = TarWriter(out)
    offsets = [offset for member in members for offset in writer.add(member)]
    size, digest = writer.close()
    written = out.getvalue()
    assert written == by_tarfile(members)
    assert (size, digest) == (len(written), hashlib.sha256(written).hexdigest())
    for offset, (_, content) in zip(offsets, members, strict=True):
        assert written[offset : offset + len(content)] == content


@given(st.tuples(NAMES, CONTENTS))
def test_member_bytes(member):
    out = io.BytesIO()
    TarWriter(out).add(member)
    assert len(out.getvalue()) == member_bytes(len(member[1]))


def task_of(source: Path, folder: Path, **options) -> ShardTask:
    found = find_images(source)
    fields = {"check": "decode", "downscale": None, "skip_broken": False} | options
    return ShardTask(path=folder / "new", reader=found.reader, first_key=0, images=found.images, **fields)


@pytest.mark.parametrize("change", [lambda data: data + b"more", lambda data: data[:-1]])
def test_image_that_changes_while_packing_is_an_error(change, source, tmp_path):
    task = task_of(source, tmp_path)
    image = source / "cat" / "00.jpg"
    data = image.read_bytes()
    image.unlink()
    image.write_bytes(change(data))
    message = "cat/00.jpg was changed while it was being packed; pack again when nothing changes it"
    with pytest.raises(RuntimeError, match=message):
        write_shard(task)


def test_image_that_vanishes_while_packing_is_broken(source, tmp_path):
    tasks = [task_of(source, tmp_path, skip_broken=skip) for skip in (False, True)]
    (source / "cat" / "00.jpg").unlink()
    with pytest.raises(BrokenImageError, match=re.escape("it cannot be read: No such file or directory")) as error:
        write_shard(tasks[0])
    written = write_shard(tasks[1])
    assert written.broken == [error.value.broken]
    assert (error.value.broken.file, len(written.rows)) == ("cat/00.jpg", 47)


def test_image_file_above_2_gib_is_broken(source, tmp_path):
    with open(source / "cat" / "huge.jpg", "wb") as file:
        file.truncate(2**31)
    written = write_shard(task_of(source, tmp_path, skip_broken=True))
    assert [(file.file, file.reason) for file in written.broken] == [
        ("cat/huge.jpg", "it has 2147483648 bytes; make it smaller than 2 GiB")
    ]

"""Reading members of zip and tar files that common tools wrote, by their locators."""

import os
import shutil
import subprocess
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from dataio.pack.archives import TarReader, ZipReader


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_all(reader, members) -> dict[str, bytes]:
    return {
        member.name: reader.read(member.bytes, member.locator)
        for member in members
        if not member.name.endswith("/") and member.fault is None
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_files_of_all_formats(format, photos, tmp_path):
    name = "a name of more than a hundred letters, which each format has its own way to write " + "x" * 60
    shutil.copytree(photos / "cat", tmp_path / "source" / name)
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
        tar.add(tmp_path / "source", arcname=".")
    reader = TarReader((tmp_path / "none.tar", tmp_path / "a.tar"))
    members = list(reader.members(1))
    assert {member.name for member in members if member.name.endswith("/")} == {"./", f"./{name}/"}
    read = read_all(reader, members)
    assert {file.removeprefix("./"): data for file, data in read.items()} == contents(tmp_path / "source")


def test_tar_files_written_by_gnu_tar(photos, tmp_path):
    """A second name of the same file is a hard link inside the archive."""
    source = shutil.copytree(photos, tmp_path / "source")
    os.link(source / "cat" / "00.jpg", source / "cat" / "linked.jpg")
    (source / "cat" / "soft.jpg").symlink_to("00.jpg")
    subprocess.run(["tar", "cf", tmp_path / "a.tar", "-C", source, "."], check=True)
    reader = TarReader((tmp_path / "a.tar",))
    members = list(reader.members(0))
    read = {name.removeprefix("./"): data for name, data in read_all(reader, members).items()}
    assert read == {name: data for name, data in contents(source).items() if name != "cat/soft.jpg"}
    (fault,) = (member.fault for member in members if member.name == "./cat/soft.jpg")
    assert fault == "it is a link or no regular file, which cannot be read inside an archive"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_files(method, photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.mkdir("empty")
        for path in sorted(photos.glob("*/*")):
            archive.write(path, path.relative_to(photos))
    reader = ZipReader(tmp_path / "a.zip")
    members = list(reader.members())
    assert [member.name for member in members if member.name.endswith("/")] == ["empty/"]
    assert read_all(reader, members) == contents(photos)


def test_zip_file_written_to_a_pipe(photos, tmp_path):
    """Sizes and checksums follow the members then, and are repeated in the directory at the end."""
    with open(tmp_path / "a.zip", "wb") as out:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=out)
        with zipfile.ZipFile(writer.stdin, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(photos.glob("*/*")):
                archive.write(path, path.relative_to(photos))
        writer.communicate()
    reader = ZipReader(tmp_path / "a.zip")
    assert read_all(reader, reader.members()) == contents(photos)


def test_zip_members_that_cannot_be_read(photos, tmp_path):
    path = photos / "cat" / "00.jpg"
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.write(path, "cat/00.jpg")
    (member,) = ZipReader(tmp_path / "a.zip").members()
    assert member.fault == "it is compressed by zip's method 14; repack the archive with method 0 or 8"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zip_member_is_an_error(method, photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.write(photos / "cat" / "00.jpg", "cat/00.jpg")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[200] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    reader = ZipReader(tmp_path / "a.zip")
    (member,) = reader.members()
    with pytest.raises(OSError, match="its bytes do not fit its checksum in the archive|it cannot be unpacked: "):
        reader.read(member.bytes, member.locator)


def test_zip_member_larger_than_its_header_says(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/00.jpg", bytes(50_000_000))
    reader = ZipReader(tmp_path / "a.zip")
    (member,) = reader.members()
    tracemalloc.start()
    with pytest.raises(OSError, match="its bytes do not fit its checksum in the archive"):
        reader.read(1000, member.locator)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("size", [2**33, 2**62])
def test_zip_member_larger_than_its_archive(tmp_path, size):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/00.jpg", bytes(1000))
        archive.filelist[0].compress_size = size
    with pytest.raises(
        ValueError, match=r"a.zip is not a complete zip file \(it ends inside cat/00.jpg\); copy it again"
    ):
        list(ZipReader(tmp_path / "a.zip").members())


@pytest.mark.parametrize(
    ("mode", "kind", "command"), [("gz", "gzip", "gunzip"), ("bz2", "bzip2", "bunzip2"), ("xz", "xz", "unxz")]
)
def test_a_compressed_tar_file(mode, kind, command, photos, tmp_path):
    path = tmp_path / f"a.tar.{mode}"
    with tarfile.open(path, f"w:{mode}") as tar:
        tar.add(photos, arcname=".")
    message = f"{path} is compressed \\({kind}\\), so its members cannot be read one by one; unpack it first: {command}"
    with pytest.raises(ValueError, match=message):
        list(TarReader((path,)).members(0))


def test_truncated_archives(photos, tmp_path):
    tar, zipped = tmp_path / "a.tar", tmp_path / "a.zip"
    with tarfile.open(tar, "w") as archive:
        archive.add(photos, arcname=".")
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.write(photos / "cat" / "00.jpg", "cat/00.jpg")
    for path in (tar, zipped):
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{tar} is not a complete tar file \\(.*\\); copy it again"):
        list(TarReader((tar,)).members(0))
    with pytest.raises(ValueError, match=f"{zipped} is not a complete zip file \\(.*\\); copy it again"):
        list(ZipReader(zipped).members())


def test_damaged_tar_header_is_an_error(photos, tmp_path):
    """tarfile takes it for the end of the file, and the images behind it would be missing."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(photos, arcname=".")
    with tarfile.open(path) as archive:
        header = archive.getmembers()[5].offset
    data = bytearray(path.read_bytes())
    data[header] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"a.tar is not a complete tar file .the header at byte {header} is damaged"):
        list(TarReader((path,)).members(0))


def test_file_that_is_not_an_archive(tmp_path):
    (tmp_path / "a.tar").write_text("no archive")
    with pytest.raises(ValueError, match=r"a.tar is not a complete tar file \(.*\); copy it again"):
        list(TarReader((tmp_path / "a.tar",)).members(0))

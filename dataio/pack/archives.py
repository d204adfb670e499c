"""Readers of zip and tar files whose members are read one by one, in any order, by many processes.

Members are listed once, and each has a locator with which any process reads it directly. source.py chooses the images
among them.
"""

import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from dataio.files import escape_unprintable

_COMPRESSED = {  # first bytes of a file → format, and the command that unpacks it
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_ZIP_HEADER_BYTES = 30  # size of a member's local header, before its name and extra field
_ZIP_LENGTHS = struct.Struct("<HH")  # lengths of the name and the extra field, the end of that header
_ENCRYPTED = 1  # bit of a zip member's flags
_MAX_DEFLATE_RATIO = 1032  # 258 bytes take 2 bits at least
_BOMB_RATIO, _BOMB_BYTES = 100, 1 << 26  # of images, only large blank ones without compression deflate like this
_NO_FILE = "it is a link or no regular file, which cannot be read inside an archive"
_OPEN_FILES = 256


class Member(NamedTuple):
    """A file or a folder (its name ends with /) of a source. `locator` tells the reader of the source where it is."""

    name: str
    bytes: int = 0
    locator: tuple[Any, ...] = ()
    fault: str | None = None  # why it cannot be read


@dataclass(frozen=True)
class TarReader:
    """Reader of uncompressed tar files. A locator is (number of the tar file, offset)."""

    paths: tuple[Path, ...]

    def members(self, number: int) -> Iterator[Member]:
        """Yield all members of one tar file. Raises ValueError if it is compressed, damaged or not a tar file."""
        path = self.paths[number]
        _require_plain(path)
        size = path.stat().st_size
        links: dict[str, Member] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for info in tar_headers(tar):
                    member = _tar_member(info, number, links)
                    if info.offset_data + info.size > size and info.isreg():
                        raise tarfile.ReadError(f"it ends inside {escape_unprintable(info.name)}")
                    links[info.name] = member
                    yield member
        except (tarfile.TarError, ValueError, RecursionError, OverflowError, MemoryError) as error:  # malformed headers
            raise ValueError(f"{path} is not a complete tar file ({error}); copy it again") from error

    def read(self, size: int, locator: tuple[int, ...]) -> bytes:
        """Return the `size` bytes of a member."""
        number, offset = locator
        return os.pread(_opened(self.paths[number]).fileno(), size, offset)


def tar_headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar file. Raises ReadError where one is damaged or has a negative size.

    tarfile takes a damaged header for the end of the file, and would step backwards over a negative size, and read the
    same headers for ever (CVE-2025-8194).
    """
    for info in tar:
        if info.size < 0 or tar.offset < info.offset_data:  # a sparse file has one size here and another in the header
            raise tarfile.ReadError(f"{escape_unprintable(info.name)} has a negative size")
        yield info
    file = cast(BinaryIO, tar.fileobj)
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def _tar_member(info: tarfile.TarInfo, number: int, before: dict[str, Member]) -> Member:
    if info.isdir():
        return Member(f"{info.name}/")
    if info.islnk() and info.linkname in before:  # the same file under another name
        return before[info.linkname]._replace(name=info.name)
    if info.issparse() or not info.isreg():
        return Member(info.name, fault=_NO_FILE)
    return Member(info.name, info.size, (number, info.offset_data))


@dataclass(frozen=True)
class ZipReader:
    """Reader of a zip file. A locator is (offset of the member's header, stored bytes, method, CRC-32)."""

    path: Path

    def members(self) -> Iterator[Member]:
        """Yield all members. Raises ValueError if the zip file is damaged."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{self.path} is not a complete zip file ({error}); copy it again") from error
        size = self.path.stat().st_size
        for info in infos:
            if info.header_offset + info.compress_size > size:
                raise ValueError(
                    f"{self.path} is not a complete zip file (it ends inside {escape_unprintable(info.filename)}); copy"
                    " it again"
                )
            locator = info.header_offset, info.compress_size, info.compress_type, info.CRC
            yield Member(info.filename, info.file_size, locator, _zip_fault(info))

    def read(self, size: int, locator: tuple[int, ...]) -> bytes:
        # ZipFile would read the whole directory again in each process: 1 GB of memory for a million members.
        """Return the `size` bytes of a member. Raises OSError if they cannot be unpacked or their checksum is wrong."""
        offset, stored, method, checksum = locator
        file = _opened(self.path).fileno()
        try:
            name, extra = _ZIP_LENGTHS.unpack(os.pread(file, _ZIP_HEADER_BYTES, offset)[-_ZIP_LENGTHS.size :])
            data = os.pread(file, stored, offset + _ZIP_HEADER_BYTES + name + extra)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # bounds the memory it takes
        except (struct.error, zlib.error) as error:
            raise OSError(f"it cannot be unpacked: {error}") from error
        if zlib.crc32(data) != checksum:
            raise OSError("its bytes do not fit its checksum in the archive")
        return data


def _zip_fault(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & _ENCRYPTED:
        return "it is encrypted"
    if stat.S_ISLNK(info.external_attr >> 16):  # where zip on Unix keeps the mode
        return _NO_FILE
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"it is compressed by zip's method {info.compress_type}; repack the archive with method 0 or 8"
    stored, size = info.compress_size, info.file_size
    if size > stored * (1 if info.compress_type == zipfile.ZIP_STORED else _MAX_DEFLATE_RATIO):
        return f"it cannot have the {size} bytes that the archive claims, of {stored} stored"
    if size > max(_BOMB_BYTES, stored * _BOMB_RATIO):
        return f"its {stored} bytes unpack to {size}, as no usual image's do; if it is one, convert it to JPEG or PNG"
    return None


def _require_plain(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(8)
    for mark, (kind, command) in _COMPRESSED.items():
        if start.startswith(mark):
            raise ValueError(
                f"{path} is compressed ({kind}), so its members cannot be read one by one; unpack it first:"
                f" {command} {path}"
            )


@lru_cache(maxsize=_OPEN_FILES)
def _opened(path: Path) -> io.FileIO:
    return open(path, "rb", buffering=0)

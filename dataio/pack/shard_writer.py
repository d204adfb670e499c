"""Writes one shard in a worker process: images and labels as a tar file, its index, what is to be said of it.

pack.py plans the shards and gives them their names; image_checks.py looks at each image.
"""

import hashlib
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dataio.manifest import SAMPLE_DTYPE, SkippedFile
from dataio.pack.image_checks import Downscale, Header, check_image, downscale_image
from dataio.pack.source import LABEL_EXTENSION, ImageFile, Reader

_BLOCK = tarfile.BLOCKSIZE
_MAX_READ_BYTES = 2**31 - 2**13  # that Linux reads at once


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: these images, in this order, with keys from `first_key` on."""

    path: Path
    reader: Reader
    first_key: int
    images: list[ImageFile]
    check: str
    downscale: Downscale | None
    skip_broken: bool
    max_megapixels: int | None = None


@dataclass
class WrittenShard:
    """What a shard holds: `rows` of SAMPLE_DTYPE whose `shard` is still 0, its index, and the paths of odd images.

    `shrunk` images were made smaller.
    """

    rows: np.ndarray
    idx: bytes
    bytes: int
    sha256: str
    broken: list[SkippedFile] = field(default_factory=list)
    cmyk: list[str] = field(default_factory=list)
    rotated: list[str] = field(default_factory=list)
    shrunk: int = 0


class BrokenImageError(ValueError):
    """An image that cannot be packed, in a source that must not have one."""

    def __init__(self, broken: SkippedFile) -> None:
        super().__init__(broken)
        self.broken = broken


def write_shard(task: ShardTask) -> WrittenShard:
    """Reads, checks and writes the images of one shard. One image is in memory at a time.

    Raises BrokenImageError, unless they are to be skipped, and RuntimeError if a file has not its planned size.
    """
    written = WrittenShard(np.empty(0, SAMPLE_DTYPE), b"", 0, "")
    rows, lines = [], []
    with open(task.path, "wb") as file:
        tar = TarWriter(file)
        for key, image in enumerate(task.images, task.first_key):
            try:
                data, header = _read(task, image, written)
            except ValueError as error:
                written.broken.append(SkippedFile(image.path, str(error)))
                if not task.skip_broken:
                    raise BrokenImageError(written.broken[-1]) from error
                continue
            name, label = f"{key:08d}.{header.extension}", str(image.label)
            label_name = f"{key:08d}.{LABEL_EXTENSION}"
            offset, label_offset = tar.add((name, data), (label_name, label.encode()))
            rows.append((0, image.label, offset, len(data), header.width, header.height))
            lines.append(
                f"{header.extension} {offset} {len(data)} {name} {LABEL_EXTENSION} {label_offset} {len(label)} {label_name}\n"
            )
        written.bytes, written.sha256 = tar.close()
    written.rows = np.array(rows, SAMPLE_DTYPE)
    written.idx = f"v1.2 {len(lines)}\n{''.join(lines)}".encode()  # as wds2idx writes it, for DALI's own reader
    return written


def _read(task: ShardTask, image: ImageFile, written: WrittenShard) -> tuple[bytes, Header]:
    """(bytes to store, their header), noting in `written` what is odd. Raises ValueError with what is broken."""
    if image.bytes > _MAX_READ_BYTES:
        raise ValueError(f"it has {image.bytes} bytes; make it smaller than 2 GiB")
    try:
        data = task.reader.read(image.bytes, image.locator)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error
    if len(data) != image.bytes:
        raise RuntimeError(f"{image.path} was changed while it was being packed; pack again when nothing changes it")
    header = check_image(data, task.check, task.max_megapixels)
    if task.downscale is not None:
        stored, header = downscale_image(data, header, task.downscale)
        written.shrunk += stored is not data
        data = stored
    if header.cmyk:
        written.cmyk.append(image.path)
    if header.rotated:
        written.rotated.append(image.path)
    return data, header


class TarWriter:
    """Writes members as tarfile's USTAR format has them, with owner and time 0, and hashes what it writes.

    tarfile takes 20 µs for a member's header, half as long as all else that an image needs. Names are at most 99
    bytes of ASCII.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._bytes = file, hashlib.sha256(), 0

    def add(self, *members: tuple[str, bytes]) -> list[int]:
        """Writes (name, content) of each; returns the offsets of the contents in the file."""
        pieces, offsets = [], []
        position = self._bytes
        for name, content in members:
            offsets.append(position + _BLOCK)
            pieces += _tar_header(name.encode("ascii"), len(content)), content, bytes(-len(content) % _BLOCK)
            position += member_bytes(len(content))
        self._write(b"".join(pieces))
        return offsets

    def close(self) -> tuple[int, str]:
        """Writes the end mark; returns (bytes, sha256) of the whole. The file stays open."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self._bytes % tarfile.RECORDSIZE))
        return self._bytes, self._hash.hexdigest()

    def _write(self, piece: bytes) -> None:
        self._hash.update(piece)
        self._file.write(piece)
        self._bytes += len(piece)


def member_bytes(content: int) -> int:
    """What a member with so many bytes of content takes in a tar file."""
    return _BLOCK + content + -content % _BLOCK


_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
_BEFORE_SIZE, _AFTER_SIZE, _REST = _EMPTY_HEADER[100:124], _EMPTY_HEADER[136:148], _EMPTY_HEADER[156:]
_SUM_OF_OTHERS = sum(_BEFORE_SIZE + _AFTER_SIZE + _REST) + 8 * ord(" ")


def _tar_header(name: bytes, content: int) -> bytes:
    size = b"%011o\0" % content
    checksum = b"%06o\0 " % (_SUM_OF_OTHERS + sum(name) + sum(size))
    return b"".join((name.ljust(100, b"\0"), _BEFORE_SIZE, size, _AFTER_SIZE, checksum, _REST))

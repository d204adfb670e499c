"""Writing of one shard in a worker process: images and labels as a tar file, its index, its rows of the sample table.

packer.py plans the shards and names them; image_checks.py checks each image.
"""

import hashlib
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from dataio.files import escape_unprintable
from dataio.manifest import SAMPLE_DTYPE, SkippedFile
from dataio.pack.image_checks import Downscale, Header, check_image, downscale_image
from dataio.pack.source import LABEL_EXTENSION, ImageFile, Reader

_BLOCK = tarfile.BLOCKSIZE
_MAX_READ_BYTES = 2**31 - 2**13  # limit of a single read() on Linux


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: these images, in this order, with keys from `first_key` on."""

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
    """Contents of a shard: `rows` of SAMPLE_DTYPE (whose `shard` is still 0), its index, the paths of unusual images.

    `shrunk`, the name that journals on disk use, is the number of images that were downscaled.
    """

    rows: npt.NDArray[np.void]
    idx: bytes
    bytes: int
    sha256: str
    broken: list[SkippedFile] = field(default_factory=list)
    cmyk: list[str] = field(default_factory=list)
    rotated: list[str] = field(default_factory=list)
    shrunk: int = 0


class BrokenImageError(ValueError):
    """An image cannot be packed, and broken ones are not to be skipped."""

    def __init__(self, broken: SkippedFile) -> None:
        super().__init__(broken)
        self.broken = broken


def write_shard(task: ShardTask) -> WrittenShard:
    """Read, check and write the images of one shard; one image is in memory at a time.

    Raises BrokenImageError, unless broken images are to be skipped, and RuntimeError if a file's size has changed.
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
            image_entry = f"{header.extension} {offset} {len(data)} {name}"
            lines.append(f"{image_entry} {LABEL_EXTENSION} {label_offset} {len(label)} {label_name}\n")
        written.bytes, written.sha256 = tar.close()
    written.rows = np.array(rows, SAMPLE_DTYPE)
    written.idx = f"v1.2 {len(lines)}\n{''.join(lines)}".encode()  # wds2idx's format, for DALI's own reader
    return written


def _read(task: ShardTask, image: ImageFile, written: WrittenShard) -> tuple[bytes, Header]:
    """Return (bytes to store, their header), noting unusual images in `written`. Raises ValueError for broken ones."""
    if image.bytes > _MAX_READ_BYTES:
        raise ValueError(f"it has {image.bytes} bytes; make it smaller than 2 GiB")
    try:
        data = task.reader.read(image.bytes, image.locator)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror or error}") from error
    if len(data) != image.bytes:
        path = escape_unprintable(image.path)
        raise RuntimeError(f"{path} was changed while it was being packed; pack again when nothing changes it")
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
    """Writer of tar files in USTAR format, with owner and time 0, which hashes what it writes.

    The headers are byte for byte those of tarfile, which takes 20 µs for each, half as long as all else that an image
    needs. Names are at most 99 bytes of ASCII.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._bytes = file, hashlib.sha256(), 0

    def add(self, *members: tuple[str, bytes]) -> list[int]:
        """Write members, (name, content) each; return the offsets of their contents in the file."""
        pieces: list[bytes] = []
        offsets: list[int] = []
        position = self._bytes
        for name, content in members:
            offsets.append(position + _BLOCK)
            pieces += _tar_header(name.encode("ascii"), len(content)), content, bytes(-len(content) % _BLOCK)
            position += member_bytes(len(content))
        self._write(b"".join(pieces))
        return offsets

    def close(self) -> tuple[int, str]:
        """Write the end mark; return (bytes, sha256) of the whole file, which stays open."""
        self._write(bytes(2 * _BLOCK))
        self._write(bytes(-self._bytes % tarfile.RECORDSIZE))
        return self._bytes, self._hash.hexdigest()

    def _write(self, piece: bytes) -> None:
        self._hash.update(piece)
        self._file.write(piece)
        self._bytes += len(piece)


def member_bytes(content: int) -> int:
    """Return the bytes that a member with so many bytes of content takes in a tar file."""
    return _BLOCK + content + -content % _BLOCK


_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
_BEFORE_SIZE, _AFTER_SIZE, _REST = _EMPTY_HEADER[100:124], _EMPTY_HEADER[136:148], _EMPTY_HEADER[156:]
_SUM_OF_OTHERS = sum(_BEFORE_SIZE + _AFTER_SIZE + _REST) + 8 * ord(" ")


def _tar_header(name: bytes, content: int) -> bytes:
    size = b"%011o\0" % content
    checksum = b"%06o\0 " % (_SUM_OF_OTHERS + sum(name) + sum(size))
    return b"".join((name.ljust(100, b"\0"), _BEFORE_SIZE, size, _AFTER_SIZE, checksum, _REST))

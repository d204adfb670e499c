"""Reading of encoded images from shards on a local disk, each verified to be the sample that the manifest names.

A sample is two consecutive members of a tar file: the image, then its label (see pack/shard_writer.py). The sample
table of the manifest has the image's offset and its label, and the label that is read with the image must be the same.
A shard that was exchanged, shifted or overwritten since it was packed thus gives an error, and never an image with
another image's label. remote/prefetch.py reads shards of remote data sets in the same way.
"""

import errno
import os
import tarfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dataio.manifest import Manifest, load_manifest
from dataio.urls import is_url

if TYPE_CHECKING:
    from dataio.remote.options import CacheOptions

_BLOCK = tarfile.BLOCKSIZE
_NAME, _SIZE = slice(0, 100), slice(124, 136)  # fields of a USTAR header


class BadSampleError(Exception):
    """The bytes at a sample's offset are not that sample; the text says why."""


class EncodedImages(Protocol):
    """Reader of a data set's encoded images: `LocalShards`, or `RemoteShards` of a remote data set."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begin a batch that needs these shards now or soon, in this order."""

    def read_ahead(self, samples: Sequence[int]) -> None:
        """Announce the samples that will be read next."""

    def read(self, sample: int) -> bytes:
        """Return a sample's encoded image. Raises as `read_sample` does."""

    def close(self) -> None:
        """Close all files."""


class LocalShards:
    """Encoded images of a local packed folder. Each shard is opened once, and closed with this object or by close().

    Raises RuntimeError if a shard cannot be opened.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._files: list[int] = []
        self.close = weakref.finalize(self, _close, self._files)
        for shard in manifest.shards:
            try:
                self._files.append(os.open(manifest.folder / shard.name, os.O_RDONLY))
            except OSError as error:
                remedy = manifest.remedy
                if error.errno == errno.EMFILE:
                    remedy = f"allow more than {len(manifest.shards)} with ulimit -n, or pack larger shards"
                raise RuntimeError(f"cannot open {shard.name}: {error.strerror}; {remedy}") from error

    def prefetch(self, shards: Sequence[int]) -> None:
        """Do nothing: all shards are there."""

    def read_ahead(self, samples: Sequence[int]) -> None:
        """Let the operating system read these samples from disk in parallel, while they are read one by one."""
        for shard, offset, size in self._manifest.samples[["shard", "offset", "bytes"]][samples].tolist():
            start, end = _extent(offset, size)
            with suppress(OSError):  # a file system may not support it
                os.posix_fadvise(self._files[shard], start, end - start, os.POSIX_FADV_WILLNEED)

    def read(self, sample: int) -> bytes:
        """Return a sample's encoded image. Raises as `read_sample` does."""
        return read_sample(self._manifest, sample, self._files[self._manifest.samples["shard"][sample]])


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


def read_sample(manifest: Manifest, sample: int, file: int) -> bytes:
    """Return the encoded image of a sample, read from the open file of its shard.

    Raises RuntimeError, naming the sample, if it cannot be read completely; BadSampleError if the shard has other data
    there, or another label.
    """
    _, label, offset, size, _, _ = manifest.samples[sample].item()  # three times as fast as field by field
    start, end = _extent(offset, size)
    fault = "its shard ends too early"
    try:
        members = os.pread(file, end - start, start)
    except OSError as error:
        members, fault = b"", str(error.strerror)
    if len(members) != end - start:
        raise RuntimeError(f"cannot read {manifest.describe(sample)}: {fault}; {manifest.remedy}")
    _check_members(members, size, label)
    return members[_BLOCK : _BLOCK + size]


def _extent(offset: int, size: int) -> tuple[int, int]:
    """Return (start, end) of a sample in its shard: from the header of its image to the end of its label's block."""
    return offset - _BLOCK, offset + -(-size // _BLOCK) * _BLOCK + 2 * _BLOCK


def _check_members(members: bytes, size: int, label: int) -> None:
    key, of_image = _read_header(members[:_BLOCK])
    name, of_label = _read_header(members[-2 * _BLOCK : -_BLOCK])
    key = key.partition(b".")[0]
    if of_image != size or not key:
        raise BadSampleError("its shard has something else there")
    if name != key + b".cls" or not 0 < of_label <= _BLOCK:
        raise BadSampleError("its shard has no label behind it")
    text = members[-_BLOCK:][:of_label]
    if not text.isdigit() or int(text) != label:
        shown = text[:12].decode(errors="replace")
        raise BadSampleError(f"its label is {shown!r} in its shard and {label} in the sample table")


def _read_header(header: bytes) -> tuple[bytes, int]:
    """Return (name, size) of a tar member by its header; the size is -1 if the field holds no number."""
    digits = header[_SIZE].rstrip(b"\0 ")
    try:
        size = int(digits, 8) if digits.isdigit() else -1
    except ValueError:  # a digit above 7
        size = -1
    return header[_NAME].partition(b"\0")[0], size


def open_dataset(location: str | Path, cache: "CacheOptions") -> Manifest:
    """Open the manifest of a packed folder, local or at a URL, of which the sample table is fetched and no shard.

    Raises what `load_manifest` and `remote.fetch.fetch` raise.
    """
    if not is_url(location):
        return load_manifest(location)
    from dataio.remote.prefetch import open_remote  # imports fsspec, which local data sets can do without

    return open_remote(str(location), cache)


def open_shards(manifest: Manifest) -> EncodedImages:
    """Open the reader of a data set's encoded images."""
    if not manifest.remote:
        return LocalShards(manifest)
    from dataio.remote.prefetch import RemoteShards

    return RemoteShards(manifest)

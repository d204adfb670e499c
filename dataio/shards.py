"""Encoded images out of shards on a local disk, each with the proof that it is the right one.

pack.py writes a sample as two members of a tar file: the image, and behind it the label. The sample table says where
the image lies and what its label is; the label that is read with it must agree. So a shard that was exchanged,
shifted or overwritten since it was packed gives an error, and never an image with another image's label. decode.py
reads through this module, prefetch.py does the same for shards that it fetches.
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
_NAME, _SIZE = slice(0, 100), slice(124, 136)  # of a member's header in USTAR


class BadSampleError(Exception):
    """What lies at a sample's path_or_url is not that sample; the text says why."""


class EncodedImages(Protocol):
    """What reads the encoded images of a data set: `LocalShards`, or `RemoteShards` of a remote one."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Begins a batch that needs these shards, in this order, now or soon."""

    def read_ahead(self, samples: Sequence[int]) -> None:
        """Samples that are read next."""

    def read(self, sample: int) -> bytes:
        """The encoded image. Raises as `read_sample` does."""

    def close(self) -> None:
        """Lets go of all files."""


class LocalShards:
    """The encoded images of a packed folder. Each shard is opened once, and closed with this object or by close().

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
        """They are all there; prefetch.py's would be fetched."""

    def read_ahead(self, samples: Sequence[int]) -> None:
        """Lets the operating system fetch these from disk side by side, while they are read one by one."""
        for shard, offset, size in self._manifest.samples[["shard", "offset", "bytes"]][samples].tolist():
            start, end = _extent(offset, size)
            with suppress(OSError):  # a file system may not care
                os.posix_fadvise(self._files[shard], start, end - start, os.POSIX_FADV_WILLNEED)

    def read(self, sample: int) -> bytes:
        """The encoded image. Raises as `read_sample` does."""
        return read_sample(self._manifest, sample, self._files[self._manifest.samples["shard"][sample]])


def _close(files: list[int]) -> None:
    while files:
        os.close(files.pop())


def read_sample(manifest: Manifest, sample: int, file: int) -> bytes:
    """The encoded image of a sample, from the open file of its shard.

    Raises RuntimeError, naming the sample, if it cannot be read whole; BadSampleError if the shard has something
    else there, or another label.
    """
    _, label, offset, size, _, _ = manifest.samples[sample].item()  # three times as fast as field by field
    start, end = _extent(offset, size)
    fault = "its shard ends too early"
    try:
        members = os.pread(file, end - start, start)
    except OSError as error:
        members, fault = b"", error.strerror
    if len(members) != end - start:
        raise RuntimeError(f"cannot read {manifest.describe(sample)}: {fault}; {manifest.remedy}")
    _check_members(members, size, label)
    return members[_BLOCK : _BLOCK + size]


def _extent(offset: int, size: int) -> tuple[int, int]:
    """Where in its shard a sample lies: from the header before its image to the end of its label, a block each."""
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
        redact_url = text[:12].decode(errors="replace")
        raise BadSampleError(f"its label is {redact_url!r} in its shard and {label} in the sample table")


def _read_header(header: bytes) -> tuple[bytes, int]:
    """(name, bytes) of a member of a tar file; -1 bytes if the field holds no number."""
    digits = header[_SIZE].rstrip(b"\0 ")
    try:
        size = int(digits, 8) if digits.isdigit() else -1
    except ValueError:  # an 8 or 9
        size = -1
    return header[_NAME].partition(b"\0")[0], size


def open_dataset(location: str | Path, cache: "CacheOptions") -> Manifest:
    """The manifest of a packed folder, here or at a URL. Of a remote one the sample table is fetched, and no shard.

    Raises what `load_manifest` and `remote.fetch` raise.
    """
    if not is_url(location):
        return load_manifest(location)
    from dataio.remote.prefetch import open_remote  # fsspec is for those who need it

    return open_remote(str(location), cache)


def open_shards(manifest: Manifest) -> EncodedImages:
    """What reads the encoded images of a data set."""
    if not manifest.remote:
        return LocalShards(manifest)
    from dataio.remote.prefetch import RemoteShards

    return RemoteShards(manifest)

"""What a packed folder holds: its manifest, the table of its samples, its shards.

The pack command writes it, everything else in dataio reads it.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter, ValidationError

from dataio.files import sha256_of
from dataio.urls import redact_url

if TYPE_CHECKING:  # local data sets have no use for it
    from dataio.remote.options import Remote

MANIFEST_NAME = "manifest.json"
SAMPLES_NAME = "samples.npy"
FORMAT_VERSION = 1

#: One row of samples.npy. `offset` is the first byte of the encoded image inside its shard.
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("label", "<u4"),
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
    ]
)

_SHARD_NAME = re.compile(r"\w[\w.-]*\.tar")  # no folder in it: it is looked for below the manifest's own
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One tar file: `bytes` and `sha256` are the whole file's, `samples` the number of images in it.

    Its index (wds2idx's format, for DALI's own reader) lies beside it as `name` with the ending `.idx`.
    """

    name: str
    bytes: int
    sha256: str
    samples: int
    idx_sha256: str

    @property
    def idx_name(self) -> str:
        return str(Path(self.name).with_suffix(".idx"))


@dataclass(frozen=True)
class SkippedFile:
    """A file of the class folder that was left out: its path inside that folder, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class ManifestFile:
    """What manifest.json says, field by field. `hold_out` (percent) and `part` are the pack's options.

    sha256: of the other fields; filled in where it is not given, as by manifests from before there was one.
    """

    format: int
    seed: int
    hold_out: float | None
    part: str | None
    samples: int
    samples_sha256: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    broken: tuple[SkippedFile, ...]
    sha256: str = ""

    def __post_init__(self) -> None:
        if not self.sha256:
            object.__setattr__(self, "sha256", self.content_sha256())

    def content_sha256(self) -> str:
        fields = asdict(self)
        del fields["sha256"]
        if self.hold_out is not None:
            fields["hold_out"] = float(self.hold_out)  # 10 and 10.0 are the same percentage
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """A packed folder. `samples` is a read-only (N,) array of SAMPLE_DTYPE, which processes share by mmap.

    A remote one has its tables in `folder` and as many of its shards as cache_folder.py keeps there.
    """

    folder: Path
    hash: str  # sha256 of manifest.json, which holds the hashes of all other files
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples: np.ndarray
    broken: tuple[SkippedFile, ...]
    remote: "Remote | None" = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def location(self) -> str:
        """Where the data set lies, for people: its folder, or its URL."""
        return redact_url(self.remote.url) if self.remote else str(self.folder)

    @property
    def remedy(self) -> str:
        """What to do about a damaged shard."""
        if self.remote:
            return f"fetch it again by removing {self.folder}"
        return f"check the folder with: python -m dataio.verify {self.folder}"

    @cached_property
    def shard_samples(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.shards)

    def required_cache_bytes(self, shards: int) -> int:
        """The room that any so many shards take, one more (of a bad sample's substitute), and the sample table."""
        sizes = sorted((shard.bytes for shard in self.shards), reverse=True)
        return sum(sizes[: shards + 1]) + (self.folder / SAMPLES_NAME).stat().st_size

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: `shard-000002.tar, offset 1536, class "boot"`."""
        row = self.samples[sample]
        shard, label = self.shards[row["shard"]].name, self.classes[row["label"]]
        return f'sample {sample} ({shard}, offset {row["offset"]}, class "{label}")'


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder that `python -m dataio.pack` wrote. Shards' sizes are checked here, hashes by verify.py.

    Raises FileNotFoundError if there is no manifest, ValueError if it, the sample table or a shard's size is
    wrong.
    """
    folder = Path(folder)
    file, digest = read_manifest_file(folder)
    _check_shards(folder, file.shards)
    return make_manifest(folder, file, digest)


def make_manifest(folder: Path, file: ManifestFile, digest: str, remote: "Remote | None" = None) -> Manifest:
    """The manifest of a folder whose manifest.json and sample table are there; its shards need not be.

    Raises ValueError if the sample table is not the one that the manifest names.
    """
    samples = load_samples(folder / SAMPLES_NAME, file.samples, file.samples_sha256)
    _check_tables(folder, file.shards, file.classes, samples)
    return Manifest(folder, digest, file.classes, file.shards, samples, file.broken, remote)


def read_manifest_file(folder: Path) -> tuple[ManifestFile, str]:
    """(manifest.json as it stands, its sha256), nothing else read. Raises as `load_manifest` does."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no {MANIFEST_NAME} in {folder}; write shards there with: python -m dataio.pack SOURCE {folder}"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: bytes, source: str) -> tuple[ManifestFile, str]:
    """(the manifest in the bytes of a file at `source`, their sha256). Raises ValueError if they are none."""
    try:
        version = json.loads(text)["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fault = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{source} is not a manifest ({fault}); pack the folder again") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{source} has format {version}, this code reads {FORMAT_VERSION}; pack the folder again")
    try:
        file = TypeAdapter(ManifestFile).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{source} is not a manifest ({where}: {first['msg']}); pack the folder again") from error
    fault = _find_fault(file)
    if fault:
        raise ValueError(f"{source} is not a manifest ({fault}); pack the folder again")
    return file, hashlib.sha256(text).hexdigest()


def _find_fault(file: ManifestFile) -> str | None:
    """What no manifest says. Names are checked because files are opened, fetched and removed by them."""
    names = [shard.name for shard in file.shards]
    for name in names:
        if not _SHARD_NAME.fullmatch(name):
            return f"{name!r} is no name of a shard"
    if len(set(names)) < len(names):
        return "two shards have one name"
    if len(set(file.classes)) < len(file.classes):
        return "two classes have one name"
    for digest in (file.samples_sha256, *(shard.sha256 for shard in file.shards)):
        if not _SHA256.fullmatch(digest):
            return f"{digest!r} is no sha256"
    if min((min(shard.samples, shard.bytes) for shard in file.shards), default=1) < 1:
        return "a shard is empty"
    if max((shard.bytes for shard in file.shards), default=0) >= 2**63:
        return "a shard is larger than any disk"
    if file.sha256 != file.content_sha256():
        return "its content changed, its own sha256 is of another"
    return None


def load_samples(path: Path, count: int, sha256: str | None = None) -> np.ndarray:
    """The sample table, (count,) of SAMPLE_DTYPE, read-only.

    Raises ValueError if the file holds another, or has another sha256 than is given.
    """
    try:
        if sha256 is not None and sha256_of(path) != sha256:  # 30 ms for a million samples
            raise ValueError("its bytes changed, the manifest has another sha256")
        samples = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); copy it again, or pack the folder again") from error
    if samples.dtype != SAMPLE_DTYPE or samples.shape != (count,):
        raise ValueError(
            f"{path} is a table of shape {samples.shape} and type {samples.dtype}, where the manifest asks for"
            f" {count} samples; pack the folder again"
        )
    return samples


def _check_shards(folder: Path, shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise ValueError(f"{path} is missing; the manifest names it. Pack the folder again")
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes where the manifest says {shard.bytes}: it was truncated"
                f" or changed. Copy it again or pack the folder again"
            )


def _check_tables(folder: Path, shards: tuple[Shard, ...], classes: tuple[str, ...], samples: np.ndarray) -> None:
    if len(samples) == 0:
        raise ValueError(f"{folder} holds no samples; pack a folder with images")
    counts = [shard.samples for shard in shards]
    # Shard after shard: ShuffledSampler and verify.py find a shard's samples by counting.
    if sum(counts) != len(samples) or (samples["shard"] != np.repeat(np.arange(len(shards)), counts)).any():
        raise ValueError(f"{folder / SAMPLES_NAME} does not fit the manifest's shards; pack the folder again")
    sizes = np.array([shard.bytes for shard in shards], dtype=np.uint64)[samples["shard"]]
    offsets = samples["offset"]
    members = -(-samples["bytes"].astype(np.int64) // 512) * 512 + 1024  # the image, and its label behind it
    if not ((offsets >= 512) & (offsets < sizes) & (members.astype(np.uint64) <= sizes - offsets)).all():
        raise ValueError(f"{folder / SAMPLES_NAME} has an image beyond the end of its shard; pack the folder again")
    if samples["label"].max() >= len(classes):
        raise ValueError(
            f"{folder / SAMPLES_NAME} has label {samples['label'].max()} but the manifest names"
            f" {len(classes)} classes; pack the folder again"
        )

"""Contents of a packed folder: the manifest, the sample table and the list of shards, read and validated.

`python -m dataio.pack` writes them (pack/packer.py); all of dataio reads them.
"""

import difflib
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from dataio.files import escape_unprintable, has_control_character, sha256_of
from dataio.urls import redact_url

if TYPE_CHECKING:  # local data sets never import it
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

_SHARD_NAME = re.compile(r"\w[\w.-]*\.tar")  # without a folder: shards lie beside their manifest
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """A tar file of a packed folder: `bytes` and `sha256` of the whole file, `samples` the number of its images.

    Its index (wds2idx's format, for DALI's own reader) has the same name with the extension `.idx`.
    """

    name: str
    bytes: int
    sha256: str
    samples: int
    idx_sha256: str

    @property
    def idx_name(self) -> str:
        """Name of the shard's index."""
        return str(Path(self.name).with_suffix(".idx"))


@dataclass(frozen=True)
class SkippedFile:
    """A file of the source that was not packed: its path inside the source, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class ManifestFile:
    """Fields of manifest.json.

    hold_out: percentage of --val-percent. part: the --split, under its first names: "kept" is train, "held-out" is val.
    sha256: of all other fields; computed where it is missing, as in manifests from before it was added.
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
        """Return the hexadecimal sha256 of all other fields."""
        fields = asdict(self)
        del fields["sha256"]
        if self.hold_out is not None:
            fields["hold_out"] = float(self.hold_out)  # 10 and 10.0 are the same percentage
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """A packed folder. `samples` is its read-only (N,) sample table of SAMPLE_DTYPE, which processes share by mmap.

    `folder` holds the sample table and the shards; of a remote data set, it is a folder of the cache (see
    remote/cache_folder.py) and holds only some of the shards.
    """

    folder: Path
    hash: str  # sha256 of manifest.json, which contains the hashes of all other files
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples: npt.NDArray[np.void]
    broken: tuple[SkippedFile, ...]
    remote: "Remote | None" = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.samples)

    @property
    def location(self) -> str:
        """Folder or redacted URL of the data set, for messages."""
        return redact_url(self.remote.url) if self.remote else str(self.folder)

    @property
    def remedy(self) -> str:
        """What to do about a damaged shard, for messages."""
        if self.remote:
            return f"fetch it again by removing {self.folder}"
        return f"check the folder with: python -m dataio.verify {self.folder}"

    @cached_property
    def shard_samples(self) -> tuple[int, ...]:
        """Number of samples of each shard."""
        return tuple(shard.samples for shard in self.shards)

    def required_cache_bytes(self, shards: int) -> int:
        """Return the bytes of any `shards` shards, one more (for a bad sample's substitute), and the sample table."""
        sizes = sorted((shard.bytes for shard in self.shards), reverse=True)
        return sum(sizes[: shards + 1]) + (self.folder / SAMPLES_NAME).stat().st_size

    def describe(self, sample: int) -> str:
        """Describe a sample in a message: `sample 7 (shard-000002.tar, offset 1536, class "boot")`."""
        row = self.samples[sample]
        shard, label = self.shards[row["shard"]].name, self.classes[row["label"]]
        return f'sample {sample} ({shard}, offset {row["offset"]}, class "{label}")'


def load_manifest(folder: str | Path) -> Manifest:
    """Load the manifest of a local packed folder. The sizes of shards are checked here, their hashes by verify.py.

    Raises FileNotFoundError if there is no manifest, ValueError if it, the sample table or a shard's size is wrong.
    """
    folder = Path(folder)
    file, digest = read_manifest_file(folder)
    _check_shards(folder, file.shards)
    return make_manifest(folder, file, digest)


def make_manifest(folder: Path, file: ManifestFile, digest: str, remote: "Remote | None" = None) -> Manifest:
    """Make the Manifest of a folder that has manifest.json and the sample table, whatever shards it has.

    Raises ValueError if the sample table is not the one that the manifest names.
    """
    samples = load_samples(folder / SAMPLES_NAME, file.samples, file.samples_sha256)
    _check_tables(folder, file.shards, file.classes, samples)
    return Manifest(folder, digest, file.classes, file.shards, samples, file.broken, remote)


def read_manifest_file(folder: Path) -> tuple[ManifestFile, str]:
    """Read manifest.json and no other file; return (its fields, its sha256). Raises as `load_manifest` does."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no {MANIFEST_NAME} in {folder}; write shards there with: python -m dataio.pack SOURCE {folder}"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(text: bytes, source: str) -> tuple[ManifestFile, str]:
    """Parse the bytes of a manifest.json at `source`; return (its fields, their sha256).

    Raises ValueError, naming `source`, if they are not a valid manifest.
    """
    try:
        version = json.loads(text)["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{source} is not a manifest ({reason}); pack the folder again") from error
    if version != FORMAT_VERSION:
        found = escape_unprintable(version)
        raise ValueError(f"{source} has format {found}, this code reads {FORMAT_VERSION}; pack the folder again")
    try:
        file = TypeAdapter(ManifestFile).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        where = escape_unprintable(".".join(str(part) for part in first["loc"]))
        raise ValueError(f"{source} is not a manifest ({where}: {first['msg']}); pack the folder again") from error
    fault = _find_fault(file)
    if fault:
        raise ValueError(f"{source} is not a manifest ({fault}); pack the folder again")
    return file, hashlib.sha256(text).hexdigest()


def _find_fault(file: ManifestFile) -> str | None:
    """Describe what is wrong with a manifest of the right types; None if nothing is.

    Names are checked because files are opened, fetched and removed by them.
    """
    names = [shard.name for shard in file.shards]
    for name in names:
        if not _SHARD_NAME.fullmatch(name):
            return f"{name!r} is not a valid shard name"
    if len(set(names)) < len(names):
        return "two shards have the same name"
    for name in file.classes:
        if has_control_character(name):
            return f"class {escape_unprintable(name)} has control characters in its name"
    if len(set(file.classes)) < len(file.classes):
        return "two classes have the same name"
    for digest in (file.samples_sha256, *(shard.sha256 for shard in file.shards)):
        if not _SHA256.fullmatch(digest):
            return f"{digest!r} is not a sha256"
    if min((min(shard.samples, shard.bytes) for shard in file.shards), default=1) < 1:
        return "a shard is empty"
    if max((shard.bytes for shard in file.shards), default=0) >= 2**63:
        return "a shard is larger than any disk"
    if file.sha256 != file.content_sha256():
        return "its content does not match its own sha256"
    return None


def load_samples(path: Path, count: int, sha256: str | None = None) -> npt.NDArray[np.void]:
    """Map the sample table, (count,) of SAMPLE_DTYPE, read-only.

    Raises ValueError if the file is no such table, or has another sha256 than is given.
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


def _check_tables(
    folder: Path, shards: tuple[Shard, ...], classes: tuple[str, ...], samples: npt.NDArray[np.void]
) -> None:
    if len(samples) == 0:
        raise ValueError(f"{folder} holds no samples; pack a folder with images")
    counts = [shard.samples for shard in shards]
    # Samples are sorted by shard: ShuffledSampler and verify.py find a shard's samples by counting.
    if sum(counts) != len(samples) or (samples["shard"] != np.repeat(np.arange(len(shards)), counts)).any():
        raise ValueError(f"{folder / SAMPLES_NAME} does not fit the manifest's shards; pack the folder again")
    sizes = np.array([shard.bytes for shard in shards], dtype=np.uint64)[samples["shard"]]
    offsets = samples["offset"]
    members = -(-samples["bytes"].astype(np.int64) // 512) * 512 + 1024  # the image, and the label that follows it
    if not ((offsets >= 512) & (offsets < sizes) & (members.astype(np.uint64) <= sizes - offsets)).all():
        raise ValueError(f"{folder / SAMPLES_NAME} has an image beyond the end of its shard; pack the folder again")
    if samples["label"].max() >= len(classes):
        raise ValueError(
            f"{folder / SAMPLES_NAME} has label {samples['label'].max()} but the manifest names"
            f" {len(classes)} classes; pack the folder again"
        )


def check_labels(manifest: Manifest, num_classes: int) -> None:
    """Raise ValueError if the data set has more classes than the model has outputs, `num_classes`."""
    classes = len(manifest.classes)
    if classes > num_classes:
        raise ValueError(
            f"{manifest.location} has {classes} classes, the model has {num_classes} outputs; set model.num_classes to"
            f" {classes}, or leave it out"
        )


def map_labels(val: Manifest, classes: tuple[str, ...], source: str) -> npt.NDArray[np.int64]:
    """Map the labels of `val` by class name to those of a model: (classes of `val`,) int64.

    classes: the model's, which come from `source`, a training set or weights. `val` may have fewer of them, in any
    order; a class without images may have any name, and maps to -1 if it is unknown.
    Raises ValueError, naming the first, if `val` has images of a class that is not among `classes`.
    """
    labels = {name: label for label, name in enumerate(classes)}
    for name in (val.classes[label] for label in np.unique(val.samples["label"])):
        if name not in labels:
            near = difflib.get_close_matches(name, classes, n=3) or classes[:3]
            raise ValueError(
                f'class "{name}" of {val.location} is not among the {len(classes)} classes of {source}, such as'
                f" {', '.join(near)}; leave it out of the one, or have it in both"
            )
    return np.array([labels.get(name, -1) for name in val.classes], dtype=np.int64)


def count_classes(manifest: Manifest) -> int:
    """Count the classes of a data set that have images."""
    return len(np.unique(manifest.samples["label"]))

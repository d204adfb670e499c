"""What a packed folder holds (its manifest), and in which order it is seen.

Written by pack.py, read by everything else in dataio. The order and the random draws of a training run are
pure functions of (seed, position): no state, no dependence on the number of ranks. A *position* counts the
samples of a whole run, from 0; `position // samples` is its epoch and `position % samples` its place in that
epoch, so that each epoch holds every sample exactly once and the next one follows without a gap.

Only NumPy's Philox *bit stream* is used: NumPy keeps it stable between versions, unlike its distributions.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

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

_ORDER_STREAM, _DRAW_STREAM = 0, 1  # keep the uses of one seed apart
STORAGE_STREAM = 3  # pack.py's; the order uses the even numbers


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
class Broken:
    """A file of the class folder that was left out: its path inside that folder, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class ManifestFile:
    """What manifest.json says, field by field. `hold_out` (percent) and `part` are the pack's options."""

    format: int
    seed: int
    hold_out: float | None
    part: str | None
    samples: int
    samples_sha256: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    broken: tuple[Broken, ...]


@dataclass(frozen=True)
class Manifest:
    """A packed folder. `samples` is a read-only (N,) array of SAMPLE_DTYPE, which processes share by mmap."""

    folder: Path
    hash: str  # sha256 of manifest.json, which holds the hashes of all other files
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    samples: np.ndarray
    broken: tuple[Broken, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def describe(self, sample: int) -> str:
        """Where a sample lies, for messages: `shard-000002.tar, offset 1536, class "boot"`."""
        row = self.samples[sample]
        shard, label = self.shards[row["shard"]].name, self.classes[row["label"]]
        return f'sample {sample} ({shard}, offset {row["offset"]}, class "{label}")'


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder that `python -m dataio.pack` wrote. Sizes are checked here, hashes by verify.py.

    Raises FileNotFoundError if there is no manifest, ValueError if it, the sample table or a shard's size is
    wrong.
    """
    folder = Path(folder)
    file, digest = read_manifest_file(folder)
    samples = load_samples(folder / SAMPLES_NAME, file.samples)
    _check_tables(folder, file.shards, file.classes, samples)
    return Manifest(folder, digest, file.classes, file.shards, samples, file.broken)


def read_manifest_file(folder: Path) -> tuple[ManifestFile, str]:
    """(manifest.json as it stands, its sha256), nothing else read. Raises as `load_manifest` does."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no {MANIFEST_NAME} in {folder}; write shards there with: python -m dataio.pack SOURCE {folder}"
        )
    text = path.read_bytes()
    try:
        fields = json.loads(text)
        version = fields["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r}); pack the folder again") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, this code reads {FORMAT_VERSION}; pack the folder again")
    try:
        fields["classes"] = tuple(fields["classes"])
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        fields["broken"] = tuple(Broken(**broken) for broken in fields["broken"])
        return ManifestFile(**fields), hashlib.sha256(text).hexdigest()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r}); pack the folder again") from error


def load_samples(path: Path, count: int) -> np.ndarray:
    """The sample table, (count,) of SAMPLE_DTYPE, read-only. Raises ValueError if the file holds another."""
    try:
        samples = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); pack the folder again") from error
    if samples.dtype != SAMPLE_DTYPE or samples.shape != (count,):
        raise ValueError(
            f"{path} is a table of shape {samples.shape} and type {samples.dtype}, where the manifest asks for"
            f" {count} samples; pack the folder again"
        )
    return samples


def _check_tables(folder: Path, shards: tuple[Shard, ...], classes: tuple[str, ...], samples: np.ndarray) -> None:
    for shard in shards:
        path = folder / shard.name
        if not path.is_file():
            raise ValueError(f"{path} is missing; the manifest names it. Pack the folder again")
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes where the manifest says {shard.bytes}: it was truncated"
                f" or changed. Copy it again or pack the folder again"
            )
    if len(samples) == 0:
        raise ValueError(f"{folder} holds no samples; pack a folder with images")
    per_shard = np.bincount(samples["shard"], minlength=len(shards))
    if len(per_shard) > len(shards) or per_shard.tolist() != [shard.samples for shard in shards]:
        raise ValueError(f"{folder / SAMPLES_NAME} does not fit the manifest's shards; pack the folder again")
    if samples["label"].max() >= len(classes):
        raise ValueError(
            f"{folder / SAMPLES_NAME} has label {samples['label'].max()} but the manifest names"
            f" {len(classes)} classes; pack the folder again"
        )


def philox(seed: int, stream: int) -> np.random.Philox:
    """The bit stream of a seed for one of its uses. Raises ValueError if the seed is not in [0, 2**63)."""
    if not 0 <= seed < 2**63:  # NumPy would round such a key to float64, and many seeds to the same
        raise ValueError(f"seed is {seed}; use a number from 0 to 2**63 - 1")
    return np.random.Philox(key=[seed, stream])


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def epoch_order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of an epoch: (samples,) int64, a permutation that depends on (seed, epoch, samples) alone.

    Raises ValueError as `philox` does.
    """
    keys = philox(seed, epoch << 1 | _ORDER_STREAM).random_raw(samples)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def samples_at(seed: int, positions: np.ndarray, samples: int) -> np.ndarray:
    """The samples at these positions of the run: (P,) int64 → (P,) int64 in [0, samples)."""
    epochs, places = np.divmod(positions, samples)
    chosen = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = epoch_order(seed, int(epoch), samples)[places[here]]
    return chosen


def draws_at(seed: int, first: int, count: int, per_position: int) -> np.ndarray:
    """Uniform draws of `count` positions from `first` on: (count, per_position) float64 in [0, 1).

    Each position owns `per_position` numbers of one long Philox stream, whichever rank asks for it.
    Raises ValueError if `per_position` is no multiple of 4, and as `philox` does.
    """
    if per_position % 4:
        raise ValueError(f"per_position is {per_position}; Philox yields 4 numbers at a time, use a multiple of 4")
    stream = philox(seed, _DRAW_STREAM).advance(first * (per_position // 4))
    raw = stream.random_raw(count * per_position)
    return (raw >> np.uint64(11)).reshape(count, per_position) * 2.0**-53

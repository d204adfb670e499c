"""What a packed folder holds (its manifest), and in which order it is seen.

Written by pack.py, read by everything else in dataio. The order and the random draws of a training run are
pure functions of (seed, position): no state, no dependence on the number of ranks. A *position* counts the
samples of a whole run, from 0; `position // samples` is its epoch and `position % samples` its place in that
epoch, so that each epoch holds every sample exactly once and the next one follows without a gap. `Order` has two
kinds: a full permutation for local disks, and one within windows of shards for data that lies far away.

Only NumPy's Philox *bit stream* is used: NumPy keeps it stable between versions, unlike its distributions.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from dataio.files import sha256_of
from dataio.remote import Remote, shown

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
    broken: tuple[Broken, ...]
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
    broken: tuple[Broken, ...]
    remote: Remote | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def place(self) -> str:
        """Where the data set lies, for people: its folder, or its URL."""
        return shown(self.remote.url) if self.remote else str(self.folder)

    @property
    def remedy(self) -> str:
        """What to do about a damaged shard."""
        if self.remote:
            return f"fetch it again by removing {self.folder}"
        return f"check the folder with: python -m dataio.verify {self.folder}"

    @cached_property
    def shard_samples(self) -> tuple[int, ...]:
        return tuple(shard.samples for shard in self.shards)

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


def make_manifest(folder: Path, file: ManifestFile, digest: str, remote: Remote | None = None) -> Manifest:
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


def parse_manifest(text: bytes, place: str) -> tuple[ManifestFile, str]:
    """(the manifest in the bytes of a file at `place`, their sha256). Raises ValueError if they are none."""
    try:
        version = json.loads(text)["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fault = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{place} is not a manifest ({fault}); pack the folder again") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{place} has format {version}, this code reads {FORMAT_VERSION}; pack the folder again")
    try:
        file = TypeAdapter(ManifestFile).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place} is not a manifest ({where}: {first['msg']}); pack the folder again") from error
    fault = _find_fault(file)
    if fault:
        raise ValueError(f"{place} is not a manifest ({fault}); pack the folder again")
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
    # Shard after shard: Order and verify.py find a shard's samples by counting.
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


@dataclass(frozen=True)
class Order:
    """In which order a run sees the samples: a pure function of the position.

    shard_samples: how many each shard holds, in stored order. window_shards: None permutes each epoch as a whole.
    With a number, each epoch deals the shards to windows of at most so many and permutes the samples within each
    window, so that reading needs only a window of shards at a time. The windows of an epoch are equal within one
    shard, and each holds shards from everywhere: one of every stretch of stored order that is as long as there
    are windows.
    Raises ValueError if window_shards is below 1.
    """

    seed: int
    shard_samples: tuple[int, ...]
    window_shards: int | None = None

    def __post_init__(self) -> None:
        if self.window_shards is not None and self.window_shards < 1:
            raise ValueError(f"window_shards is {self.window_shards}; use at least 1")

    def __str__(self) -> str:
        return "full" if self.window_shards is None else f"windowed by {self.window_shards} shards"

    @cached_property
    def samples(self) -> int:
        """Of an epoch."""
        return sum(self.shard_samples)

    @property
    def windows(self) -> int:
        """Of an epoch."""
        return 1 if self.window_shards is None else -(-len(self.shard_samples) // self.window_shards)

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions of the run: (P,) int64 → (P,) int64 in [0, samples)."""
        if self.window_shards is None:
            return samples_at(self.seed, positions, self.samples)
        chosen = np.empty(len(positions), dtype=np.int64)
        numbers, places = self._windows_of(positions)
        for number in np.unique(numbers):
            here = numbers == number
            chosen[here] = _window_order(self, int(number))[places[here]]
        return chosen

    def shards_ahead(self, first: int, last: int) -> tuple[int, ...]:
        """The shards that positions `first` to `last` need, and those of the window after the first one's.

        In the order in which they are needed.
        """
        (begin, end), _ = self._windows_of(np.array([first, last]))
        needed = np.concatenate([_window_shards(self, number) for number in range(begin, max(end, begin + 1) + 1)])
        return tuple(dict.fromkeys(needed.tolist()))

    def most_held(self, positions: int) -> int:
        """How many shards `shards_ahead` names at most, for a stretch of so many positions."""
        shards = len(self.shard_samples)
        least = min(self.shard_samples) * (shards // self.windows)  # samples of a window
        windows = max(2, 1 + -(-(positions - 1) // least))
        return min(shards, windows * -(-shards // self.windows))

    def _windows_of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P,) positions → (the windows that they lie in, counted over the whole run; their places there)."""
        epochs, places = np.divmod(positions, self.samples)
        numbers = epochs * self.windows
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ends = _deal(self, int(epoch))[1]
            windows = np.searchsorted(ends, places[here], side="right")
            numbers[here] += windows
            places[here] -= np.concatenate([[0], ends])[windows]
        return numbers, places


@lru_cache(maxsize=4)
def _deal(order: Order, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The shards of each of an epoch's windows, and the places (windows,) in the epoch at which they end."""
    shards, windows = len(order.shard_samples), order.windows
    if windows == 1:
        dealt = [np.arange(shards)]
    else:
        grid = _stretches(order)
        keys = _words(order.seed, epoch, 0, grid.size).reshape(grid.shape)
        grid = np.take_along_axis(grid, np.argsort(keys, axis=1, kind="stable"), axis=1)
        dealt = [column[column >= 0] for column in grid.T]
    samples = np.array(order.shard_samples)
    return dealt, np.cumsum([samples[window].sum() for window in dealt])


@lru_cache(maxsize=4)  # a batch may lie in two windows, and the last one be asked for again
def _window_order(order: Order, number: int) -> np.ndarray:
    """The samples of a window, counted over the whole run, in the order in which they are seen."""
    epoch, window = divmod(number, order.windows)
    dealt, ends = _deal(order, epoch)
    starts = np.cumsum(order.shard_samples) - order.shard_samples
    members = np.concatenate([starts[shard] + np.arange(order.shard_samples[shard]) for shard in dealt[window]])
    first = _stretches(order).size + int(ends[window]) - len(members)  # behind the words that deal
    permuted = members[np.argsort(_words(order.seed, epoch, first, len(members)), kind="stable")]
    permuted.flags.writeable = False
    return permuted


def _window_shards(order: Order, number: int) -> np.ndarray:
    epoch, window = divmod(int(number), order.windows)
    return _deal(order, epoch)[0][window]


def _stretches(order: Order) -> np.ndarray:
    """The shards in rows of as many as there are windows: (rows, windows), -1 for what a short row lacks.

    The middle one is short: at an end, its shards would tilt the windows that get them.
    """
    shards = len(order.shard_samples)
    rows = -(-shards // order.windows)
    lacking = rows * order.windows - shards
    short_ends = (rows // 2 + 1) * order.windows - lacking
    return np.insert(np.arange(shards), [short_ends] * lacking, -1).reshape(rows, order.windows)


def _words(seed: int, epoch: int, first: int, count: int) -> np.ndarray:
    """`count` words of an epoch's stream from number `first` on; Philox yields 4 at a time."""
    stream = philox(seed, epoch << 1 | _ORDER_STREAM).advance(first // 4)
    return stream.random_raw(first % 4 + count)[first % 4 :]


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

"""Which sample stands at which position of a run, and its random draws: pure functions of (seed, position).

No state, and no dependence on the number of ranks. A *position* counts the samples of a whole run, from 0;
`position // samples` is its epoch and `position % samples` its place in that epoch, so that each epoch holds every
sample exactly once and the next one follows without a gap. `Sampler` has two kinds: a full permutation for local disks,
and one within windows of shards for remote data.

Only NumPy's Philox *bit stream* is used: NumPy keeps it stable between versions, unlike its distributions.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

_SHUFFLE_STREAM, _AUGMENT_STREAM = 0, 1  # keep the uses of one seed apart
PACK_SHUFFLE_STREAM = 3  # the pack command's; orders use the even numbers


def philox(seed: int, stream: int) -> np.random.Philox:
    """The bit stream of a seed for one of its uses. Raises ValueError if the seed is not in [0, 2**63)."""
    if not 0 <= seed < 2**63:  # NumPy would round such a key to float64, and many seeds to the same
        raise ValueError(f"seed is {seed}; use a number from 0 to 2**63 - 1")
    return np.random.Philox(key=[seed, stream])


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def epoch_permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of an epoch: (samples,) int64, a permutation that depends on (seed, epoch, samples) alone.

    Raises ValueError as `philox` does.
    """
    keys = philox(seed, epoch << 1 | _SHUFFLE_STREAM).random_raw(samples)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order


def samples_at(seed: int, positions: np.ndarray, samples: int) -> np.ndarray:
    """The samples at these positions of the run: (P,) int64 → (P,) int64 in [0, samples)."""
    epochs, places = np.divmod(positions, samples)
    chosen = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = epoch_permutation(seed, int(epoch), samples)[places[here]]
    return chosen


@dataclass(frozen=True)
class Sampler:
    """In which order a run sees the samples: a pure function of the position.

    shard_samples: how many each shard holds, in stored order. shuffle_window_shards: None permutes each epoch as a whole.
    With a number, each epoch deals the shards to windows of at most so many and permutes the samples within each
    window, so that reading needs only a window of shards at a time. The windows of an epoch are equal within one
    shard, and each holds shards from everywhere: one of every stretch of stored order that is as long as there
    are windows.
    Raises ValueError if shuffle_window_shards is below 1.
    """

    seed: int
    shard_samples: tuple[int, ...]
    shuffle_window_shards: int | None = None

    def __post_init__(self) -> None:
        if self.shuffle_window_shards is not None and self.shuffle_window_shards < 1:
            raise ValueError(f"shuffle_window_shards is {self.shuffle_window_shards}; use at least 1")

    def __str__(self) -> str:
        return "full" if self.shuffle_window_shards is None else f"windowed by {self.shuffle_window_shards} shards"

    @cached_property
    def samples_per_epoch(self) -> int:
        """Of an epoch."""
        return sum(self.shard_samples)

    @property
    def windows_per_epoch(self) -> int:
        """Of an epoch."""
        return 1 if self.shuffle_window_shards is None else -(-len(self.shard_samples) // self.shuffle_window_shards)

    def samples_at(self, positions: np.ndarray) -> np.ndarray:
        """The samples at these positions of the run: (P,) int64 → (P,) int64 in [0, samples)."""
        if self.shuffle_window_shards is None:
            return samples_at(self.seed, positions, self.samples_per_epoch)
        chosen = np.empty(len(positions), dtype=np.int64)
        numbers, places = self._windows_of(positions)
        for number in np.unique(numbers):
            here = numbers == number
            chosen[here] = _window_order(self, int(number))[places[here]]
        return chosen

    def shards_to_prefetch(self, first: int, last: int) -> tuple[int, ...]:
        """The shards that positions `first` to `last` need, and those of the window after the first one's.

        In the order in which they are needed.
        """
        (begin, end), _ = self._windows_of(np.array([first, last]))
        needed = np.concatenate([_window_shards(self, number) for number in range(begin, max(end, begin + 1) + 1)])
        return tuple(dict.fromkeys(needed.tolist()))

    def max_prefetched_shards(self, positions: int) -> int:
        """How many shards `shards_to_prefetch` names at most, for a stretch of so many positions."""
        shards = len(self.shard_samples)
        least = min(self.shard_samples) * (shards // self.windows_per_epoch)  # samples of a window
        windows = max(2, 1 + -(-(positions - 1) // least))
        return min(shards, windows * -(-shards // self.windows_per_epoch))

    def _windows_of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(P,) positions → (the windows that they lie in, counted over the whole run; their places there)."""
        epochs, places = np.divmod(positions, self.samples_per_epoch)
        numbers = epochs * self.windows_per_epoch
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ends = _assign_windows(self, int(epoch))[1]
            windows = np.searchsorted(ends, places[here], side="right")
            numbers[here] += windows
            places[here] -= np.concatenate([[0], ends])[windows]
        return numbers, places


@lru_cache(maxsize=4)
def _assign_windows(sampler: Sampler, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The shards of each of an epoch's windows, and the places (windows,) in the epoch at which they end."""
    shards, windows = len(sampler.shard_samples), sampler.windows_per_epoch
    if windows == 1:
        shards_by_window = [np.arange(shards)]
    else:
        grid = _shard_strata(sampler)
        keys = _random_words(sampler.seed, epoch, 0, grid.size).reshape(grid.shape)
        grid = np.take_along_axis(grid, np.argsort(keys, axis=1, kind="stable"), axis=1)
        shards_by_window = [column[column >= 0] for column in grid.T]
    samples = np.array(sampler.shard_samples)
    return shards_by_window, np.cumsum([samples[window].sum() for window in shards_by_window])


@lru_cache(maxsize=4)  # a batch may lie in two windows, and the last one be asked for again
def _window_order(sampler: Sampler, number: int) -> np.ndarray:
    """The samples of a window, counted over the whole run, in the order in which they are seen."""
    epoch, window = divmod(number, sampler.windows_per_epoch)
    shards_by_window, ends = _assign_windows(sampler, epoch)
    starts = np.cumsum(sampler.shard_samples) - sampler.shard_samples
    members = np.concatenate(
        [starts[shard] + np.arange(sampler.shard_samples[shard]) for shard in shards_by_window[window]]
    )
    first = _shard_strata(sampler).size + int(ends[window]) - len(members)  # behind the words that deal
    permuted = members[np.argsort(_random_words(sampler.seed, epoch, first, len(members)), kind="stable")]
    permuted.flags.writeable = False
    return permuted


def _window_shards(sampler: Sampler, number: int) -> np.ndarray:
    epoch, window = divmod(int(number), sampler.windows_per_epoch)
    return _assign_windows(sampler, epoch)[0][window]


def _shard_strata(sampler: Sampler) -> np.ndarray:
    """The shards in rows of as many as there are windows: (rows, windows), -1 for what a short row lacks.

    The middle one is short: at an end, its shards would tilt the windows that get them.
    """
    shards = len(sampler.shard_samples)
    rows = -(-shards // sampler.windows_per_epoch)
    lacking = rows * sampler.windows_per_epoch - shards
    short_ends = (rows // 2 + 1) * sampler.windows_per_epoch - lacking
    return np.insert(np.arange(shards), [short_ends] * lacking, -1).reshape(rows, sampler.windows_per_epoch)


def _random_words(seed: int, epoch: int, first: int, count: int) -> np.ndarray:
    """`count` words of an epoch's stream from number `first` on; Philox yields 4 at a time."""
    stream = philox(seed, epoch << 1 | _SHUFFLE_STREAM).advance(first // 4)
    return stream.random_raw(first % 4 + count)[first % 4 :]


def draws_at(seed: int, first: int, count: int, per_position: int) -> np.ndarray:
    """Uniform draws of `count` positions from `first` on: (count, per_position) float64 in [0, 1).

    Each position owns `per_position` numbers of one long Philox stream, whichever rank asks for it.
    Raises ValueError if `per_position` is no multiple of 4, and as `philox` does.
    """
    if per_position % 4:
        raise ValueError(f"per_position is {per_position}; Philox yields 4 numbers at a time, use a multiple of 4")
    stream = philox(seed, _AUGMENT_STREAM).advance(first * (per_position // 4))
    raw = stream.random_raw(count * per_position)
    return (raw >> np.uint64(11)).reshape(count, per_position) * 2.0**-53

"""Shuffled sample order and random draws of a run, as pure functions of seed and position.

A *position* counts the samples of a whole run from 0, over all ranks: `position // samples` is its epoch and
`position % samples` its offset in that epoch. Each epoch holds every sample exactly once, and the next one follows
without a gap. `ShuffledSampler` stands where PyTorch has RandomSampler and DistributedSampler, but it has no state and
does not know of ranks: any range of positions can be asked for at any time, so an order can be resumed at any
position, on any number of ranks. loader.py gives each rank its positions.

Only NumPy's Philox *bit stream* is used, which stays the same between NumPy's versions; its distributions may not.

P: positions that are asked for at once.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

#: Philox streams of one seed: 2 · epoch + 0 shuffles that epoch, 1 augments, 3 shuffles the samples of a pack.
_SHUFFLE_STREAM, _AUGMENT_STREAM = 0, 1
PACK_SHUFFLE_STREAM = 3


def philox(seed: int, stream: int) -> np.random.Philox:
    """Philox bit generator of a seed for one of its uses. Raises ValueError if the seed is not in [0, 2**63)."""
    if not 0 <= seed < 2**63:  # NumPy would round such a key to float64, and many seeds to the same
        raise ValueError(f"seed is {seed}; use a number from 0 to 2**63 - 1")
    return np.random.Philox(key=[seed, stream])


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def epoch_permutation(seed: int, epoch: int, samples: int) -> Indices:
    """Permutation of an epoch's samples, which depends on (seed, epoch, samples) alone: (samples,) int64, read-only.

    Raises ValueError as `philox` does.
    """
    keys = philox(seed, epoch << 1 | _SHUFFLE_STREAM).random_raw(samples)
    permutation = np.argsort(keys, kind="stable")
    permutation.flags.writeable = False
    return permutation


def samples_at(seed: int, positions: Indices, samples: int) -> Indices:
    """Look up the samples at positions of a run that shuffles each epoch as a whole: (P,) → (P,) in [0, samples)."""
    epochs, offsets = np.divmod(positions, samples)
    result = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        selected = epochs == epoch
        result[selected] = epoch_permutation(seed, int(epoch), samples)[offsets[selected]]
    return result


@dataclass(frozen=True)
class ShuffledSampler:
    """Shuffled order of a run's samples: a full permutation of each epoch, or a windowed shuffle for remote shards.

    shard_samples: samples of each shard, in stored order. shuffle_window_shards: None permutes each epoch as a whole.
    A number makes it a windowed shuffle: each epoch deals the shards at random to windows of at most so many, and
    permutes the samples within each window, so that only one window of shards is read at a time. The windows of an
    epoch have equally many shards, give or take one. Their shards are stratified: each window gets one of every run
    of as many neighbouring shards as there are windows, so that classes stored in order are spread over all windows.
    Raises ValueError if shuffle_window_shards is below 1.
    """

    seed: int
    shard_samples: tuple[int, ...]
    shuffle_window_shards: int | None = None

    def __post_init__(self) -> None:
        if self.shuffle_window_shards is not None and self.shuffle_window_shards < 1:
            raise ValueError(f"shuffle_window_shards is {self.shuffle_window_shards}; use at least 1")

    def __str__(self) -> str:
        """Name of the order, as state.json has it: a run resumes only in the order that it began in."""
        return "full" if self.shuffle_window_shards is None else f"windowed by {self.shuffle_window_shards} shards"

    @cached_property
    def samples_per_epoch(self) -> int:
        """Samples of the data set, each seen once in an epoch."""
        return sum(self.shard_samples)

    @property
    def windows_per_epoch(self) -> int:
        """Windows that an epoch's shards are dealt to; 1 without a windowed shuffle."""
        return 1 if self.shuffle_window_shards is None else -(-len(self.shard_samples) // self.shuffle_window_shards)

    def samples_at(self, positions: Indices) -> Indices:
        """Look up the samples at these positions of the run: (P,) → (P,) in [0, samples_per_epoch)."""
        if self.shuffle_window_shards is None:
            return samples_at(self.seed, positions, self.samples_per_epoch)
        result = np.empty(len(positions), dtype=np.int64)
        windows, offsets = self._windows_at(positions)
        for window in np.unique(windows):
            selected = windows == window
            result[selected] = _window_permutation(self, int(window))[offsets[selected]]
        return result

    def shards_to_prefetch(self, first: int, last: int) -> tuple[int, ...]:
        """List the shards that positions `first` to `last` need, and those of the window after the first one's.

        They come in the order in which they are needed.
        """
        (begin, end), _ = self._windows_at(np.array([first, last]))
        needed = np.concatenate([_window_shards(self, window) for window in range(begin, max(end, begin + 1) + 1)])
        return tuple(dict.fromkeys(needed.tolist()))

    def max_prefetched_shards(self, positions: int) -> int:
        """Bound how many shards `shards_to_prefetch` lists for so many consecutive positions."""
        shards = len(self.shard_samples)
        smallest_window = min(self.shard_samples) * (shards // self.windows_per_epoch)  # in samples
        windows = max(2, 1 + -(-(positions - 1) // smallest_window))
        return min(shards, windows * -(-shards // self.windows_per_epoch))

    def _windows_at(self, positions: Indices) -> tuple[Indices, Indices]:
        """Locate positions: (P,) → their windows, counted over the whole run, and their offsets in these, (P,) each."""
        epochs, offsets = np.divmod(positions, self.samples_per_epoch)
        windows = epochs * self.windows_per_epoch
        for epoch in np.unique(epochs):
            selected = epochs == epoch
            _, ends = _deal_shards(self, int(epoch))
            windows_in_epoch = np.searchsorted(ends, offsets[selected], side="right")
            windows[selected] += windows_in_epoch
            offsets[selected] -= np.concatenate([[0], ends])[windows_in_epoch]
        return windows, offsets


@lru_cache(maxsize=4)
def _deal_shards(sampler: ShuffledSampler, epoch: int) -> tuple[list[Indices], Indices]:
    """Deal the shards to an epoch's windows: the shards of each, and the offset at which each ends, (windows,)."""
    if sampler.windows_per_epoch == 1:
        shards_by_window = [np.arange(len(sampler.shard_samples))]
    else:
        strata = _shard_strata(sampler)
        keys = _random_words(sampler.seed, epoch, 0, strata.size).reshape(strata.shape)
        dealt = np.take_along_axis(strata, np.argsort(keys, axis=1, kind="stable"), axis=1)
        shards_by_window = [column[column >= 0] for column in dealt.T]
    samples = np.array(sampler.shard_samples)
    return shards_by_window, np.cumsum([samples[shards].sum() for shards in shards_by_window])


@lru_cache(maxsize=4)  # a batch may lie in two windows, and the last one be asked for again
def _window_permutation(sampler: ShuffledSampler, window: int) -> Indices:
    """Permutation of the samples of a window, which is counted over the whole run."""
    epoch, window_in_epoch = divmod(window, sampler.windows_per_epoch)
    shards_by_window, ends = _deal_shards(sampler, epoch)
    starts = np.cumsum(sampler.shard_samples) - sampler.shard_samples
    members = np.concatenate(
        [starts[shard] + np.arange(sampler.shard_samples[shard]) for shard in shards_by_window[window_in_epoch]]
    )
    first_word = _shard_strata(sampler).size + int(ends[window_in_epoch]) - len(members)  # after those that deal shards
    words = _random_words(sampler.seed, epoch, first_word, len(members))
    permuted: Indices = members[np.argsort(words, kind="stable")]
    permuted.flags.writeable = False
    return permuted


def _window_shards(sampler: ShuffledSampler, window: int) -> Indices:
    epoch, window_in_epoch = divmod(int(window), sampler.windows_per_epoch)
    return _deal_shards(sampler, epoch)[0][window_in_epoch]


def _shard_strata(sampler: ShuffledSampler) -> Indices:
    """Strata of neighbouring shards, one shard for each window: (strata, windows), -1 for those that one lacks.

    The middle stratum is the short one: at an end, the windows without a shard of it would be biased to the other end.
    """
    shards, windows = len(sampler.shard_samples), sampler.windows_per_epoch
    strata = -(-shards // windows)
    missing = strata * windows - shards
    end_of_short = (strata // 2 + 1) * windows - missing
    return np.insert(np.arange(shards), [end_of_short] * missing, -1).reshape(strata, windows)


def _random_words(seed: int, epoch: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Draw `count` 64-bit words of an epoch's stream from number `first` on; Philox yields 4 at a time."""
    stream = philox(seed, epoch << 1 | _SHUFFLE_STREAM).advance(first // 4)
    return stream.random_raw(first % 4 + count)[first % 4 :]


def draws_at(seed: int, first: int, count: int, per_position: int) -> npt.NDArray[np.float64]:
    """Draw uniform numbers in [0, 1) for `count` positions from `first` on: (count, per_position) float64.

    Each position owns `per_position` numbers of one long Philox stream, whichever rank asks for it.
    Raises ValueError if `per_position` is no multiple of 4, and as `philox` does.
    """
    if per_position % 4:
        raise ValueError(f"per_position is {per_position}; Philox yields 4 numbers at a time, use a multiple of 4")
    stream = philox(seed, _AUGMENT_STREAM).advance(first * (per_position // 4))
    raw = stream.random_raw(count * per_position)
    return (raw >> np.uint64(11)).reshape(count, per_position) * np.float64(2.0**-53)

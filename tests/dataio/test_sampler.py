"""The orders and the draws against Philox written out from its paper."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.sampler import ShuffledSampler, draws_at, epoch_permutation, samples_at

WORD = 2**64


def philox(key: tuple[int, int], count: int, first_block: int = 0) -> list[int]:
    """`count` words of Philox4x64-10 (Salmon et al. 2011, section 3.3), in Python integers.

    NumPy counts up before each block of four words, so its first block has counter 1.
    """
    words = []
    for block in range(first_block + 1, first_block + 1 + -(-count // 4)):
        c0, c1, c2, c3 = block, 0, 0, 0
        k0, k1 = key
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, WORD)
            high1, low1 = divmod(0xCA5A826395121157 * c2, WORD)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
        words += [c0, c1, c2, c3]
    return words[:count]


@pytest.mark.parametrize(("seed", "epoch", "samples"), [(0, 0, 1), (0, 0, 10), (7, 3, 101), (2**63 - 1, 90, 64)])
def test_epoch_permutation_ranks_philox_words(seed, epoch, samples):
    words = philox((seed, 2 * epoch), samples)
    assert epoch_permutation(seed, epoch, samples).tolist() == sorted(range(samples), key=words.__getitem__)


def test_epoch_permutation_never_changes():
    """Runs begun with an older version resume in the same order."""
    assert epoch_permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_permutation(42, 5, 10).tolist() == [9, 3, 1, 0, 7, 4, 6, 5, 8, 2]


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), samples=st.integers(1, 300))
def test_epoch_permutation_has_each_sample_once(seed, epoch, samples):
    assert sorted(epoch_permutation(seed, epoch, samples)) == list(range(samples))


def test_epochs_and_seeds_have_different_permutations():
    permutations = {tuple(epoch_permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(permutations) == 25


def test_epoch_permutation_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        epoch_permutation(0, 0, 10)[0] = 1


def test_samples_at_crosses_epochs():
    expected = np.concatenate([epoch_permutation(3, epoch, 7) for epoch in range(4)])
    assert samples_at(3, np.arange(28), 7).tolist() == expected.tolist()
    assert samples_at(3, np.arange(5, 16), 7).tolist() == expected[5:16].tolist()
    assert samples_at(3, np.array([20, 6, 7]), 7).tolist() == expected[[20, 6, 7]].tolist()


def reference_windows(seed: int, epoch: int, sizes: list[int], shuffle_window_shards: int) -> list[tuple[list, list]]:
    """(shards, samples) of each window of an epoch, from the definition: no NumPy, and no jump in the stream.

    Each stratum of as many neighbouring shards as there are windows deals one shard to each, in the order of its words;
    the middle stratum may lack some. Then each offset in the epoch has a word, and those of a window rank its samples.
    """
    windows = -(-len(sizes) // shuffle_window_shards)
    strata = -(-len(sizes) // windows)
    words = iter(philox((seed, 2 * epoch), strata * windows + sum(sizes) + 4))
    dealt = [[] for _ in range(windows)]
    if windows == 1:
        dealt[0] = list(range(len(sizes)))
        [next(words) for _ in sizes]
    else:
        shards = iter(range(len(sizes)))
        for number in range(strata):
            present = windows if number != strata // 2 else len(sizes) - (strata - 1) * windows
            stratum = [next(shards) if index < present else None for index in range(windows)]
            keys = [next(words) for _ in range(windows)]
            for window, index in enumerate(sorted(range(windows), key=keys.__getitem__)):
                if stratum[index] is not None:
                    dealt[window].append(stratum[index])
    result = []
    for shards in dealt:
        members = [sum(sizes[:shard]) + number for shard in shards for number in range(sizes[shard])]
        keys = [next(words) for _ in members]
        result.append((shards, [members[index] for index in sorted(range(len(members)), key=keys.__getitem__)]))
    return result


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)
WINDOWS = st.integers(1, 14)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), sizes=SIZES, window=WINDOWS)
def test_windowed_shuffle_matches_its_definition(seed, epoch, sizes, window):
    sampler = ShuffledSampler(seed, tuple(sizes), window)
    reference = reference_windows(seed, epoch, sizes, window)
    first = epoch * sampler.samples_per_epoch
    expected = [sample for _, samples in reference for sample in samples]
    assert sampler.samples_at(np.arange(first, first + sampler.samples_per_epoch)).tolist() == expected
    assert sorted(expected) == list(range(sampler.samples_per_epoch))
    counts = [len(shards) for shards, _ in reference]
    assert max(counts) <= window
    assert max(counts) - min(counts) <= 1
    assert len(reference) == sampler.windows_per_epoch


def test_windowed_shuffle_never_changes():
    """Runs begun with an older version resume in the same order."""
    sampler = ShuffledSampler(42, (3, 2, 4, 1, 2), 2)
    first = [4, 3, 11, 10, 1, 2, 0, 9, 6, 5, 8, 7]
    second = [0, 1, 2, 5, 11, 6, 7, 10, 8, 3, 9, 4]
    assert sampler.samples_at(np.arange(24)).tolist() == first + second


@settings(max_examples=60)
@given(sizes=SIZES, window=WINDOWS | st.none(), data=st.data())
def test_samples_at_takes_positions_in_any_order(sizes, window, data):
    sampler = ShuffledSampler(7, tuple(sizes), window)
    whole = sampler.samples_at(np.arange(3 * sampler.samples_per_epoch))
    positions = data.draw(st.lists(st.integers(0, 3 * sampler.samples_per_epoch - 1), min_size=1, max_size=20))
    assert sampler.samples_at(np.array(positions)).tolist() == whole[positions].tolist()


@settings(max_examples=60)
@given(sizes=SIZES, window=WINDOWS | st.none(), first=st.integers(0, 200), length=st.integers(1, 40))
def test_shards_to_prefetch(sizes, window, first, length):
    """All shards of the positions, and of the window after the first one's, in the order of need, within the bound."""
    sampler = ShuffledSampler(3, tuple(sizes), window)
    prefetched = sampler.shards_to_prefetch(first, first + length - 1)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    needed = [int(shard_of[sample]) for sample in sampler.samples_at(np.arange(first, first + length))]
    assert set(needed) <= set(prefetched)
    assert len(prefetched) == len(set(prefetched)) <= sampler.max_prefetched_shards(length)
    if window is None:
        assert sorted(prefetched) == list(range(len(sizes)))
        return
    epochs = range(first // sampler.samples_per_epoch, (first + length) // sampler.samples_per_epoch + 2)
    windows = [shards for epoch in epochs for shards, _ in reference_windows(3, epoch, sizes, window)]
    ends = (
        np.cumsum([sum(sizes[shard] for shard in shards) for shards in windows]) + epochs[0] * sampler.samples_per_epoch
    )
    begin = int(np.searchsorted(ends, first, side="right"))
    end = max(begin + 1, int(np.searchsorted(ends, first + length - 1, side="right")))
    assert list(prefetched) == list(dict.fromkeys(shard for shards in windows[begin : end + 1] for shard in shards))


def test_windowed_shuffle_at_a_far_position():
    sampler = ShuffledSampler(5, (100,) * 64, 16)
    far = 10**12 // 6400 * 6400
    assert sorted(sampler.samples_at(np.arange(far, far + 6400))) == list(range(6400))
    window = sampler.samples_at(np.arange(far, far + 1600)) // 100
    assert sorted(set(window.tolist())) == sorted(sampler.shards_to_prefetch(far, far)[:16])


def correlations(sampler: ShuffledSampler, epochs: int) -> np.ndarray:
    """Correlation of shuffled and stored order in each epoch."""
    stored = np.arange(sampler.samples_per_epoch)
    orders = [sampler.samples_at(epoch * sampler.samples_per_epoch + stored) for epoch in range(epochs)]
    return np.array([np.corrcoef(stored, seen)[0, 1] for seen in orders])


def test_full_shuffle_is_uncorrelated_with_stored_order():
    assert np.abs(correlations(ShuffledSampler(0, (1000,) * 64), 10)).max() <= 0.02


@pytest.mark.parametrize("shards", [17, 40, 64, 250])
def test_windowed_shuffle_is_nearly_uncorrelated_with_stored_order(shards):
    """Windows of 16 shards: over an epoch, and within each window."""
    sampler = ShuffledSampler(0, (256,) * shards, 16)
    assert np.abs(correlations(sampler, 5)).max() <= 0.1
    seen = sampler.samples_at(np.arange(sampler.samples_per_epoch))
    first_shards = [sampler.shards_to_prefetch(position, position)[0] for position in range(len(seen))]
    ends = np.flatnonzero(np.diff(first_shards)) + 1
    within = [np.corrcoef(np.arange(len(part)), part)[0, 1] for part in np.split(seen, ends)]
    assert len(within) == sampler.windows_per_epoch
    assert np.abs(within).max() <= 0.1


def test_sampler_names_its_order():
    assert str(ShuffledSampler(0, (3, 2))) == "full"
    assert str(ShuffledSampler(0, (3, 2), 16)) == "windowed by 16 shards"
    assert ShuffledSampler(0, (3, 2)).samples_at(np.arange(5)).tolist() == epoch_permutation(0, 0, 5).tolist()
    with pytest.raises(ValueError, match="shuffle_window_shards is 0; use at least 1"):
        ShuffledSampler(0, (3, 2), 0)


def test_draws_are_the_upper_bits_of_philox_words():
    words = philox((11, 1), 40 * 8)
    expected = (np.array(words, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) / 2**53
    assert np.array_equal(draws_at(11, 0, 40, 8), expected.reshape(40, 8))


def test_draws_at_a_far_position():
    """Position 10⁹ with 8 draws each begins at block 2·10⁹, which Philox reaches without generating those before."""
    words = philox((11, 1), 8, first_block=2 * 10**9)
    expected = (np.array(words, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) / 2**53
    assert np.array_equal(draws_at(11, 10**9, 1, 8)[0], expected)


@given(first=st.integers(0, 10**12), counts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_draws_do_not_depend_on_how_positions_are_split(first, counts):
    whole = draws_at(5, first, sum(counts), 4)
    starts = first + np.cumsum([0, *counts[:-1]])
    pieces = [draws_at(5, int(start), count, 4) for start, count in zip(starts, counts, strict=True)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert ((whole >= 0) & (whole < 1)).all()


def test_draws_refuse_a_fraction_of_a_block():
    with pytest.raises(ValueError, match="per_position is 6; .* use a multiple of 4"):
        draws_at(0, 0, 1, 6)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seeds_out_of_range(seed):
    message = rf"seed is {seed}; use a number from 0 to 2\*\*63 - 1"
    with pytest.raises(ValueError, match=message):
        epoch_permutation(seed, 0, 10)
    with pytest.raises(ValueError, match=message):
        draws_at(seed, 0, 1, 4)

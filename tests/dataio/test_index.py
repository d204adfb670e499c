"""The order and the draws against Philox written out from its paper; the manifest against damage."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataio.files import sha256_of
from dataio.index import MANIFEST_NAME, SAMPLES_NAME, draws_at, epoch_order, load_manifest, samples_at

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
def test_order_is_the_ranking_of_philox_words(seed, epoch, samples):
    words = philox((seed, 2 * epoch), samples)
    assert epoch_order(seed, epoch, samples).tolist() == sorted(range(samples), key=words.__getitem__)


def test_order_stays_what_it_was():
    """A run that was started with an older version must resume in the same order."""
    assert epoch_order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(42, 5, 10).tolist() == [9, 3, 1, 0, 7, 4, 6, 5, 8, 2]


@settings(deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6), samples=st.integers(1, 300))
def test_order_holds_each_sample_once(seed, epoch, samples):
    assert sorted(epoch_order(seed, epoch, samples)) == list(range(samples))


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_cannot_be_changed_by_its_readers():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 10)[0] = 1


def test_samples_at_crosses_epochs():
    expected = np.concatenate([epoch_order(3, epoch, 7) for epoch in range(4)])
    assert samples_at(3, np.arange(28), 7).tolist() == expected.tolist()
    assert samples_at(3, np.arange(5, 16), 7).tolist() == expected[5:16].tolist()
    assert samples_at(3, np.array([20, 6, 7]), 7).tolist() == expected[[20, 6, 7]].tolist()


def test_draws_are_the_upper_bits_of_philox_words():
    words = philox((11, 1), 40 * 8)
    expected = (np.array(words, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) / 2**53
    assert np.array_equal(draws_at(11, 0, 40, 8), expected.reshape(40, 8))


def test_draws_at_a_far_position():
    """Position 10⁹ with 8 draws each begins at block 2·10⁹, which nobody has to count up to."""
    words = philox((11, 1), 8, first_block=2 * 10**9)
    expected = (np.array(words, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) / 2**53
    assert np.array_equal(draws_at(11, 10**9, 1, 8)[0], expected)


@settings(deadline=None)
@given(first=st.integers(0, 10**12), counts=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_draws_do_not_depend_on_how_a_range_is_cut(first, counts):
    whole = draws_at(5, first, sum(counts), 4)
    starts = first + np.cumsum([0, *counts[:-1]])
    pieces = [draws_at(5, int(start), count, 4) for start, count in zip(starts, counts, strict=True)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert ((whole >= 0) & (whole < 1)).all()


def test_draws_refuse_a_part_of_a_block():
    with pytest.raises(ValueError, match="per_position is 6; .* use a multiple of 4"):
        draws_at(0, 0, 1, 6)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seeds_beyond_the_range(seed):
    message = rf"seed is {seed}; use a number from 0 to 2\*\*63 - 1"
    with pytest.raises(ValueError, match=message):
        epoch_order(seed, 0, 10)
    with pytest.raises(ValueError, match=message):
        draws_at(seed, 0, 1, 4)


def test_manifest_says_what_was_packed(shards, photos):
    manifest = load_manifest(shards)
    assert manifest.classes == ("astronaut", "cat", "coffee", "rocket")
    assert len(manifest) == sum(1 for _ in photos.glob("*/*")) == sum(shard.samples for shard in manifest.shards)
    assert len(manifest.shards) > 1
    assert manifest.broken == ()
    assert manifest.hash == sha256_of(shards / MANIFEST_NAME)
    row = manifest.samples[5]
    assert manifest.describe(5) == (
        f'sample 5 (shard-000000.tar, offset {row["offset"]}, class "{manifest.classes[row["label"]]}")'
    )


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def change_manifest(folder, **fields):
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json in .*; write shards there with: python -m"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "shards": 3, "classes": []}'])
def test_not_a_manifest(copy, text):
    (copy / MANIFEST_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest .*; pack the folder again"):
        load_manifest(copy)


def test_manifest_of_another_format(copy):
    change_manifest(copy, format=2)
    with pytest.raises(ValueError, match="manifest.json has format 2, this code reads 1; pack the folder again"):
        load_manifest(copy)


def test_missing_shard(copy):
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000001.tar is missing; .* Pack the folder again"):
        load_manifest(copy)


def test_truncated_shard(copy):
    path = copy / "shard-000001.tar"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 512)
    with pytest.raises(ValueError, match=f"has {size - 512} bytes where the manifest says {size}: it was truncated"):
        load_manifest(copy)


def test_sample_table_of_another_length(copy):
    np.save(copy / SAMPLES_NAME, np.load(copy / SAMPLES_NAME)[:-1])
    with pytest.raises(ValueError, match=r"shape \(47,\) .* asks for 48 samples; pack the folder again"):
        load_manifest(copy)


def test_sample_table_that_is_no_table(copy):
    (copy / SAMPLES_NAME).write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"samples.npy cannot be read .*; pack the folder again"):
        load_manifest(copy)


def test_sample_table_of_other_shards(copy):
    rows = np.load(copy / SAMPLES_NAME)
    rows["shard"][0] = 1
    np.save(copy / SAMPLES_NAME, rows)
    with pytest.raises(ValueError, match="samples.npy does not fit the manifest's shards"):
        load_manifest(copy)


def test_labels_beyond_the_classes(copy):
    change_manifest(copy, classes=["astronaut", "cat"])
    with pytest.raises(ValueError, match="has label 3 but the manifest names 2 classes"):
        load_manifest(copy)


def test_no_samples(copy):
    change_manifest(copy, samples=0, shards=[])
    np.save(copy / SAMPLES_NAME, np.load(copy / SAMPLES_NAME)[:0])
    with pytest.raises(ValueError, match="holds no samples; pack a folder with images"):
        load_manifest(copy)

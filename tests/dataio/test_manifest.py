"""Manifests and sample tables, intact, damaged, and of earlier versions."""

import json
import shutil

import numpy as np
import pytest

from dataio.files import sha256_of
from dataio.manifest import MANIFEST_NAME, SAMPLES_NAME, load_manifest


def test_manifest_contents(shards, photos):
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
    path.write_text(json.dumps(json.loads(path.read_text()) | fields | {"sha256": ""}))


def test_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json in .*; write shards there with: python -m"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", 9999 * "[", "\xff", '{"format": 1}', '{"format": 1, "shards": 3, "classes": []}']
)
def test_not_a_manifest(copy, text):
    (copy / MANIFEST_NAME).write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest .*; pack the folder again"):
        load_manifest(copy)


def change_first_shard(**fields):
    return lambda manifest: manifest["shards"][0].update(fields)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda manifest: manifest.update(samples="48"), "samples: Input should be a valid integer"),
        (lambda manifest: manifest.update(sample=48), "sample: Unexpected keyword argument"),
        (lambda manifest: manifest.pop("classes"), "classes: Field required"),
        (lambda manifest: manifest["classes"].__setitem__(2, "\x1bc\n"), r"class \\x1bc\\n has control characters in"),
        (lambda manifest: manifest.update({"\x1bc": 1}), r"\\x1bc: Unexpected keyword argument"),
        (lambda manifest: manifest["classes"].__setitem__(2, "cat"), "two classes have the same name"),
        (lambda manifest: manifest.update(samples_sha256="0" * 63), "'0{63}' is not a sha256"),
        (lambda manifest: manifest["shards"].reverse() or manifest["shards"][0].pop("bytes"), "shards.0.bytes: Field"),
        (change_first_shard(name="../shard-000000.tar"), "'../shard-000000.tar' is not a valid shard name"),
        (change_first_shard(name="/etc/passwd"), "'/etc/passwd' is not a valid shard name"),
        (change_first_shard(name="shard-000001.tar"), "two shards have the same name"),
        (change_first_shard(samples=0), "a shard is empty"),
        (change_first_shard(bytes=-1), "a shard is empty"),
        (change_first_shard(sha256="A" * 64), "'A{64}' is not a sha256"),
    ],
)
def test_invalid_manifest_fields(copy, change, fault):
    path = copy / MANIFEST_NAME
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"manifest.json is not a manifest \(.*{fault}.*\); pack the folder again"):
        load_manifest(copy)


@pytest.mark.parametrize(
    "change", [{"classes": ["astronaut", "coffee", "cat", "rocket"]}, {"seed": 1}, {"sha256": 64 * "0"}]
)
def test_changed_manifest(copy, change):
    """Classes that exchange their names are noticed by the hash alone."""
    path = copy / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ValueError, match=r"manifest.json is not a manifest \(its content does not match its own sha256\)"
    ):
        load_manifest(copy)


def test_manifest_without_a_hash(copy):
    path = copy / MANIFEST_NAME
    fields = json.loads(path.read_text())
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    assert load_manifest(copy).classes == tuple(fields["classes"])


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


def change_samples(folder, rows):
    """Write another sample table, with its hash in the manifest."""
    np.save(folder / SAMPLES_NAME, rows)
    change_manifest(folder, samples_sha256=sha256_of(folder / SAMPLES_NAME))


def test_sample_table_of_another_length(copy):
    change_samples(copy, np.load(copy / SAMPLES_NAME)[:-1])
    with pytest.raises(ValueError, match=r"shape \(47,\) .* asks for 48 samples; pack the folder again"):
        load_manifest(copy)


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_sample_table_that_is_not_a_table(copy, content):
    (copy / SAMPLES_NAME).write_bytes(content)
    change_manifest(copy, samples_sha256=sha256_of(copy / SAMPLES_NAME))
    with pytest.raises(ValueError, match=r"samples.npy cannot be read .*; copy it again, or pack the folder again"):
        load_manifest(copy)


def test_changed_sample_table(copy):
    """A label that becomes that of another class is noticed by the hash alone."""
    rows = np.load(copy / SAMPLES_NAME)
    rows["label"][3] = (rows["label"][3] + 1) % 4
    np.save(copy / SAMPLES_NAME, rows)
    with pytest.raises(
        ValueError, match=r"samples.npy cannot be read \(its bytes changed, the manifest has another sha"
    ):
        load_manifest(copy)


@pytest.mark.parametrize("change", ["another count", "another order"])
def test_sample_table_of_other_shards(copy, change):
    rows = np.load(copy / SAMPLES_NAME)
    rows["shard"][0] = 1
    if change == "another order":  # each shard has as many as before
        rows["shard"][np.flatnonzero(rows["shard"] == 1)[-1]] = 0
    change_samples(copy, rows)
    with pytest.raises(ValueError, match="samples.npy does not fit the manifest's shards"):
        load_manifest(copy)


@pytest.mark.parametrize(
    ("field", "value"), [("offset", 0), ("offset", 100), ("offset", 2**40), ("offset", 2**64 - 1), ("bytes", 2**32 - 1)]
)
def test_images_beyond_the_end_of_their_shard(copy, field, value):
    rows = np.load(copy / SAMPLES_NAME)
    rows[field][7] = value
    change_samples(copy, rows)
    with pytest.raises(ValueError, match="samples.npy has an image beyond the end of its shard; pack the folder again"):
        load_manifest(copy)


@pytest.mark.parametrize("size", [0, 2**63, 2**70])
def test_absurd_shard_sizes(copy, size):
    shards = json.loads((copy / MANIFEST_NAME).read_text())["shards"]
    shards[0]["bytes"] = size
    change_manifest(copy, shards=shards)
    with pytest.raises(ValueError, match="a shard is (empty|larger than any disk)"):
        load_manifest(copy)


def test_labels_beyond_the_classes(copy):
    change_manifest(copy, classes=["astronaut", "cat"])
    with pytest.raises(ValueError, match="has label 3 but the manifest names 2 classes"):
        load_manifest(copy)


def test_no_samples(copy):
    change_manifest(copy, samples=0, shards=[])
    change_samples(copy, np.load(copy / SAMPLES_NAME)[:0])
    with pytest.raises(ValueError, match="holds no samples; pack a folder with images"):
        load_manifest(copy)

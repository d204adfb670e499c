"""Reading of local shards: intact, damaged, exchanged and missing ones; files opened once and closed."""

import os
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dataio.manifest import Manifest, load_manifest
from dataio.shards import BadSampleError, LocalShards


@pytest.fixture(scope="module")
def manifest(shards) -> Manifest:
    return load_manifest(shards)


@pytest.fixture
def damaged(many_shards, tmp_path) -> Manifest:
    """Copy of `many_shards`, to be damaged after its manifest was read."""
    return load_manifest(shutil.copytree(many_shards, tmp_path / "damaged"))


def label_offset(manifest: Manifest, sample: int) -> int:
    """Return the offset of a sample's label from the start of its image."""
    return -(-int(manifest.samples["bytes"][sample]) // 512) * 512 + 512


def test_samples_equal_what_tarfile_reads(manifest):
    files = LocalShards(manifest)
    sample = 0
    for shard in manifest.shards:
        with tarfile.open(manifest.folder / shard.name) as tar:
            members = [(member.name.partition(".")[2], tar.extractfile(member).read()) for member in tar]
        for (_, image), (ending, label) in zip(members[::2], members[1::2], strict=True):
            assert ending == "cls"
            assert files.read(sample) == image
            assert manifest.samples["label"][sample] == int(label)
            sample += 1
    assert sample == len(manifest)


def test_changed_label(damaged, overwrite):
    label = int(damaged.samples["label"][30])
    other = (label + 1) % 10
    overwrite(damaged, 30, b"%d" % other, label_offset(damaged, 30))
    files = LocalShards(damaged)
    with pytest.raises(BadSampleError, match=f"its label is '{other}' in its shard and {label} in the sample table"):
        files.read(30)
    files.read(29)
    files.read(31)


@pytest.mark.parametrize("content", [b"\0", b"x", b"\xb2", b"-"])
def test_label_that_is_not_a_number(damaged, overwrite, content):
    overwrite(damaged, 30, content, label_offset(damaged, 30))
    with pytest.raises(BadSampleError, match="its label is '.*' in its shard and . in the sample table"):
        LocalShards(damaged).read(30)


@pytest.mark.parametrize("content", [b"7", b"9", b"\0", b"-", b" ", b"\xff"])
@pytest.mark.parametrize("digit", range(10))
def test_changed_image_size(damaged, overwrite, digit, content):
    """One of the 11 octal digits in its tar header is changed."""
    overwrite(damaged, 30, content, 124 + digit - 512)
    with pytest.raises(BadSampleError, match="its shard has something else there"):
        LocalShards(damaged).read(30)


def test_label_of_another_image(damaged, overwrite):
    overwrite(damaged, 30, b"9", label_offset(damaged, 30) - 512)  # the key's first digit
    with pytest.raises(BadSampleError, match="its shard has no label behind it"):
        LocalShards(damaged).read(30)


def test_exchanged_shards_give_no_wrong_label(damaged):
    """Both are given the size that the manifest names, so that only reading them tells."""
    paths = [damaged.folder / shard.name for shard in damaged.shards[:2]]
    contents = [path.read_bytes() for path in paths]
    size = max(map(len, contents))
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content.ljust(size, b"\0"))
    files, right = LocalShards(damaged), 0
    for sample in range(sum(damaged.shard_samples[:2])):
        row = damaged.samples[sample]
        try:
            image = files.read(sample)
        except BadSampleError:
            continue
        other = contents[1 - row["shard"]]
        at = int(row["offset"])
        assert other[at : at + len(image)] == image
        assert int(other[at + label_offset(damaged, sample) :][:1]) == row["label"]
        right += 1
    assert right < 3  # by chance, the same place, size and label


def test_truncated_shard_is_named(damaged):
    last = damaged.samples[-1]
    name = damaged.shards[last["shard"]].name
    os.truncate(damaged.folder / name, int(last["offset"]) + 10)
    fault = rf"cannot read sample {len(damaged) - 1} \({name}, .*its shard ends too early; check the folder with"
    with pytest.raises(RuntimeError, match=fault):
        LocalShards(damaged).read(len(damaged) - 1)


def test_unreadable_shard_is_named(damaged):
    """A folder in its place can be opened like a file, and only reading it fails."""
    path = damaged.folder / damaged.shards[-1].name
    path.unlink()
    path.mkdir()
    with pytest.raises(RuntimeError, match=rf"cannot read sample .* \({path.name}, .*Is a directory; check the folder"):
        LocalShards(damaged).read(len(damaged) - 1)


def test_missing_shard_is_named(damaged):
    (damaged.folder / damaged.shards[-1].name).unlink()
    with pytest.raises(RuntimeError, match=f"cannot open {damaged.shards[-1].name}: No such file.*dataio.verify"):
        LocalShards(damaged)


def test_open_file_limit_is_named(manifest):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(RuntimeError, match=f"allow more than {len(manifest.shards)} with ulimit -n"):
            LocalShards(manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("by", ["its end", "close"])
def test_shards_are_closed_with_their_last_use(manifest, by):
    def open_shards() -> int:
        links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(link.startswith(str(manifest.folder)) for link in links)

    before = open_shards()
    shards = LocalShards(manifest)
    assert open_shards() == before + len(manifest.shards)
    if by == "close":
        shards.close()
        shards.close()
    else:
        del shards
    assert open_shards() == before


def test_samples_are_sorted_by_shard(damaged):
    assert damaged.shard_samples == tuple(np.bincount(damaged.samples["shard"]))
    assert len(damaged.shards) >= 16


def test_read_ahead_changes_nothing(damaged, overwrite):
    """The same bytes follow; a truncated shard raises when it is read, not before."""
    files = LocalShards(damaged)
    samples = np.random.default_rng(0).permutation(len(damaged))
    expected = [files.read(sample) for sample in samples]
    files.read_ahead(samples)
    assert [files.read(sample) for sample in samples] == expected
    last = len(damaged) - 1
    os.truncate(damaged.folder / damaged.shards[-1].name, int(damaged.samples["offset"][last]))
    files.read_ahead([0, last])
    with pytest.raises(RuntimeError, match="its shard ends too early"):
        files.read(last)


TRAINING = """
import sys
import torch
from dataio.augment.params import ImageOptions
from dataio.loader import LoaderOptions, TrainLoader
from dataio.shards import open_dataset

manifest = open_dataset(sys.argv[1], None)
loader = TrainLoader(manifest, ImageOptions(image_size=32, threads=1), LoaderOptions(0, 4), torch.device("cpu"))
print(len([next(loader) for _ in range(3)]))
print([name for name in sys.modules if name.startswith(("dataio.remote", "dataio.pack", "fsspec", "tenacity"))])
"""


def test_training_on_local_shards_imports_nothing_of_remote_ones(shards):
    """Nor what only packing needs; and the packages for remote data sets may be missing."""
    training = subprocess.run([sys.executable, "-c", TRAINING, shards], capture_output=True, text=True)
    assert (training.returncode, training.stdout) == (0, "3\n[]\n"), training.stderr

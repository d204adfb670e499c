"""The journal of an unfinished pack: which shards are kept, which are removed, and which changes are named."""

from pathlib import Path

import numpy as np
import pytest

from dataio.manifest import SkippedFile
from dataio.pack.journal import Journal
from dataio.pack.shard_writer import ShardTask, WrittenShard, write_shard
from dataio.pack.source import find_images
from dataio.workers import worker_pool

SETTINGS = {"seed": 1, "check": "decode"}


@pytest.fixture(scope="module")
def pool():
    with worker_pool(2) as pool:
        yield pool


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "content").mkdir()
    return tmp_path / "content"


@pytest.fixture
def written(photos, folder, pool) -> list[WrittenShard]:
    """Four finished shards; all images of the third are broken, so that it has no file."""
    found = find_images(photos)
    all_written = []
    with Journal(folder, SETTINGS, pool) as journal:
        assert (journal.shards, journal.changed) == ([], [])
        for number in range(4):
            images = found.images[6 * number : 6 * number + 6]
            if number == 2:
                images = [image._replace(locator=("none.jpg",)) for image in images]
            path = folder.parent / f"{number}.new"
            all_written.append(write_shard(ShardTask(path, found.reader, 0, images, "decode", None, True)))
            journal.add(path, all_written[-1])
    return all_written


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_finished_shards_are_kept(written, folder, pool):
    (folder.parent / "4.new").write_bytes(b"half a shard")
    (folder / "shard-000003.tar").write_bytes(b"renamed, not recorded")
    with Journal(folder, SETTINGS, pool) as journal:
        assert journal.changed == []
        names = [finished.shard and finished.shard.name for finished in journal.shards]
        assert names == ["shard-000000.tar", "shard-000001.tar", None, "shard-000002.tar"]
        for finished, expected in zip(journal.shards, written, strict=True):
            assert np.array_equal(finished.written.rows, expected.rows)
            for field in ("bytes", "sha256", "broken", "cmyk", "rotated", "shrunk"):
                assert getattr(finished.written, field) == getattr(expected, field)
        assert journal.shards[2].written.broken[0] == SkippedFile(
            "cat/00.jpg", "it cannot be read: No such file or directory"
        )
    assert files(folder) == [f"shard-00000{number}.{ending}" for number in range(3) for ending in ("idx", "tar")]
    assert files(folder.parent) == ["content", "journal"]


def test_other_settings_remove_all_shards(written, folder, pool):
    with Journal(folder, SETTINGS | {"check": "none", "resize": 256}, pool) as journal:
        assert (journal.shards, journal.changed) == ([], ["check", "resize"])
    assert files(folder) == []
    with Journal(folder, SETTINGS | {"check": "none", "resize": 256}, pool) as journal:
        assert (journal.shards, journal.changed) == ([], [])


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")])
@pytest.mark.parametrize(("name", "kept"), [("shard-000000.tar", 0), ("shard-000001.idx", 1), ("shard-000002.tar", 3)])
def test_shards_up_to_a_damaged_one_are_kept(damage, name, kept, written, folder, pool):
    damage(folder / name)
    with Journal(folder, SETTINGS, pool) as journal:
        assert len(journal.shards) == kept
    assert len(files(folder)) == 2 * min(kept, 2)
    with Journal(folder, SETTINGS, pool) as journal:
        assert len(journal.shards) == kept


@pytest.mark.parametrize("lost", [1, 50])
def test_truncated_last_line(lost, written, folder, pool):
    """It is complete without its line end, but not without more."""
    journal = folder.parent / "journal"
    journal.write_bytes(journal.read_bytes()[:-lost])
    with Journal(folder, SETTINGS, pool) as journal:
        assert len(journal.shards) == (4 if lost == 1 else 3)


def test_file_that_is_not_a_journal(written, folder, pool):
    (folder.parent / "journal").write_bytes(b"not a journal\n")
    with Journal(folder, SETTINGS, pool) as journal:
        assert (journal.shards, journal.changed) == ([], [])
    assert files(folder) == []

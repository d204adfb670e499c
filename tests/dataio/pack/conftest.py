"""Comparison of packed folders with each other, and with the images that they were packed from."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from dataio.manifest import load_manifest


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Function: folder → the bytes of each file below it, by path."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read


@pytest.fixture(scope="session")
def images_by_class() -> Callable[[Iterable[Path]], Counter]:
    """Function: files in class folders → how often each (class, encoded image) occurs."""
    return lambda files: Counter((file.parent.name, file.read_bytes()) for file in files)


@pytest.fixture(scope="session")
def packed_images() -> Callable[[Path], Counter]:
    """Function: packed folder → how often each (class, encoded image) occurs in it, by its sample table."""

    def read(folder: Path) -> Counter:
        manifest = load_manifest(folder)
        shards = [(folder / shard.name).read_bytes() for shard in manifest.shards]
        return Counter(
            (manifest.classes[row["label"]], shards[row["shard"]][row["offset"] : row["offset"] + row["bytes"]])
            for row in manifest.samples
        )

    return read

"""Checks packed folders: `python -m dataio.verify TARGET` lists every fault, or says that there is none.

Everything is read again: sizes and sha256 of all files, and each shard's members against its .idx and its rows
in samples.npy. What only costs a look, load_manifest checks at the start of each run.
"""

import argparse
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from dataio.files import sha256_of
from dataio.index import MANIFEST_NAME, SAMPLES_NAME, ManifestFile, Shard, load_samples, read_manifest_file
from dataio.workers import available_cores

_REMEDY = "copy it again, or pack the folder again"


@dataclass(frozen=True)
class Member:
    """A sample as its shard has it: what its .idx line should be, and its row in samples.npy."""

    idx_line: str
    row: tuple[int, int, int]  # label, offset, bytes


def verify(folder: str | Path) -> list[str]:
    """The faults of a packed folder, each with its file and remedy; none if it is whole."""
    folder = Path(folder)
    try:
        manifest, _ = read_manifest_file(folder)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    samples, faults = _read_samples(folder, manifest)
    faults += _unknown_files(folder, manifest)
    ends = np.cumsum([shard.samples for shard in manifest.shards])

    def check(number: int) -> list[str]:
        shard = manifest.shards[number]
        rows = None if samples is None else samples[ends[number] - shard.samples : ends[number]]
        try:
            return list(_shard_faults(folder, manifest, number, rows))
        except OSError as error:
            return [f"{shard.name}: it cannot be read ({error}); check the disk, then {_REMEDY}"]

    console = Console(stderr=True)
    bar = Progress(console=console, disable=not console.is_terminal, transient=True)
    with ThreadPoolExecutor(available_cores()) as pool, bar:  # hashing releases the interpreter's lock
        for found in bar.track(pool.map(check, range(len(manifest.shards))), len(manifest.shards)):
            faults += found
    return faults


def _read_samples(folder: Path, manifest: ManifestFile) -> tuple[np.ndarray | None, list[str]]:
    """(the sample table or None if it cannot be used, its faults)."""
    counted = sum(shard.samples for shard in manifest.shards)
    if counted != manifest.samples:
        return None, [
            f"{MANIFEST_NAME}: it says {manifest.samples} samples, but {counted} over its shards; pack the folder again"
        ]
    try:
        samples = load_samples(folder / SAMPLES_NAME, manifest.samples)
    except ValueError as error:
        return None, [str(error)]
    if sha256_of(folder / SAMPLES_NAME) != manifest.samples_sha256:
        return samples, [f"{SAMPLES_NAME}: its bytes changed (the manifest has another sha256); {_REMEDY}"]
    return samples, []


def _unknown_files(folder: Path, manifest: ManifestFile) -> list[str]:
    known = {name for shard in manifest.shards for name in (shard.name, shard.idx_name)}
    found = sorted(path.name for ending in ("*.tar", "*.idx") for path in folder.glob(ending))
    return [f"{name}: the manifest does not name it; remove it" for name in found if name not in known]


def _shard_faults(folder: Path, manifest: ManifestFile, number: int, rows: np.ndarray | None) -> Iterator[str]:
    """The faults of one shard, its .idx and its rows of samples.npy (None: not to be had)."""
    shard = manifest.shards[number]
    path = folder / shard.name
    if not path.is_file():
        yield f"{shard.name}: missing; {_REMEDY}"
        return
    size = path.stat().st_size
    if size != shard.bytes:
        yield f"{shard.name}: {size} bytes where the manifest says {shard.bytes}; {_REMEDY}"
        return
    if sha256_of(path) != shard.sha256:
        yield f"{shard.name}: its bytes changed (the manifest has another sha256); {_REMEDY}"
    try:
        members = list(_members(path))
    except (tarfile.TarError, ValueError) as error:
        yield f"{shard.name}: not a tar file of images and labels ({error}); {_REMEDY}"
        return
    highest = max((member.row[0] for member in members), default=0)
    if highest >= len(manifest.classes):
        yield (
            f"{shard.name}: it has label {highest}, the manifest {len(manifest.classes)} classes; pack the folder again"
        )
    yield from _idx_faults(folder, shard, members)
    if len(members) != shard.samples:
        yield f"{shard.name}: {len(members)} samples where the manifest says {shard.samples}; {_REMEDY}"
    elif rows is not None:
        yield from _row_faults(shard.name, number, rows, members)


def _members(path: Path) -> Iterator[Member]:
    """The samples of a shard, in order. Raises TarError or ValueError if it is not laid out as pack.py does."""
    with tarfile.open(path, "r:") as tar:
        files = iter(tar)
        for image in files:
            key, _, ending = image.name.partition(".")
            label = next(files, None)
            if label is None or label.name != f"{key}.cls":
                raise ValueError(f"{image.name} is not followed by {key}.cls")
            yield Member(
                idx_line=f"{ending} {image.offset_data} {image.size} {image.name}"
                f" cls {label.offset_data} {label.size} {label.name}",
                row=(int(tar.extractfile(label).read()), image.offset_data, image.size),
            )


def _idx_faults(folder: Path, shard: Shard, members: list[Member]) -> Iterator[str]:
    path = folder / shard.idx_name
    if not path.is_file():
        yield f"{path.name}: missing; {_REMEDY}"
        return
    lines = path.read_text(errors="replace").splitlines()
    right = [f"v1.2 {len(members)}", *(member.idx_line for member in members)]
    for number, (line, other) in enumerate(zip_longest(lines, right), 1):
        if line != other:
            said, needed = (f'"{text}"' if text is not None else "missing" for text in (line, other))
            yield f"{path.name}: line {number} is {said} where {shard.name} needs {needed}; {_REMEDY}"
            return
    if sha256_of(path) != shard.idx_sha256:
        yield f"{path.name}: its bytes changed (the manifest has another sha256); {_REMEDY}"


def _row_faults(name: str, number: int, rows: np.ndarray, members: list[Member]) -> Iterator[str]:
    fields = ("shard", "label", "offset", "bytes")
    stated = np.stack([rows[field].astype(np.int64) for field in fields], axis=1)
    actual = np.array([(number, *member.row) for member in members], dtype=np.int64)
    wrong = np.flatnonzero((stated != actual).any(axis=1))
    if len(wrong):
        first = wrong[0]
        yield (
            f"{SAMPLES_NAME}: {len(wrong)} wrong of {len(rows)} rows for {name}; number {first} says"
            f" {', '.join(fields)} {stated[first].tolist()}, the shard {actual[first].tolist()}; {_REMEDY}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dataio.verify",
        description="Checks a folder that dataio.pack wrote: every file's size and sha256, and that shards, indices"
        " and sample table fit together. Exit status 1 if anything is wrong.",
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder with a manifest.json")
    target = parser.parse_args(argv).target
    start = time.monotonic()
    faults = verify(target)
    for fault in faults:
        print(fault)
    if faults:
        print(f"faults in {target}: {len(faults)}")
        return 1
    manifest, digest = read_manifest_file(target)
    print(
        f"{target} is whole: samples {manifest.samples}, classes {len(manifest.classes)}, shards"
        f" {len(manifest.shards)}, manifest {digest[:12]}; checked in {time.monotonic() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

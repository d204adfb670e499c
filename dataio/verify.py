"""Verification of packed folders: `python -m dataio.verify TARGET` lists every fault, or reports that there is none.

All files are read again: their sizes and sha256 are compared with the manifest, and the members of each shard with its
.idx and its rows of samples.npy; with --decode every image is decoded too. Only local folders are verified; files
fetched from a URL are checked against the same sha256 as they arrive. What is cheap to check, load_manifest checks at
the start of each run.
"""

import argparse
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataio.files import escape_unprintable, sha256_of
from dataio.manifest import MANIFEST_NAME, SAMPLES_NAME, ManifestFile, Shard, load_samples, read_manifest_file
from dataio.pack.archives import tar_headers
from dataio.pack.image_checks import check_image
from dataio.progress import progress_bar
from dataio.urls import is_url, redact_url
from dataio.workers import available_cores, worker_pool

_FAULTS_SHOWN = 20  # images of one shard
_LABEL_DIGITS = 10  # digits of the largest label that samples.npy can hold
_REMEDY = "copy it again, or pack the folder again"


@dataclass(frozen=True)
class ShardSample:
    """A sample as its shard has it: the line that its .idx should have, and its row of samples.npy."""

    name: str  # name of the image's tar member
    idx_line: str
    row: tuple[int, int, int]  # label, offset, bytes


def verify(folder: str | Path, decode: bool = False, workers: int = 0) -> list[str]:
    """Return the faults of a packed folder, each with its file and remedy; none if it is intact.

    decode: check every image too, as `pack --check decode` does. workers: processes; 0 is one per available core.
    """
    folder = Path(folder)
    try:
        manifest, _ = read_manifest_file(folder)
    except (FileNotFoundError, ValueError) as error:
        return [str(error)]
    samples, faults = _read_samples(folder, manifest)
    faults += _unknown_files(folder, manifest)
    if not manifest.shards:
        return faults
    ends = np.cumsum([shard.samples for shard in manifest.shards])
    tasks = [
        ShardCheck(folder, manifest, number, None if samples is None else samples[end - shard.samples : end], decode)
        for number, (shard, end) in enumerate(zip(manifest.shards, ends, strict=True))
    ]
    with (
        worker_pool(min(workers or available_cores(), len(tasks))) as pool,
        progress_bar("checking", sum(shard.bytes for shard in manifest.shards)) as show,
    ):
        done = 0
        for shard, found in zip(manifest.shards, pool.map(_check_shard, tasks), strict=True):
            faults += found
            done += shard.bytes
            if show:
                show(done)
    return faults


@dataclass(frozen=True)
class ShardCheck:
    """Task of a worker process: one shard, by its number, with its rows of samples.npy (None if unreadable)."""

    folder: Path
    manifest: ManifestFile
    number: int
    rows: npt.NDArray[np.void] | None
    decode: bool


def _check_shard(task: ShardCheck) -> list[str]:
    try:
        return list(_shard_faults(task))
    except OSError as error:
        name = task.manifest.shards[task.number].name
        return [f"{name}: it cannot be read ({error}); check the disk, then {_REMEDY}"]


def _read_samples(folder: Path, manifest: ManifestFile) -> tuple[npt.NDArray[np.void] | None, list[str]]:
    """Return (sample table, its faults); None for a table that cannot be used."""
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
    found = sorted(path.name for extension in ("*.tar", "*.idx") for path in folder.glob(extension))
    return [f"{name}: the manifest does not name it; remove it" for name in found if name not in known]


def _shard_faults(task: ShardCheck) -> Iterator[str]:
    """Yield the faults of one shard, its .idx, its rows of samples.npy and its images."""
    manifest, rows = task.manifest, task.rows
    shard = manifest.shards[task.number]
    path = task.folder / shard.name
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
    except (tarfile.TarError, ValueError, RecursionError, OverflowError, MemoryError) as error:
        yield f"{shard.name}: not a tar file of images and labels ({error}); {_REMEDY}"
        return
    highest = max((member.row[0] for member in members), default=0)
    if highest >= len(manifest.classes):
        yield (
            f"{shard.name}: it has label {highest}, the manifest {len(manifest.classes)} classes; pack the folder again"
        )
    yield from _idx_faults(task.folder, shard, members)
    if len(members) != shard.samples:
        yield f"{shard.name}: {len(members)} samples where the manifest says {shard.samples}; {_REMEDY}"
        rows = None
    elif rows is not None:
        yield from _row_faults(shard.name, task.number, rows, members)
    if task.decode:
        yield from _truncate_faults(_image_faults(path, rows, members), shard.name)


def _members(path: Path) -> Iterator[ShardSample]:
    """Yield the samples of a shard in order. Raises TarError or ValueError if they are not images with labels."""
    with tarfile.open(path, "r:") as tar:
        files = tar_headers(tar)
        for image in files:
            key, _, extension = image.name.partition(".")
            label = next(files, None)
            if label is None or label.name != f"{key}.cls":
                raise ValueError(f"{image.name} is not followed by {key}.cls")
            if not (image.isreg() and label.isreg()):
                raise ValueError(f"{image.name} or {label.name} is no regular file")
            yield ShardSample(
                name=image.name,
                idx_line=f"{extension} {image.offset_data} {image.size} {image.name}"
                f" cls {label.offset_data} {label.size} {label.name}",
                row=(_read_label(tar, label), image.offset_data, image.size),
            )


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    """Return the label in a member: digits, as `shards.read_sample` compares it. Raises ValueError for others."""
    file = tar.extractfile(member)
    text = file.read(_LABEL_DIGITS + 1) if file else b""
    if not text.isdigit() or len(text) > _LABEL_DIGITS:
        raise ValueError(f"{member.name} holds {text.decode(errors='replace')!r}, which is no number of a class")
    return int(text)


def _idx_faults(folder: Path, shard: Shard, members: list[ShardSample]) -> Iterator[str]:
    path = folder / shard.idx_name
    if not path.is_file():
        yield f"{path.name}: missing; {_REMEDY}"
        return
    lines = path.read_text(errors="replace").splitlines()
    expected_lines = [f"v1.2 {len(members)}", *(member.idx_line for member in members)]
    for number, (line, expected) in enumerate(zip_longest(lines, expected_lines), 1):
        if line != expected:
            found, needed = (f'"{text}"' if text is not None else "missing" for text in (line, expected))
            yield f"{path.name}: line {number} is {found} where {shard.name} needs {needed}; {_REMEDY}"
            return
    if sha256_of(path) != shard.idx_sha256:
        yield f"{path.name}: its bytes changed (the manifest has another sha256); {_REMEDY}"


def _row_faults(name: str, number: int, rows: npt.NDArray[np.void], members: list[ShardSample]) -> Iterator[str]:
    fields = ("shard", "label", "offset", "bytes")
    stated = rows[list(fields)].tolist()  # Python's integers, since those of a damaged shard may be of any size
    actual = [(number, *member.row) for member in members]
    wrong = [index for index, pair in enumerate(zip(stated, actual, strict=True)) if pair[0] != pair[1]]
    if wrong:
        first = wrong[0]
        yield (
            f"{SAMPLES_NAME}: {len(wrong)} wrong of {len(rows)} rows for {name}; number {first} says"
            f" {', '.join(fields)} {list(stated[first])}, the shard {list(actual[first])}; {_REMEDY}"
        )


def _image_faults(path: Path, rows: npt.NDArray[np.void] | None, members: list[ShardSample]) -> Iterator[str]:
    """Yield the faults of the images themselves, and of their sizes in samples.npy."""
    with open(path, "rb") as file:
        for number, member in enumerate(members):
            _, offset, size = member.row
            file.seek(offset)
            try:
                header = check_image(file.read(size), "decode")
            except ValueError as error:
                yield f"{path.name}: {member.name}: {error}; {_REMEDY} with --skip-broken"
                continue
            stated = None if rows is None else (rows[number]["width"], rows[number]["height"])
            if stated not in (None, (header.width, header.height)):
                yield (
                    f"{path.name}: {member.name} has {header.width}×{header.height} pixels where {SAMPLES_NAME} says"
                    f" {stated[0]}×{stated[1]}; {_REMEDY}"
                )


def _truncate_faults(faults: Iterator[str], shard: str) -> Iterator[str]:
    """Yield the first faults, and how many more there are."""
    yield from islice(faults, _FAULTS_SHOWN)
    if more := sum(1 for _ in faults):
        yield f"{shard}: {more} more images with faults"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 1 if anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m dataio.verify",
        description="Checks a folder that dataio.pack wrote: every file's size and sha256, and that shards, indices"
        " and sample table fit together. Exit status 1 if anything is wrong.",
    )
    parser.add_argument("target", metavar="TARGET", type=os.path.expanduser, help="folder with a manifest.json")
    parser.add_argument("--decode", action="store_true", help="decode every image too, to the last pixel")
    parser.add_argument("--workers", type=int, default=0, help="number of processes (default: one per core)")
    arguments = parser.parse_args(argv)
    if arguments.workers < 0:
        parser.error(f"--workers is {arguments.workers}; use 1 or more, or 0 for one per core")
    if is_url(arguments.target):
        parser.error(
            f"{redact_url(arguments.target)} is remote, and only local folders are checked; name the one it was copied"
            " from, or a local copy (the sha256 of every file that training fetches is checked anyway)"
        )
    target, start = Path(arguments.target), time.monotonic()
    try:
        faults = verify(target, arguments.decode, arguments.workers)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    for fault in faults:
        print(escape_unprintable(fault, None))  # it may name anything that a damaged shard holds
    if faults:
        print(f"faults in {target}: {len(faults)}")
        return 1
    manifest, digest = read_manifest_file(target)
    print(
        f"{target} is intact: samples {manifest.samples}, classes {len(manifest.classes)}, shards"
        f" {len(manifest.shards)}, manifest {digest[:12]}; checked in {time.monotonic() - start:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

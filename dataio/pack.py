"""Class folder → shards: `python -m dataio.pack SOURCE TARGET`.

    SOURCE/class/image.jpg        TARGET/shard-000000.tar   images and labels in a seeded, mixed order
    SOURCE/class/sub/image.png →  TARGET/shard-000000.idx   where each lies, for DALI's fn.readers.webdataset
                                  TARGET/samples.npy        the same as one table (index.SAMPLE_DTYPE)
                                  TARGET/manifest.json      classes, shards, sha256 of every other file

Every image is decoded once, wholly (source.py), so that training never meets one that cannot be. The bytes of all
files depend on the images and the options alone, not on the number of workers. TARGET appears when it is complete.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import time
from concurrent.futures import wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from dataio.files import new_folder, sha256_of, sync, write_file
from dataio.index import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    STORAGE_STREAM,
    Broken,
    Manifest,
    ManifestFile,
    Shard,
    load_manifest,
    philox,
)
from dataio.source import ClassFolder, ImageFile, find_images, read_image
from dataio.workers import available_cores, worker_pool

PARTS = ("held-out", "kept")  # of --hold-out

_BLOCK = tarfile.BLOCKSIZE
_BROKEN_SHOWN = 20


@dataclass(frozen=True)
class PackOptions:
    """What the command's options say. `hold_out` is a percentage, `part` is "kept" or "held-out"."""

    shard_mib: int = 256
    workers: int = 0  # 0: one per available core
    seed: int = 0
    skip_broken: bool = False
    hold_out: float | None = None
    part: str | None = None

    def __post_init__(self):
        if self.shard_mib < 1:
            raise ValueError(f"--shard-mib is {self.shard_mib}; use 1 or more (128 to 512 suits most disks)")
        if self.workers < 0:
            raise ValueError(f"--workers is {self.workers}; use 1 or more, or 0 for one per core")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; use a number from 0 to 2**63 - 1")
        if (self.hold_out is None) != (self.part is None):
            raise ValueError("--hold-out and --part belong together; give both or neither")
        if self.hold_out is not None and not 0 < self.hold_out < 100:
            raise ValueError(f"--hold-out is {self.hold_out}; use a percentage between 0 and 100")
        if self.part not in (None, *PARTS):
            raise ValueError(f'--part is "{self.part}"; use {" or ".join(PARTS)}')


def pack(source: str | Path, target: str | Path, options: PackOptions | None = None) -> Manifest:
    """The manifest of the shards that were written to the new folder `target`.

    Raises ValueError if `source` is no class folder, has an empty class or (without `skip_broken`) a broken
    image, or if `target` is not free. Nothing is left at `target` then.
    """
    options = options or PackOptions()
    source, target = Path(source), Path(target)
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies inside {source}; choose a folder beside it, or it would become a class")
    with new_folder(target) as folder:
        with Console(stderr=True).status(f"listing {source}"):
            found = _part_of(find_images(source), options)
        if found.broken and not options.skip_broken:
            raise _broken_error(source, found.broken[0])
        tasks = _plan(found, folder, options)
        results = _write_shards(tasks, options)
        _write_tables(folder, found, results, options)
    return load_manifest(target)


def _part_of(found: ClassFolder, options: PackOptions) -> ClassFolder:
    """The part of the class folder that is to be packed: --hold-out decides by a hash of each image's path."""
    if options.hold_out is None:
        return found
    bound = options.hold_out / 100 * 2**64

    def is_held_out(path: str) -> bool:
        return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:8], "big") < bound

    parts: dict[str, list[ImageFile]] = {part: [] for part in PARTS}
    for image in found.images:
        parts["held-out" if is_held_out(image.path) else "kept"].append(image)
    for (part, images), change in zip(parts.items(), ("larger", "smaller"), strict=True):
        missing = sorted(set(range(len(found.classes))) - {image.label for image in images})
        if missing:
            raise ValueError(
                f'class "{found.classes[missing[0]]}" has no image in the {part} part with --hold-out'
                f" {options.hold_out:g}; use a {change} percentage"
            )
    wanted = options.part == "held-out"
    broken = [file for file in found.broken if is_held_out(file.file) == wanted]
    return replace(found, images=parts[options.part], broken=broken)


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: these images, in this order, with keys from `first_key` on."""

    path: Path
    source: Path
    first_key: int
    images: list[ImageFile]
    skip_broken: bool


@dataclass(frozen=True)
class ShardResult:
    """One shard as written: `rows` of SAMPLE_DTYPE whose `shard` is still 0. No rows: no file."""

    path: Path
    rows: np.ndarray
    bytes: int
    sha256: str
    idx_sha256: str
    broken: list[Broken]


def _plan(found: ClassFolder, folder: Path, options: PackOptions) -> list[ShardTask]:
    """The images in seeded order, cut where the next one would make the shard too large."""
    stream = philox(options.seed, STORAGE_STREAM)
    order = np.argsort(stream.random_raw(len(found.images)), kind="stable")
    limit = options.shard_mib * 2**20 - tarfile.RECORDSIZE  # the end mark takes at most one record
    starts, used = [0], 0
    for place, number in enumerate(order):
        image = found.images[number]
        needed = _member_bytes(image.bytes) + _member_bytes(len(str(image.label)))
        if used + needed > limit and place > starts[-1]:
            starts.append(place)
            used = 0
        used += needed
    return [
        ShardTask(
            path=folder / f"shard-{shard:06d}.tar",
            source=found.folder,
            first_key=start,
            images=[found.images[number] for number in order[start:end]],
            skip_broken=options.skip_broken,
        )
        for shard, (start, end) in enumerate(zip(starts, [*starts[1:], len(order)], strict=True))
    ]


def _member_bytes(content: int) -> int:
    return _BLOCK + -(-content // _BLOCK) * _BLOCK


def _write_shards(tasks: list[ShardTask], options: PackOptions) -> list[ShardResult]:
    """The tasks' results, in their order; a bar on a terminal shows how many bytes are written.

    An error ends all others; of several it is the first in that order, however many workers there are.
    """
    workers = min(options.workers or available_cores(), len(tasks))
    columns = TextColumn("packing"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    results: list[ShardResult] = []
    with worker_pool(workers) as pool, bar:
        planned = sum(_member_bytes(image.bytes) + 2 * _BLOCK for task in tasks for image in task.images)
        row = bar.add_task("", total=planned)
        finished = 0
        for number, future in enumerate([pool.submit(_write_shard, task) for task in tasks]):
            while not wait([future], timeout=0.5).done:
                running = (task.path for task in tasks[number : number + workers])
                bar.update(row, completed=finished + sum(path.stat().st_size for path in running if path.exists()))
            results.append(future.result())
            finished += results[-1].bytes
            bar.update(row, completed=finished)
    return results


def _write_shard(task: ShardTask) -> ShardResult:
    """Reads, checks and writes the images of one shard, and its .idx. One image is in memory at a time."""
    rows, lines, broken = [], [], []
    with open(task.path, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image in enumerate(task.images, task.first_key):
            try:
                data, ending, width, height = read_image(task.source / image.path)
            except ValueError as error:
                broken.append(Broken(image.path, str(error)))
                if not task.skip_broken:
                    raise _broken_error(task.source, broken[-1]) from error
                continue
            members = [
                _add_member(tar, file, f"{key:08d}.{ending}", data),
                _add_member(tar, file, f"{key:08d}.cls", str(image.label).encode()),
            ]
            rows.append((0, image.label, members[0][1], len(data), width, height))
            lines.append(" ".join(f"{part}" for member in members for part in member))
    if not rows:
        task.path.unlink()
        return ShardResult(task.path, np.empty(0, SAMPLE_DTYPE), 0, "", "", broken)
    sync(task.path)
    idx = task.path.with_suffix(".idx")
    write_file(idx, "".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines]).encode())
    return ShardResult(
        path=task.path,
        rows=np.array(rows, SAMPLE_DTYPE),
        bytes=task.path.stat().st_size,
        sha256=sha256_of(task.path),
        idx_sha256=sha256_of(idx),
        broken=broken,
    )


def _add_member(tar: tarfile.TarFile, file: io.BufferedWriter, name: str, data: bytes) -> tuple[str, int, int, str]:
    """(ending, offset of the data, its bytes, name), as an .idx line has it. Owner and time stay 0."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    offset = file.tell() + _BLOCK  # one header block: USTAR, and a short name
    tar.addfile(member, io.BytesIO(data))
    return name.split(".")[1], offset, len(data), name


def _broken_error(source: Path, broken: Broken) -> ValueError:
    return ValueError(
        f"broken image {source / broken.file}: {broken.reason}; repair or remove it, or pack with --skip-broken"
        f" to leave out all such files"
    )


def _write_tables(folder: Path, found: ClassFolder, results: list[ShardResult], options: PackOptions) -> None:
    """samples.npy and manifest.json. Shards are renumbered if one had nothing but broken images."""
    broken = found.broken + [file for result in results for file in result.broken]
    results = [result for result in results if len(result.rows)]
    samples = np.concatenate([np.empty(0, SAMPLE_DTYPE), *(result.rows for result in results)])
    lost = np.bincount(samples["label"], minlength=len(found.classes)) == 0
    if lost.any():
        name = found.classes[int(lost.argmax())]
        raise ValueError(f'class "{name}" has only broken images; repair one or remove {found.folder / name}')
    samples["shard"] = np.repeat(np.arange(len(results)), [len(result.rows) for result in results])
    table = io.BytesIO()
    np.save(table, samples)
    write_file(folder / SAMPLES_NAME, table.getvalue())
    shards = [_name_shard(folder, number, result) for number, result in enumerate(results)]
    manifest = ManifestFile(
        format=FORMAT_VERSION,
        seed=options.seed,
        hold_out=options.hold_out,
        part=options.part,
        samples=len(samples),
        samples_sha256=sha256_of(folder / SAMPLES_NAME),
        classes=tuple(found.classes),
        shards=tuple(shards),
        broken=tuple(sorted(broken, key=lambda file: file.file)),
    )
    write_file(folder / MANIFEST_NAME, (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def _name_shard(folder: Path, number: int, result: ShardResult) -> Shard:
    name = f"shard-{number:06d}.tar"
    shard = Shard(name, result.bytes, result.sha256, len(result.rows), result.idx_sha256)
    if result.path.name != name:
        result.path.with_suffix(".idx").rename(folder / shard.idx_name)
        result.path.rename(folder / name)
    return shard


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dataio.pack",
        description="Packs a class folder of images into shards for training. Every image is decoded once to check"
        " it. The same images and options give the same bytes again, whatever the number of workers.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder with a folder of images per class")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to write, new or empty")
    parser.add_argument("--shard-mib", type=int, default=256, help="largest size of a shard (default: 256 MiB)")
    parser.add_argument("--workers", type=int, default=0, help="number of processes (default: one per core)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of storage (default: 0)")
    parser.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out and list files that are no images or cannot be decoded; without it they are an error",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        metavar="PERCENT",
        help="split SOURCE in two by a hash of each image's path and pack one --part: for a folder without a"
        " validation set, run twice with the same percentage",
    )
    parser.add_argument(
        "--part",
        choices=PARTS,
        help="which part to pack: held-out has PERCENT of the images, kept the others",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = vars(_parse(argv))
    source, target = arguments.pop("source"), arguments.pop("target")
    start = time.monotonic()
    try:
        manifest = pack(source, target, PackOptions(**arguments))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; nothing was written to {target}", file=sys.stderr)
        return 130
    _print_broken(manifest.broken)
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    print(
        f"packed {target}: samples {len(manifest)}, classes {len(manifest.classes)}, shards"
        f" {len(manifest.shards)}, {size:.1f} MiB; in {time.monotonic() - start:.1f} s"
    )
    return 0


def _print_broken(broken: tuple[Broken, ...]) -> None:
    for file in broken[:_BROKEN_SHOWN]:
        print(f"skipped {file.file}: {file.reason}", file=sys.stderr)
    if broken:
        more = f", {_BROKEN_SHOWN} of them shown" if len(broken) > _BROKEN_SHOWN else ""
        print(f"skipped {len(broken)} broken files{more}; {MANIFEST_NAME} lists them all", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

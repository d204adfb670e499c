"""Class folder → shards: `python -m dataio.pack SOURCE TARGET`.

    SOURCE/class/image.jpg        TARGET/shard-000000.tar   images and labels in a seeded, mixed order
    SOURCE/class/sub/image.png →  TARGET/shard-000000.idx   where each lies, for DALI's fn.readers.webdataset
                                  TARGET/samples.npy        the same as one table (index.SAMPLE_DTYPE)
                                  TARGET/manifest.json      classes, shards, sha256 of every other file

Every image is decoded once, wholly, so that training never meets one that cannot be. The bytes of all files
depend on the images and the options alone, not on the number of workers. TARGET appears when it is complete.
"""

import argparse
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from glob import escape
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

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
    sha256_of,
)

#: PIL's formats that DALI decodes to the same pixels, and the ending each one gets inside a shard.
FORMATS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG with further pictures behind the first, as some cameras write it
    "PNG": "png",
    "BMP": "bmp",
    "WEBP": "webp",
    "TIFF": "tiff",
    "PPM": "ppm",
    "JPEG2000": "jp2",
}
#: What the names of image files end with, in lower case.
ENDINGS = (
    *(".bmp", ".j2k", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)

PARTS = ("held-out", "kept")  # of --hold-out

_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_LOCK_NAME = "lock"
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


class ImageFile(NamedTuple):
    """One image of a class folder: its path inside that folder, its class's number and its size."""

    path: str
    label: int
    bytes: int


@dataclass(frozen=True)
class ClassFolder:
    """What lies in a class folder, sorted by name. `broken` are the files that need not be opened to tell."""

    folder: Path
    classes: list[str]
    images: list[ImageFile]
    broken: list[Broken]


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


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes `target` when the block ends, and vanishes if it fails.

    A block that is killed leaves its folder behind; the next one for the same target removes it.
    Raises ValueError if `target` exists and is not empty.
    """
    target = target.resolve()
    _require_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{escape(target.name)}.*.partial"):
        with suppress(OSError), open(left / _LOCK_NAME, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the process that made it lives
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir()
    try:
        with open(folder / _LOCK_NAME, "w") as lock:
            with suppress(OSError):  # some network file systems have no locks: then nothing is ever removed
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
            (folder / _LOCK_NAME).unlink()
            _sync_folder(folder)
            _require_free(target)  # another process may have been faster
            folder.rename(target)
            _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; delete it or name another folder")


def find_images(source: str | Path) -> ClassFolder:
    """The classes and images of a class folder: a visible folder is a class, the files in and below it its images.

    Hidden files are ignored, and so are files beside the class folders unless they are images. A file inside a
    class whose name does not end like an image's is listed as broken.
    Raises ValueError if there is no class, or a class has no image.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; name one that holds a folder of images for each class")
    entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    classes = [entry.name for entry in entries if entry.is_dir()]
    if not classes:
        raise ValueError(
            f"{source} holds no class folders; put the images of each class into a folder of their own, like"
            f" {source / 'CLASS' / 'IMAGE'}"
        )
    found = ClassFolder(source, classes, images=[], broken=[])
    for entry in entries:
        if entry.suffix.lower() in ENDINGS and not entry.is_dir():
            found.broken.append(Broken(entry.name, "it lies in no class folder"))
    for label, name in enumerate(classes):
        images, others = len(found.images), len(found.broken)
        for path, size in sorted(_files_below(source / name)):
            path = f"{name}/{path}"
            if not path.lower().endswith(ENDINGS):
                found.broken.append(Broken(path, f"its name ends with none of {' '.join(ENDINGS)}"))
            elif size is None:
                found.broken.append(Broken(path, "it is a link to nothing, or no regular file"))
            else:
                found.images.append(ImageFile(path, label, size))
        if len(found.images) == images:
            files = len(found.broken) - others
            raise ValueError(
                f'class "{name}" has no images{f" ({files} files of other kinds)" if files else ""}; add some to'
                f" {source / name} or remove that folder"
            )
    return found


def _files_below(top: Path) -> Iterator[tuple[str, int | None]]:
    """(path inside `top`, bytes or None if nothing can be read) of each visible file; links are followed."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()  # a link may lead back to a folder above it
    for folder, folders, names in os.walk(top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(folder, top)
        for name in names:
            if not name.startswith("."):
                path = os.path.join(folder, name)
                size = os.path.getsize(path) if os.path.isfile(path) else None
                yield name if inside == "." else f"{inside}/{name}", size


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
    stream = np.random.Philox(key=[options.seed, STORAGE_STREAM])
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


def available_cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end at once when the block raises or is interrupted, and when this process is killed.

    Raises RuntimeError if one of them is killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, lifeline = context.Pipe(duplex=False)
    with receiver, lifeline, ProcessPoolExecutor(workers, context, _end_with_parent, (receiver,)) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker was killed, most often because memory ran out; free some, or use fewer workers"
            ) from error
        except BaseException:
            lifeline.close()
            raise


def _end_with_parent(lifeline: Connection) -> None:
    """Ends this worker when the other end of `lifeline` is closed, which the parent's death does as well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    threading.Thread(target=lambda: (lifeline.poll(None), os._exit(1)), daemon=True).start()


def _write_shard(task: ShardTask) -> ShardResult:
    """Reads, checks and writes the images of one shard, and its .idx. One image is in memory at a time."""
    rows, lines, broken = [], [], []
    with open(task.path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
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
        _sync(file)
    if not rows:
        task.path.unlink()
        return ShardResult(task.path, np.empty(0, SAMPLE_DTYPE), 0, "", "", broken)
    idx = task.path.with_suffix(".idx")
    _write_file(idx, "".join(f"{line}\n" for line in [f"v1.2 {len(lines)}", *lines]).encode())
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


def read_image(path: Path) -> tuple[bytes, str, int, int]:
    """(the file's bytes, its ending in a shard, width, height) of an image that can be decoded wholly.

    Width and height are as stored: a rotation that EXIF asks for is not applied. Raises ValueError with the
    reason if the file cannot be read or decoded, or is of a format that DALI does not decode.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from error
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata and large images are no fault
            image = Image.open(io.BytesIO(data))
            if image.format in FORMATS:
                width, height = _stored_size(image)
                image.load()
            if image.format == "PNG":
                _check_png_chunks(data)
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is no image, or of an unknown format") from error
    except Exception as error:  # PIL's decoders raise a dozen kinds on garbage
        raise ValueError(f"it cannot be decoded: {error}") from error
    if image.format not in FORMATS:
        raise ValueError(f"it is a {image.format}, which DALI does not decode; convert it to JPEG or PNG")
    return data, FORMATS[image.format], width, height


def _check_png_chunks(data: bytes) -> None:
    """Raises if a chunk's checksum is wrong or the last chunk is missing: DALI minds, load() reads pixels only."""
    Image.open(io.BytesIO(data)).verify()  # up to the last chunk
    if _PNG_END not in data:
        raise ValueError("the last chunk is missing")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) without the rotation that the metadata may ask for, which PIL applies to TIFF alone."""
    if image.format == "TIFF":
        return image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
    return image.size


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
    _write_file(folder / SAMPLES_NAME, table.getvalue())
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
    _write_file(folder / MANIFEST_NAME, (json.dumps(asdict(manifest), indent=1) + "\n").encode())


def _name_shard(folder: Path, number: int, result: ShardResult) -> Shard:
    name = f"shard-{number:06d}.tar"
    shard = Shard(name, result.bytes, result.sha256, len(result.rows), result.idx_sha256)
    if result.path.name != name:
        result.path.with_suffix(".idx").rename(folder / shard.idx_name)
        result.path.rename(folder / name)
    return shard


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _print_broken(broken: Iterable[Broken]) -> None:
    broken = list(broken)
    for file in broken[:_BROKEN_SHOWN]:
        print(f"skipped {file.file}: {file.reason}", file=sys.stderr)
    if broken:
        more = f", {_BROKEN_SHOWN} of them shown" if len(broken) > _BROKEN_SHOWN else ""
        print(f"skipped {len(broken)} broken files{more}; {MANIFEST_NAME} lists them all", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

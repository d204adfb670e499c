"""Packing of images into shards, as `python -m dataio.pack SOURCE TARGET` does it.

    SOURCE/class/image.jpg        TARGET/shard-000000.tar   images and labels in a seeded, mixed order
    SOURCE/class/sub/image.png →  TARGET/shard-000000.idx   offsets of its members, for DALI's fn.readers.webdataset
                                  TARGET/samples.npy        sample table of all shards (manifest.SAMPLE_DTYPE)
                                  TARGET/report.json        how the images were packed, and the unusual ones
                                  TARGET/manifest.json      classes, shards, sha256 of every file but the report

The bytes of all files depend on the images and the options alone: neither on the number of workers nor on how often
packing was killed, since a restarted pack keeps the shards that its journal lists as finished. TARGET appears when it
is complete. source.py finds the images, image_checks.py checks each, shard_writer.py writes a shard in a worker
process, journal.py records the finished ones.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataio.files import atomic_folder, clear_folder, escape_unprintable, printable, sync
from dataio.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SAMPLE_DTYPE,
    SAMPLES_NAME,
    Manifest,
    ManifestFile,
    SkippedFile,
    load_manifest,
    parse_manifest,
)
from dataio.pack.image_checks import DOWNSCALE_VERSION
from dataio.pack.journal import TEMP_SUFFIX, FinishedShard, Journal
from dataio.pack.options import PackOptions
from dataio.pack.shard_writer import BrokenImageError, ShardTask, WrittenShard, member_bytes, write_shard
from dataio.pack.source import ImageFile, Source, find_images, read_names
from dataio.progress import progress_bar, spinner
from dataio.sampler import PACK_SHUFFLE_STREAM, philox
from dataio.workers import available_cores, worker_pool

REPORT_NAME = "report.json"

_SMALLEST_SHARD = 16 * 2**20  # bytes; a small source is cut into shards of this size …
_MIN_SHARDS = 64  # … or into this many if they are larger, so that every worker gets some
_INDEX_BYTES = 128  # upper bound of what an image takes in its .idx and in samples.npy
_NAMES_SHOWN = 3
_SYNC_THREADS = 16
#: What manifest.json and report.json call the splits.
_PART_NAMES = {"train": "kept", "val": "held-out"}


def pack(source: str | Path, target: str | Path, options: PackOptions | None = None) -> Manifest:
    """Pack the images of `source` into shards in the new folder `target`; return their manifest.

    Raises ValueError if `source` is nothing that can be packed, has an empty class or (without `skip_broken`) a broken
    image, or if `target` is not free; RuntimeError if the disk is too small or another process packs into `target`.
    `target` does not exist then; finished shards are kept beside it, and the next call resumes from them.
    """
    options = options or PackOptions()
    source, target = Path(source), Path(target)
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{target} lies inside {source}; choose a folder beside it, or it would become a class")
    with atomic_folder(target, resume=True) as folder:
        with spinner(f"listing {source}"):
            found = find_images(source, None if options.classes is None else read_names(options.classes))
        splits = None
        if options.val_percent is not None and options.split is not None:
            splits = split(found, options.val_percent)
            broken = found.broken if options.split == "train" else []  # files that are not images count as training's
            found = replace(found, images=splits[options.split], broken=broken)
        for line in _warnings(found):
            print(line, file=sys.stderr)
        if found.broken and not options.skip_broken:
            raise _broken_error(found, found.broken[0])
        tasks = _plan_shards(found, folder.parent, options)
        with worker_pool(min(options.workers or available_cores(), len(tasks))) as pool:
            shards = _write_shards(found, tasks, folder, pool, options)
        report = _report(found, splits, [shard.written for shard in shards], options)
        _write_tables(folder, found, shards, options, report)
    return load_manifest(target)


def _warnings(found: Source) -> Iterator[str]:
    """Yield what the user of a source may not expect of it, one line each."""
    plain = sorted(found.classes)
    pairs = enumerate(zip(found.classes, plain, strict=True))
    different = next((number for number, names in pairs if names[0] != names[1]), None)
    if found.natural_order and different is not None:
        yield (
            f'classes are in natural order, as in timm: class {different} is "{found.classes[different]}", where'
            f' torchvision has "{plain[different]}"; --classes FILE, with a name in each line, gives them another order'
        )
    used = {image.label for image in found.images}
    unused = [name for number, name in enumerate(found.classes) if number not in used]
    if unused:
        yield f"classes without images: {len(unused)} ({_first_of(unused)})"
    if found.ignored:
        yield f"texts and tables among the images, ignored: {found.ignored}"


def _first_of(names: Sequence[str]) -> str:
    return ", ".join([*names[:_NAMES_SHOWN], *(["…"] if len(names) > _NAMES_SHOWN else [])])


def split(found: Source, percent: float) -> dict[str, list[ImageFile]]:
    """Split the images into "train" and "val": of every class, `percent` are held out for validation.

    At least one image of a class is held out, and never all; a class of one image is trained on. A hash of the images'
    paths chooses them, so that adding images moves no more than one other of each class.
    Raises ValueError if no class has two images.
    """
    classes: dict[int, list[int]] = {}  # label → indices into found.images, since paths may be equal in a WebDataset
    for index, image in enumerate(found.images):
        classes.setdefault(image.label, []).append(index)
    held_out: set[int] = set()
    for indices in classes.values():
        indices.sort(key=lambda index: hashlib.sha256(os.fsencode(found.images[index].path)).digest())
        wanted = max(1, int(len(indices) * percent / 100 + 0.5))
        held_out.update(indices[: min(wanted, len(indices) - 1)])
    if not held_out:
        raise ValueError(f"no class of {found.name} has two images, so that one could be held out; add some")
    return {
        "val": [image for index, image in enumerate(found.images) if index in held_out],
        "train": [image for index, image in enumerate(found.images) if index not in held_out],
    }


def _plan_shards(found: Source, folder: Path, options: PackOptions) -> list[ShardTask]:
    """Put the images into seeded order, and cut it where the next image would make the shard too large."""
    stream = philox(options.seed, PACK_SHUFFLE_STREAM)
    order = np.argsort(stream.random_raw(len(found.images)), kind="stable").tolist()
    images = [found.images[number] for number in order]
    ends = np.cumsum([_bytes_of(image) for image in images])
    limit = min(options.shard_mib * 2**20, max(_SMALLEST_SHARD, int(ends[-1]) // _MIN_SHARDS))
    limit -= tarfile.RECORDSIZE  # the end mark takes at most one record
    tasks: list[ShardTask] = []
    start = 0
    while start < len(images):
        used = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, used + limit, side="right")))
        tasks.append(
            ShardTask(
                path=folder / f"shard-{len(tasks):06d}{TEMP_SUFFIX}",
                reader=found.reader,
                first_key=start,
                images=images[start:end],
                check=options.check,
                downscale=options.downscale,
                skip_broken=options.skip_broken,
                max_megapixels=options.max_megapixels,
            )
        )
        start = end
    return tasks


def _bytes_of(image: ImageFile) -> int:
    """Return the bytes that an image and its label take in a shard."""
    return member_bytes(image.bytes) + member_bytes(len(str(image.label)))


def _write_shards(
    found: Source, tasks: list[ShardTask], folder: Path, pool: ProcessPoolExecutor, options: PackOptions
) -> list[FinishedShard]:
    """Write the shards that are not finished yet; return all, in the order of the tasks.

    An error cancels all other shards; of several errors the first in that order is raised.
    """
    with spinner("looking for finished shards"):
        journal = Journal(folder, _pack_settings(found, options), pool)
    with journal:
        if journal.changed:
            changed = ", ".join(journal.changed)
            print(f"starting over: the unfinished pack in {folder.parent} had another {changed}", file=sys.stderr)
        elif journal.shards:
            print(f"resuming: {len(journal.shards)} of {len(tasks)} shards are finished", file=sys.stderr)
        remaining = tasks[len(journal.shards) :]
        _require_space(folder, remaining)
        try:
            for shard in journal.shards:
                if shard.written.broken and not options.skip_broken:
                    raise BrokenImageError(shard.written.broken[0])
            for task, written in zip(remaining, _results(remaining, pool), strict=True):
                journal.add(task.path, written)
        except BrokenImageError as error:
            raise _broken_error(found, error.broken) from error
        return journal.shards


def _pack_settings(found: Source, options: PackOptions) -> dict[str, Any]:
    """Return all that determines the bytes of a pack, by names that messages can show."""
    return {
        "format": FORMAT_VERSION,
        "source (its files, their sizes and times of change)": found.fingerprint,
        "classes": list(found.classes),
        "choice of images": hashlib.sha256(os.fsencode("\n".join(image.path for image in found.images))).hexdigest(),
        "--shard-mib": options.shard_mib,
        "--seed": options.seed,
        "--check": options.check,
        "--max-megapixels": options.max_megapixels,
        "--resize": options.resize,
        "--quality": options.downscale and options.downscale.quality,
        "version of Pillow": options.downscale and DOWNSCALE_VERSION,
        "--val-percent": options.val_percent,
        "--split": options.split,
    }


def _require_space(folder: Path, tasks: list[ShardTask]) -> None:
    """Raise RuntimeError if the disk has no room for these shards; --resize may need less than that."""
    images = [image for task in tasks for image in task.images]
    needed = sum(map(_bytes_of, images)) + len(images) * _INDEX_BYTES + len(tasks) * tarfile.RECORDSIZE
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RuntimeError(
            f"{folder.parent.parent} has {free / 2**20:,.0f} MiB free, the shards need {needed / 2**20:,.0f} MiB;"
            f" free some, or name a folder on a larger disk"
        )


def _results(tasks: list[ShardTask], pool: ProcessPoolExecutor) -> Iterator[WrittenShard]:
    """Yield the shards in order as workers write them; show the bytes written on a terminal."""
    planned = [sum(map(_bytes_of, task.images)) for task in tasks]
    futures = [pool.submit(write_shard, task) for task in tasks]
    with progress_bar("packing", sum(planned)) as show:
        for number, future in enumerate(futures):
            while not wait([future], timeout=0.5 if show else None).done:
                if show:
                    running = (task.path for task in tasks[number:] if task.path.exists())
                    show(sum(planned[:number]) + sum(path.stat().st_size for path in running))
            yield future.result()


def _broken_error(found: Source, broken: SkippedFile) -> ValueError:
    return ValueError(
        f"broken image {found.name}/{escape_unprintable(broken.file)}: {broken.reason}; repair or remove it, or pack"
        f" with --skip-broken to leave out all such files"
    )


def _write_tables(
    folder: Path, found: Source, finished: list[FinishedShard], options: PackOptions, report: "PackReport"
) -> None:
    """Write samples.npy, report.json and manifest.json, and wait until the whole folder is on disk.

    Raises ValueError if a class has lost all its images, unless it is a validation split.
    """
    written = [shard.written for shard in finished]
    rows = [shard.rows for shard in written if len(shard.rows)]
    samples = np.concatenate([np.empty(0, SAMPLE_DTYPE), *rows])
    lost = {image.label for image in found.images} - set(np.unique(samples["label"]).tolist())
    if lost and options.split != "val":  # in a validation split, some classes may have no image at all
        clear_folder(folder)  # the source has to change, and all shards with it
        name = found.classes[min(lost)]
        raise ValueError(f'class "{name}" has only broken images; repair one or remove {found.name}/{name}')
    samples["shard"] = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
    table = io.BytesIO()
    np.save(table, samples)
    broken = found.broken + [file for shard in written for file in shard.broken]
    manifest = ManifestFile(
        format=FORMAT_VERSION,
        seed=options.seed,
        hold_out=options.val_percent,
        part=None if options.split is None else _PART_NAMES[options.split],
        samples=len(samples),
        samples_sha256=hashlib.sha256(table.getvalue()).hexdigest(),
        classes=found.classes,
        shards=tuple(shard.shard for shard in finished if shard.shard),
        broken=tuple(replace(file, file=printable(file.file)) for file in sorted(broken, key=lambda file: file.file)),
    )
    (folder / SAMPLES_NAME).write_bytes(table.getvalue())
    (folder / REPORT_NAME).write_bytes(_json(asdict(report)))
    text = _json(asdict(manifest))
    parse_manifest(text, str(folder / MANIFEST_NAME))  # nothing is published that cannot be read
    (folder / MANIFEST_NAME).write_bytes(text)
    with ThreadPoolExecutor(_SYNC_THREADS) as threads:  # all files together take about as long as one
        list(threads.map(sync, folder.iterdir()))


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


@dataclass(frozen=True)
class PackReport:
    """Contents of report.json: how the images were packed, and the paths of unusual ones."""

    check: str
    resize: int | None
    quality: int | None
    encoder: str | None
    resized: int  # number of images that were downscaled
    cmyk: list[str]
    rotated: list[str]  # their EXIF asks for a rotation or a flip
    parts: dict[str, int] | None = None  # with --val-percent: number of images of either split, by _PART_NAMES
    ignored: int = 0  # text files and tables among the images


def _report(
    found: Source, splits: dict[str, list[ImageFile]] | None, written: list[WrittenShard], options: PackOptions
) -> PackReport:
    downscale = options.downscale
    return PackReport(
        check=options.check,
        resize=options.resize,
        quality=downscale.quality if downscale else None,
        encoder=DOWNSCALE_VERSION if downscale else None,
        resized=sum(shard.shrunk for shard in written),
        cmyk=sorted(path for shard in written for path in shard.cmyk),
        rotated=sorted(path for shard in written for path in shard.rotated),
        parts={_PART_NAMES[name]: len(images) for name, images in splits.items()} if splits else None,
        ignored=found.ignored,
    )


def read_report(folder: Path) -> PackReport:
    """Read report.json of a packed folder."""
    return PackReport(**json.loads((folder / REPORT_NAME).read_text()))

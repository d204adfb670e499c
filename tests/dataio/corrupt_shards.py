"""Damages a small packed folder in many ways, and trains on each: corrupt_shards.py PACK SCRATCH FIRST COUNT SEED.

Prints one line of JSON for each variant: the damage, and the outcome: "refused" (the folder was not opened), "error"
(training ended with one), "substituted" (with the number of samples), "pixels" (they differ) or "nothing". Folders of
the last two are kept in SCRATCH. The script itself fails if a label is wrong. It runs in a process of its own, so that
a crash or a hang is noticed.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dataio.augment.params import ImageOptions
from dataio.loader import LoaderOptions, TrainLoader
from dataio.manifest import MANIFEST_NAME, SAMPLE_DTYPE, SAMPLES_NAME, load_manifest
from dataio.remote.options import CacheOptions, RetryPolicy
from dataio.shards import open_dataset

# RandAugment would take 0.1 s to build, for each variant.
OPTIONS = ImageOptions(image_size=32, threads=2, prefetch_batches=1, augmentation="simple")
BATCH, STEPS = 24, 1  # so large that DALI reads headers in threads
Damage = Callable[[random.Random, Path], str]


def rewrite(path: Path, content: bytes) -> None:
    """Replace a hard link by a file of its own."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def flip_bytes(draw: random.Random, folder: Path, pattern: str) -> str:
    path = draw.choice(sorted(folder.glob(pattern)))
    content = bytearray(path.read_bytes())
    places = [draw.randrange(len(content)) for _ in range(draw.choice((1, 1, 4, 64)))]
    for place in places:
        content[place] ^= 1 << draw.randrange(8)
    rewrite(path, bytes(content))
    return f"flipped {len(places)} bits of {path.name}, the first at {places[0]}"


def cut(draw: random.Random, folder: Path, pattern: str) -> str:
    path = draw.choice(sorted(folder.glob(pattern)))
    content = path.read_bytes()
    kept = draw.choice((0, 1, draw.randrange(len(content)), len(content) - 1))
    rewrite(path, content[:kept])
    return f"cut {path.name} to {kept} bytes"


def lengthen(draw: random.Random, folder: Path, pattern: str) -> str:
    path = draw.choice(sorted(folder.glob(pattern)))
    rewrite(path, path.read_bytes() + draw.randbytes(draw.choice((1, 512, 10240))))
    return f"lengthened {path.name}"


def remove(draw: random.Random, folder: Path, pattern: str) -> str:
    path = draw.choice(sorted(folder.glob(pattern)))
    path.unlink()
    return f"removed {path.name}"


def exchange(draw: random.Random, folder: Path, pattern: str) -> str:
    """Exchange the names of two files, whose sizes are made to fit the names."""
    one, other = draw.sample(sorted(folder.glob(pattern)), 2)
    contents = [one.read_bytes(), other.read_bytes()]
    for path, content in zip((other, one), contents, strict=True):
        rewrite(path, content[: path.stat().st_size].ljust(path.stat().st_size, b"\0"))
    return f"exchanged {one.name} and {other.name}"


def overwrite_image(draw: random.Random, folder: Path) -> str:
    """Overwrite parts of images with noise, zeros, another image, or the image shifted."""
    rows = np.load(folder / SAMPLES_NAME)
    for sample in draw.sample(range(len(rows)), draw.choice((1, 1, 3))):
        row, other = rows[sample], rows[draw.randrange(len(rows))]
        path = folder / f"shard-{row['shard']:06d}.tar"
        content = bytearray(path.read_bytes())
        begin, size = int(row["offset"]), int(row["bytes"])
        source = (folder / f"shard-{other['shard']:06d}.tar").read_bytes()[int(other["offset"]) :][
            : int(other["bytes"])
        ]
        patch = draw.choice((draw.randbytes(size), bytes(size), 2 * source, content[begin + 3 :][:size]))
        first = draw.choice((0, draw.randrange(size)))
        content[begin + first : begin + size] = patch[first:size].ljust(size - first, b"\xff")
        rewrite(path, bytes(content))
    return f"overwrote images, the last is {sample}"


def overwrite_member(draw: random.Random, folder: Path) -> str:
    """Replace a tar header or a label by another one."""
    rows = np.load(folder / SAMPLES_NAME)
    row = rows[draw.randrange(len(rows))]
    path = folder / f"shard-{row['shard']:06d}.tar"
    content = bytearray(path.read_bytes())
    image = int(row["offset"])
    label = image + -(-int(row["bytes"]) // 512) * 512 + 512
    place = draw.choice((image - 512, label - 512, label))
    source = draw.randrange(0, len(content) - 512, 512)
    content[place : place + 512] = content[source : source + 512]
    if place == label and draw.random() < 0.5:
        content[place : place + 512] = (b"%d" % draw.randrange(12)).ljust(512, b"\0")
    rewrite(path, bytes(content))
    return f"overwrote block {place} of {path.name}"


def edit_manifest(draw: random.Random, folder: Path) -> str:
    """Change or remove one of its values; lists lose, repeat and exchange items."""
    fields = json.loads((folder / MANIFEST_NAME).read_text())
    places = [(fields, name) for name in fields]
    places += [(shard, name) for shard in fields["shards"] for name in shard]
    holder, name = draw.choice(places)
    value = holder[name]
    if isinstance(value, list) and value and draw.random() < 0.8:
        one, other = draw.randrange(len(value)), draw.randrange(len(value))
        edit = draw.choice(("pop", "repeat", "exchange"))
        if edit == "pop":
            value.pop(one)
        elif edit == "repeat":
            value.insert(other, value[one])
        else:
            value[one], value[other] = value[other], value[one]
    elif draw.random() < 0.2:
        del holder[name]
    else:
        wrong = [None, "", -1, 0, 1, 2**70, 0.5, True, [], {}, "../x.tar", "shard-000001.tar", "0" * 64]
        if isinstance(value, int):
            wrong += [value + 1, value - 1, value * 512]
        if isinstance(value, str) and value:
            wrong += [value[1:], value.upper(), value[::-1], "/" + value]
        holder[name] = draw.choice(wrong)
    if name != "classes" and draw.random() < 0.5:
        fields["sha256"] = ""  # as if it had none of its own: whatever is wrong must be found otherwise
    rewrite(folder / MANIFEST_NAME, json.dumps(fields, indent=1).encode())
    return f"edited {name}"


def edit_samples(draw: random.Random, folder: Path) -> str:
    """Change, exchange or remove rows, or the dtype of the table."""
    rows = np.load(folder / SAMPLES_NAME)
    edit = draw.choice(("value", "value", "label", "exchange", "pop", "type"))
    row, other = draw.randrange(len(rows)), draw.randrange(len(rows))
    if edit == "value":
        rows[row][draw.choice(SAMPLE_DTYPE.names)] += draw.choice((1, 2, 512, 2**31))
    elif edit == "label":
        rows["label"][[row, other]] = rows["label"][[other, row]] if draw.random() < 0.5 else 0
    elif edit == "exchange":
        rows[[row, other]] = rows[[other, row]]
    elif edit == "pop":
        rows = np.delete(rows, row)
    else:
        rows = np.stack(
            [rows[name].astype(draw.choice((np.uint32, np.float32, object))) for name in ("shard", "label")]
        )
    (folder / SAMPLES_NAME).unlink()
    np.save(folder / SAMPLES_NAME, rows)
    return f"edited samples: {edit}"


def on(pattern: str, damage: Callable[[random.Random, Path, str], str]) -> Damage:
    return lambda draw, folder: damage(draw, folder, pattern)


DAMAGES: list[Damage] = [
    *(on("shard-*.tar", damage) for damage in (flip_bytes, flip_bytes, flip_bytes, cut, lengthen, remove, exchange)),
    *(on("shard-*.idx", damage) for damage in (flip_bytes, cut, lengthen, remove, exchange)),
    *(on(MANIFEST_NAME, damage) for damage in (flip_bytes, flip_bytes, cut, lengthen, remove)),
    *(on(SAMPLES_NAME, damage) for damage in (flip_bytes, flip_bytes, cut, lengthen, remove)),
    *(on("[ms]*[ny]", exchange), overwrite_image, overwrite_image, overwrite_image, overwrite_member, overwrite_member),
    *(edit_manifest, edit_manifest, edit_samples),
]


class Truth:
    """Labels of the undamaged folder, and its pixels as training sees them."""

    def __init__(self, pack: Path) -> None:
        self.manifest = load_manifest(pack)
        self.images = torch.cat([batch.images for batch in self.batches(self.manifest)])

    def batches(self, manifest) -> list:
        loader_options = LoaderOptions(
            seed=7, global_batch_size=BATCH, shuffle_window_shards=2, max_bad_samples=BATCH * STEPS
        )
        loader = TrainLoader(manifest, OPTIONS, loader_options, torch.device("cpu"))
        return [next(loader) for _ in range(STEPS)]

    def outcome(self, folder: Path, remote: bool, cache: Path) -> dict:
        """Train on a damaged folder, and describe the outcome."""
        try:
            retry_policy = RetryPolicy(
                max_attempts=1, eviction_timeout_seconds=3600, file_timeout_seconds=3600, batch_timeout_seconds=3600
            )
            options = CacheOptions(cache, 2**30, retry_policy)
            manifest = open_dataset(folder.as_uri() if remote else folder, options)
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            return {"outcome": "refused", "message": str(error)}
        try:
            batches = self.batches(manifest)
        except RuntimeError as error:
            return {"outcome": "error", "message": str(error)}
        assert manifest.classes == self.manifest.classes, "labels with other names"
        for batch in batches:
            labels = self.manifest.samples["label"][batch.samples]
            assert batch.labels.tolist() == labels.tolist(), "a wrong label"
        substituted = [broken.reason for batch in batches for broken in batch.substituted]
        if substituted:
            return {"outcome": "substituted", "count": len(substituted), "message": substituted[0]}
        same = torch.equal(torch.cat([batch.images for batch in batches]), self.images)
        return {"outcome": "nothing" if same else "pixels", "message": ""}


def main(pack: Path, scratch: Path, first: int, count: int, seed: int) -> None:
    truth = Truth(pack)
    caches = Path(tempfile.mkdtemp(dir=scratch.parent))
    for number in range(first, first + count):
        draw = random.Random(f"{seed} {number}")
        folder, cache = scratch / f"{number}", caches / f"{number}"
        shutil.copytree(pack, folder, copy_function=os.link)
        damage = DAMAGES[number % len(DAMAGES)](draw, folder)
        remote = draw.random() < 0.15
        began = time.monotonic()
        result = truth.outcome(folder, remote, cache)
        seconds = round(time.monotonic() - began, 2)
        print(
            json.dumps({"number": number, "damage": damage, "remote": remote, "seconds": seconds, **result}), flush=True
        )
        if result["outcome"] not in ("pixels", "nothing"):
            shutil.rmtree(folder)
        shutil.rmtree(cache, ignore_errors=True)  # a thread may still write to it


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))

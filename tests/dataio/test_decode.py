"""Images that cannot be decoded: named with the reason, substituted, and none where memory ran out."""

import io
import itertools
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.augment.params import ImageOptions
from dataio.augment.resize import Resizer
from dataio.loader import EvalLoader, LoaderOptions, TrainLoader
from dataio.manifest import Manifest, load_manifest
from dataio.pack.packer import pack
from dataio.shards import LocalShards

CPU = torch.device("cpu")


@pytest.fixture
def manifest(shards) -> Manifest:
    return load_manifest(shards)


@pytest.fixture
def damaged(shards, tmp_path) -> Manifest:
    """A copy of `shards` to be damaged after its manifest was read."""
    return load_manifest(shutil.copytree(shards, tmp_path / "damaged"))


def evaluate(manifest: Manifest, prefetch_batches: int = 2) -> None:
    options = ImageOptions(image_size=32, threads=2, prefetch_batches=prefetch_batches)
    for _ in EvalLoader(manifest, options, 4, 0, 1, CPU):
        pass


@pytest.mark.parametrize("prefetch_batches", [1, 2, 5])
def test_a_truncated_image_is_named_with_the_remedy(damaged, truncate, prefetch_batches):
    files = LocalShards(damaged)
    broken = next(sample for sample in range(20, len(damaged)) if files.read(sample).startswith(b"\xff\xd8"))
    truncate(damaged, broken)
    row = damaged.samples[broken]
    place = rf"sample {broken} \({damaged.shards[row['shard']].name}, offset {row['offset']},"
    remedy = rf"python -m dataio.verify {damaged.folder} and pack it again without broken images"
    with pytest.raises(RuntimeError, match=rf"cannot decode {place}.*truncated.*{remedy}"):
        evaluate(damaged, prefetch_batches)


HEADERS = """
import sys
from pathlib import Path
import numpy as np
import torch
from dataio.manifest import load_manifest
from dataio.decode import BatchRequest, decode_batches
from dataio.augment.params import ImageOptions, eval_params
manifest, samples = load_manifest(Path(sys.argv[1])), np.arange(48)
options = ImageOptions(image_size=32, threads=2)
for _ in range(5):
    params = eval_params(manifest.samples[samples], options)
    try:
        list(decode_batches(manifest, options, iter([BatchRequest(0, samples, params)]), 48, torch.device("cpu")))
    except RuntimeError as error:
        print(error)
"""


def tiny_jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 7)).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image" * 8, "not an image"),
        (b"\xff\xd8\xff\xe0\0\1" * 8, "broken data stream"),
        (tiny_jpeg(), "it has 9×7 pixels where"),
    ],
    ids=["no image", "no header", "another size"],
)
def test_a_header_that_is_broken_does_not_end_the_process(damaged, overwrite, content, said):
    """DALI's decoder alone crashes on each of these, in most batches that are as large as this."""
    overwrite(damaged, 0, content)
    run = subprocess.run([sys.executable, "-c", HEADERS, damaged.folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("cannot decode sample 0 ") == run.stdout.count(said) == 5, run.stdout


def test_what_is_no_image_is_named_and_all_of_a_batch_at_once(damaged, overwrite):
    for sample in (5, 6):
        overwrite(damaged, sample, b"no image" * 8)
    with pytest.raises(RuntimeError, match=r"decode sample 5 \(.*\): not an image, sample 6 \(.*\): not an image;"):
        evaluate(damaged)


@pytest.mark.parametrize("failures", [1, 30, 10**9], ids=["once", "some", "always"])
def test_images_that_cannot_be_scaled_are_not_taken_for_broken_ones(manifest, monkeypatch, failures):
    """The host's fault, however long it lasts: memory that runs out, here in the second batch."""
    calls, scale = itertools.count(), Resizer._resize

    def fail(*arguments: object) -> np.ndarray:
        if 8 <= next(calls) < 8 + failures:
            raise MemoryError("no memory for a window")
        return scale(*arguments)

    monkeypatch.setattr(Resizer, "_resize", fail)
    plan = LoaderOptions(seed=0, global_batch_size=8, max_bad_samples=99)
    loader = TrainLoader(manifest, ImageOptions(image_size=32, threads=2), plan, CPU)
    with pytest.raises(
        RuntimeError, match="^cannot scale images on the CPU: MemoryError: no memory for a window; free"
    ):
        list(itertools.islice(loader, 5))
    assert loader.bad_samples == 0


@pytest.mark.parametrize(("size", "limit"), [((70000, 40), None), ((64, 48), 100)], ids=["wide", "beyond PIL's limit"])
def test_a_broken_image_of_any_size_is_replaced(tmp_path, truncate, monkeypatch, size, limit):
    """Even if there can be no JPEG of it, or PIL takes it for an attack."""
    (tmp_path / "photos" / "class").mkdir(parents=True)
    for name, shape in (("broken", size), ("whole", (32, 32))):
        Image.effect_noise(shape, 50).convert("RGB").save(tmp_path / "photos" / "class" / f"{name}.png")
    manifest = pack(tmp_path / "photos", tmp_path / "packed")
    broken = int(manifest.samples["width"].argmax())
    truncate(manifest, broken)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    plan = LoaderOptions(seed=0, global_batch_size=2, max_bad_samples=1)
    batch = next(TrainLoader(manifest, ImageOptions(image_size=32), plan, CPU))
    assert [(met.sample, met.substitute) for met in batch.substituted] == [(broken, 1 - broken)]
    assert "unrecognized data stream" in batch.substituted[0].reason


SCARCE = """
import resource, sys
import torch
from dataio.manifest import load_manifest
from dataio.loader import TrainLoader, LoaderOptions
from dataio.augment.params import ImageOptions

plan = LoaderOptions(seed=0, global_batch_size=1, max_bad_samples=99)
options = ImageOptions(image_size=32, threads=1, prefetch_batches=1)
loader = TrainLoader(load_manifest(sys.argv[1]), options, plan, torch.device("cpu"))
next(loader)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[2]) * 2**20,) * 2)
try:
    for batch in loader:  # 8 % or more of each image, until it is too much
        assert not batch.substituted
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "kind", "mib"),
    [
        *((6000, "jpg", 40), (6000, "png", 40)),
        *((6000, "webp", 190), (6000, "webp", 230), (6000, "jpg", 170), (12000, "jpg", 250)),
        (3000, "webp", 8),
    ],
)
def test_an_image_for_which_there_is_no_memory_is_not_taken_for_a_broken_one(tmp_path, side, kind, mib):
    """One is large, and progressive if it is a JPEG. With 40 MiB left DALI cannot even decode another one alone."""
    folder = tmp_path / "photos" / "class"
    folder.mkdir(parents=True)
    for number in range(9):
        size = (side, side) if number == 4 else (64, 64)
        photo = Image.effect_noise((64, 64), 50).convert("RGB").resize(size)
        photo.save(folder / f"{number}.{kind}", progressive=True, method=0)
    pack(tmp_path / "photos", tmp_path / "packed")
    command = [sys.executable, "-c", SCARCE, tmp_path / "packed", str(mib)]
    run = subprocess.run(command, capture_output=True, text=True)
    faults = (
        r"cannot decode sample \d \(.*\), nor a blank image of its size \(.*\)",
        "DALI failed on a batch, and on none of its images alone",
        "cannot scale images on the CPU",
    )
    assert re.match(f"({'|'.join(faults)}).*; free some memory", run.stdout), run.stdout + run.stderr

"""Batches with undecodable images: each is named with the reason and the remedy, and none crashes the process."""

import io
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from dataio.augment.params import ImageOptions
from dataio.loader import EvalLoader
from dataio.manifest import Manifest, load_manifest
from dataio.shards import LocalShards

CPU = torch.device("cpu")


@pytest.fixture
def damaged(shards, tmp_path) -> Manifest:
    """Copy of `shards`, to damage after its manifest was read."""
    return load_manifest(shutil.copytree(shards, tmp_path / "damaged"))


def evaluate(manifest: Manifest, prefetch_batches: int = 2) -> None:
    options = ImageOptions(image_size=32, threads=2, prefetch_batches=prefetch_batches)
    for _ in EvalLoader(manifest, options, 4, 0, 1, CPU):
        pass


@pytest.mark.parametrize("prefetch_batches", [1, 2, 5])
def test_a_truncated_image_is_named_with_the_remedy(damaged, truncate, prefetch_batches):
    files = LocalShards(damaged)
    bad = next(sample for sample in range(20, len(damaged)) if files.read(sample).startswith(b"\xff\xd8"))
    truncate(damaged, bad)
    row = damaged.samples[bad]
    name = rf"sample {bad} \({damaged.shards[row['shard']].name}, offset {row['offset']},"
    remedy = rf"python -m dataio.verify {damaged.folder} and pack it again without broken images"
    with pytest.raises(RuntimeError, match=rf"cannot decode {name}.*truncated.*{remedy}"):
        evaluate(damaged, prefetch_batches)


DECODE_FIVE_TIMES = """
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
    ("content", "reason"),
    [
        (b"no image" * 8, "not an image"),
        (b"\xff\xd8\xff\xe0\0\1" * 8, "broken data stream"),
        (tiny_jpeg(), "it has 9×7 pixels where"),
    ],
    ids=["no image", "no header", "another size"],
)
def test_an_invalid_header_does_not_crash_the_process(damaged, overwrite, content, reason):
    """DALI's decoder by itself crashes on each of these, in most batches as large as this one."""
    overwrite(damaged, 0, content)
    run = subprocess.run([sys.executable, "-c", DECODE_FIVE_TIMES, damaged.folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("cannot decode sample 0 ") == run.stdout.count(reason) == 5, run.stdout


def test_all_bad_images_of_a_batch_are_named_at_once(damaged, overwrite):
    for sample in (5, 6):
        overwrite(damaged, sample, b"no image" * 8)
    with pytest.raises(RuntimeError, match=r"decode sample 5 \(.*\): not an image, sample 6 \(.*\): not an image;"):
        evaluate(damaged)

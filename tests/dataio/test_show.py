"""The grid compared with the packed photographs, the loader's batches and their augmentation."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dataio.augment.batch_augment import BatchAugment, BatchAugmentOptions
from dataio.augment.params import ImageOptions
from dataio.loader import LoaderOptions, TrainLoader
from dataio.manifest import load_manifest
from dataio.pack.packer import pack
from dataio.sampler import samples_at
from dataio.show import main, show


def tiles(figure) -> list[tuple[str, np.ndarray]]:
    """Return (title, pixels) of each tile that shows something, row by row."""
    return [(axis.get_title(), np.asarray(axis.images[0].get_array())) for axis in figure.axes if axis.images]


def stored(manifest, sample) -> tuple[str, np.ndarray]:
    row = manifest.samples[sample]
    data = (manifest.folder / manifest.shards[row["shard"]].name).read_bytes()[row["offset"] :][: row["bytes"]]
    image = Image.open(io.BytesIO(data))
    name = manifest.classes[row["label"]]
    return f"{name} {image.width}×{image.height}", np.asarray(image.convert("RGB"))


def test_tiles_are_the_first_samples_of_a_run(shards):
    manifest = load_manifest(shards)
    drawn = tiles(show(shards, count=11, seed=3))
    expected = [stored(manifest, sample) for sample in samples_at(3, np.arange(11), len(manifest))]
    assert len(drawn) == 11
    for (title, pixels), (name, photograph) in zip(drawn, expected, strict=True):
        assert title == name
        assert np.array_equal(pixels, photograph)


def test_augmented_tiles_below_the_stored_ones(shards):
    """What a run with this seed trains on in its first step."""
    manifest = load_manifest(shards)
    drawn = tiles(show(shards, count=10, augmented=True, size=64, seed=3))
    assert len(drawn) == 20
    rows = [drawn[:8], drawn[8:16], drawn[16:18], drawn[18:]]  # 8 columns
    before, after = rows[0] + rows[2], rows[1] + rows[3]
    batch = next(TrainLoader(manifest, ImageOptions(image_size=64), LoaderOptions(3, 10), torch.device("cpu")))
    assert [title for title, _ in before] == [stored(manifest, sample)[0] for sample in batch.samples]
    images, targets = BatchAugment(BatchAugmentOptions(), 4, 3, 10, torch.device("cpu"))(batch)
    mean, std = (np.array(values) for values in (ImageOptions().mean, ImageOptions().std))
    for (title, pixels), image, target in zip(after, images, targets, strict=True):
        levels = 255 * (image.permute(1, 2, 0).numpy() * std + mean)
        assert np.abs(pixels - levels.clip(0, 255)).max() <= 0.51
        for line in title.splitlines():
            name, share = line.split()
            assert float(share) == pytest.approx(target[manifest.classes.index(name)].item(), abs=0.006)
        assert sum(float(line.split()[1]) for line in title.splitlines()) > 0.9


def test_the_command_writes_a_picture(shards, tmp_path, capsys):
    out = tmp_path / "grid.png"
    assert main([str(shards), "--out", str(out), "--count", "3", "--augmented", "--size", "32"]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000  # photographs, not a white page


def test_count_above_the_number_of_samples(fashion_shards, tmp_path):
    folder = fashion_shards / "val"
    assert len(tiles(show(folder, count=10_000))) == len(load_manifest(folder))


def test_long_class_names_are_shortened(source, tmp_path):
    (source / "cat").rename(source / f"cat {'x' * 80}")
    pack(source, tmp_path / "packed")
    titles = [title for title, _ in tiles(show(tmp_path / "packed", count=48))]
    assert sum(title.startswith("cat xxx") and "… " in title for title in titles) == 12
    assert max(map(len, titles)) < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0", "--out", "grid.png"], "--count is 0; use 1 or more"),
        (
            ["--augmented", "--size", "0", "--out", "grid.png"],
            "image_size is 0: input should be greater than or equal to 1",
        ),
        (["--seed", "-1", "--out", "grid.png"], "seed is -1; use a number from 0 to 2**63 - 1"),
        (["--count", "2", "--out", "grid.xyz"], "Format 'xyz' is not supported"),
        (["--count", "2", "--out", "none/grid.png"], "[Errno 2] No such file or directory: "),
    ],
)
def test_invalid_options(options, message, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(shards), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_image_is_named(shards, tmp_path, capsys):
    folder = shutil.copytree(shards, tmp_path / "copy")
    manifest = load_manifest(folder)
    row = manifest.samples[0]
    with open(folder / manifest.shards[0].name, "r+b") as shard:
        shard.seek(int(row["offset"]))
        shard.write(bytes(int(row["bytes"])))
    assert main([str(folder), "--count", "48", "--out", str(tmp_path / "grid.png")]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot draw {manifest.describe(0)}: ")
    assert not (tmp_path / "grid.png").exists()


def test_remote_shards(http_server, many_shards, tmp_path, capsys):
    """They are drawn as local ones are, from a cache that has space for one at a time."""
    near, far, cache = tmp_path / "near.png", tmp_path / "far.png", tmp_path / "cache"
    url, options = f"{http_server(many_shards).url}/?token=hush", ["--count", "12", "--seed", "3"]
    gib = str(2.5 * (many_shards / "shard-000000.tar").stat().st_size / 2**30)
    assert main([url, "--out", str(far), *options]) == 2
    said = capsys.readouterr().err
    assert said.endswith("/?… is remote; name a folder for the shards that are fetched with --cache\n")
    assert main([url, "--out", str(far), *options, "--cache", str(cache), "--cache-gib", gib]) == 0
    assert main([str(many_shards), "--out", str(near), *options]) == 0
    with Image.open(near) as one, Image.open(far) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert main([url, "--out", str(far), *options, "--augmented", "--size", "32", "--cache", str(cache)]) == 0


def test_no_manifest(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "grid.png")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no manifest.json in {tmp_path}")

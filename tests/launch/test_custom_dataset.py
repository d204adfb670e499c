"""A user's images: the name of what is made of them, and settings that follow from their number."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataio.manifest import SAMPLE_DTYPE, load_manifest
from dataio.pack.options import PackOptions
from launch.config import load_config
from launch.custom_dataset import dataset_name, image_overrides, inspect_dataset, schedule_overrides
from launch.quickstart import CONFIG


def test_changed_images_have_another_name(photos, tmp_path):
    """So that shards of the old images are not reused."""
    source = shutil.copytree(photos, tmp_path / "source")
    before = inspect_dataset(source, PackOptions(), None).name
    assert inspect_dataset(source, PackOptions(), None).name == before
    (source / "cat" / "00.jpg").unlink()
    assert inspect_dataset(source, PackOptions(), None).name != before


@pytest.mark.parametrize(("images", "steps"), [(15, 700), (135, 700), (3000, 1000), (100_000, 9000)])
def test_settings_follow_the_number_of_images(images, steps, fashion_shards):
    """A few images get enough steps, and the EMA forgets the initial weights within any number of steps."""
    manifest = load_manifest(fashion_shards / "val")
    first = image_overrides(replace(manifest, samples=np.zeros(images, SAMPLE_DTYPE)))
    config = load_config(CONFIG, first)
    config = load_config(
        CONFIG, [*first, *schedule_overrides(images, config.optimizer.epochs, config.optimizer.global_batch_size)]
    )
    optimizer = config.optimizer
    done = optimizer.epochs * images / optimizer.global_batch_size
    assert done > steps
    assert optimizer.ema_decay**done < 1e-4
    assert 0 < optimizer.warmup_epochs < optimizer.epochs / 10
    assert optimizer.global_batch_size % 2 == 0


def test_folders_of_one_name_have_different_names(tmp_path):
    first, second = (tmp_path / parent / "images" for parent in "ab")
    options = PackOptions()
    assert dataset_name(first, options, []) != dataset_name(second, options, [])
    assert dataset_name(first, options, []) == dataset_name(tmp_path / "a" / "." / "images", options, [])


def test_names_are_those_of_earlier_versions():
    """So that images that were packed before are found again."""
    options = PackOptions(resize=256, check="header", skip_broken=True)
    assert dataset_name(Path("/data/my photos"), options, ["0123", "10 %", "cat", "dog"]) == "my-photos-c2489eb9"

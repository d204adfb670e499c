"""Resize of uint8 images by PyTorch against PIL, and the threads it runs in."""

import gc
import threading

import numpy as np
import pytest
from PIL import Image

from dataio.augment.resize import Resizer

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth shapes, sharp edges and noise: (H, W, 3) uint8."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.sin(rows / 17)[..., None] * np.cos(columns[..., None] / (9, 23, 41))
    edges = (rows // 31 + columns // 13)[..., None] % 2
    noise = np.random.default_rng(0).normal(size=(height, width, 3))
    return np.clip(127 + 60 * smooth + 50 * edges + 20 * noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("height", "width", "to"),
    [
        (375, 500, (224, 224)),
        (500, 333, (256, 170)),
        (300, 200, (256, 256)),
        (40, 61, (224, 224)),
        (37, 500, (224, 64)),
        (1, 1, (32, 32)),
    ],
)
def test_resize_matches_pil(interpolation, height, width, to):
    image = photograph(height, width)
    (resized,) = Resizer(interpolation, 1)([image], [np.array(to, dtype=np.float32)])
    resample = FILTERS[interpolation]
    rows_resized = Image.fromarray(image).resize((to[1], height), resample)  # Pillow 13 may take columns first
    expected = rows_resized.resize(to[::-1], resample)
    assert resized.dtype == np.uint8
    assert resized.flags.c_contiguous
    differences = np.abs(resized.astype(int) - np.asarray(expected))
    assert differences.max() <= 2
    assert differences.mean() <= 0.01


def test_each_image_of_a_batch_has_its_own_size():
    images = [photograph(60 + 7 * number, 90 - 5 * number) for number in range(9)]
    sizes = [np.array([32 + number, 64 - number], dtype=np.float32) for number in range(9)]
    resizer = Resizer("bicubic", 3)
    together = resizer(images, sizes)
    assert [resized.shape[:2] for resized in together] == [tuple(size) for size in sizes]
    for resized, image, size in zip(together, images, sizes, strict=True):
        assert np.array_equal(resized, *resizer([image], [size]))


def test_an_impossible_resize_raises_in_the_caller():
    with pytest.raises(RuntimeError, match="greater than 0"):
        Resizer("bicubic", 2)([photograph(8, 8)] * 3, [np.array(size) for size in ((4, 4), (0, 4), (4, 4))])


def test_threads_end_with_their_resizer():
    before = set(threading.enumerate())
    resizer = Resizer("bicubic", 3)
    resizer([photograph(64, 64)] * 30, [np.array((32, 32))] * 30)
    threads = set(threading.enumerate()) - before
    assert 1 <= len(threads) <= 3
    del resizer
    gc.collect()
    for thread in threads:
        thread.join()

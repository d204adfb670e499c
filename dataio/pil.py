"""PIL as it is used for images of any size: no warnings, no limit of pixels."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image


@contextmanager
def pil_without_limits() -> Iterator[None]:
    """PIL without its warnings of odd metadata, and without its limit of pixels: ours is --max-megapixels."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit

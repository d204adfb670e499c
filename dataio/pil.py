"""PIL without its warnings and its limit on image sizes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image


@contextmanager
def pil_without_limits() -> Iterator[None]:
    """Suspend PIL's warnings about metadata and its limit of pixels: the limit that counts is --max-megapixels."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit

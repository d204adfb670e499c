"""What lies in a class folder, and which of its files can be decoded.

A class folder holds a folder of images for each class; pack.py makes shards of it. The names decide what is
opened at all (find_images), the bytes what is let in (read_image).
"""

import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

from dataio.index import Broken

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

_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"


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

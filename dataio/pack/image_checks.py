"""The bytes of one image file: what is let into a shard, its size, what is odd about it, and making it smaller.

source.py says where the bytes are, shard_writer.py writes them.
"""

import io
import struct
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, TiffImagePlugin

from dataio.pil import pil_without_limits

#: PIL's formats that DALI decodes to the same pixels (see also _MODES), and the extension each one gets inside a shard.
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
#: Of formats that hold more than DALI decodes rightly, PIL's modes that it does.
_MODES = {
    "TIFF": ("L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B"),
    "PPM": ("1", "L", "RGB"),
    "JPEG2000": ("L", "RGB", "RGBA", "I;16"),
}
#: How files have pixels that DALI refuses, or takes for others: what PIL's names for it begin with.
_UNSUPPORTED_PIXELS = {"BGR;15": "15 bits a pixel", "BGR;16": "16 bits a pixel", "RGBa": "premultiplied transparency"}
#: What the names of image files end with, in lower case.
EXTENSIONS = (
    *(".bmp", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
#: How thoroughly an image is looked at. Width and height are read at each level; a file that has none is broken.
CHECKS = {
    "decode": "decode every pixel: whatever passes can be trained on",
    "header": "the header as PIL reads it, and for JPEG and PNG whether the file's end is there: finds truncated"
    " files, no damage inside",
    "none": "width and height alone: finds files that are no images, neither truncated ones nor damage inside",
}
_ORIENTATION = 0x0112  # EXIF's tag, and TIFF's
_PLANAR = 0x011C  # TIFF's: 2 is a plane for each colour
_ROTATIONS = range(2, 9)
_UNDO_ROTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
#: Bytes 4 to 12 of a HEIC file: a box and its brand.
_HEIC = {b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")}
_JPEG_END = b"\xff\xd9"


@dataclass(frozen=True, slots=True)
class Header:
    """What an image file says of itself. Width and height are of the stored pixels, before any rotation."""

    extension: str  # in a shard
    width: int
    height: int
    cmyk: bool = False
    rotated: bool = False  # its EXIF asks for a rotation or a flip, which training does not apply


@dataclass(frozen=True)
class Downscale:
    """Images whose short side is longer than `side` pixels are scaled to it, and stored as JPEG of this quality."""

    short_side: int
    quality: int


def check_image(data: bytes, check: str, max_megapixels: int | None = None) -> Header:
    """The header of an image that passes `check`, one of CHECKS, and has at most so many megapixels.

    Raises ValueError with the reason if it does not, or is of a kind that DALI does not decode to the same pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    if check == "none" and (header := _jpeg_header(data)) is not None:
        _require_megapixels(header, max_megapixels)
        return header
    try:
        with pil_without_limits():
            image = Image.open(io.BytesIO(data))
            if unsupported := _unsupported_format(image, data):
                raise _RejectedImageError(
                    f"it is a {unsupported}, which DALI does not decode; convert it to JPEG or PNG"
                )
            header = _header(image)
            _require_megapixels(header, max_megapixels)
            if check != "none":
                _check_end(image.format, data)
            if check == "decode":
                image.load()
    except _RejectedImageError:
        raise
    except Image.UnidentifiedImageError as error:
        if data[4:12] in _HEIC:
            raise ValueError("it is HEIC, as phones write it, whatever its name; convert it to JPEG or PNG") from error
        raise ValueError("it is no image, or of an unknown format") from error
    except Exception as error:  # PIL's decoders raise a dozen kinds on garbage
        raise ValueError(f"it cannot be decoded: {error}") from error
    return header


class _RejectedImageError(ValueError):
    """An image that can be decoded, and is not to be."""


def _require_megapixels(header: Header, most: int | None) -> None:
    pixels = header.width * header.height
    if most is not None and pixels > most * 10**6:
        raise _RejectedImageError(
            f"it has {header.width}×{header.height} pixels, more than the {most} million of --max-megapixels; allow"
            f" {-(-pixels // 10**6)}, or make it smaller"
        )


def _unsupported_format(image: Image.Image, data: bytes) -> str | None:
    """What an image is that DALI refuses, or decodes to other pixels without a word; None if it does neither."""
    if image.format not in FORMATS:
        return image.format
    if image.mode not in _MODES.get(image.format, (image.mode,)):
        return f"{image.format} of PIL's mode {image.mode}"
    if image.format == "PPM" and image.mode != "1" and image.tile[0].codec_name != "raw":
        return "PPM in plain text, or of other than 256 levels"
    if image.format in ("BMP", "TIFF"):
        if image.format == "TIFF" and image.tag_v2.get(_PLANAR) == 2:
            return "TIFF with a plane for each colour"
        if image.format == "BMP" and _has_masks_behind_a_short_header(data):
            return "BMP with masks behind a header of 40 bytes"
        for stored, kind in _UNSUPPORTED_PIXELS.items():
            if image.tile[0].args[0].startswith(stored):
                return f"{image.format} with {kind}"
    if image.format == "JPEG2000" and _has_offset(data):
        return "JPEG2000 with an offset of its image or tiles"
    return None


def _has_masks_behind_a_short_header(data: bytes) -> bool:
    """Of a BMP: DALI does not read these, and takes any order of colours for blue, green, red."""
    header_bytes, bits, compression = struct.unpack_from("<14xI10xHI", data)
    return (header_bytes, bits, compression) == (40, 32, 3)


def _has_offset(data: bytes) -> bool:
    """Of a JPEG 2000: whether its image, or its first tile, begins elsewhere than at 0 of its reference grid."""
    start = data.find(_JP2_CODESTREAM_START)
    if start < 0 or len(data) < start + len(_JP2_CODESTREAM_START) + _GRID.size:
        return False  # the decoder will say what is wrong
    _, _, left, top, _, _, tile_left, tile_top = _GRID.unpack_from(data, start + len(_JP2_CODESTREAM_START))
    return any((left, top, tile_left, tile_top))


def downscale_image(data: bytes, header: Header, downscale: Downscale) -> tuple[bytes, Header]:
    """(its bytes, header) of the image made smaller, without metadata; one that is small enough stays as it is.

    The same bytes again with the same DOWNSCALE_VERSION. Raises ValueError if it cannot be decoded.
    """
    short = min(header.width, header.height)
    if short <= downscale.short_side:
        return data, header
    size = tuple(round(side * downscale.short_side / short) for side in (header.width, header.height))
    out = io.BytesIO()
    try:
        with pil_without_limits():
            image = Image.open(io.BytesIO(data))
            # libjpeg may scale by 1/2, 1/4 or 1/8 as it decodes; twice the size is left for the filter
            image.draft(image.mode, (2 * size[0], 2 * size[1]))
            _stored_pixels(image).resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=downscale.quality)
    except Exception as error:  # as above
        raise ValueError(f"it cannot be decoded: {error}") from error
    return out.getvalue(), Header("jpg", *size, header.cmyk, header.rotated)


#: What the bytes of a smaller image depend on beside the image and Downscale.
DOWNSCALE_VERSION = f"Pillow {PIL.__version__}"


def _stored_pixels(image: Image.Image) -> Image.Image:
    """The image as training decodes it: 8 bits, grey or RGB, without any rotation."""
    if image.format == "TIFF":  # which PIL rotates as it loads, unlike all other formats
        undo = _UNDO_ROTATION.get(image.getexif().get(_ORIENTATION))
        image.load()
        image = image if undo is None else image.transpose(undo)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _header(image: Image.Image) -> Header:
    width, height = image.size
    rotated = _asks_for_rotation(image.info.get("exif", b""))
    if image.format == "TIFF":  # whose size PIL gives after the rotation
        width, height = image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
        rotated = image.tag_v2.get(_ORIENTATION) in _ROTATIONS
    return Header(FORMATS[image.format], width, height, image.mode == "CMYK", rotated)


def _asks_for_rotation(data: bytes) -> bool:
    if not data:
        return False
    exif = Image.Exif()
    try:
        with pil_without_limits():
            exif.load(data)
            return exif.get(_ORIENTATION) in _ROTATIONS
    except Exception:  # metadata that cannot be read is no fault
        return False


def _check_end(kind: str, data: bytes) -> None:
    """Raises if the last marker of a JPEG or the last chunk of a PNG is missing, or a PNG's checksum is wrong.

    DALI minds the latter, PIL's load() reads pixels only.
    """
    if kind == "PNG":
        Image.open(io.BytesIO(data)).verify()  # up to the last chunk
        if _PNG_END not in data:
            raise ValueError("the last chunk is missing")
    elif kind in ("JPEG", "MPO") and data.find(_JPEG_END, _jpeg_segments(data).get(_SCAN, 0)) < 0:
        raise ValueError("image file is truncated (it has no end marker)")


def _jpeg_header(data: bytes) -> Header | None:
    """The header of a JPEG in a tenth of PIL's time; None: leave it to PIL."""
    segments = _jpeg_segments(data)
    if _SCAN not in segments:
        return None
    place = segments.get(_APP1)
    rotated = place is not None and _asks_for_rotation(data[place + 4 : segments[_SCAN]])
    for frame in _FRAMES:
        if place := segments.get(frame):
            height, width, components = _FRAME.unpack_from(data, place + 5)
            return Header("jpg", width, height, components == 4, rotated) if width and height else None
    return None


def _jpeg_segments(data: bytes) -> dict[int, int]:
    """For each marker, where its first segment begins, up to the first scan; of APP1 the first with EXIF."""
    place, end, marker = 2, len(data) - 10, 0
    places: dict[int, int] = {}
    if data.startswith(b"\xff\xd8"):
        while place < end and data[place] == 0xFF and marker != _SCAN:
            marker = data[place + 1]
            if marker != _APP1 or data.startswith(_EXIF, place + 4):
                places.setdefault(marker, place)
            place += 2 + (data[place + 2] << 8 | data[place + 3])
    return places


_APP1, _SCAN = 0xE1, 0xDA
_EXIF = b"Exif\0\0"
_FRAMES = (0xC0, 0xC2, 0xC1)  # baseline, progressive, extended
_FRAME = struct.Struct(">HHB")  # of such a segment: height, width, number of components
_JP2_CODESTREAM_START = b"\xff\x4f\xff\x51"  # how JPEG 2000's begins: two markers
_GRID = struct.Struct(">4x8I")  # then, behind two lengths: the ends and offsets of image and tiles

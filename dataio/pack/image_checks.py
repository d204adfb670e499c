"""Checks of single encoded images: format, size, unusual properties; and downscaling.

source.py finds the files, shard_writer.py writes them; verify.py checks packed images again.
"""

import io
import re
import struct
from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from dataio.pil import pil_without_limits

#: PIL's names of the formats that may be packed, and the extension that each gets inside a shard.
FORMATS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG followed by further pictures, as some cameras write it
    "PNG": "png",
    "BMP": "bmp",
    "WEBP": "webp",
    "TIFF": "tiff",
    "PPM": "ppm",
    "JPEG2000": "jp2",
}
#: Of formats with variants that DALI refuses or decodes to other pixels than PIL: what `_variant` says of all others.
_DECODED_ALIKE = {
    "BMP": re.compile(r"(1|L|P|RGB|RGBA) (raw (1|L|P(;[14])?|BGRX?|BGRA|ABGR|RGBA)|bmp_rle [LP])"),
    "PPM": re.compile(r"1 (raw|ppm_plain) .*|(L|RGB) raw .*"),
    "TIFF": re.compile(r"(L|P|RGB|RGBA|CMYK|YCbCr|I;16B?) (raw|libtiff) (?!RGBa)\S*"),
    "JPEG2000": re.compile(r"(L|RGB|RGBA|I;16) jpeg2k (jp2|j2k)"),
}
#: Extensions of image files, in lower case.
EXTENSIONS = (
    *(".bmp", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
#: Levels of checking, thorough ones first. Each reads width and height; a file that has none is broken.
CHECKS = {
    "decode": "decode every pixel: whatever passes can be trained on",
    "header": "the header as PIL reads it, and for JPEG and PNG whether the file's end is there: finds truncated"
    " files, no damage inside",
    "none": "width and height alone: finds files that are no images, neither truncated ones nor damage inside",
}
_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_PLANAR_CONFIGURATION = 0x011C  # tag of TIFF: 2 stores each colour in a plane of its own
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
#: Bytes 4 to 12 of a HEIC file: a box and its brand.
_HEIC = {b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")}
_PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
_JPEG_END = b"\xff\xd9"
_APP1, _SCAN = 0xE1, 0xDA  # JPEG markers
_FRAMES = (0xC0, 0xC2, 0xC1)  # JPEG markers of baseline, progressive and extended frames
_FRAME = struct.Struct(">HHB")  # height, width, number of components in a frame's segment
_EXIF = b"Exif\0\0"
#: The start of a JPEG 2000 codestream whose image and tiles begin at 0 of the reference grid, which PIL does not tell.
_JP2_AT_ORIGIN = re.compile(rb"\xff\x4f\xff\x51.{12}\0{8}.{8}\0{8}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Header:
    """Properties of an image that its header tells. Width and height are of the stored pixels, before any rotation."""

    extension: str  # in a shard
    width: int
    height: int
    cmyk: bool = False
    rotated: bool = False  # its EXIF asks for a rotation or a flip, which training does not apply


@dataclass(frozen=True)
class Downscale:
    """Options of downscaling: images with a longer short side are scaled to `short_side` pixels, and stored as JPEG."""

    short_side: int
    quality: int


def check_image(data: bytes, check: str, max_megapixels: int | None = None) -> Header:
    """Return the header of an image that passes `check`, one of CHECKS, and has at most so many megapixels.

    Raises ValueError with the reason if it does not, or is of a kind that DALI and PIL do not decode alike.
    """
    if not data:
        raise ValueError("the file is empty")
    if check == "none" and (header := _jpeg_header(data)) is not None:
        _require_megapixels(header, max_megapixels)
        return header
    try:
        with pil_without_limits():
            image = Image.open(io.BytesIO(data))
            _require_decoded_alike(image, data)
            header = _header(image)
            _require_megapixels(header, max_megapixels)
            if check != "none":
                _check_end(image, data)
            if check == "decode":
                image.load()
    except _RejectedImageError:
        raise
    except UnidentifiedImageError as error:
        if data[4:12] in _HEIC:
            raise ValueError("it is HEIC, as phones write it, whatever its name; convert it to JPEG or PNG") from error
        raise ValueError("it is no image, or of an unknown format") from error
    except Exception as error:  # PIL's decoders raise a dozen kinds on garbage
        raise ValueError(f"it cannot be decoded: {error}") from error
    return header


class _RejectedImageError(ValueError):
    """An image that PIL can decode, but that must not be packed."""


def _require_megapixels(header: Header, most: int | None) -> None:
    pixels = header.width * header.height
    if most is not None and pixels > most * 10**6:
        raise _RejectedImageError(
            f"it has {header.width}×{header.height} pixels, more than the {most} million of --max-megapixels; allow"
            f" {-(-pixels // 10**6)}, or make it smaller"
        )


def _require_decoded_alike(image: Image.Image, data: bytes) -> None:
    """Raise _RejectedImageError if DALI refuses an image, or decodes it to other pixels than PIL without a word."""
    if image.format not in FORMATS:
        raise _RejectedImageError(f"it is a {image.format}, which DALI does not decode; convert it to JPEG or PNG")
    alike = _DECODED_ALIKE.get(image.format)
    if alike is not None and not alike.fullmatch(variant := _variant(image, data)):
        raise _RejectedImageError(
            f"it is a {image.format} that DALI and PIL do not decode alike ({variant}); convert it to JPEG or PNG"
        )


def _variant(image: Image.Image, data: bytes) -> str:
    """Describe how pixels are stored, in PIL's words: its mode, decoder and raw mode, like `RGB raw BGR;15`."""
    tile = image.tile[0]  # type: ignore[attr-defined]  # ImageFile's, as which Image.open returns it
    raw_mode = tile.args if isinstance(tile.args, str) else tile.args[0]
    words = [image.mode, tile.codec_name, raw_mode]
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PLANAR_CONFIGURATION) == 2:
        words.append("in planes")
    if image.format == "JPEG2000" and not _JP2_AT_ORIGIN.search(data):
        words.append("at an offset")
    return " ".join(words)


def downscale_image(data: bytes, header: Header, downscale: Downscale) -> tuple[bytes, Header]:
    """Return (encoded bytes, header) of the downscaled image, without metadata; small images keep their bytes.

    The bytes depend on DOWNSCALE_VERSION. Raises ValueError if the image cannot be decoded.
    """
    short = min(header.width, header.height)
    if short <= downscale.short_side:
        return data, header
    width, height = (round(side * downscale.short_side / short) for side in (header.width, header.height))
    out = io.BytesIO()
    try:
        with pil_without_limits():
            image = Image.open(io.BytesIO(data))
            # libjpeg may scale by 1/2, 1/4 or 1/8 as it decodes; twice the size is left for the filter
            image.draft(image.mode, (2 * width, 2 * height))
            smaller = _stored_pixels(image).resize((width, height), Image.Resampling.LANCZOS)
            smaller.save(out, "JPEG", quality=downscale.quality)
    except Exception as error:  # as above
        raise ValueError(f"it cannot be decoded: {error}") from error
    return out.getvalue(), Header("jpg", width, height, header.cmyk, header.rotated)


#: What the bytes of a downscaled image depend on, beside the image and Downscale.
DOWNSCALE_VERSION = f"Pillow {PIL.__version__}"


def _stored_pixels(image: Image.Image) -> Image.Image:
    """Decode an image as training does: 8 bits, grey or RGB, without any rotation."""
    if image.format == "TIFF":  # the only format that PIL rotates as it loads
        undo = _UNDO_ROTATION.get(image.getexif().get(_ORIENTATION, 1))
        image.load()
        image = image if undo is None else image.transpose(undo)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _header(image: Image.Image) -> Header:
    width, height = image.size
    rotated = _asks_for_rotation(image.info.get("exif", b""))
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # its size is that after the rotation
        width, height = image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
        rotated = image.tag_v2.get(_ORIENTATION) in _ROTATIONS
    return Header(FORMATS[image.format or ""], width, height, image.mode == "CMYK", rotated)


def _asks_for_rotation(data: bytes) -> bool:
    if not data:
        return False
    exif = Image.Exif()
    try:
        with pil_without_limits():
            exif.load(data)
            return exif.get(_ORIENTATION) in _ROTATIONS
    except Exception:  # unreadable metadata does not make an image broken
        return False


def _check_end(image: Image.Image, data: bytes) -> None:
    """Raise if the last marker of a JPEG or the last chunk of a PNG is missing, or a checksum of a PNG is wrong.

    DALI checks the latter, whereas PIL's load() reads pixels only.
    """
    if image.format == "PNG":
        Image.open(io.BytesIO(data)).verify()  # up to the last chunk
        if _PNG_END not in data:
            raise ValueError("the last chunk is missing")
    elif image.format in ("JPEG", "MPO") and data.find(_JPEG_END, _jpeg_segments(data).get(_SCAN, 0)) < 0:
        raise ValueError("image file is truncated (it has no end marker)")


def _jpeg_header(data: bytes) -> Header | None:
    """Read the header of a JPEG in a fraction of PIL's time; None if that is left to PIL."""
    segments = _jpeg_segments(data)
    if _SCAN not in segments:
        return None
    start = segments.get(_APP1)
    rotated = start is not None and _asks_for_rotation(data[start + 4 : segments[_SCAN]])
    for frame in _FRAMES:
        if start := segments.get(frame):
            height, width, components = _FRAME.unpack_from(data, start + 5)
            return Header("jpg", width, height, components == 4, rotated) if width and height else None
    return None


def _jpeg_segments(data: bytes) -> dict[int, int]:
    """Return the offset of each marker's first segment, up to the first scan; of APP1, the first with EXIF."""
    offset, end, marker = 2, len(data) - 10, 0
    offsets: dict[int, int] = {}
    if data.startswith(b"\xff\xd8"):
        while offset < end and data[offset] == 0xFF and marker != _SCAN:
            marker = data[offset + 1]
            if marker != _APP1 or data.startswith(_EXIF, offset + 4):
                offsets.setdefault(marker, offset)
            offset += 2 + (data[offset + 2] << 8 | data[offset + 3])
    return offsets

"""Levels of checking, headers, refused variants and downscaling, compared with PIL and DALI."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import skimage
import tifffile
from nvidia.dali import fn, pipeline_def
from PIL import Image

from dataio.pack.image_checks import CHECKS, Downscale, Header, _stored_pixels, check_image, downscale_image

ORIENTATION = 0x0112


def read_photograph() -> Image.Image:
    """300×200 pixels."""
    with Image.open(Path(skimage.data_dir, "chelsea.png")) as image:
        return image.convert("RGB").crop((60, 40, 360, 240))


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return read_photograph()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rotation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def by_dali(data: bytes) -> np.ndarray:
    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decoder():
        source = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)])
        return fn.decoders.image(source, device="cpu", adjust_orientation=False)

    pipeline = decoder()
    pipeline.build()
    (decoded,) = pipeline.run()
    return decoded.at(0).astype(int)


# Headers


@pytest.mark.parametrize("check", CHECKS)
def test_headers_at_every_check(check, photos):
    """Sizes equal PIL's, and the CMYK and the rotated image are found at every level."""
    odd = {"coffee/01.jpg": (True, False), "rocket/01.jpg": (False, True)}
    paths = sorted(photos.glob("*/*"))
    for path in paths:
        header = check_image(path.read_bytes(), check)
        with Image.open(path) as image:
            assert (header.width, header.height) == image.size
        assert header.extension == path.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
        assert (header.cmyk, header.rotated) == odd.get(str(path.relative_to(photos)), (False, False))
    assert len(paths) == 48


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"optimize": True, "subsampling": 0},
        {"comment": b"\xff\xc0\0\x11\x08\0\1\0\1 no frame"},
        {"restart_marker_blocks": 4},
        {"exif": rotation(1)},
        {"exif": rotation(9)},  # means nothing
        {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"},  # points nowhere
        {"exif": b"Exif\0\0garbage"},
    ],
)
def test_jpeg_variants(check, options, photograph):
    assert check_image(encoded(photograph, "JPEG", **options), check) == Header("jpg", 300, 200)


@pytest.mark.parametrize("check", CHECKS)
def test_exif_rotation_after_other_metadata(check, photograph):
    """XMP often precedes EXIF, in a segment with the same marker."""
    data = encoded(photograph, "JPEG", exif=rotation(6))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>"
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + data[2:]
    assert check_image(data, check) == Header("jpg", 300, 200, rotated=True)


@pytest.mark.parametrize("check", CHECKS)
def test_multi_picture_jpeg(check, photograph):
    small = photograph.resize((30, 20))
    data = encoded(photograph, "MPO", save_all=True, append_images=[small])
    assert check_image(data, check) == Header("jpg", 300, 200)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotations_of_other_formats(check, kind, orientation, photograph):
    """PIL rotates TIFF files as it loads them, unlike all other formats; DALI gets the stored pixels."""
    header = check_image(encoded(photograph, kind, exif=rotation(orientation)), check)
    assert header == Header(kind.lower(), 300, 200, rotated=orientation != 1)


@pytest.mark.parametrize("extension", ["bmp", "jp2", "jpg", "pgm", "png", "tif", "webp"])
def test_dali_decodes_accepted_formats(extension, tmp_path, photograph):
    path = tmp_path / f"image.{extension}"
    photograph.convert("L").save(path)
    header = check_image(path.read_bytes(), "decode")
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert (header.width, header.height) == (300, 200)
    assert np.abs(by_dali(path.read_bytes()) - expected).mean() < 0.1


#: Of what PIL writes: modes that are let in, and modes that DALI refuses or takes for other pixels.
MODES = {
    "TIFF": ("L P RGB RGBA CMYK YCbCr I;16", "1 LA LAB I F"),
    "PNG": ("1 L LA P RGB RGBA I;16", ""),
    "JPEG2000": ("L RGB RGBA I;16", "LA CMYK"),
    "PPM": ("1 L RGB RGBA", "I F I;16"),
    "BMP": ("1 L P RGB RGBA", ""),
}


def in_mode(photograph: Image.Image, mode: str) -> Image.Image:
    grey = np.asarray(photograph.convert("L"))
    wide = {"I": grey.astype(np.int32) * 256, "F": grey.astype(np.float32), "I;16": grey.astype(np.uint16) * 257}
    if mode == "LAB":
        return Image.merge("LAB", photograph.split())  # any pixels will do
    return Image.fromarray(wide[mode]) if mode in wide else photograph.convert(mode)


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind][0].split()])
def test_dali_decodes_accepted_modes(kind, mode, photograph):
    data = encoded(in_mode(photograph, mode), kind)
    check_image(data, "decode")
    expected = np.asarray(_stored_pixels(Image.open(io.BytesIO(data))).convert("RGB"), dtype=int)
    assert np.abs(by_dali(data) - expected).max() <= 1  # palettes and YCbCr of TIFF are rounded otherwise


UNLIKE = "it is a {} that DALI and PIL do not decode alike \\({}\\); convert it to JPEG or PNG"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind][1].split()])
def test_modes_that_dali_decodes_to_other_pixels_are_refused(kind, mode, check, photograph):
    with pytest.raises(ValueError, match=UNLIKE.format(kind, ".*")):
        check_image(encoded(in_mode(photograph, mode), kind), check)


def bitmap(bits: int, masks: tuple[int, ...] = (), header_bytes: int = 40) -> bytes:
    """Make a BMP of 8×8 random pixels, as PIL does not write them. Masks follow a header of 40 bytes."""
    pixels = np.random.default_rng(0).bytes(8 * bits)
    header = struct.pack("<IiiHHIIiiII", header_bytes, 8, 8, 1, bits, 3 * bool(masks), len(pixels), 0, 0, 0, 0)
    header = (header + struct.pack(f"<{len(masks)}I", *masks)).ljust(header_bytes, b"\0")
    return struct.pack("<2sIII", b"BM", 14 + len(header) + len(pixels), 0, 14 + len(header)) + header + pixels


def run_length_bitmap(bits: int, grey: bool = False) -> bytes:
    """Make a BMP of 8×8 pixels with a palette, each row a single run."""
    palette = b"".join(bytes((15 * number, 255 - 15 * number, 3 * number, 0)) for number in range(16))
    if grey:
        palette = b"".join(bytes((number, number, number, 0)) for number in range(16))
    rows = b"".join(bytes((8, row * (17 if bits == 4 else 1), 0, 0)) for row in range(8)) + b"\0\1"
    start = 54 + len(palette)
    header = struct.pack("<2sIII", b"BM", start + len(rows), 0, start)
    header += struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, bits, {8: 1, 4: 2}[bits], len(rows), 0, 0, 16, 0)
    return header + palette + rows


def tiff(pixels: np.ndarray, **options) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, metadata=None, **options)
    return out.getvalue()


def raw_variants(photograph: Image.Image) -> dict[str, tuple[bytes, str | None]]:
    """Return for each variant an image, and how the message names the variant if it is refused."""
    rgb = np.asarray(photograph)[:40, :48]
    rgba = np.dstack([rgb, 255 - rgb[..., :1]])
    planes, four_planes = (np.ascontiguousarray(np.moveaxis(pixels, 2, 0)) for pixels in (rgb, rgba))
    wide = rgb.astype(np.uint16) * 257
    premultiplied = {"photometric": "rgb", "extrasamples": ["assocalpha"]}
    separate = {"photometric": "rgb", "planarconfig": "separate"}
    cmyk = {"photometric": "separated"}
    tall = photograph.crop((0, 0, 40, 30))
    xbgr, bgxr, bgrx = (0xFF << 24, 0xFF << 16, 0xFF << 8), (0xFF << 24, 0xFF << 8, 0xFF), (0xFF << 16, 0xFF << 8, 0xFF)
    abgr, bgra = (*xbgr, 0xFF), (*bgrx, 0xFF << 24)
    rgba_masks = (0xFF, 0xFF << 8, 0xFF << 16, 0xFF << 24)
    variants = {
        "BMP of 15 bits": (bitmap(16), "RGB raw BGR;15"),
        "BMP of 15 bits with masks": (bitmap(16, (0x7C00, 0x03E0, 0x001F)), "RGB raw BGR;15"),
        "BMP of 16 bits": (bitmap(16, (0xF800, 0x07E0, 0x001F)), "RGB raw BGR;16"),
        "BMP of 16 bits, long header": (bitmap(16, (0xF800, 0x07E0, 0x001F, 0), 108), "RGB raw BGR;16"),
        "BMP of 24 bits": (bitmap(24), None),
        "BMP of 32 bits": (bitmap(32), None),
        "BMP with masks in DALI's order": (bitmap(32, bgrx), None),
        "BMP with masks in another order": (bitmap(32, xbgr), "RGB raw XBGR"),
        "BMP with masks in a third order": (bitmap(32, bgxr), "RGB raw BGXR"),
        "BMP with masks in another order, long header": (bitmap(32, (*xbgr, 0), 124), "RGB raw XBGR"),
        "BMP with transparency last": (bitmap(32, abgr, 124), None),
        "BMP with transparency first": (bitmap(32, bgra, 108), None),
        "BMP with red first": (bitmap(32, rgba_masks, 108), None),
        "BMP of runs": (run_length_bitmap(8), None),
        "BMP of runs of grey": (run_length_bitmap(8, grey=True), None),
        "BMP of runs of 4 bits": (run_length_bitmap(4), "P bmp_rle P;4"),
        "PPM of 101 levels": (b"P5\n4 4\n100\n" + bytes(range(16)), "L ppm L"),
        "PPM of 65536 levels": (b"P6\n2 2\n65535\n" + bytes(range(24)), "RGB ppm RGB"),
        "plain grey PPM": (b"P2\n4 4\n255\n" + b"9 " * 16, "L ppm_plain L"),
        "plain PPM": (b"P3\n4 4\n255\n" + b"9 " * 48, "RGB ppm_plain RGB"),
        "plain black and white PPM": (b"P1\n4 4\n" + b"0 1 1 0 " * 4, None),
        "TIFF": (tiff(rgb, photometric="rgb"), None),
        "TIFF of 16 bits": (tiff(wide, photometric="rgb"), None),
        "TIFF of 16 bits, grey": (tiff(wide[..., 0], photometric="minisblack"), None),
        "TIFF of 16 bits, white is 0": (tiff(wide[..., 0], photometric="miniswhite"), None),
        "TIFF with white as 0": (tiff(rgb[..., 0], photometric="miniswhite"), None),
        "TIFF in tiles": (tiff(rgb, photometric="rgb", tile=(16, 16)), None),
        "TIFF of CMYK": (tiff(rgba, **cmyk), None),
        "TIFF with a fourth channel": (tiff(rgba, photometric="rgb", extrasamples=["unspecified"]), None),
        "TIFF with transparency": (tiff(rgba, photometric="rgb", extrasamples=["unassalpha"]), None),
        "TIFF with premultiplied transparency": (tiff(rgba, **premultiplied), "RGBA raw RGBa"),
        "deflated TIFF with it": (tiff(rgba, compression="zlib", **premultiplied), "RGBA libtiff RGBa"),
        "TIFF of 16 bits with it": (tiff(rgba.astype(np.uint16) * 257, **premultiplied), "RGBA raw RGBa;16L"),
        "TIFF in planes": (tiff(planes, **separate), "RGB raw R in planes"),
        "deflated TIFF in planes": (tiff(planes, compression="zlib", **separate), "RGB libtiff RGB in planes"),
        "TIFF in 4 planes": (tiff(four_planes, extrasamples=["unassalpha"], **separate), "RGBA raw R in planes"),
        "TIFF in planes of CMYK": (tiff(four_planes, planarconfig="separate", **cmyk), "CMYK raw C in planes"),
        "JPEG 2000": (encoded(tall, "JPEG2000"), None),
        "JPEG 2000 in tiles": (encoded(tall, "JPEG2000", tile_size=(16, 16)), None),
        "JPEG 2000 codestream": (encoded(tall, "JPEG2000", no_jp2=True), None),
    }
    for name, no_box in (("jp2", False), ("j2k", True)):
        for number, place in enumerate([{}, {"tile_offset": (3, 3)}]):
            data = encoded(tall, "JPEG2000", tile_size=(400, 400), offset=(5, 7), no_jp2=no_box, **place)
            variants[f"{name} at an offset, {number}"] = data, f"RGB jpeg2k {name} at an offset"
    return variants


VARIANTS = raw_variants(read_photograph())


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_refused_or_decoded_alike(name):
    """At every level of checking; DALI and PIL decode accepted ones to the same pixels."""
    data, variant = VARIANTS[name]
    for check in CHECKS:
        if variant is None:
            check_image(data, check)
        else:
            with pytest.raises(ValueError, match=UNLIKE.format(r"\w+", variant)):
                check_image(data, check)
    if variant is None:
        expected = np.asarray(_stored_pixels(Image.open(io.BytesIO(data))).convert("RGB"), dtype=int)
        assert np.abs(by_dali(data) - expected).max() <= 1


def test_refused_variants_are_not_decoded_alike():
    """DALI refuses them or decodes other pixels, but for a few whose kind it does not always decode alike."""
    alike = set()
    for name, (data, variant) in VARIANTS.items():
        if variant is not None:
            expected = np.asarray(_stored_pixels(Image.open(io.BytesIO(data))).convert("RGB"), dtype=int)
            try:
                decoded = by_dali(data)
            except RuntimeError:
                continue
            if np.abs(decoded - expected).max() <= 1:
                alike.add(name)
    assert alike <= {
        *("BMP with masks in another order, long header", "PPM of 65536 levels", "plain grey PPM", "plain PPM"),
        *("TIFF in planes", "deflated TIFF in planes", "TIFF in planes of CMYK"),
    }


# Checks

NO_IMAGE = "it is no image, or of an unknown format"


def damaged_files(photograph: Image.Image) -> dict[str, tuple[bytes, dict[str, str]]]:
    """Return for each damage the bytes, and the reason by each check that finds it."""
    jpeg, png = encoded(photograph, "JPEG", quality=95), encoded(photograph, "PNG")
    thumbnail = encoded(photograph.resize((60, 40)), "JPEG")
    embedded = encoded(photograph, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail)
    cut = "it cannot be decoded: image file is truncated"
    checksum = png.index(b"IDAT") + 200
    return {
        "empty": (b"", dict.fromkeys(CHECKS, "the file is empty")),
        "text": (b"not an image", dict.fromkeys(CHECKS, NO_IMAGE)),
        "gif": (encoded(photograph, "GIF"), dict.fromkeys(CHECKS, "it is a GIF, which DALI does not decode; convert")),
        "jpeg that ends in its header": (jpeg[:150], dict.fromkeys(CHECKS, "it ")),
        "half a jpeg": (jpeg[: len(jpeg) // 2], {"decode": cut, "header": cut}),
        "jpeg without its last 2 bytes": (jpeg[:-2], {"decode": cut, "header": cut}),
        "half a jpeg with a whole one in its metadata": (
            embedded[: len(embedded) // 2],
            {"decode": cut, "header": cut},
        ),
        "half a png": (png[: len(png) // 2], dict.fromkeys(("decode", "header"), "it cannot be decoded: ")),
        "png without its end": (png[:-4], dict.fromkeys(("decode", "header"), "it cannot be decoded: ")),
        "png with a wrong checksum": (
            png[:checksum] + bytes([png[checksum] ^ 1]) + png[checksum + 1 :],
            dict.fromkeys(("decode", "header"), "it cannot be decoded: broken PNG file"),
        ),
        "half a bmp": ((bmp := encoded(photograph, "BMP"))[: len(bmp) // 2], {"decode": cut}),
    }


@pytest.mark.parametrize("check", CHECKS)
def test_faults_found_by_each_check(check, photograph):
    for name, (data, reasons) in damaged_files(photograph).items():
        if check in reasons:
            with pytest.raises(ValueError, match=reasons[check]):
                check_image(data, check)
        else:
            header = check_image(data, check)
            assert (name, header.width, header.height) == (name, 300, 200)


def test_random_bytes_raise_no_other_error(photograph):
    """Random bytes after the signature of each format, and inside intact files."""
    generator = np.random.Generator(np.random.Philox(0))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"):
        whole = encoded(photograph.resize((64, 48)), kind)
        for _ in range(30):
            data = bytearray(whole)
            start = int(generator.integers(0, min(len(data), 400)))
            data[start : start + 20] = generator.bytes(20)
            for check in CHECKS:
                try:
                    check_image(bytes(data), check)
                except ValueError as error:
                    assert str(error).startswith("it ")  # noqa: PT017  (not raising is right as well)


# Smaller images


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (200, 200), (1000, 50)])
def test_short_side_after_downscaling(size, photograph):
    data = encoded(photograph.resize(size), "PNG")
    header = check_image(data, "decode")
    smaller, after = downscale_image(data, header, Downscale(48, 90))
    short = min(size)
    assert after == Header("jpg", round(size[0] * 48 / short), round(size[1] * 48 / short))
    with Image.open(io.BytesIO(smaller)) as image:
        assert (image.format, image.size) == ("JPEG", (after.width, after.height))


def test_small_images_keep_their_bytes(photograph):
    data = encoded(photograph, "PNG")
    header = check_image(data, "decode")
    for side in (200, 201, 1000):
        assert downscale_image(data, header, Downscale(side, 90)) == (data, header)
    assert downscale_image(data, header, Downscale(199, 90))[1] == Header("jpg", 298, 199)


def test_downscaling_is_deterministic_and_obeys_quality(photograph):
    data = encoded(photograph, "PNG")
    header = check_image(data, "decode")
    sizes = [len(downscale_image(data, header, Downscale(100, quality))[0]) for quality in (50, 90, 95)]
    assert sizes == sorted(set(sizes))
    assert downscale_image(data, header, Downscale(100, 90)) == downscale_image(data, header, Downscale(100, 90))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_downscaled_images_match_dali_decoding(mode, photograph):
    """16 bits become 8, transparency is dropped, CMYK becomes RGB."""
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257)
    else:
        stored = photograph.convert(mode)
    data = encoded(stored, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 98} if mode == "CMYK" else {}))
    smaller, header = downscale_image(data, check_image(data, "decode"), Downscale(100, 95))
    assert (header.extension, header.cmyk) == ("jpg", mode == "CMYK")
    expected = Image.fromarray(by_dali(data).astype(np.uint8)).resize((150, 100), Image.Resampling.LANCZOS)
    assert np.abs(by_dali(smaller) - np.asarray(expected).astype(int)).mean() < 4  # most of it from P's dithering


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_downscaling_does_not_rotate(kind, orientation, photograph):
    data = encoded(photograph, kind, exif=rotation(orientation))
    smaller, header = downscale_image(data, check_image(data, "decode"), Downscale(100, 95))
    assert header == Header("jpg", 150, 100, rotated=orientation != 1)
    expected = np.asarray(photograph.resize((150, 100), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(by_dali(smaller) - expected).mean() < 3
    with Image.open(io.BytesIO(smaller)) as image:
        assert dict(image.getexif()) == {}


def test_libjpeg_scaling_loses_no_quality(photograph):
    large = photograph.resize((1500, 1000), Image.Resampling.BICUBIC)
    data = encoded(large, "JPEG", quality=95)
    smaller, _ = downscale_image(data, check_image(data, "header"), Downscale(100, 95))
    expected = np.asarray(large.resize((150, 100), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(by_dali(smaller) - expected).mean() < 3


def test_downscaling_a_truncated_image_is_an_error(photograph):
    data = encoded(photograph, "JPEG")[:3000]
    with pytest.raises(ValueError, match="it cannot be decoded: image file is truncated"):
        downscale_image(data, check_image(data, "none"), Downscale(100, 90))


@pytest.mark.parametrize("check", CHECKS)
def test_pixel_limit_is_max_megapixels_not_pils(check, photograph, monkeypatch):
    """PIL's own limit, here of 100 pixels, has no effect."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = encoded(photograph.resize((1500, 1000)), kind)
        header = check_image(data, check, max_megapixels=2)
        assert downscale_image(data, header, Downscale(100, 90))[1] == Header("jpg", 150, 100)
        with pytest.raises(
            ValueError, match="it has 1500×1000 pixels, more than the 1 million of --max-megapixels; al"
        ):
            check_image(data, check, max_megapixels=1)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("check", CHECKS)
def test_heic_with_another_extension(check):
    data = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(1000)
    with pytest.raises(
        ValueError, match="it is HEIC, as phones write it, whatever its name; convert it to JPEG or PNG"
    ):
        check_image(data, check)

"""Finding images among other files, and letting in what DALI decodes to the same pixels."""

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from PIL import Image

from dataio.source import find_images, read_image


def test_nested_linked_and_hidden_files(source):
    """Sub-folders and links belong to their class, hidden files and files beside the classes to none."""
    before = len(list(source.glob("*/*")))
    nested = source / "cat" / "indoors" / "old"
    nested.mkdir(parents=True)
    (source / "cat" / "03.jpg").rename(nested / "photo.jpg")
    (source / "cat" / "linked.jpg").symlink_to(source / "cat" / "04.jpg")
    (nested / "up").symlink_to(source / "cat")  # a circle
    (source / "dog").symlink_to(source / "rocket")
    (source / "cat" / ".hidden.jpg").write_bytes(b"no image")
    (source / ".hidden").mkdir()
    (source / "README.txt").write_text("about these photographs")
    found = find_images(source)
    assert len(found.images) == before + 1 + 12
    assert found.classes == ["astronaut", "cat", "coffee", "dog", "rocket"]
    assert np.bincount([image.label for image in found.images]).tolist() == [12, 13, 12, 12, 12]
    assert found.broken == []
    for image in found.images:
        assert len(read_image(source / image.path)[0]) == image.bytes


def test_images_without_class_folders(photos):
    with pytest.raises(ValueError, match="cat holds no class folders; put the images of each class into a folder"):
        find_images(photos / "cat")


def test_empty_class(source):
    (source / "dog").mkdir()
    with pytest.raises(ValueError, match='class "dog" has no images; add some to .*/dog or remove that folder'):
        find_images(source)
    (source / "dog" / "rex.gif").write_bytes(b"")
    with pytest.raises(ValueError, match=r'class "dog" has no images \(1 files of other kinds\); add some'):
        find_images(source)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_keeps_its_stored_size(orientation, tmp_path, photos):
    """PIL turns TIFF files by their orientation, unlike all other formats; DALI gets the stored pixels."""
    rotation = Image.Exif()
    rotation[0x0112] = orientation
    with Image.open(photos / "cat" / "00.jpg") as image:
        size = image.size
        image.save(tmp_path / "turned.tif", exif=rotation)
    assert read_image(tmp_path / "turned.tif")[1:] == ("tiff", *size)


@pytest.mark.parametrize("ending", ["bmp", "jp2", "jpg", "pgm", "png", "tif", "webp"])
def test_dali_decodes_what_is_let_in(ending, tmp_path, photos):
    path = tmp_path / f"image.{ending}"
    with Image.open(photos / "cat" / "00.jpg") as image:
        grey = image.convert("L")
        grey.save(path)
    data, _, width, height = read_image(path)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decoder():
        return fn.decoders.image(fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)]), device="cpu")

    pipeline = decoder()
    pipeline.build()
    (decoded,) = pipeline.run()
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert (width, height) == grey.size
    assert np.abs(decoded.at(0).astype(int) - expected).mean() < 0.1

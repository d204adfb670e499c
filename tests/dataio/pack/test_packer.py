"""Packed photographs, read back with other tools: webdataset, DALI's reader, wds2idx."""

import io
from collections import Counter

import webdataset
from nvidia.dali import fn, pipeline_def
from PIL import Image
from wds2idx import IndexCreator

from dataio.manifest import load_manifest
from dataio.pack.image_checks import FORMATS
from dataio.pack.packer import PackOptions, pack


def test_sample_table_points_to_every_image(photos, shards, images_by_class, packed_images):
    assert packed_images(shards) == images_by_class(photos.glob("*/*"))


def test_sizes_are_those_of_the_stored_pixels(shards):
    """Including those of the photograph whose EXIF asks for a rotation."""
    manifest = load_manifest(shards)
    rotated = 0
    for row in manifest.samples:
        with open(shards / manifest.shards[row["shard"]].name, "rb") as file:
            file.seek(row["offset"])
            image = Image.open(io.BytesIO(file.read(row["bytes"])))
        assert (row["width"], row["height"]) == image.size
        rotated += image.getexif().get(0x0112, 1) != 1
    assert rotated == 1


def test_seed_shuffles_the_stored_order(photos, shards, tmp_path, packed_images):
    labels = load_manifest(shards).samples["label"]
    assert len(set(labels[:12])) == 4
    other = pack(photos, tmp_path / "other", PackOptions(shard_mib=1, seed=1))
    assert other.samples["label"].tolist() != labels.tolist()
    assert packed_images(tmp_path / "other") == packed_images(shards)


def test_bit_identical_again_and_with_other_workers(photos, shards, tmp_path, contents):
    for name, workers in (("one", 1), ("again", 1), ("three", 3)):
        pack(photos, tmp_path / name, PackOptions(shard_mib=1, workers=workers))
        assert contents(tmp_path / name) == contents(shards)


def test_shard_sizes_stay_within_the_limit(shards, photos):
    sizes = [shard.bytes for shard in load_manifest(shards).shards]
    assert max(sizes) <= 2**20
    largest = max(file.stat().st_size for file in photos.glob("*/*"))
    assert min(sizes[:-1]) > 2**20 - largest - 4096 - 10240  # another image would not have fitted


def test_webdataset_reads_the_shards(photos, shards, images_by_class):
    manifest = load_manifest(shards)
    urls = [str(shards / shard.name) for shard in manifest.shards]
    read = Counter()
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        (image,) = (value for field, value in sample.items() if field in FORMATS.values())
        read[manifest.classes[int(sample["cls"])], image] += 1
    assert read == images_by_class(photos.glob("*/*"))


def test_dali_reads_the_shards_through_the_index(photos, shards, images_by_class):
    manifest = load_manifest(shards)

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def reader():
        image, label = fn.readers.webdataset(
            paths=[str(shards / shard.name) for shard in manifest.shards],
            index_paths=[str(shards / shard.idx_name) for shard in manifest.shards],
            ext=[";".join(sorted(set(FORMATS.values()))), "cls"],
            missing_component_behavior="error",
            name="reader",
        )
        return image, label

    pipeline = reader()
    pipeline.build()
    read = Counter()
    for _ in range(pipeline.reader_meta("reader")["epoch_size"]):
        image, label = (output.at(0).tobytes() for output in pipeline.run())
        read[manifest.classes[int(label)], image] += 1
    assert read == images_by_class(photos.glob("*/*"))


def test_the_index_is_what_wds2idx_writes(shards, tmp_path):
    for shard in load_manifest(shards).shards:
        with IndexCreator(str(shards / shard.name), str(tmp_path / "idx"), verbose=False) as creator:
            creator.create_index()
        assert (tmp_path / "idx").read_text() == (shards / shard.idx_name).read_text()

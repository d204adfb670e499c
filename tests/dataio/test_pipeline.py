"""The DALI graph against PIL and torchvision, and the memory of its batches."""

import gc
import io
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms import functional as vision

from dataio.augment.params import ImageOptions, TransformParams, eval_params, train_params
from dataio.augment.policies import Op, RandAugment
from dataio.decode import BatchRequest, decode_batches
from dataio.manifest import Manifest, load_manifest
from dataio.pipeline import build_pipeline
from dataio.sampler import draws_at
from dataio.shards import LocalShards
from launch.benchmark.parity import apply_op_in_pil

CPU = torch.device("cpu")
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param(
        "cuda",
        id="cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU for nvJPEG"),
        ],
    ),
]


@pytest.fixture(scope="module")
def manifest(shards) -> Manifest:
    return load_manifest(shards)


def requests(params: TransformParams, batch_size: int) -> Iterator[BatchRequest]:
    """Requests of all samples that have parameters, in order; the last batch may be shorter."""
    samples = np.arange(len(params.flips))
    for first in samples[::batch_size]:
        chosen = samples[first : first + batch_size]
        yield BatchRequest(int(first), chosen, params.select(chosen))


def decode(
    manifest: Manifest, options: ImageOptions, params: TransformParams, device: torch.device = CPU
) -> torch.Tensor:
    """All images of the manifest in one tensor: (N, 3, S, S)."""
    batches = decode_batches(manifest, options, requests(params, 7), 7, device)
    return torch.cat([images for _, images in batches])


def levels(images: torch.Tensor, options: ImageOptions) -> torch.Tensor:
    """Normalised images as levels, 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (options.mean, options.std))
    return 255 * (images.cpu() * std + mean)


def pil_images(manifest: Manifest) -> list[Image.Image]:
    shards = LocalShards(manifest)
    return [Image.open(io.BytesIO(shards.read(sample))).convert("RGB") for sample in range(len(manifest))]


def draw_params(manifest: Manifest, options: ImageOptions, seed: int = 5) -> TransformParams:
    return train_params(manifest.samples, draws_at(seed, 0, len(manifest), options.draws_per_image), options)


def resize_in_pil(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resize to (width, height), rows first; since version 13 Pillow takes columns first in tall images."""
    return image.resize((size[0], image.height), resample).resize(size, resample)


def crop_in_pil(
    manifest: Manifest, params: TransformParams, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> list[Image.Image]:
    """The crops of all images in PIL, resized to size × size and flipped."""
    crop_boxes = zip(pil_images(manifest), params.crop_boxes.tolist(), strict=True)
    crops = [image.crop((left, top, left + width, top + height)) for image, (left, top, width, height) in crop_boxes]
    crops = [resize_in_pil(image, (size, size), resample) for image in crops]
    return [vision.hflip(image) if flip else image for image, flip in zip(crops, params.flips, strict=True)]


def assert_close(got: torch.Tensor, expected: list[Image.Image], device: str) -> None:
    """On the CPU only the last bits of filter weights differ from PIL's; on a GPU nvJPEG and DALI round otherwise."""
    reference = torch.stack([vision.pil_to_tensor(image) for image in expected]).float()
    differences = (got - reference).abs()
    by_image = differences.mean(dim=(1, 2, 3))
    if device == "cpu":
        assert differences.max() < 2.01  # levels
        assert by_image.mean() <= 0.02
        assert by_image.max() <= 0.05
    else:
        assert by_image.mean() <= 0.4
        assert by_image.max() <= 0.6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_mode", ["squash", "center"])
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 224 / 256), (97, 0.9), (64, 1.0)])
def test_evaluation_matches_pil(manifest, device, interpolation, crop_mode, size, crop_pct):
    options = ImageOptions(
        image_size=size,
        interpolation=interpolation,
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        threads=2,
    )
    got = levels(decode(manifest, options, eval_params(manifest.samples, options), torch.device(device)), options)
    side = int(size / crop_pct)
    resize = Resize((side, side) if crop_mode == "squash" else side, InterpolationMode(interpolation))
    images = pil_images(manifest)
    resized = [resize_in_pil(image, resize(image).size, RESAMPLING[interpolation]) for image in images]
    assert_close(got, [CenterCrop(size)(image) for image in resized], device)


@pytest.mark.parametrize("device", DEVICES)
def test_training_crops_and_flips_match_pil(manifest, device):
    options = ImageOptions(image_size=96, augmentation="simple", threads=2)
    params = draw_params(manifest, options)
    assert 0 < params.flips.sum() < len(manifest)
    assert_close(
        levels(decode(manifest, options, params, torch.device(device)), options),
        crop_in_pil(manifest, params, 96),
        device,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(ImageOptions(image_size=96, threads=2), id="rand-augment"),
        pytest.param(ImageOptions(image_size=96, threads=2, rand_augment=RandAugment(num_layers=1)), id="one layer"),
        pytest.param(ImageOptions(image_size=96, threads=2, interpolation="bilinear"), id="bilinear"),
        pytest.param(ImageOptions(image_size=96, threads=2, augmentation="three-augment"), id="three-augment"),
        pytest.param(
            ImageOptions(image_size=96, threads=2, augmentation="simple", color_jitter=0.4), id="colour jitter"
        ),
    ],
)
def test_augmentations_match_pil(manifest, options, device):
    """From the encoded image to its last op. No maximum, as one pixel may decide on all of an image (equalize)."""
    params = draw_params(manifest, options)
    assert (params.ops != Op.NONE).any(axis=0).all()
    resample = RESAMPLING[options.interpolation]
    expected = []
    for image, ops, op_args in zip(
        crop_in_pil(manifest, params, 96, resample), params.ops, params.op_args, strict=True
    ):
        for op, op_arg in zip(ops, op_args, strict=True):
            image = apply_op_in_pil(image, Op(op), op_arg, options.interpolation)
        expected.append(vision.pil_to_tensor(image))
    got = levels(decode(manifest, options, params, torch.device(device)), options)
    differences = (got - torch.stack(expected)).abs().mean(dim=(1, 2, 3))
    assert differences.median() < 0.5
    assert differences.mean() < 0.8


@pytest.mark.parametrize("augmentation", ["simple", "three-augment", "rand-augment"])
def test_a_graph_for_a_gpu_can_be_built_without_one(augmentation):
    """DALI refuses operators without a GPU implementation, and arguments on a GPU that must be on the CPU."""
    options = ImageOptions(augmentation=augmentation)
    build_pipeline(options, lambda: (), 4, torch.device("cuda", 0), None)


@pytest.mark.parametrize("device", DEVICES)
def test_images_are_channels_last_float32_on_the_device(manifest, device):
    options = ImageOptions(image_size=48, threads=2)
    images = decode(manifest, options, eval_params(manifest.samples, options), torch.device(device))
    assert images.shape == (len(manifest), 3, 48, 48)
    assert images.dtype == torch.float32
    assert images.device.type == device
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_keeps_its_pixels_while_the_next_ones_are_decoded(manifest, device):
    options = ImageOptions(image_size=64, threads=2)
    params = eval_params(manifest.samples, options)
    batches = [
        (images, images.clone())
        for _, images in decode_batches(manifest, options, requests(params, 4), 4, torch.device(device))
    ]
    assert len(batches) == len(manifest) // 4
    assert all(torch.equal(kept, at_first) for kept, at_first in batches)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_outlives_its_pipeline_and_may_be_overwritten(manifest, device):
    """DALI never overwrites a batch that is still held, and no later batch has what the caller wrote."""
    options = ImageOptions(image_size=64, threads=2)
    params = [draw_params(manifest, options, seed) for seed in range(3)]
    expected = [decode(manifest, options, of_seed, torch.device(device)).clone() for of_seed in params]
    begun = decode_batches(manifest, options, requests(params[0], 4), 4, torch.device(device))
    held = [images for _, images in itertools.islice(begun, 8)]
    begun.close()  # early, with batches in flight
    del begun
    gc.collect()
    later = decode(manifest, options, params[1], torch.device(device))
    assert torch.equal(torch.cat(held), expected[0][:32])
    assert torch.equal(later, expected[1])
    for images in held:
        images.fill_(torch.nan)
    assert torch.equal(decode(manifest, options, params[2], torch.device(device)), expected[2])
    assert torch.cat(held).isnan().all()
    assert torch.equal(later, expected[1])


def test_flipping_mirrors_the_same_pixels(manifest):
    plain, flipped = (ImageOptions(image_size=64, augmentation="simple", hflip=probability) for probability in (0, 1))
    images, mirrored = (decode(manifest, options, draw_params(manifest, options)) for options in (plain, flipped))
    assert torch.equal(images.flip(3), mirrored)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augmentation", ["simple", "three-augment", "rand-augment"])
def test_pixels_do_not_depend_on_batch_threads_or_prefetch(manifest, augmentation, device):
    few = ImageOptions(image_size=64, augmentation=augmentation, threads=1, prefetch_batches=1)
    many = ImageOptions(image_size=64, augmentation=augmentation, threads=3, prefetch_batches=4)
    params = draw_params(manifest, few)
    backwards = np.arange(len(manifest))[::-1]
    in_one = [BatchRequest(0, backwards, params.select(backwards))]
    ((_, images),) = decode_batches(manifest, many, iter(in_one), len(manifest), torch.device(device))
    assert torch.equal(images.flip(0), decode(manifest, few, params, torch.device(device)))


@pytest.mark.parametrize("augmentation", ["three-augment", "rand-augment"])
def test_augmentation_leaves_evaluation_alone(manifest, augmentation):
    simple, other = (ImageOptions(image_size=64, augmentation=name, threads=2) for name in ("simple", augmentation))
    images = [decode(manifest, options, eval_params(manifest.samples, options)) for options in (simple, other)]
    assert torch.equal(*images)


def test_augmentation_leaves_crops_and_flips_alone(manifest):
    """A sample has the same crop and flip from the same draws, whatever ops follow."""
    draws = draws_at(0, 0, len(manifest), ImageOptions().draws_per_image)
    crops_and_flips = [
        train_params(manifest.samples, draws[:, : options.draws_per_image], options)[:4]
        for options in (
            ImageOptions(),
            ImageOptions(augmentation="simple"),
            ImageOptions(augmentation="simple", color_jitter=0.0),
        )
    ]
    assert all(
        np.array_equal(*pair) for others in crops_and_flips[1:] for pair in zip(crops_and_flips[0], others, strict=True)
    )

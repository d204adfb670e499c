"""Who takes part in the data benchmark: ours, and webdataset with the transforms of torchvision and of timm.

Each is an object made for one task, whose `epoch` hands out all images once. dali_loaders.py has what needs DALI's own
graphs; loading.py runs each in a process of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode, v2

from dataio.cache import open_shards
from dataio.index import Manifest, Order, draws_at, load_manifest
from dataio.loader import EvalLoader
from dataio.pipeline import ImageOptions, Request, decode_batches, train_views
from launch.config import DataSection
from launch.plan import image_options

RECIPES = get_args(DataSection.model_fields["recipe"].annotation)
#: What is done to the images.
WORKS = ("read", "decode", "evaluation", *reversed(RECIPES))  # from least to most
GRID = 8  # decoded images are handed over as so many pixels a side, taken from all over them
ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp")
SHUFFLED = 1000  # encoded images in a rival's buffer
SEED = 0


@dataclass(frozen=True)
class Task:
    """What is to be loaded, and with how much. `cores`: threads or worker processes."""

    work: str  # of WORKS
    folder: Path  # packed
    batch: int
    size: int  # pixels, of the normalised images
    cores: int
    device: str  # where batches are handed over

    @property
    def shuffled(self) -> bool:
        """In another order each epoch; otherwise in stored order, so that pixels can be compared."""
        return self.work not in ("decode", "evaluation")

    def options(self) -> ImageOptions:
        """Ours; the rivals read the same numbers off it."""
        recipe = {"recipe": self.work} if self.work in RECIPES else {}
        data = DataSection(train="-", val="-", image_size=self.size, threads=self.cores, **recipe)
        return image_options(data)


class Delivery(NamedTuple):
    """A batch. `rows`: of the manifest, None where the loader does not know and nobody asks.

    images: B encoded images; (B, GRID, GRID, 3) uint8; or (B, 3, S, S) float32, normalised, on the device.
    """

    images: Any
    labels: Any  # B numbers
    rows: Any = None


class Loader(Protocol):
    """A contestant."""

    def epoch(self, number: int) -> Iterator[Delivery]:
        """Every image once."""


class Ours:
    """dataio, as launch/train.py and launch/evaluate.py use it."""

    def __init__(self, task: Task) -> None:
        self.task, self.manifest = task, load_manifest(task.folder)
        self._options, self._device = task.options(), torch.device(task.device)

    def epoch(self, number: int) -> Iterator[Delivery]:
        if self.task.work == "read":
            return self._read(number)
        if self.task.work == "evaluation":
            return self._evaluate()
        return self._train(number)

    def _read(self, number: int) -> Iterator[Delivery]:
        with closing(open_shards(self.manifest)) as shards:
            for _, samples in training_order(self.manifest, number, self.task.batch):
                encoded = [shards.read(sample) for sample in samples]
                yield Delivery(encoded, self.manifest.samples["label"][samples], samples)

    def _evaluate(self) -> Iterator[Delivery]:
        for batch in EvalLoader(self.manifest, self._options, self.task.batch, 0, 1, self._device):
            yield Delivery(batch.images, batch.labels, batch.samples)

    def _train(self, number: int) -> Iterator[Delivery]:
        """TrainLoader has no end, and would be decoding the next epoch when a rival's turn begins."""
        requests = self._requests(number)
        for request, images in decode_batches(self.manifest, self._options, requests, self.task.batch, self._device):
            labels = torch.from_numpy(self.manifest.samples["label"][request.samples].astype(np.int64))
            yield Delivery(images, labels.to(self._device), request.samples)

    def _requests(self, number: int) -> Iterator[Request]:
        for first, samples in training_order(self.manifest, number, self.task.batch):
            draws = draws_at(SEED, first, len(samples), self._options.draws_per_image)
            yield Request(first, samples, train_views(self.manifest.samples[samples], draws, self._options))


def training_order(manifest: Manifest, epoch: int, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """An epoch's batches: (position of the first sample, samples)."""
    order = Order(SEED, manifest.shard_samples)
    first, end = epoch * len(manifest), (epoch + 1) * len(manifest)
    for position in range(first, end, batch):
        yield position, order.samples_at(np.arange(position, min(position + batch, end)))


def row_of_names(manifest: Manifest) -> dict[str, int]:
    """Keys of samples in their shards, as webdataset calls them → rows of the manifest."""
    rows: dict[str, int] = {}
    for shard in manifest.shards:
        for line in (manifest.folder / shard.idx_name).read_text().splitlines()[1:]:
            rows[line.split()[3].partition(".")[0]] = len(rows)
    return rows


class WebDataset:
    """webdataset's reader in torch's worker processes, which decode with PIL; `transform` does the rest there."""

    def __init__(self, task: Task, transform: Callable[[Image.Image], Any] | None = None) -> None:
        import webdataset

        self.task, self._transform = task, transform
        manifest = load_manifest(task.folder)
        self._rows = row_of_names(manifest)
        urls = [str(manifest.folder / shard.name) for shard in manifest.shards]
        # webdataset deals whole shards to workers: with more workers than shards, some would have nothing to do.
        workers = min(task.cores, len(urls)) * (task.work != "read")  # bytes are read faster than workers hand them on
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls) if task.shuffled else False, seed=SEED)
        if task.shuffled:
            dataset = dataset.shuffle(SHUFFLED)
        if task.work != "read":
            dataset = dataset.decode("pil")
        dataset = dataset.to_tuple("__key__", ";".join(ENDINGS), "cls").map_tuple(str, self._transform_image, int)
        dataset = dataset.batched(task.batch, collation_fn=default_collate)  # writes into shared memory at once
        self._loader = webdataset.WebLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=task.device != "cpu" and workers > 0,
        )

    def _transform_image(self, image: Any) -> Any:
        return image if self._transform is None else self._transform(image)

    def epoch(self, number: int) -> Iterator[Delivery]:
        for names, images, labels in self._loader:
            if isinstance(images, Tensor):
                images = images.to(self.task.device, non_blocking=True)
            yield Delivery(images, labels, np.array([self._rows[name] for name in names]))


def grid_of(pixels: np.ndarray) -> np.ndarray:
    """GRID × GRID pixels from all over an image: (H, W, 3) → (GRID, GRID, 3)."""
    rows, columns = (np.arange(GRID) * side // GRID for side in pixels.shape[:2])
    return pixels[rows[:, None], columns]


def pil_grid(image: Image.Image) -> np.ndarray:
    """The whole image decoded, and its grid."""
    return grid_of(np.asarray(image))


def torchvision_transform(task: Task) -> Callable[[Image.Image], Tensor]:
    """torchvision's evaluation or training transform, for PIL images."""
    options, bicubic = task.options(), InterpolationMode.BICUBIC
    if task.work == "evaluation":
        side = int(task.size / options.eval_crop_fraction)
        cut = [v2.Resize((side, side), bicubic), v2.CenterCrop(task.size)]
    else:
        cut = [
            v2.RandomResizedCrop(task.size, options.crop_scale, options.crop_ratio, bicubic),
            v2.RandomHorizontalFlip(options.flip_probability),
        ]
    to_numbers = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(options.mean, options.std)]
    return v2.Compose([*cut, *to_numbers])


def timm_transform(task: Task) -> Callable[[Image.Image], Tensor]:
    """timm's, likewise; its names for the recipes are beside ours."""
    from timm.data import auto_augment, create_transform

    # Pillow 13 refuses to keep 0 bits, which this operation asks for now and then; before, that gave black.
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = _posterize
    options = task.options()
    shared = {"interpolation": options.interpolation, "mean": options.mean, "std": options.std}
    if task.work == "evaluation":
        return create_transform(task.size, crop_pct=options.eval_crop_fraction, crop_mode="squash", **shared)
    return create_transform(
        task.size,
        is_training=True,
        scale=options.crop_scale,
        ratio=options.crop_ratio,
        hflip=options.flip_probability,
        auto_augment={"rand-augment": "rand-m9-mstd0.5-inc1", "three-augment": "3a", "simple": None}[task.work],
        color_jitter=options.jitter or None,
        **shared,
    )


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)

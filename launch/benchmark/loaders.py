"""The interface of the data benchmark's loaders, and those that read with webdataset and decode with PIL.

A loader is made for one config; its `epoch` yields all images once. dali_loaders.py has the loaders that need DALI,
ours among them; loader_processes.py runs each in a process of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode, v2

from dataio.manifest import Manifest, load_manifest
from launch.config import DataSection

AUGMENTATIONS = get_args(DataSection.model_fields["augmentation"].annotation)
WORKLOADS = ("read", "decode", "evaluation", *reversed(AUGMENTATIONS))  # from the least work to the most
GRID = 8  # pixels a side, taken from all over a decoded image, that are delivered of it
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
SHUFFLE_BUFFER = 1000  # encoded images in a baseline's buffer
SEED = 0


@dataclass(frozen=True)
class LoaderConfig:
    """The images, what is done to them, and the size of the batches. `cores`: threads or worker processes."""

    workload: str  # one of WORKLOADS
    folder: Path  # packed
    batch: int
    size: int  # pixels, of the normalised images
    cores: int
    device: str  # device that holds the batches

    @property
    def shuffled(self) -> bool:
        """Whether each epoch has another order; otherwise it is the stored one, so that pixels can be compared."""
        return self.workload not in ("decode", "evaluation")

    def data(self) -> DataSection:
        """Configure decoding and augmentation."""
        augmentation: dict[str, Any] = {"augmentation": self.workload} if self.workload in AUGMENTATIONS else {}
        return DataSection(train="-", val="-", image_size=self.size, threads=max(1, self.cores), **augmentation)


class LoadedBatch(NamedTuple):
    """A batch. `rows`: of the manifest, None where the loader does not know them and they are not needed.

    images: B encoded images; (B, GRID, GRID, 3) uint8; or (B, 3, S, S) float32, normalised, on the device.
    """

    images: Any
    labels: Any  # B numbers
    rows: Any = None


class Loader(Protocol):
    """Interface of the loaders."""

    def epoch(self, number: int) -> Iterator[LoadedBatch]:
        """Every image once, in batches."""


def rows_by_key(manifest: Manifest) -> dict[str, int]:
    """Rows of the manifest by the samples' webdataset keys."""
    rows: dict[str, int] = {}
    for shard in manifest.shards:
        for line in (manifest.folder / shard.idx_name).read_text().splitlines()[1:]:
            rows[line.split()[3].partition(".")[0]] = len(rows)
    return rows


class WebDataset:
    """Loader of webdataset: torch's worker processes read, decode with PIL and apply `transform`."""

    def __init__(self, config: LoaderConfig, transform: Callable[[Image.Image], Any] | None = None) -> None:
        import webdataset

        self.config, self._transform = config, transform
        manifest = load_manifest(config.folder)
        self._rows = rows_by_key(manifest)
        urls = [str(manifest.folder / shard.name) for shard in manifest.shards]
        # webdataset deals whole shards to workers: with more workers than shards, some would have nothing to do. Bytes
        # are read faster without workers than they can pass them on.
        workers = min(config.cores, len(urls)) if config.workload != "read" else 0
        dataset = webdataset.WebDataset(urls, shardshuffle=len(urls) if config.shuffled else False, seed=SEED)
        if config.shuffled:
            dataset = dataset.shuffle(SHUFFLE_BUFFER)
        if config.workload != "read":
            dataset = dataset.decode("pil")
        dataset = dataset.to_tuple("__key__", ";".join(EXTENSIONS), "cls").map_tuple(str, self._transform_image, int)
        dataset = dataset.batched(config.batch, collation_fn=default_collate)  # writes into shared memory at once
        self._loader = webdataset.WebLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=config.device != "cpu" and workers > 0,
        )

    def _transform_image(self, image: Any) -> Any:
        return image if self._transform is None else self._transform(image)

    def epoch(self, number: int) -> Iterator[LoadedBatch]:
        """Every image once, in batches."""
        for names, images, labels in self._loader:
            if isinstance(images, Tensor):
                images = images.to(self.config.device, non_blocking=True)
            yield LoadedBatch(images, labels, np.array([self._rows[name] for name in names]))


def grid_of(pixels: np.ndarray) -> np.ndarray:
    """GRID × GRID pixels from all over an image: (H, W, 3) → (GRID, GRID, 3)."""
    rows, columns = (np.arange(GRID) * side // GRID for side in pixels.shape[:2])
    return pixels[rows[:, None], columns]


def pil_grid(image: Image.Image) -> np.ndarray:
    """Grid of an image, which is decoded as a whole."""
    return grid_of(np.asarray(image))


def torchvision_transform(config: LoaderConfig) -> Callable[[Image.Image], Tensor]:
    """Build torchvision's transform for evaluation or training, from PIL images to (3, S, S) float32."""
    data, bicubic = config.data(), InterpolationMode.BICUBIC
    if config.workload == "evaluation":
        side = int(config.size / data.crop_pct)
        cut = [v2.Resize((side, side), bicubic), v2.CenterCrop(config.size)]
    else:
        cut = [
            v2.RandomResizedCrop(config.size, data.crop_scale, data.crop_ratio, bicubic),
            v2.RandomHorizontalFlip(data.hflip),
        ]
    to_numbers = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    return v2.Compose([*cut, *to_numbers])


def timm_transform(config: LoaderConfig) -> Callable[[Image.Image], Tensor]:
    """Build timm's transform for evaluation or training, from PIL images to (3, S, S) float32."""
    from timm.data import auto_augment, create_transform

    # Pillow 13 refuses to keep 0 bits, which this operation asks for now and then; before, that gave black.
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = _posterize
    data = config.data()
    shared: dict[str, Any] = {"interpolation": data.interpolation, "mean": data.mean, "std": data.std}
    if config.workload == "evaluation":
        return create_transform(config.size, crop_pct=data.crop_pct, crop_mode="squash", **shared)
    return create_transform(
        config.size,
        is_training=True,
        scale=data.crop_scale,
        ratio=data.crop_ratio,
        hflip=data.hflip,
        auto_augment={"rand-augment": "rand-m9-mstd0.5-inc1", "three-augment": "3a", "simple": None}[config.workload],
        color_jitter=0.3 if config.workload == "three-augment" else None,  # type: ignore[arg-type]  # as DeiT III
        **shared,
    )


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)

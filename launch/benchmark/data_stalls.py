"""Data stalls of a model: training steps on one batch that is already on the device, and on batches of our loader.

Mohan et al., "Analyzing and Mitigating Data Stalls in DNN Training" (VLDB 2021). data.py runs it, on a GPU for b4 and
b5 by default.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from dataio.loader import Batch, LoaderOptions, TrainLoader
from dataio.manifest import Manifest, load_manifest
from launch.benchmark.measure import MIN_ROUNDS, quantiles, synchronize
from launch.benchmark.step import Training
from launch.config import DataSection

_WARM_UP_STEPS = 3
_SEED = 0


@dataclass(frozen=True)
class DataStallConfig:
    """The model and the batches; each round runs `steps` training steps without the loader, and as many with it."""

    model: str
    recipe: str
    batch: int
    size: int  # pixels
    cores: int
    steps: int


def measure_data_stalls(config: DataStallConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """Images per second of the model alone and of the model with our loader, and their ratio."""
    manifest = load_manifest(folder)
    batches = _batches(config, manifest, device)
    torch.manual_seed(_SEED)
    training = Training(timm.create_model(config.model, num_classes=len(manifest.classes)), device)
    ready = next(batches)
    for _ in range(_WARM_UP_STEPS):
        training.step(ready.images, ready.labels)

    def rate(take: Callable[[], Batch]) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(config.steps):
            batch = take()
            training.step(batch.images, batch.labels)
        synchronize(device)
        return config.steps * config.batch / (time.perf_counter() - began)

    alone, fed = [], []
    for _ in range(MIN_ROUNDS):
        alone.append(rate(lambda: ready))
        fed.append(rate(lambda: next(batches)))
    return asdict(config) | {
        "step_images_per_second": asdict(quantiles(alone)),
        "fed_images_per_second": asdict(quantiles(fed)),
        "share_fed": quantiles([a / b for a, b in zip(fed, alone, strict=True)]).median,
    }


def _batches(config: DataStallConfig, manifest: Manifest, device: torch.device) -> Iterator[Batch]:
    recipe: dict[str, Any] = {"augmentation": config.recipe}
    data = DataSection(train="-", val="-", image_size=config.size, threads=config.cores, **recipe)
    return TrainLoader(manifest, data, LoaderOptions(_SEED, config.batch), device)

"""Whether a loader keeps a model busy: training steps on one batch that lies ready, and on batches of our loader.

data.py asks for it, on a GPU for b4 and b5. The step is plain PyTorch's: forward, loss, backward, AdamW.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

import polaformer  # noqa: F401  registers the models
from dataio.loader import Batch, LoaderOptions, TrainLoader
from dataio.manifest import Manifest, load_manifest
from launch.benchmark.measure import MIN_ROUNDS, quantiles
from launch.config import DataSection

_WARM_UP_STEPS = 3
_SEED = 0


@dataclass(frozen=True)
class DataStallConfig:
    """What is to be fed: `steps` of a model at a time, in turns with and without the loader."""

    model: str
    recipe: str
    batch: int
    size: int  # pixels
    cores: int
    steps: int


def measure_data_stalls(config: DataStallConfig, folder: Path, device: torch.device) -> dict[str, Any]:
    """Rates of the model alone and of the model with our loader, in images/s, and their ratio."""
    manifest = load_manifest(folder)
    batches = _batches(config, manifest, device)
    step = _make_step(config, len(manifest.classes), device)
    ready = next(batches)
    for _ in range(_WARM_UP_STEPS):
        step(ready)
    alone, fed = [], []
    for _ in range(MIN_ROUNDS):
        alone.append(_rate(config, step, lambda: ready, device))
        fed.append(_rate(config, step, lambda: next(batches), device))
    return asdict(config) | {
        "step_images_per_second": asdict(quantiles(alone)),
        "fed_images_per_second": asdict(quantiles(fed)),
        "share_fed": quantiles([a / b for a, b in zip(fed, alone, strict=True)]).median,
    }


def _batches(config: DataStallConfig, manifest: Manifest, device: torch.device) -> Iterator[Batch]:
    data = DataSection(train="-", val="-", image_size=config.size, threads=config.cores, augmentation=config.recipe)
    return TrainLoader(manifest, data, LoaderOptions(_SEED, config.batch), device)


def _make_step(config: DataStallConfig, classes: int, device: torch.device) -> Callable[[Batch], None]:
    torch.manual_seed(_SEED)
    model = timm.create_model(config.model, num_classes=classes).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _rate(
    config: DataStallConfig, step: Callable[[Batch], None], take: Callable[[], Batch], device: torch.device
) -> float:
    """Images per second over `config.steps` steps."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(config.steps):
        step(take())
    _wait(device)
    return config.steps * config.batch / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

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
from dataio.loader import Batch, TrainLoader, TrainPlan
from dataio.manifest import Manifest, load_manifest
from launch.benchmark.measure import LEAST_ROUNDS, spread
from launch.config import DataSection
from launch.plan import image_options

_WARM_UP_STEPS = 3
_SEED = 0


@dataclass(frozen=True)
class Feeding:
    """What is to be fed: `steps` of a model at a time, in turns with and without the loader."""

    model: str
    recipe: str
    batch: int
    size: int  # pixels
    cores: int
    steps: int


def measure_feeding(feeding: Feeding, folder: Path, device: torch.device) -> dict[str, Any]:
    """Rates of the model alone and of the model with our loader, in images/s, and their ratio."""
    manifest = load_manifest(folder)
    batches = _batches(feeding, manifest, device)
    step = _make_step(feeding, len(manifest.classes), device)
    ready = next(batches)
    for _ in range(_WARM_UP_STEPS):
        step(ready)
    alone, fed = [], []
    for _ in range(LEAST_ROUNDS):
        alone.append(_rate(feeding, step, lambda: ready, device))
        fed.append(_rate(feeding, step, lambda: next(batches), device))
    return asdict(feeding) | {
        "step_images_per_second": asdict(spread(alone)),
        "fed_images_per_second": asdict(spread(fed)),
        "share_fed": spread([a / b for a, b in zip(fed, alone, strict=True)]).median,
    }


def _batches(feeding: Feeding, manifest: Manifest, device: torch.device) -> Iterator[Batch]:
    data = DataSection(train="-", val="-", image_size=feeding.size, threads=feeding.cores, recipe=feeding.recipe)
    return TrainLoader(manifest, image_options(data), TrainPlan(_SEED, feeding.batch), device)


def _make_step(feeding: Feeding, classes: int, device: torch.device) -> Callable[[Batch], None]:
    torch.manual_seed(_SEED)
    model = timm.create_model(feeding.model, num_classes=classes).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _rate(feeding: Feeding, step: Callable[[Batch], None], take: Callable[[], Batch], device: torch.device) -> float:
    """Images per second over `feeding.steps` steps."""
    _wait(device)
    began = time.perf_counter()
    for _ in range(feeding.steps):
        step(take())
    _wait(device)
    return feeding.steps * feeding.batch / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

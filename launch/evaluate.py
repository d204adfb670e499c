"""Top-1 and top-5 accuracy of weights on packed images, every image exactly once on any number of ranks.

python -m launch.evaluate --weights RUN --data SHARDS
python -m launch.evaluate --weights RUN/checkpoints/best --kind model --data SHARDS
torchrun --standalone --nproc-per-node 8 -m launch.evaluate --weights model.safetensors --data SHARDS
"""

from launch.interrupt import EXIT_REFUSED, exit_on_interrupt, exit_process

if __name__ == "__main__":
    exit_on_interrupt()

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dataio.augment.params import ImageOptions
from dataio.files import user_path
from dataio.loader import Batch, EvalLoader
from dataio.manifest import Manifest, count_classes, map_labels
from dataio.remote.options import cache_options
from dataio.shards import open_dataset
from dataio.urls import redact_url
from launch.command_line import make_parser
from launch.distributed import (
    RankInfo,
    broadcast_object,
    default_device_type,
    get_local_world_size,
    raise_on_all_ranks,
    run_distributed,
)
from launch.find_weights import WEIGHTS_PATH_HELP, find_weights
from launch.model_metadata import ModelMetadata, make_model_metadata, read_model_metadata
from polaformer import PRESETS
from polaformer.model import TOTAL_STRIDE
from polaformer.weights import load_weights


@torch.no_grad()
def evaluate(
    models: Sequence[nn.Module], batches: Iterable[Batch], num_classes: int, precision: str
) -> list[dict[str, float]]:
    """Return top-1 and top-5 accuracy in percent and the mean cross-entropy of each model, over all ranks' batches.

    Every rank calls it, and may have fewer batches than others, or none. Leaves the models in the mode they were in.
    """
    device = next(models[0].parameters()).device
    scores = [_Metrics(num_classes, device) for _ in models]
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        for batch in batches:
            for model, score in zip(models, scores, strict=True):
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = model(batch.images)
                score.add(logits.float(), batch.labels)
    finally:  # `batches` may raise Stopped
        for model, was_training in zip(models, training, strict=True):
            model.train(was_training)
    return [score.compute() for score in scores]


class _Metrics:
    """Accuracy and loss of one model, over all ranks."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        # Imported late: it brings SciPy and Matplotlib, a quarter of all that training imports.
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        self._accuracy = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
            }
        ).to(device)
        self._loss = MeanMetric().to(device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self._accuracy.update(logits, labels)
        self._loss.update(F.cross_entropy(logits, labels, reduction="none"))

    def compute(self) -> dict[str, float]:
        percent = {name: 100 * value.item() for name, value in self._accuracy.compute().items()}
        return {**percent, "loss": self._loss.compute().item()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = make_parser("python -m launch.evaluate", __doc__)
    add = parser.add_argument
    add("--weights", type=user_path, required=True, help=WEIGHTS_PATH_HELP)
    data = "a folder written by python -m dataio.pack, or the URL of a copy"
    add("--data", type=os.path.expanduser, required=True, help=data)
    add("--cache", type=user_path, help="this machine's folder for remote shards (default: one of your own)")
    add("--cache-gib", type=float, default=64, help="size that it may reach (default 64)")
    add("--kind", choices=("ema", "model"), default="ema", help="which weights of a run or checkpoint (default ema)")
    add("--model", choices=tuple(PRESETS), help="needed where the file does not say (official .pth)")
    add("--image-size", type=int, help="pixels, a multiple of 32 (default: the weights' own, else 224)")
    add("--batch-size", type=int, default=64, help="images per rank at a time (default 64)")
    add("--precision", choices=("bf16", "fp32"), default="fp32", help="autocast or not (default fp32)")
    add("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    add("--threads", type=int, default=4, help="decoding threads of each rank (default 4)")
    add("--out", type=user_path, help="write the JSON there as well")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    arguments = parser.parse_args(argv)
    if arguments.out is not None and arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is a folder; name a file, for example {arguments.out / 'accuracy.json'}")
    return arguments


def prepare(
    arguments: argparse.Namespace, path: Path, device: torch.device, local_world_size: int
) -> tuple[nn.Module, EvalLoader, ModelMetadata]:
    """Return the model with the weights at `path`, this rank's batches, and the weights' metadata.

    local_world_size: how many ranks run on this machine, and share a cache.
    Raises ValueError, FileNotFoundError or RuntimeError if weights, model and data do not fit each other.
    """
    cache = cache_options(arguments.cache, arguments.cache_gib, arguments.data)
    manifest = open_dataset(arguments.data, cache)
    if manifest.remote:
        cache.check_cache_size(
            {manifest.location: EvalLoader.required_cache_bytes(manifest, arguments.batch_size, local_world_size)}
        )
    metadata = _resolve_metadata(arguments, path, manifest)
    label_map = map_labels(manifest, metadata.classes, str(path))
    model = timm.create_model(metadata.model, num_classes=len(metadata.classes))
    load_weights(model, path)
    if read_model_metadata(path) is None and dist.get_rank() == 0:
        first, last = metadata.classes[0], metadata.classes[-1]
        print(
            f"{path} names no classes; its outputs are taken to be those of {manifest.location}, from {first} to"
            f" {last} in that order",
            file=sys.stderr,
        )
    images = metadata.image_options(arguments.threads)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loader = EvalLoader(manifest, images, arguments.batch_size, rank, world_size, device, label_map)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval(), loader, metadata


def _resolve_metadata(arguments: argparse.Namespace, path: Path, manifest: Manifest) -> ModelMetadata:
    """Return the metadata in the file at `path`, or else that of the arguments, which must not contradict the file."""
    metadata = read_model_metadata(path)
    if metadata is None:
        if arguments.model is None:
            raise ValueError(f"{path} does not say which model it is of; add --model polaformerpp_b0 … b5")
        metadata = make_model_metadata(arguments.model, manifest.classes, ImageOptions())
    if arguments.model not in (None, metadata.model):
        raise ValueError(f"{path} is of {metadata.model}, not of --model {arguments.model}; leave --model out")
    if arguments.image_size is None:
        return metadata
    if arguments.image_size < TOTAL_STRIDE or arguments.image_size % TOTAL_STRIDE:
        raise ValueError(f"--image-size {arguments.image_size} is no size; use a multiple of {TOTAL_STRIDE}")
    return replace(metadata, image_size=arguments.image_size)


def main(argv: list[str] | None = None) -> int:
    """Evaluate weights as the command line says; return the exit status."""
    arguments = parse(argv)
    device_type = arguments.device or default_device_type()
    return run_distributed(partial(run, arguments), device_type, timedelta(minutes=10))


def run(arguments: argparse.Namespace, rank_info: RankInfo, device: torch.device) -> int:
    """Evaluate weights on all ranks, print the result on rank 0 and return the exit status.

    Raises RunError on every rank if weights, model and data do not fit each other.
    """
    local_world_size = get_local_world_size()
    with raise_on_all_ranks():
        path = find_weights(arguments.weights, arguments.kind) if rank_info.rank == 0 else None
    path = broadcast_object(path)  # on other ranks a run that is still training may have a newer one by now
    with raise_on_all_ranks():
        model, loader, metadata = prepare(arguments, path, device, local_world_size)
    [scores] = evaluate([model], loader, len(metadata.classes), arguments.precision)
    if rank_info.rank != 0:
        return 0
    report = {"weights": str(path), "model": metadata.model, "image_size": metadata.image_size}
    report |= {"data": redact_url(arguments.data), "samples": len(loader.manifest)}
    report |= {"classes": len(metadata.classes), "classes_with_samples": count_classes(loader.manifest), **scores}
    text = json.dumps(report, indent=1)
    print(text)
    return 0 if arguments.out is None else _write(arguments.out, text + "\n")


def _write(path: Path, text: str) -> int:
    """Write the JSON, which is printed already, and return the command's exit status."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        print(f"error: cannot write --out {path}: {error.strerror}; the JSON is above", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    exit_process(main())

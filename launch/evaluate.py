"""Top-1 and top-5 accuracy of weights on packed images, every image exactly once on any number of ranks.

python -m launch.evaluate --weights RUN --data SHARDS
python -m launch.evaluate --weights RUN/checkpoints/best --kind model --data SHARDS
torchrun --standalone --nproc-per-node 8 -m launch.evaluate --weights model.safetensors --data SHARDS
"""

from launch.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dataio.augment.views import ImageOptions
from dataio.files import user_path
from dataio.loader import Batch, EvalLoader, count_classes, map_labels
from dataio.manifest import Manifest
from dataio.remote.options import cache_options
from dataio.shards import open_data
from dataio.urls import shown
from launch.card import Card, make_card, read_card
from launch.distributed import (
    Refusal,
    count_ranks_here,
    default_device_type,
    end_at_once,
    from_rank_zero,
    placement,
    start,
    stop,
    together,
)
from launch.find_weights import WHAT_CAN_BE_NAMED, find_weights
from polaformer import PRESETS
from polaformer.model import TOTAL_STRIDE
from polaformer.weights import load_weights


@torch.no_grad()
def evaluate(
    models: Sequence[nn.Module], batches: Iterable[Batch], classes: int, precision: str
) -> list[dict[str, float]]:
    """Of each model, accuracies in percent and the mean cross-entropy over all ranks' batches; every rank calls it.

    A rank may have fewer batches than others, or none. Leaves the models in the mode they were in.
    """
    device = next(models[0].parameters()).device
    scores = [_Scores(classes, device) for _ in models]
    training = [model.training for model in models]
    for model in models:
        model.eval()
    for batch in batches:
        for model, score in zip(models, scores, strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(batch.images)
            score.add(logits.float(), batch.labels)
    for model, was_training in zip(models, training, strict=True):
        model.train(was_training)
    return [score.totals() for score in scores]


class _Scores:
    """Of one model, over all ranks."""

    def __init__(self, classes: int, device: torch.device) -> None:
        # Brings SciPy and Matplotlib along, a quarter of all that training imports: no run should wait for it to start.
        from torchmetrics import MeanMetric, MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        self._accuracy = MetricCollection(
            {
                "top1": MulticlassAccuracy(classes, average="micro"),
                "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
            }
        ).to(device)
        self._loss = MeanMetric().to(device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self._accuracy.update(logits, labels)
        self._loss.update(F.cross_entropy(logits, labels, reduction="none"))

    def totals(self) -> dict[str, float]:
        percent = {name: 100 * value.item() for name, value in self._accuracy.compute().items()}
        return {**percent, "loss": self._loss.compute().item()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate",
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--weights", type=user_path, required=True, help=WHAT_CAN_BE_NAMED)
    data = "a folder written by python -m dataio.pack, or the URL of a copy"
    add("--data", type=os.path.expanduser, required=True, help=data)
    add("--cache", type=user_path, help="this machine's folder for remote shards (default: one of your own)")
    add("--cache-gib", type=float, default=64, help="size that it may reach (default 64)")
    add("--kind", choices=("ema", "model"), default="ema", help="which weights of a run or checkpoint (default ema)")
    add("--model", choices=tuple(PRESETS), help="needed where the file does not say (official .pth)")
    add("--image-size", type=int, help="pixels, a multiple of 32 (default: the weights' own, else 224)")
    add("--batch", type=int, default=64, help="images per rank at a time (default 64)")
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
    arguments: argparse.Namespace, path: Path, device: torch.device, ranks_here: int
) -> tuple[nn.Module, EvalLoader, Card]:
    """The model with the weights at `path`, the batches of this rank, and what is known of the weights.

    ranks_here: those on this rank's machine, which share a cache.
    Raises ValueError, FileNotFoundError or RuntimeError if weights, model and data do not fit each other.
    """
    cache = cache_options(arguments.cache, arguments.cache_gib, arguments.data)
    manifest = open_data(arguments.data, cache)
    if manifest.remote:
        cache.require_room({manifest.place: EvalLoader.bytes_at_once(manifest, arguments.batch, ranks_here)})
    card = _settle_card(arguments, path, manifest)
    label_map = map_labels(manifest, card.classes, str(path))
    model = timm.create_model(card.model, num_classes=len(card.classes))
    load_weights(model, path)
    if read_card(path) is None and dist.get_rank() == 0:
        first, last = card.classes[0], card.classes[-1]
        print(
            f"{path} names no classes; its outputs are taken to be those of {manifest.place}, from {first} to {last} in"
            " that order",
            file=sys.stderr,
        )
    images = card.image_options(arguments.threads)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    loader = EvalLoader(manifest, images, arguments.batch, rank, ranks, device, label_map)
    return model.to(device, memory_format=torch.channels_last).eval(), loader, card


def _settle_card(arguments: argparse.Namespace, path: Path, manifest: Manifest) -> Card:
    """What the file at `path` says of itself, or else the arguments and the data; arguments must not contradict it."""
    card = read_card(path)
    if card is None:
        if arguments.model is None:
            raise ValueError(f"{path} does not say which model it is of; add --model polaformerpp_b0 … b5")
        card = make_card(arguments.model, manifest.classes, ImageOptions())
    if arguments.model not in (None, card.model):
        raise ValueError(f"{path} is of {card.model}, not of --model {arguments.model}; leave --model out")
    if arguments.image_size is None:
        return card
    if arguments.image_size < TOTAL_STRIDE or arguments.image_size % TOTAL_STRIDE:
        raise ValueError(f"--image-size {arguments.image_size} is no size; use a multiple of {TOTAL_STRIDE}")
    return replace(card, image_size=arguments.image_size)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        place = placement(os.environ)
        device = start(place, arguments.device or default_device_type(), timedelta(minutes=10))
    except (ValueError, RuntimeError) as error:  # of this rank alone: there is no group yet
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        ranks_here = count_ranks_here()
        with together():
            path = find_weights(arguments.weights, arguments.kind) if place.rank == 0 else None
        path = from_rank_zero(path)  # a run that goes on may have a newer one by now
        with together():
            model, loader, card = prepare(arguments, path, device, ranks_here)
        [scores] = evaluate([model], loader, len(card.classes), arguments.precision)
    except Refusal as refusal:
        if place.rank == 0:
            print(f"error: {refusal}", file=sys.stderr, flush=True)
        dist.barrier()  # launchers end all ranks as soon as one has ended
        stop()
        return 2
    except Exception:
        end_at_once()
    stop()
    if place.rank == 0:
        report = {"weights": str(path), "model": card.model, "image_size": card.image_size}
        report |= {"data": shown(arguments.data), "samples": len(loader.manifest)}
        report |= {"classes": len(card.classes), "classes_with_samples": count_classes(loader.manifest), **scores}
        text = json.dumps(report, indent=1)
        print(text)
        return 0 if arguments.out is None else _write(arguments.out, text + "\n")
    return 0


def _write(path: Path, text: str) -> int:
    """The command's exit status; what cannot be written has been printed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        print(f"error: cannot write --out {path}: {error.strerror}; the JSON is above", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

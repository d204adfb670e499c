"""Images of one's own for launch/quickstart.py: how they are laid out, and which settings suit their number."""

import hashlib
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataio.manifest import Manifest
from dataio.pack.layout import find_layout
from dataio.pack.options import PackOptions
from dataio.pack.packer import split
from dataio.pack.source import find_images, read_names

DEFAULT_VAL_PERCENT = 10.0


@dataclass(frozen=True)
class CustomDataset:
    """A data set that can be packed. val: None where validation images are held out of `train`.

    name: for folders of what is made of it; another one if an image or an option is another. remarks: for people.
    """

    name: str
    train: Path
    val: Path | None
    classes: tuple[str, ...]
    remarks: list[str]


def inspect_dataset(path: Path, options: PackOptions, val_percent: float | None) -> CustomDataset:
    """The parts and classes of the images at `path`: a folder, zip or tar, in any of the layouts of dataio.layout.

    Raises ValueError if they cannot be packed, one of training's classes is alone, or validation has further classes.
    """
    if not path.exists():
        raise ValueError(
            f"--data {path} is not there; name a folder, zip or tar with a folder of images for each class"
        )
    layout = find_layout(path)
    found = find_images(layout.train, options.classes and read_names(options.classes))
    if len(found.classes) < 2:
        raise ValueError(
            f"{found.name} has a single class, {found.classes[0]}, and there is nothing to tell apart; name a folder"
            " with a folder of images for each of at least two classes"
        )
    kind = f"{len(found.classes)} classes in {found.name}"
    if layout.val is None:
        percent = DEFAULT_VAL_PERCENT if val_percent is None else val_percent
        counts = {part: len(images) for part, images in split(found, percent).items()}
        stamp = f"{percent:g} %"
        remarks = [f"training images: {counts['train']} of {kind}", f"validation images: {counts['val']}, held out"]
    elif val_percent is not None:
        raise ValueError(
            f"--val-percent is for images without a validation part, and {layout.val} is one; leave it out"
        )
    else:
        try:
            val = find_images(layout.val, found.classes)
        except ValueError as error:
            raise ValueError(f"{error} (the names are those in {found.name})") from error
        stamp = val.fingerprint
        remarks = [f"training images: {len(found.images)} of {kind}"]
        remarks.append(f"validation images: {len(val.images)} in {val.name}")
    if layout.unused:
        remarks.append(f"left alone: {', '.join(map(str, layout.unused))}")
    return CustomDataset(
        dataset_name(path, options, [found.fingerprint, stamp, *found.classes]),
        layout.train,
        layout.val,
        found.classes,
        remarks,
    )


def dataset_name(path: Path, options: PackOptions, stamps: list[str]) -> str:
    """The folder's name without odd characters, and a hash of its place, its files and the options of packing."""
    name = re.sub(r"[^\w.]+", "-", path.resolve().stem if path.is_file() else path.resolve().name).strip("-.")
    made_with = list(replace(options, workers=0, skip_broken=False).flags())  # these change no byte
    said = [os.fsencode(path.resolve()), *(word.encode() for word in made_with + stamps)]
    return f"{name or 'images'}-{hashlib.sha256(b'|'.join(said)).hexdigest()[:8]}"


def image_overrides(train: Manifest) -> list[str]:
    """Crops, mean and size of photographs, which configs/quickstart.yaml has for 28×28 grey images; and how many steps.

    A few hundred images are seen a hundred times and more, in small batches: as many steps as a small model needs.
    """
    images = len(train)
    short = float(np.median(np.minimum(train.samples["width"], train.samples["height"])))
    return [
        f"data.image_size={32 if short < 48 else 64}",
        "data.crop_scale=[0.25, 1.0]",
        "data.crop_ratio=[0.75, 1.3333]",
        "data.crop_pct=0.875",
        "data.mean=[0.485, 0.456, 0.406]",
        "data.std=[0.229, 0.224, 0.225]",
        f"optimizer.epochs={20 + 24_000 / images:.4g}",
        f"optimizer.global_batch_size={32 if images < 1000 else 64 if images < 5000 else 192}",
        "optimizer.warmup_epochs=0",  # until schedule_overrides says
    ]


def schedule_overrides(images: int, epochs: float, batch: int) -> list[str]:
    """What follows from the number of steps: rate, warm-up, moving average, and when a run is evaluated and saved.

    The rate grows with the batch's square root. The average is over the last twentieth of the steps.
    """
    steps = max(1.0, epochs * images / batch)
    return [
        f"optimizer.lr={3.2e-3 * math.sqrt(192 / batch):.3g}",
        f"optimizer.warmup_epochs={epochs / 20:.3g}",
        f"optimizer.ema_decay={min(0.9998, max(0.0, 1 - 20 / steps)):.5g}",
        f"log.eval_every_epochs={epochs / 5:.4g}",
        f"checkpoint.every_epochs={epochs / 5:.4g}",
    ]

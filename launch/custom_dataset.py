"""A user's images for launch/quickstart.py: their layout, and the settings that suit their number and size."""

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
    """A data set that can be packed.

    name: of the folders of its shards and run; it depends on the images and the packing options.
    val: None if validation images are held out of `train`.
    remarks: lines that describe it.
    """

    name: str
    train: Path
    val: Path | None
    classes: tuple[str, ...]
    remarks: list[str]


def inspect_dataset(path: Path, options: PackOptions, val_percent: float | None) -> CustomDataset:
    """Find splits and classes of the images at `path`, a folder, zip or tar in any layout that find_layout knows.

    val_percent: None for the default where there is no validation split.
    Raises ValueError if the images cannot be packed, training has a single class, or validation has further classes.
    """
    if not path.exists():
        raise ValueError(
            f"--data {path} is not there; name a folder, zip or tar with a folder of images for each class"
        )
    layout = find_layout(path)
    found = find_images(layout.train, None if options.classes is None else read_names(options.classes))
    if len(found.classes) < 2:
        raise ValueError(
            f"{found.name} has a single class, {found.classes[0]}, and there is nothing to tell apart; name a folder"
            " with a folder of images for each of at least two classes"
        )
    kind = f"{len(found.classes)} classes in {found.name}"
    if layout.val is None:
        percent = DEFAULT_VAL_PERCENT if val_percent is None else val_percent
        counts = {name: len(images) for name, images in split(found, percent).items()}
        stamp = f"{percent:g} %"
        remarks = [f"training images: {counts['train']} of {kind}", f"validation images: {counts['val']}, held out"]
    elif val_percent is not None:
        raise ValueError(
            f"--val-percent is for images without a validation split, and {layout.val} is one; leave it out"
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
    """Return the file name of `path` without special characters, and a hash of path, stamps and packing options."""
    name = re.sub(r"[^\w.]+", "-", path.resolve().stem if path.is_file() else path.resolve().name).strip("-.")
    flags = list(replace(options, workers=0, skip_broken=False).flags())  # these two change no byte of the shards
    hashed = [os.fsencode(path.resolve()), *(word.encode() for word in flags + stamps)]
    return f"{name or 'images'}-{hashlib.sha256(b'|'.join(hashed)).hexdigest()[:8]}"


def image_overrides(train: Manifest) -> list[str]:
    """Return overrides of crops, normalisation, image size, batch and epochs that suit the packed images.

    configs/quickstart.yaml has those of 28×28 grey images. A few hundred images are seen a hundred times and more in
    small batches, which gives the number of steps that a small model needs.
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
        "optimizer.warmup_epochs=0",  # schedule_overrides sets it
    ]


def schedule_overrides(images: int, epochs: float, batch: int) -> list[str]:
    """Return overrides that follow from the number of steps: learning rate, warm-up, EMA, evaluations, checkpoints.

    The learning rate grows with the square root of the batch. The EMA covers about the last twentieth of the steps.
    """
    steps = max(1.0, epochs * images / batch)
    return [
        f"optimizer.lr={3.2e-3 * math.sqrt(192 / batch):.3g}",
        f"optimizer.warmup_epochs={epochs / 20:.3g}",
        f"optimizer.ema_decay={min(0.9998, max(0.0, 1 - 20 / steps)):.5g}",
        f"log.eval_every_epochs={epochs / 5:.4g}",
        f"checkpoint.every_epochs={epochs / 5:.4g}",
    ]

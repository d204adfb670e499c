"""What a configuration comes to on given data and ranks: batch sizes, steps, rates; nothing is allocated for it.

python -m launch.plan --config configs/X.yaml [--ranks N] [--machines N] [key=value …]
"""

from launch.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

import argparse
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dataio.augment.mixing import MixOptions, check_pairs
from dataio.augment.recipes import RandAugment
from dataio.augment.views import ImageOptions
from dataio.files import user_path
from dataio.loader import EvalLoader, TrainPlan, check_labels, count_classes, map_labels
from dataio.manifest import Manifest
from dataio.remote.options import Patience, cache_options
from dataio.shards import open_data
from dataio.urls import is_url
from launch.config import Config, DataSection, load_config
from launch.schedule import Schedule, lr_at, make_schedule
from polaformer.model import TOTAL_STRIDE

_SHARE_OF_SHARD, _SHARE_OF_BATCH = 0.4, 0.8  # that these may wait, of the time for which ranks wait for each other


@dataclass(frozen=True)
class Plan:
    """A run's numbers. Raises what `make_plan` raises; holding one means that they fit together."""

    train: Manifest
    val: Manifest  # may lack some of train's classes
    val_label_map: np.ndarray  # (val's classes,) int64: the labels of the same names in train
    batches: TrainPlan  # how a step's samples are dealt to ranks and micro-steps
    images: ImageOptions
    mixing: MixOptions
    class_names: tuple[str, ...]  # one for each output of the model
    schedule: Schedule

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def steps(self) -> int:
        return self.schedule.steps

    @property
    def samples_per_epoch(self) -> int:
        return len(self.train)


def make_plan(config: Config, rank: int, ranks: int, ranks_here: int | None = None) -> Plan:
    """Reads both manifests, fetches their tables if they are remote, and checks the configuration against them.

    ranks_here: those on this rank's machine, which share a cache; None: all of them.
    Raises FileNotFoundError without shards; ValueError if the output is no folder, the batch does not divide, is too
    small or cannot be mixed in pairs, training has a single class, validation has one that training lacks, a label is
    beyond model.num_classes, or the cache is too small; RuntimeError if a remote folder cannot be read.
    """
    check_output(config.output)
    batches = deal_batches(config, rank, ranks)
    images, mixing = image_options(config.data), mix_options(config.data)
    check_pairs(mixing, batches.batch)
    check_batch(config, batches)
    train, val = open_both(config, batches, ranks_here or ranks)
    if count_classes(train) < 2:
        only = train.classes[train.samples["label"][0]]
        raise ValueError(
            f"{train.place} has images of a single class, {only}, and there is nothing to tell apart; pack a folder"
            " with a folder of images for each of at least two classes"
        )
    label_map = map_labels(val, train.classes, train.place)
    classes = config.model.num_classes or len(train.classes)
    check_labels(train, classes)
    mixing = replace(mixing, mix_group=min(mixing.mix_group, batches.global_batch))  # no draw is for more than a step
    names = train.classes + tuple(f"unused {label}" for label in range(len(train.classes), classes))
    return Plan(train, val, label_map, batches, images, mixing, names, make_schedule(config.optimizer, len(train)))


def deal_batches(config: Config, rank: int, ranks: int) -> TrainPlan:
    """What dataio needs to know of the configuration: which samples a rank gets."""
    optimizer, data = config.optimizer, config.data
    windowed = data.order == "windowed" or (data.order == "auto" and is_url(data.train))
    return TrainPlan(
        seed=config.seed,
        global_batch=optimizer.global_batch,
        accumulation=optimizer.accumulation,
        rank=rank,
        ranks=ranks,
        window_shards=data.window_shards if windowed else None,
        max_broken=data.max_broken,
    )


def check_output(folder: Path) -> None:
    """Raises ValueError if a run's folder cannot be one. It need not exist yet."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        kind = "a broken link" if nearest.is_symlink() and not nearest.exists() else "a file"
        raise ValueError(f"output is {folder}, and {nearest} is {kind}; choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output is {folder}, and {nearest} may not be written to; choose another folder")


def check_batch(config: Config, batches: TrainPlan) -> None:
    """Raises ValueError if BatchNorm would have one value per channel: one image, whose last feature map is 1 × 1."""
    size = config.data.image_size
    if batches.batch == 1 and size == TOTAL_STRIDE:
        raise ValueError(
            f"a batch of 1 image per rank at {size}² pixels leaves BatchNorm a single value per channel;"
            f" use optimizer.global_batch={2 * batches.global_batch}, or data.image_size={2 * size}"
        )


def open_both(config: Config, batches: TrainPlan, ranks_here: int) -> tuple[Manifest, Manifest]:
    """Training and validation data. Raises ValueError if the cache cannot hold what is needed of both at a time."""
    data, timeout = config.data, 60 * config.engine.timeout_minutes
    patience = Patience(
        file_seconds=_SHARE_OF_SHARD * timeout,
        batch_seconds=_SHARE_OF_BATCH * timeout,
        longer=", or raise engine.timeout_minutes",
    )
    cache = replace(cache_options(data.cache, data.cache_gib, data.train, data.val), patience=patience)
    train, val = open_data(data.train, cache), open_data(data.val, cache)
    needed = {"data.train": batches.bytes_at_once(train)} if train.remote else {}
    if val.remote:
        needed["data.val"] = EvalLoader.bytes_at_once(val, batches.batch, ranks_here)
    cache.require_room(needed)
    return train, val


def image_options(data: DataSection) -> ImageOptions:
    """The same: how an image is prepared."""
    return ImageOptions(**_same_fields(data, ImageOptions) | {"rand_augment": RandAugment(**dict(data.rand_augment))})


def mix_options(data: DataSection) -> MixOptions:
    """The same for what happens to whole batches."""
    return MixOptions(**_same_fields(data, MixOptions))


def _same_fields(data: DataSection, options: type) -> dict[str, Any]:
    """The configuration's values for all fields of a dataclass of dataio; both have the same names."""
    return {field.name: getattr(data, field.name) for field in fields(options)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.plan", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--config", type=user_path, required=True, help="a YAML file, for example configs/polaformerpp_b4.yaml"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes that would train, one per GPU (default 1)")
    parser.add_argument("--machines", type=int, default=1, help="over which these are spread evenly (default 1)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.epochs=10")
    arguments = parser.parse_args(argv)
    ranks, machines = arguments.ranks, arguments.machines
    if machines < 1 or ranks % machines:
        parser.error(f"{ranks} ranks are not spread evenly over {machines} machines; use a divisor of {ranks}")
    try:
        config = load_config(arguments.config, arguments.overrides)
        plan = make_plan(config, 0, ranks, ranks // machines)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table("quantity", "value", title=str(arguments.config))
    for name, value in describe(config, plan).items():
        table.add_row(name, value)
    Console().print(table)
    return 0


def describe(config: Config, plan: Plan) -> dict[str, str]:
    """The plan in words and numbers, for people."""
    schedule = plan.schedule
    return {
        "model": f"{config.model.name}, {plan.classes} classes, {config.data.image_size}² pixels",
        "training images": f"{plan.samples_per_epoch:,} in {len(plan.train.shards)} shards,"
        f" order {plan.batches.order(plan.train)}",
        "validation images": f"{len(plan.val):,}{_lacking(plan)}",
        "batch": f"{config.optimizer.global_batch} = {plan.batches.ranks} ranks × {config.optimizer.accumulation}"
        f" accumulation × {plan.batches.batch}",
        "steps": f"{plan.steps:,}, of which {schedule.warmup_steps:,} warm up",
        "learning rate": f"{schedule.start:.3g} → {schedule.peak:.3g} → {lr_at(plan.steps - 1, schedule):.3g}",
        "engine": f"ZeRO-{config.engine.zero_stage}, {config.engine.precision}",
    }


def _lacking(plan: Plan) -> str:
    """Of how few classes validation is, if it lacks some."""
    of_val, of_train = count_classes(plan.val), len(plan.train.classes)
    return f", of {of_val} classes out of {of_train}" if of_val < of_train else ""


if __name__ == "__main__":
    sys.exit(main())

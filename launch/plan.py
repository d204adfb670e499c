"""Plan a run: batch sizes, steps and learning rates of a configuration on given data and ranks; allocates nothing.

python -m launch.plan --config configs/X.yaml [--world-size N] [--nodes N] [key=value …]
    … --mtbf HOURS [--save-seconds S] [--start-seconds S]     the expected goodput as well
"""

from launch.interrupt import exit_on_interrupt, exit_process

if __name__ == "__main__":
    exit_on_interrupt()

import argparse
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dataio.augment.batch_augment import BatchAugmentOptions, check_even_batch
from dataio.files import user_path
from dataio.loader import EvalLoader, LoaderOptions
from dataio.manifest import Manifest, check_labels, count_classes, map_labels
from dataio.options import add_renamed_flag
from dataio.remote.options import RetryPolicy, cache_options
from dataio.shards import open_dataset
from dataio.urls import is_url
from launch.config import Config, load_config
from launch.goodput import SAVING, START, best_interval, expected_goodput, read_ledger
from launch.schedule import Schedule, ends_interval, lr_at, make_schedule
from polaformer.model import TOTAL_STRIDE

#: Group of BatchNorm where model.norm_group is null: the authors' micro-batch.
_DEFAULT_NORM_GROUP = 128
#: How long fetching a file, and a batch, may take: a share of the time for which ranks wait for each other.
_FILE_TIMEOUT_SHARE, _BATCH_TIMEOUT_SHARE = 0.4, 0.65


@dataclass(frozen=True)
class Plan:
    """The data and numbers of a run, checked against each other by `make_plan`."""

    train: Manifest
    val: Manifest  # may lack some of train's classes
    val_label_map: np.ndarray  # (val's classes,) int64: their labels in train
    loader_options: LoaderOptions  # how a step's samples are divided among ranks and micro-steps
    batch_augment: BatchAugmentOptions
    norm_group: int  # consecutive samples over which BatchNorm takes its statistics
    class_names: tuple[str, ...]  # one per output of the model
    schedule: Schedule

    @property
    def num_classes(self) -> int:
        """Number of the model's outputs."""
        return len(self.class_names)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.schedule.steps

    @property
    def samples_per_epoch(self) -> int:
        """Number of training images."""
        return len(self.train)

    def epochs(self, steps: int) -> float:
        """Return how many epochs so many steps are."""
        return steps * self.loader_options.global_batch_size / self.samples_per_epoch

    def ends_epochs(self, step: int, epochs: float | None) -> bool:
        """Return whether a step, counted from 0, completes another `epochs` epochs; never if that is None."""
        batch = self.loader_options.global_batch_size
        return epochs is not None and ends_interval(step, batch, epochs * self.samples_per_epoch)

    def is_due(self, step: int, every_epochs: float) -> bool:
        """Return whether an action due every `every_epochs` epochs, and at the end, is due after `step` (from 0)."""
        return step + 1 == self.steps or self.ends_epochs(step, every_epochs)


def make_plan(config: Config, rank: int, world_size: int, local_world_size: int | None = None) -> Plan:
    """Read both manifests, fetch their tables if they are remote, and check the configuration against them.

    local_world_size: how many ranks run on this machine, and share a cache; None: all of them.
    Raises FileNotFoundError if there are no shards; ValueError if the output cannot be a folder, the batch is not
    divisible, too small, odd where it is mixed in pairs or no multiple of model.norm_group, training has a single
    class, validation has a class that training lacks, a label is beyond model.num_classes, or the cache is too small;
    RuntimeError if a remote folder cannot be read.
    """
    check_output(config.output)
    loader_options = make_loader_options(config, rank, world_size)
    check_even_batch(config.data, loader_options.micro_batch_size)
    norm_group = choose_norm_group(config, loader_options.micro_batch_size)
    check_batch(config, loader_options, norm_group)
    train, val = open_datasets(config, loader_options, local_world_size or world_size)
    if count_classes(train) < 2:
        only = train.classes[train.samples["label"][0]]
        raise ValueError(
            f"{train.location} has images of a single class, {only}, and there is nothing to tell apart; pack a folder"
            " with a folder of images for each of at least two classes"
        )
    label_map = map_labels(val, train.classes, train.location)
    classes = config.model.num_classes or len(train.classes)
    check_labels(train, classes)
    batch_augment = config.data
    if (
        batch_augment.mixup_active and batch_augment.mixup_group_size > loader_options.global_batch_size
    ):  # no draw is for more than a step
        batch_augment = batch_augment.replace(mixup_group_size=loader_options.global_batch_size)
    names = train.classes + tuple(f"unused {label}" for label in range(len(train.classes), classes))
    schedule = make_schedule(config.optimizer, len(train))
    return Plan(train, val, label_map, loader_options, batch_augment, norm_group, names, schedule)


def make_loader_options(config: Config, rank: int, world_size: int) -> LoaderOptions:
    """Return the options that decide which samples a rank gets, and in which order."""
    optimizer, data = config.optimizer, config.data
    windowed = data.shuffle == "windowed" or (data.shuffle == "auto" and is_url(data.train))
    return LoaderOptions(
        seed=config.seed,
        global_batch_size=optimizer.global_batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        shuffle_window_shards=data.shuffle_window_shards if windowed else None,
        max_bad_samples=data.max_bad_samples,
    )


def check_output(folder: Path) -> None:
    """Raise ValueError if `folder` is not, or cannot become, a folder that this process can write to."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        kind = "a broken link" if nearest.is_symlink() and not nearest.exists() else "a file"
        raise ValueError(f"output is {folder}, and {nearest} is {kind}; choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(
            f"output is {folder}, and {nearest} may not be written to; make it writable, or choose another folder"
        )


def choose_norm_group(config: Config, micro_batch_size: int) -> int:
    """Return the samples of a group of BatchNorm. Raises ValueError if they do not divide the micro-batch."""
    group = config.model.norm_group
    if group is None:
        return micro_batch_size if micro_batch_size % _DEFAULT_NORM_GROUP else _DEFAULT_NORM_GROUP
    if micro_batch_size % group:
        divisors = [size for size in range(1, micro_batch_size + 1) if micro_batch_size % size == 0]
        below, above = [size for size in divisors if size < group][-1:], [size for size in divisors if size > group][:1]
        raise ValueError(
            f"model.norm_group {group} does not divide the batch of {micro_batch_size} images per rank and micro-step;"
            f" use {' or '.join(map(str, below + above))}"
        )
    return group


def keep_norm_group(config: Config, plan: Plan, saved: int) -> tuple[Plan, list[str]]:
    """Return the plan with the group of BatchNorm of a resumed run's checkpoint, if that is possible, and what changes.

    saved: the group's samples. A configured group takes precedence, and the saved one must divide the micro-batch.
    """
    if config.model.norm_group is None and plan.loader_options.micro_batch_size % saved == 0:
        plan = replace(plan, norm_group=saved)
    if saved == plan.norm_group:
        return plan, []
    change = f"BatchNorm's groups change from {saved} to {plan.norm_group} samples"
    return plan, [f"{change}: from here on, results differ from those of a run without this change"]


def check_batch(config: Config, loader_options: LoaderOptions, norm_group: int) -> None:
    """Raise ValueError if BatchNorm would see one value per channel: a single image whose last feature map is 1 × 1."""
    size, batch = config.data.image_size, loader_options.micro_batch_size
    if norm_group > 1 or size != TOTAL_STRIDE:
        return
    if batch == 1:
        fault, remedy = (
            "a batch of 1 image per rank",
            f"optimizer.global_batch_size={2 * loader_options.global_batch_size}",
        )
    else:
        larger = next(group for group in range(2, batch + 1) if batch % group == 0)
        fault, remedy = "model.norm_group 1", f"model.norm_group={larger}"
    raise ValueError(
        f"{fault} at {size}² pixels leaves BatchNorm a single value per channel; use {remedy},"
        f" or data.image_size={2 * size}"
    )


def open_datasets(config: Config, loader_options: LoaderOptions, local_world_size: int) -> tuple[Manifest, Manifest]:
    """Return the manifests of training and validation data. Raises ValueError if the cache is too small for both."""
    data, timeout = config.data, 60 * config.engine.timeout_minutes
    retry_policy = RetryPolicy(
        file_timeout_seconds=_FILE_TIMEOUT_SHARE * timeout,
        batch_timeout_seconds=_BATCH_TIMEOUT_SHARE * timeout,
        timeout_hint=", or raise engine.timeout_minutes",
    )
    cache = replace(cache_options(data.cache, data.cache_gib, data.train, data.val), retry_policy=retry_policy)
    train, val = open_dataset(data.train, cache), open_dataset(data.val, cache)
    needed = {"data.train": loader_options.required_cache_bytes(train)} if train.remote else {}
    if val.remote:
        needed["data.val"] = EvalLoader.required_cache_bytes(val, loader_options.micro_batch_size, local_world_size)
    cache.check_cache_size(needed)
    return train, val


def main(argv: list[str] | None = None) -> int:
    """Print the plan of a run as a table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launch.plan", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--config", type=user_path, required=True, help="a YAML file, for example configs/polaformerpp_b4.yaml"
    )
    parser.add_argument("--world-size", type=int, default=1, help="processes that would train, one per GPU (default 1)")
    parser.add_argument("--nodes", type=int, default=1, help="over which these are spread evenly (default 1)")
    parser.add_argument("--mtbf", type=float, metavar="HOURS", help="mean time between failures of the whole job")
    measured = "default: as measured by the run in the output folder"
    parser.add_argument("--save-seconds", type=float, help=f"for which training waits at a checkpoint ({measured})")
    parser.add_argument("--start-seconds", type=float, help=f"until a start makes its first step ({measured})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optimizer.epochs=10")
    add_renamed_flag(parser, "--ranks", "--world-size")
    add_renamed_flag(parser, "--machines", "--nodes")
    arguments = parser.parse_intermixed_args(argv)
    world_size, nodes = arguments.world_size, arguments.nodes
    if nodes < 1 or world_size % nodes:
        parser.error(f"{world_size} ranks are not spread evenly over {nodes} nodes; use a divisor of {world_size}")
    if arguments.mtbf is None and (arguments.save_seconds, arguments.start_seconds) != (None, None):
        parser.error("--save-seconds and --start-seconds are for the expected goodput; give --mtbf as well")
    try:
        config = load_config(arguments.config, arguments.overrides)
        plan = make_plan(config, 0, world_size, world_size // nodes)
        rows = describe(config, plan)
        if arguments.mtbf is not None:
            rows |= describe_goodput(config, arguments.mtbf, arguments.save_seconds, arguments.start_seconds)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table("quantity", "value", title=str(arguments.config))
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    return 0


def describe(config: Config, plan: Plan) -> dict[str, str]:
    """Return the plan as quantity → value, formatted for display."""
    schedule, optimizer, loader_options = plan.schedule, config.optimizer, plan.loader_options
    return {
        "model": f"{config.model.name}, {plan.num_classes} classes, {config.data.image_size}² pixels",
        "training images": f"{plan.samples_per_epoch:,} in {len(plan.train.shards)} shards,"
        f" order {loader_options.sampler(plan.train)}",
        "validation images": f"{len(plan.val):,}{_missing_classes(plan)}",
        "batch": f"{optimizer.global_batch_size} = {loader_options.world_size} ranks"
        f" × {optimizer.gradient_accumulation_steps} accumulation × {loader_options.micro_batch_size}",
        "BatchNorm": f"statistics of groups of {plan.norm_group} samples",
        "steps": f"{plan.steps:,}, of which {schedule.warmup_steps:,} warm up",
        "learning rate": f"{schedule.warmup_lr:.3g} → {schedule.peak_lr:.3g} → {lr_at(plan.steps - 1, schedule):.3g}",
        "engine": f"ZeRO-{config.engine.zero_stage}, {config.engine.precision}",
    }


def describe_goodput(
    config: Config, mtbf_hours: float, save_seconds: float | None, start_seconds: float | None
) -> dict[str, str]:
    """Return the expected goodput as quantity → value, for the best interval between checkpoints and the configured.

    save_seconds and start_seconds: None is what the run in `config.output` has measured.
    Raises ValueError if a number is not positive, or there is no such run.
    """
    ledger = read_ledger(config.output)
    if save_seconds is None and ledger["saves"]:
        save_seconds = ledger["seconds"].get(SAVING, 0.0) / ledger["saves"]
    if start_seconds is None and ledger["starts"]:
        start_seconds = ledger["seconds"].get(START, 0.0) / ledger["starts"]
    mtbf = 3600 * _positive("--mtbf", mtbf_hours)
    if save_seconds is None or start_seconds is None:
        raise ValueError(
            f"{config.output} holds no run that has measured how long saving and starting take; give --save-seconds and"
            " --start-seconds, or train there first"
        )
    save_seconds, start_seconds = _positive("--save-seconds", save_seconds), _positive("--start-seconds", start_seconds)
    best = best_interval(mtbf, save_seconds)
    rows = {
        "failures": f"one in {mtbf_hours:g} h; a checkpoint takes {_rounded(save_seconds)} s of training,"
        f" a start {_rounded(start_seconds)} s",
        "best interval": f"checkpoint.every_minutes={_rounded(best / 60)}, expected goodput"
        f" {100 * expected_goodput(best, mtbf, save_seconds, start_seconds):.1f} %",
    }
    if config.checkpoint.every_minutes is not None:
        share = expected_goodput(60 * config.checkpoint.every_minutes, mtbf, save_seconds, start_seconds)
        rows["configured interval"] = (
            f"checkpoint.every_minutes={config.checkpoint.every_minutes:g}, expected goodput {100 * share:.1f} %"
        )
    return rows


def _positive(flag: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{flag} is {value:g}; use a finite number above 0")
    return value


def _rounded(value: float) -> str:
    """Return a number with two significant digits, and no exponent: 1234 → "1200"."""
    return f"{float(f'{value:.2g}'):.9f}".rstrip("0").rstrip(".")


def _missing_classes(plan: Plan) -> str:
    """Return how many classes validation has, as the end of a line, if it lacks some."""
    of_val, of_train = count_classes(plan.val), len(plan.train.classes)
    return f", of {of_val} classes out of {of_train}" if of_val < of_train else ""


if __name__ == "__main__":
    exit_process(main())

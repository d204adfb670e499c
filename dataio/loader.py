"""Hands out batches on the training device: which samples each rank gets, and where a stopped run goes on.

index.py gives the order, pipeline.py decodes. A run has one long sequence of positions, epoch after epoch without
a gap; a step takes the next `global_batch` of them, whatever the number of ranks. So the state of a run is one
number, and a run may go on with another number of ranks.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from dataio.index import Manifest, draws_at, samples_at
from dataio.pipeline import ImageOptions, Request, decode_batches, eval_views, train_views


class Batch(NamedTuple):
    """What one rank computes in one micro-step, or one evaluation step. B images of S×S pixels.

    position: of the first sample in the run (training) or in the manifest (evaluation).
    """

    images: torch.Tensor  # (B, 3, S, S) float32, normalised, channels_last, on the device
    labels: torch.Tensor  # (B,) int64, on the device
    samples: np.ndarray  # (B,) int64, rows of the manifest, on the host
    position: int


@dataclass(frozen=True)
class TrainPlan:
    """How a step's samples are dealt: to `accumulation` micro-steps, and in each of them to `ranks` ranks.

    Raises ValueError if global_batch cannot be dealt evenly.
    """

    seed: int
    global_batch: int  # samples of one optimizer step, over all ranks and micro-steps
    accumulation: int = 1  # micro-steps of a step
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if min(self.global_batch, self.accumulation, self.ranks) < 1 or self.seed < 0:
            raise ValueError(
                f"global batch {self.global_batch}, accumulation {self.accumulation} and ranks {self.ranks}"
                f" must be at least 1, and seed {self.seed} at least 0"
            )
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank {self.rank} is not one of {self.ranks} ranks; use 0 to {self.ranks - 1}")
        share = self.ranks * self.accumulation
        if self.global_batch % share:
            below, above = self.global_batch // share * share, -(-self.global_batch // share) * share
            remedy = f"use {below} or {above}" if below else f"use {above}"
            raise ValueError(
                f"global batch {self.global_batch} is not divisible by"
                f" {self.ranks} ranks × {self.accumulation} accumulation; {remedy}"
            )

    @property
    def batch(self) -> int:
        """Images of one rank in one micro-step."""
        return self.global_batch // (self.ranks * self.accumulation)

    def first_position(self, micro_step: int) -> int:
        """The position of this rank's first sample in a micro-step of the run, counted from 0."""
        step, part = divmod(micro_step, self.accumulation)
        return step * self.global_batch + (part * self.ranks + self.rank) * self.batch


class TrainLoader:
    """An endless iterator of this rank's batches, which can be set to any step of the run in no time.

    Raises RuntimeError from `next` if an image cannot be read or decoded, naming it.
    """

    def __init__(self, manifest: Manifest, options: ImageOptions, plan: TrainPlan, device: torch.device) -> None:
        self.manifest, self.options, self.plan, self.device = manifest, options, plan, device
        self._micro_step = 0  # micro-steps handed out since the run began
        self._batches: Iterator[Batch] | None = None  # built by the first next(), dropped by restore()

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            requests = self._requests(self._micro_step)
            self._batches = _batches(self.manifest, self.options, requests, self.plan.batch, self.device)
        try:
            batch = next(self._batches)
        except BaseException:  # the generator is dead; a further next() starts anew from the same batch
            self._batches = None
            raise
        self._micro_step += 1
        return batch

    def state(self) -> dict[str, int | str]:
        """Where the run is, for JSON. `samples_seen` counts the whole steps handed out, over all ranks."""
        steps = self._micro_step // self.plan.accumulation
        return {
            "seed": self.plan.seed,
            "samples_seen": steps * self.plan.global_batch,
            "manifest_hash": self.manifest.hash,
            "global_batch": self.plan.global_batch,
        }

    def restore(self, state: dict[str, int | str]) -> None:
        """Goes to where `state` was taken, at no cost; ranks and accumulation may be others than then.

        Raises ValueError if it is of another data set, global batch or seed: its order does not go on here.
        """
        here = self.state()
        if state["manifest_hash"] != here["manifest_hash"]:
            raise ValueError(
                f"the run began on a data set with manifest {state['manifest_hash'][:12]},"
                f" {self.manifest.folder} has {here['manifest_hash'][:12]};"
                f" give it the folder it began with, or start a new run"
            )
        for name, words in (("global_batch", "global batch"), ("seed", "seed")):
            if state[name] != here[name]:
                raise ValueError(
                    f"the run began with {words} {state[name]}, this is {words} {here[name]};"
                    f" set it back to {state[name]}, or start a new run"
                )
        self._micro_step = state["samples_seen"] // self.plan.global_batch * self.plan.accumulation
        self._batches = None

    def _requests(self, micro_step: int) -> Iterator[Request]:
        plan = self.plan
        for number in itertools.count(micro_step):
            first = plan.first_position(number)
            samples = samples_at(plan.seed, np.arange(first, first + plan.batch), len(self.manifest))
            draws = draws_at(plan.seed, first, plan.batch, self.options.draws_per_image)
            yield Request(first, samples, train_views(self.manifest.samples[samples], draws, self.options))


class EvalLoader:
    """Every sample once over all ranks, in stored order; can be iterated again and again.

    Each rank has one contiguous share, equal to the others within one sample. Its last batch may be shorter, and
    it has no batch at all if there are fewer samples than ranks. Raises RuntimeError as TrainLoader does.
    """

    def __init__(
        self,
        manifest: Manifest,
        options: ImageOptions,
        batch: int,
        rank: int,
        ranks: int,
        device: torch.device,
    ) -> None:
        if batch < 1:
            raise ValueError(f"the evaluation batch is {batch}; use at least 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} is not one of {ranks} ranks; use 0 to {ranks - 1}")
        self.manifest, self.batch, self.device = manifest, batch, device
        self.options = replace(options, recipe="simple", color_jitter=0.0)  # for a graph without stages
        self._share = range(len(manifest) * rank // ranks, len(manifest) * (rank + 1) // ranks)

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._share) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        return _batches(self.manifest, self.options, self._requests(), self.batch, self.device)

    def _requests(self) -> Iterator[Request]:
        for first in self._share[:: self.batch]:
            samples = np.arange(first, min(first + self.batch, self._share.stop))
            yield Request(first, samples, eval_views(self.manifest.samples[samples], self.options))


def _batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[Request],
    max_batch: int,
    device: torch.device,
) -> Iterator[Batch]:
    for request, images in decode_batches(manifest, options, requests, max_batch, device):
        labels = torch.from_numpy(manifest.samples["label"][request.samples].astype(np.int64))
        yield Batch(images, labels.to(device, non_blocking=True), request.samples, request.position)


def check_labels(manifest: Manifest, num_classes: int) -> None:
    """Raises ValueError if a label of the data set has no output in a model of `num_classes`."""
    highest = int(manifest.samples["label"].max())
    if highest >= num_classes:
        raise ValueError(
            f"{manifest.folder} has {len(manifest.classes)} classes and label {highest}, the model has"
            f" {num_classes} outputs; set num_classes to {len(manifest.classes)}"
        )


def check_same_classes(train: Manifest, val: Manifest) -> None:
    """Raises ValueError, naming the first difference, if a label does not mean the same class in both."""
    pairs = itertools.zip_longest(train.classes, val.classes)
    for label, names in enumerate(pairs):
        if names[0] != names[1]:
            in_train, in_val = ("missing" if name is None else f'"{name}"' for name in names)
            raise ValueError(
                f"class {label} is {in_train} in {train.folder} and {in_val} in {val.folder};"
                f" pack both from folders with the same classes"
            )

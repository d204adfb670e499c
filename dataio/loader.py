"""Hands out batches on the training device: which samples each rank gets, and where a stopped run goes on.

index.py gives the order, decoding.py decodes. A run has one long sequence of positions, epoch after epoch without
a gap; a step takes the next `global_batch` of them, whatever the number of ranks. So the state of a run is one
number, and a run may go on with another number of ranks.

An image that cannot be decoded ends an evaluation. In training the next sample of its shard that can be decoded
stands for it, with its own label, and it is counted: by each rank for the images that it met since it started, anew
in each epoch.
"""

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dataio.augment.views import ImageOptions, eval_views, train_views
from dataio.decode import Replace, Replaced, Request, decode_batches
from dataio.manifest import Manifest
from dataio.sampler import Order, draws_at

_BROKEN_SHOWN = 5


class Batch(NamedTuple):
    """What one rank computes in one micro-step, or one evaluation step. B images of S×S pixels.

    position: of the first sample in the run (training) or in the manifest (evaluation). replaced: broken images, for
    which `samples` and `labels` have their stand-ins.
    """

    images: torch.Tensor  # (B, 3, S, S) float32, normalised, channels_last, on the device
    labels: torch.Tensor  # (B,) int64, on the device
    samples: np.ndarray  # (B,) int64, rows of the manifest, on the host
    position: int
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class TrainPlan:
    """How a step's samples are dealt: to `accumulation` micro-steps, and in each of them to `ranks` ranks.

    window_shards: None for an order over the whole data set, else of index.Order. max_broken: images of an epoch that
    this rank may replace.
    Raises ValueError if global_batch cannot be dealt evenly.
    """

    seed: int
    global_batch: int  # samples of one optimizer step, over all ranks and micro-steps
    accumulation: int = 1  # micro-steps of a step
    rank: int = 0
    ranks: int = 1
    window_shards: int | None = None
    max_broken: int = 0

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

    def order(self, manifest: Manifest) -> Order:
        """Of the run's samples."""
        return Order(self.seed, manifest.shard_samples, self.window_shards)

    def bytes_at_once(self, manifest: Manifest) -> int:
        """Room that a cache of remote shards needs: for all that a step reads, and the window after it."""
        return manifest.bytes_at_once(self.order(manifest).most_held(self.global_batch))

    def first_position(self, micro_step: int) -> int:
        """The position of this rank's first sample in a micro-step of the run, counted from 0."""
        step, part = divmod(micro_step, self.accumulation)
        return step * self.global_batch + (part * self.ranks + self.rank) * self.batch


@dataclass(frozen=True)
class _TrainRequests:
    """What a rank asks decoding.py for. It does not know the loader, which would else live as long as the pipeline."""

    manifest: Manifest
    options: ImageOptions
    plan: TrainPlan
    order: Order

    def from_micro_step(self, micro_step: int) -> Iterator[Request]:
        plan = self.plan
        for number in itertools.count(micro_step):
            first = plan.first_position(number)
            samples = self.order.samples_at(np.arange(first, first + plan.batch))
            shards: tuple[int, ...] = ()
            if self.manifest.remote:
                step = number // plan.accumulation * plan.global_batch  # alike on all ranks, which share a cache
                shards = self.order.shards_ahead(step, step + plan.global_batch - 1)
            yield self._request(first, samples, shards)

    def _request(self, first: int, samples: np.ndarray, shards: tuple[int, ...]) -> Request:
        draws = draws_at(self.plan.seed, first, len(samples), self.options.draws_per_image)
        return Request(first, samples, train_views(self.manifest.samples[samples], draws, self.options), shards)

    def replace(self, request: Request, replaced: list[Replaced]) -> Request:
        """The request with stand-ins, each looked at with its position's draws."""
        samples = request.samples.copy()
        for broken in replaced:
            samples[broken.place] = broken.by
        mended = self._request(request.position, samples, request.shards)
        return mended._replace(replaced=(*request.replaced, *replaced))


class TrainLoader:
    """An endless iterator of this rank's batches, which can be set to any step of the run in no time.

    Raises ValueError if the cache is too small for a remote data set, RuntimeError from `next` if an image cannot be
    read, or more than max_broken of this epoch's cannot be decoded; it names them.
    """

    def __init__(self, manifest: Manifest, options: ImageOptions, plan: TrainPlan, device: torch.device) -> None:
        self.manifest, self.options, self.plan, self.device = manifest, options, plan, device
        if manifest.remote:
            manifest.remote.cache.require_room({manifest.place: plan.bytes_at_once(manifest)})
        self._order = plan.order(manifest)
        self._micro_step = 0  # micro-steps handed out since the run began
        self._batches: Iterator[Batch] | None = None  # built by the first next(), dropped by restore()
        self._broken: dict[int, list[Replaced]] = {}  # by epoch

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            requests = _TrainRequests(self.manifest, self.options, self.plan, self._order)
            replace = requests.replace if self.plan.max_broken else None
            coming = requests.from_micro_step(self._micro_step)
            self._batches = _batches(self.manifest, self.options, coming, self.plan.batch, self.device, replace)
        try:
            batch = next(self._batches)
            self._count(batch)
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
            "order": str(self._order),
        }

    @property
    def broken(self) -> int:
        """Broken images that this rank has replaced in the epoch that its last step began in."""
        step = max(0, self._micro_step - 1) // self.plan.accumulation
        return len(self._broken.get(step * self.plan.global_batch // len(self.manifest), []))

    def close(self) -> None:
        """Lets go of shards, and of what fetches and decodes ahead; a further next() goes on from the same batch."""
        self._batches = None

    def restore(self, state: dict[str, int | str]) -> None:
        """Goes to where `state` was taken, at no cost; ranks and accumulation may be others than then.

        Raises ValueError if it is of another data set, order, global batch or seed: it does not go on here.
        """
        here = self.state()
        state = {"order": "full", **state}  # there was no other before states named theirs
        if state["manifest_hash"] != here["manifest_hash"]:
            raise ValueError(
                f"the run began on a data set with manifest {state['manifest_hash'][:12]},"
                f" {self.manifest.place} has {here['manifest_hash'][:12]};"
                f" give it the folder it began with, or start a new run"
            )
        for name, words in (("global_batch", "global batch"), ("seed", "seed"), ("order", "order")):
            if state[name] != here[name]:
                raise ValueError(
                    f"the run began with {words} {state[name]}, this is {words} {here[name]};"
                    f" set it back to {state[name]}, or start a new run"
                )
        self._micro_step = state["samples_seen"] // self.plan.global_batch * self.plan.accumulation
        self.close()
        self._broken = {}

    def _count(self, batch: Batch) -> None:
        """Raises RuntimeError, naming them, if an epoch has more broken images than are allowed."""
        for broken in batch.replaced:
            epoch = (batch.position + broken.place) // len(self.manifest)
            met = self._broken.setdefault(epoch, [])
            if broken not in met:
                met.append(broken)
            if len(met) > self.plan.max_broken:
                named = [f"{self.manifest.describe(each.sample)}: {each.reason}" for each in met]
                if len(named) > _BROKEN_SHOWN:
                    named[_BROKEN_SHOWN:] = [f"and {len(named) - _BROKEN_SHOWN} more"]
                raise RuntimeError(
                    f"more than {self.plan.max_broken} broken images in epoch {epoch}: {', '.join(named)};"
                    f" {self.manifest.remedy}, or raise data.max_broken"
                )


class EvalLoader:
    """Every sample once over all ranks, in stored order; can be iterated again and again.

    Each rank has one contiguous share, equal to the others within one sample. Its last batch may be shorter, and
    it has no batch at all if there are fewer samples than ranks. label_map: of `map_labels`, where batches are to have
    other labels than were packed. Raises RuntimeError as TrainLoader does, ValueError if the cache is too small for a
    remote data set even where no other rank shares it.
    """

    def __init__(
        self,
        manifest: Manifest,
        options: ImageOptions,
        batch: int,
        rank: int,
        ranks: int,
        device: torch.device,
        label_map: np.ndarray | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"the evaluation batch is {batch}; use at least 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} is not one of {ranks} ranks; use 0 to {ranks - 1}")
        self.manifest, self.options, self.batch, self.device = manifest, options.plain, batch, device
        if manifest.remote:
            manifest.remote.cache.require_room({manifest.place: self.bytes_at_once(manifest, batch)})
        self._label_map = None if label_map is None else torch.from_numpy(label_map).to(device)
        self._share = range(len(manifest) * rank // ranks, len(manifest) * (rank + 1) // ranks)

    @staticmethod
    def bytes_at_once(manifest: Manifest, batch: int, ranks_here: int = 1) -> int:
        """Room that a cache of remote shards needs: for a batch of each rank that shares it, and the shard after it."""
        touched = 1 + -(-(batch - 1) // min(manifest.shard_samples))
        return manifest.bytes_at_once(ranks_here * (touched + 1))

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._share) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        for batch in _batches(self.manifest, self.options, self._requests(), self.batch, self.device):
            yield batch if self._label_map is None else batch._replace(labels=self._label_map[batch.labels])

    def _requests(self) -> Iterator[Request]:
        for first in self._share[:: self.batch]:
            samples = np.arange(first, min(first + self.batch, self._share.stop))
            rows = self.manifest.samples[samples]
            after = min(int(rows["shard"][-1]) + 1, int(self.manifest.samples["shard"][self._share[-1]]))
            shards = tuple(range(int(rows["shard"][0]), after + 1))
            yield Request(first, samples, eval_views(rows, self.options), shards)


def _batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[Request],
    max_batch: int,
    device: torch.device,
    replace: Replace | None = None,
) -> Iterator[Batch]:
    for request, images in decode_batches(manifest, options, requests, max_batch, device, replace):
        labels = torch.from_numpy(manifest.samples["label"][request.samples].astype(np.int64))
        labels = labels.to(device, non_blocking=True)
        yield Batch(images, labels, request.samples, request.position, request.replaced)


def check_labels(manifest: Manifest, num_classes: int) -> None:
    """Raises ValueError if a class of the data set has no output in a model of `num_classes`."""
    classes = len(manifest.classes)
    if classes > num_classes:
        raise ValueError(
            f"{manifest.place} has {classes} classes, the model has {num_classes} outputs; set model.num_classes to"
            f" {classes}, or leave it out"
        )


def map_labels(val: Manifest, classes: tuple[str, ...], place: str) -> np.ndarray:
    """(classes of `val`,) int64: for each its label among `classes`, those of training or of weights at `place`.

    Names decide, so `val` may have fewer classes, in any order. A class without images may have any name.
    Raises ValueError, naming the first, if it has images of a class that is not among them.
    """
    labels = {name: label for label, name in enumerate(classes)}
    for name in (val.classes[label] for label in np.unique(val.samples["label"])):
        if name not in labels:
            near = difflib.get_close_matches(name, classes, n=3) or classes[:3]
            raise ValueError(
                f'class "{name}" of {val.place} is not among the {len(classes)} classes of {place}, such as'
                f" {', '.join(near)}; leave it out of the one, or have it in both"
            )
    return np.array([labels.get(name, -1) for name in val.classes], dtype=np.int64)


def count_classes(manifest: Manifest) -> int:
    """How many classes have images in a data set."""
    return len(np.unique(manifest.samples["label"]))

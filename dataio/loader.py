"""Hands out batches on the training device: which samples each rank gets, and where a stopped run goes on.

index.py gives the order, decode.py decodes. A run has one long sequence of positions, epoch after epoch without
a gap; a step takes the next `global_batch_size` of them, whatever the number of ranks. So the state of a run is one
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

from dataio.augment.params import ImageOptions, eval_params, train_params
from dataio.decode import BatchRequest, SubstitutedSample, SubstituteFn, decode_batches
from dataio.manifest import Manifest
from dataio.sampler import Sampler, draws_at

_BROKEN_SHOWN = 5


class Batch(NamedTuple):
    """What one rank computes in one micro-step, or one evaluation step. B images of S×S pixels.

    position: of the first sample in the run (training) or in the manifest (evaluation). substituted: broken images, for
    which `samples` and `labels` have their substitutes.
    """

    images: torch.Tensor  # (B, 3, S, S) float32, normalised, channels_last, on the device
    labels: torch.Tensor  # (B,) int64, on the device
    samples: np.ndarray  # (B,) int64, rows of the manifest, on the host
    position: int
    substituted: tuple[SubstitutedSample, ...] = ()


@dataclass(frozen=True)
class LoaderOptions:
    """How a step's samples are dealt: to `gradient_accumulation_steps` micro-steps, and in each of them to `world_size` ranks.

    shuffle_window_shards: None for an order over the whole data set, else of index.Sampler. max_bad_samples: images of an epoch that
    this rank may substitute.
    Raises ValueError if global_batch_size cannot be dealt evenly.
    """

    seed: int
    global_batch_size: int  # samples of one optimizer step, over all ranks and micro-steps
    gradient_accumulation_steps: int = 1  # micro-steps of a step
    rank: int = 0
    world_size: int = 1
    shuffle_window_shards: int | None = None
    max_bad_samples: int = 0

    def __post_init__(self) -> None:
        if min(self.global_batch_size, self.gradient_accumulation_steps, self.world_size) < 1 or self.seed < 0:
            raise ValueError(
                f"global batch {self.global_batch_size}, accumulation {self.gradient_accumulation_steps} and ranks {self.world_size}"
                f" must be at least 1, and seed {self.seed} at least 0"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks; use 0 to {self.world_size - 1}")
        share = self.world_size * self.gradient_accumulation_steps
        if self.global_batch_size % share:
            below, above = self.global_batch_size // share * share, -(-self.global_batch_size // share) * share
            remedy = f"use {below} or {above}" if below else f"use {above}"
            raise ValueError(
                f"global batch {self.global_batch_size} is not divisible by"
                f" {self.world_size} ranks × {self.gradient_accumulation_steps} accumulation; {remedy}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Images of one rank in one micro-step."""
        return self.global_batch_size // (self.world_size * self.gradient_accumulation_steps)

    def sampler(self, manifest: Manifest) -> Sampler:
        """Of the run's samples."""
        return Sampler(self.seed, manifest.shard_samples, self.shuffle_window_shards)

    def required_cache_bytes(self, manifest: Manifest) -> int:
        """Room that a cache of remote shards needs: for all that a step reads, and the window after it."""
        return manifest.required_cache_bytes(self.sampler(manifest).max_prefetched_shards(self.global_batch_size))

    def first_position(self, micro_step: int) -> int:
        """The position of this rank's first sample in a micro-step of the run, counted from 0."""
        step, part = divmod(micro_step, self.gradient_accumulation_steps)
        return step * self.global_batch_size + (part * self.world_size + self.rank) * self.micro_batch_size


@dataclass(frozen=True)
class _TrainRequests:
    """What a rank asks decode.py for. It does not know the loader, which would else live as long as the pipeline."""

    manifest: Manifest
    options: ImageOptions
    loader_options: LoaderOptions
    _sampler: Sampler

    def from_micro_step(self, micro_step: int) -> Iterator[BatchRequest]:
        loader_options = self.loader_options
        for number in itertools.count(micro_step):
            first = loader_options.first_position(number)
            samples = self._sampler.samples_at(np.arange(first, first + loader_options.micro_batch_size))
            shards: tuple[int, ...] = ()
            if self.manifest.remote:
                step = (
                    number // loader_options.gradient_accumulation_steps * loader_options.global_batch_size
                )  # alike on all ranks, which share a cache
                shards = self._sampler.shards_to_prefetch(step, step + loader_options.global_batch_size - 1)
            yield self._request(first, samples, shards)

    def _request(self, first: int, samples: np.ndarray, shards: tuple[int, ...]) -> BatchRequest:
        draws = draws_at(self.loader_options.seed, first, len(samples), self.options.draws_per_image)
        return BatchRequest(first, samples, train_params(self.manifest.samples[samples], draws, self.options), shards)

    def substitute(self, request: BatchRequest, substituted: list[SubstitutedSample]) -> BatchRequest:
        """The request with substitutes, each looked at with its position's draws."""
        samples = request.samples.copy()
        for broken in substituted:
            samples[broken.batch_index] = broken.substitute
        request_with_substitutes = self._request(request.position, samples, request.shards)
        return request_with_substitutes._replace(substituted=(*request.substituted, *substituted))


class TrainLoader:
    """An endless iterator of this rank's batches, which can be set to any step of the run in no time.

    Raises ValueError if the cache is too small for a remote data set, RuntimeError from `next` if an image cannot be
    read, or more than max_bad_samples of this epoch's cannot be decoded; it names them.
    """

    def __init__(
        self, manifest: Manifest, options: ImageOptions, loader_options: LoaderOptions, device: torch.device
    ) -> None:
        self.manifest, self.options, self.loader_options, self.device = manifest, options, loader_options, device
        if manifest.remote:
            manifest.remote.cache.check_cache_size({manifest.location: loader_options.required_cache_bytes(manifest)})
        self._sampler = loader_options.sampler(manifest)
        self._micro_step = 0  # micro-steps handed out since the run began
        self._batches: Iterator[Batch] | None = None  # built by the first next(), dropped by restore()
        self._bad_samples: dict[int, list[SubstitutedSample]] = {}  # by epoch

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            requests = _TrainRequests(self.manifest, self.options, self.loader_options, self._sampler)
            substitute = requests.substitute if self.loader_options.max_bad_samples else None
            coming = requests.from_micro_step(self._micro_step)
            self._batches = _batches(
                self.manifest, self.options, coming, self.loader_options.micro_batch_size, self.device, substitute
            )
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
        steps = self._micro_step // self.loader_options.gradient_accumulation_steps
        return {
            "seed": self.loader_options.seed,
            "samples_seen": steps * self.loader_options.global_batch_size,
            "manifest_hash": self.manifest.hash,
            "global_batch": self.loader_options.global_batch_size,
            "order": str(self._sampler),
        }

    @property
    def bad_samples(self) -> int:
        """Broken images that this rank has substituted in the epoch that its last step began in."""
        step = max(0, self._micro_step - 1) // self.loader_options.gradient_accumulation_steps
        return len(self._bad_samples.get(step * self.loader_options.global_batch_size // len(self.manifest), []))

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
                f" {self.manifest.location} has {here['manifest_hash'][:12]};"
                f" give it the folder it began with, or start a new run"
            )
        for name, words in (("global_batch", "global batch"), ("seed", "seed"), ("order", "order")):
            if state[name] != here[name]:
                raise ValueError(
                    f"the run began with {words} {state[name]}, this is {words} {here[name]};"
                    f" set it back to {state[name]}, or start a new run"
                )
        self._micro_step = (
            state["samples_seen"]
            // self.loader_options.global_batch_size
            * self.loader_options.gradient_accumulation_steps
        )
        self.close()
        self._bad_samples = {}

    def _count(self, batch: Batch) -> None:
        """Raises RuntimeError, naming them, if an epoch has more broken images than are allowed."""
        for broken in batch.substituted:
            epoch = (batch.position + broken.batch_index) // len(self.manifest)
            met = self._bad_samples.setdefault(epoch, [])
            if broken not in met:
                met.append(broken)
            if len(met) > self.loader_options.max_bad_samples:
                named = [f"{self.manifest.describe(each.sample)}: {each.reason}" for each in met]
                if len(named) > _BROKEN_SHOWN:
                    named[_BROKEN_SHOWN:] = [f"and {len(named) - _BROKEN_SHOWN} more"]
                raise RuntimeError(
                    f"more than {self.loader_options.max_bad_samples} broken images in epoch {epoch}: {', '.join(named)};"
                    f" {self.manifest.remedy}, or raise data.max_bad_samples"
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
        world_size: int,
        device: torch.device,
        label_map: np.ndarray | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"the evaluation batch is {batch}; use at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks; use 0 to {world_size - 1}")
        self.manifest, self.options, self.batch, self.device = manifest, options.without_ops, batch, device
        if manifest.remote:
            manifest.remote.cache.check_cache_size({manifest.location: self.required_cache_bytes(manifest, batch)})
        self._label_map = None if label_map is None else torch.from_numpy(label_map).to(device)
        self._share = range(len(manifest) * rank // world_size, len(manifest) * (rank + 1) // world_size)

    @staticmethod
    def required_cache_bytes(manifest: Manifest, batch: int, local_world_size: int = 1) -> int:
        """Room that a cache of remote shards needs: for a batch of each rank that shares it, and the shard after it."""
        touched = 1 + -(-(batch - 1) // min(manifest.shard_samples))
        return manifest.required_cache_bytes(local_world_size * (touched + 1))

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._share) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        for batch in _batches(self.manifest, self.options, self._requests(), self.batch, self.device):
            yield batch if self._label_map is None else batch._replace(labels=self._label_map[batch.labels])

    def _requests(self) -> Iterator[BatchRequest]:
        for first in self._share[:: self.batch]:
            samples = np.arange(first, min(first + self.batch, self._share.stop))
            rows = self.manifest.samples[samples]
            after = min(int(rows["shard"][-1]) + 1, int(self.manifest.samples["shard"][self._share[-1]]))
            shards = tuple(range(int(rows["shard"][0]), after + 1))
            yield BatchRequest(first, samples, eval_params(rows, self.options), shards)


def _batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[BatchRequest],
    max_batch: int,
    device: torch.device,
    substitute: SubstituteFn | None = None,
) -> Iterator[Batch]:
    for request, images in decode_batches(manifest, options, requests, max_batch, device, substitute):
        labels = torch.from_numpy(manifest.samples["label"][request.samples].astype(np.int64))
        labels = labels.to(device, non_blocking=True)
        yield Batch(images, labels, request.samples, request.position, request.substituted)


def check_labels(manifest: Manifest, num_classes: int) -> None:
    """Raises ValueError if a class of the data set has no output in a model of `num_classes`."""
    classes = len(manifest.classes)
    if classes > num_classes:
        raise ValueError(
            f"{manifest.location} has {classes} classes, the model has {num_classes} outputs; set model.num_classes to"
            f" {classes}, or leave it out"
        )


def map_labels(val: Manifest, classes: tuple[str, ...], source: str) -> np.ndarray:
    """(classes of `val`,) int64: for each its label among `classes`, those of training or of weights at `source`.

    Names decide, so `val` may have fewer classes, in any order. A class without images may have any name.
    Raises ValueError, naming the first, if it has images of a class that is not among them.
    """
    labels = {name: label for label, name in enumerate(classes)}
    for name in (val.classes[label] for label in np.unique(val.samples["label"])):
        if name not in labels:
            near = difflib.get_close_matches(name, classes, n=3) or classes[:3]
            raise ValueError(
                f'class "{name}" of {val.location} is not among the {len(classes)} classes of {source}, such as'
                f" {', '.join(near)}; leave it out of the one, or have it in both"
            )
    return np.array([labels.get(name, -1) for name in val.classes], dtype=np.int64)


def count_classes(manifest: Manifest) -> int:
    """How many classes have images in a data set."""
    return len(np.unique(manifest.samples["label"]))

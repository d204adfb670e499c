"""Data loaders for training and evaluation: the batches of one rank, on its device.

sampler.py orders the samples, decode.py decodes them. A run is one sequence of positions, epoch after epoch without a
gap, of which each step takes the next `global_batch_size`, whatever the number of ranks. So the position is a loader's
whole state, and the same on any number of ranks.

In training the next decodable sample of the same shard substitutes, with its own label, for one that cannot be
decoded; in evaluation a bad sample is an error.

B: images of a batch, S: their side.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from dataio.augment.params import ImageOptions, eval_params, train_params
from dataio.bad_samples import BadSampleBudget, SubstitutedSample
from dataio.decode import BatchRequest, SubstituteFn, decode_batches
from dataio.loader_state import LoaderState
from dataio.manifest import Manifest
from dataio.sampler import ShuffledSampler, draws_at


class Batch(NamedTuple):
    """Images and labels of one rank in one micro-step of training, or one step of evaluation.

    position: that of the first sample in the run (training), or its row of the manifest (evaluation). substituted: bad
    samples of the batch, whose substitutes are in `samples` and `labels`.
    """

    images: torch.Tensor  # (B, 3, S, S) float32, normalised, channels_last, on the device
    labels: torch.Tensor  # (B,) int64, on the device
    samples: npt.NDArray[np.int64]  # (B,) rows of the manifest, on the host
    position: int
    substituted: tuple[SubstitutedSample, ...] = ()


@dataclass(frozen=True)
class LoaderOptions:
    """Options of training's loader: the order of the run's samples, and this rank's share of each step.

    shuffle_window_shards: None shuffles the whole data set; a number, within windows of so many shards, see
    ShuffledSampler. max_bad_samples: how many samples of an epoch this rank may substitute.
    Raises ValueError if the global batch is not divisible by ranks and micro-steps.
    """

    seed: int
    global_batch_size: int  # samples of a step, over all ranks and micro-steps
    gradient_accumulation_steps: int = 1  # micro-steps of a step
    rank: int = 0
    world_size: int = 1
    shuffle_window_shards: int | None = None
    max_bad_samples: int = 0

    def __post_init__(self) -> None:
        if min(self.global_batch_size, self.gradient_accumulation_steps, self.world_size) < 1 or self.seed < 0:
            raise ValueError(
                f"global batch {self.global_batch_size}, accumulation {self.gradient_accumulation_steps} and ranks"
                f" {self.world_size} must be at least 1, and seed {self.seed} at least 0"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks; use 0 to {self.world_size - 1}")
        micro_batches = self.world_size * self.gradient_accumulation_steps
        if self.global_batch_size % micro_batches:
            below = self.global_batch_size // micro_batches * micro_batches
            above = below + micro_batches
            remedy = f"use {below} or {above}" if below else f"use {above}"
            if sizes := self._nearest_world_sizes():
                remedy += f", or {sizes} ranks"
            raise ValueError(
                f"global batch {self.global_batch_size} is not divisible by"
                f" {self.world_size} ranks × {self.gradient_accumulation_steps} accumulation; {remedy}"
            )

    def _nearest_world_sizes(self) -> str:
        """Name the nearest numbers of ranks that divide the batch, below and above this one: "2 or 4"; "" for none."""
        micro_batches, rest = divmod(self.global_batch_size, self.gradient_accumulation_steps)
        sizes = [] if rest else [size for size in range(1, micro_batches + 1) if micro_batches % size == 0]
        below = [size for size in sizes if size < self.world_size][-1:]
        above = [size for size in sizes if size > self.world_size][:1]
        return " or ".join(map(str, below + above))

    @property
    def micro_batch_size(self) -> int:
        """Images of one rank in one micro-step."""
        return self.global_batch_size // (self.world_size * self.gradient_accumulation_steps)

    def sampler(self, manifest: Manifest) -> ShuffledSampler:
        """Create the sampler of the run, the same on all ranks."""
        return ShuffledSampler(self.seed, manifest.shard_samples, self.shuffle_window_shards)

    def required_cache_bytes(self, manifest: Manifest) -> int:
        """Bytes that a cache of remote shards must hold: all shards that a step reads, and the window after them."""
        return manifest.required_cache_bytes(self.sampler(manifest).max_prefetched_shards(self.global_batch_size))

    def step_position(self, micro_step: int) -> int:
        """Return the position at which the step of a micro-step begins; micro-steps count from 0 over the run."""
        return micro_step // self.gradient_accumulation_steps * self.global_batch_size

    def first_position(self, micro_step: int) -> int:
        """Return the position of this rank's first sample in a micro-step."""
        micro_batch = micro_step % self.gradient_accumulation_steps * self.world_size + self.rank
        return self.step_position(micro_step) + micro_batch * self.micro_batch_size

    def micro_step_at(self, position: int) -> int:
        """Return the first micro-step of the step that begins at a position."""
        return position // self.global_batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class _TrainRequests:
    """Source of the batches that a rank requests of decode.py.

    DALI holds the iterator, so this must not refer to the loader, which would then live as long as the pipeline.
    """

    manifest: Manifest
    options: ImageOptions
    loader_options: LoaderOptions
    sampler: ShuffledSampler

    def from_micro_step(self, micro_step: int) -> Iterator[BatchRequest]:
        """Yield requests from a micro-step on, without end."""
        options = self.loader_options
        for number in itertools.count(micro_step):
            first = options.first_position(number)
            samples = self.sampler.samples_at(np.arange(first, first + options.micro_batch_size))
            shards: tuple[int, ...] = ()
            if self.manifest.remote:
                step = options.step_position(number)  # the same on all ranks, which may share a cache
                shards = self.sampler.shards_to_prefetch(step, step + options.global_batch_size - 1)
            yield self._request(first, samples, shards)

    def _request(self, first: int, samples: npt.NDArray[np.int64], shards: tuple[int, ...]) -> BatchRequest:
        draws = draws_at(self.loader_options.seed, first, len(samples), self.options.draws_per_image)
        return BatchRequest(first, samples, train_params(self.manifest.samples[samples], draws, self.options), shards)

    def substitute(self, request: BatchRequest, substituted: list[SubstitutedSample]) -> BatchRequest:
        """Return the request with substitutes, each transformed by the draws of its position."""
        samples = request.samples.copy()
        for bad in substituted:
            samples[bad.batch_index] = bad.substitute
        repaired = self._request(request.position, samples, request.shards)
        return repaired._replace(substituted=(*request.substituted, *substituted))


class TrainLoader:
    """Endless iterator of this rank's batches, which moves to any step of the run at no cost.

    Raises ValueError if the cache is too small for a remote data set. `next` raises RuntimeError, naming the samples,
    if an image cannot be read, or more than max_bad_samples of an epoch cannot be decoded.
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
        self._bad_samples = BadSampleBudget(manifest, loader_options.max_bad_samples)

    def __iter__(self) -> "TrainLoader":
        """Return this loader, at its current position."""
        return self

    def __next__(self) -> Batch:
        """Return the batch of the next micro-step."""
        if self._batches is None:
            requests = _TrainRequests(self.manifest, self.options, self.loader_options, self._sampler)
            substitute = requests.substitute if self.loader_options.max_bad_samples else None
            self._batches = _batches(
                self.manifest,
                self.options,
                requests.from_micro_step(self._micro_step),
                self.loader_options.micro_batch_size,
                self.device,
                substitute,
            )
        try:
            batch = next(self._batches)
            self._bad_samples.add(batch.position, batch.substituted)
        except BaseException:  # the generator has ended; the next call starts another from the same batch
            self._batches = None
            raise
        self._micro_step += 1
        return batch

    def state(self) -> LoaderState:
        """Return the position of the run, for JSON."""
        return {
            "seed": self.loader_options.seed,
            "samples_seen": self.loader_options.step_position(self._micro_step),
            "manifest_hash": self.manifest.hash,
            "global_batch": self.loader_options.global_batch_size,
            "order": str(self._sampler),
        }

    @property
    def bad_samples(self) -> int:
        """Samples that this rank substituted in the epoch in which its last step began."""
        position = self.loader_options.step_position(max(0, self._micro_step - 1))
        return self._bad_samples.count(position // len(self.manifest))

    def close(self) -> None:
        """Close shards and pipeline; a further `next` opens them again and continues at the same position."""
        self._batches = None

    def restore(self, state: LoaderState) -> None:
        """Move to the position of `state`, at no cost; world size and gradient accumulation may differ.

        Raises ValueError if data set, order, global batch or seed differ.
        """
        own = self.state()
        if state["manifest_hash"] != own["manifest_hash"]:
            raise ValueError(
                f"the run began on a data set with manifest {state['manifest_hash'][:12]},"
                f" {self.manifest.location} has {own['manifest_hash'][:12]};"
                f" give it the folder it began with, or start a new run"
            )
        for words, before, now in (
            ("global batch", state["global_batch"], own["global_batch"]),
            ("seed", state["seed"], own["seed"]),
            ("order", state["order"], own["order"]),
        ):
            if before != now:
                raise ValueError(
                    f"the run began with {words} {before}, this is {words} {now};"
                    f" set it back to {before}, or start a new run"
                )
        self._micro_step = self.loader_options.micro_step_at(state["samples_seen"])
        self.close()
        self._bad_samples = BadSampleBudget(self.manifest, self.loader_options.max_bad_samples)


class EvalLoader:
    """Iterable of this rank's batches of an evaluation: every sample once over all ranks, in stored order.

    Each rank has one contiguous share, equal to the others within one sample. Its last batch may be shorter, and some
    ranks have no batch if there are fewer samples than ranks. It can be iterated again and again.
    label_map: of `map_labels`, if batches are to have other labels than those packed.
    Raises ValueError if the cache is too small for a remote data set even if no other rank shares it. Iteration raises
    RuntimeError, naming the sample, if an image cannot be read or decoded.
    """

    def __init__(
        self,
        manifest: Manifest,
        options: ImageOptions,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        label_map: npt.NDArray[np.int64] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"the evaluation batch is {batch_size}; use at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size} ranks; use 0 to {world_size - 1}")
        self.manifest, self.options, self.device = manifest, options.without_ops, device
        self.batch_size = batch_size
        if manifest.remote:
            manifest.remote.cache.check_cache_size({manifest.location: self.required_cache_bytes(manifest, batch_size)})
        self._label_map = None if label_map is None else torch.from_numpy(label_map).to(device)
        self._share = range(len(manifest) * rank // world_size, len(manifest) * (rank + 1) // world_size)

    @staticmethod
    def required_cache_bytes(manifest: Manifest, batch_size: int, local_world_size: int = 1) -> int:
        """Bytes that a cache of remote shards must hold: for each rank on it, those of a batch and the next one."""
        shards_of_batch = 1 + -(-(batch_size - 1) // min(manifest.shard_samples))
        return manifest.required_cache_bytes(local_world_size * (shards_of_batch + 1))

    def __len__(self) -> int:
        """Return the number of this rank's batches."""
        return -(-len(self._share) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches from its first sample on."""
        for batch in _batches(self.manifest, self.options, self._requests(), self.batch_size, self.device):
            yield batch if self._label_map is None else batch._replace(labels=self._label_map[batch.labels])

    def _requests(self) -> Iterator[BatchRequest]:
        for first in self._share[:: self.batch_size]:
            samples = np.arange(first, min(first + self.batch_size, self._share.stop))
            rows = self.manifest.samples[samples]
            after = min(int(rows["shard"][-1]) + 1, int(self.manifest.samples["shard"][self._share[-1]]))
            shards = tuple(range(int(rows["shard"][0]), after + 1))
            yield BatchRequest(first, samples, eval_params(rows, self.options), shards)


def _batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[BatchRequest],
    max_batch_size: int,
    device: torch.device,
    substitute: SubstituteFn | None = None,
) -> Iterator[Batch]:
    for request, images in decode_batches(manifest, options, requests, max_batch_size, device, substitute):
        labels = torch.from_numpy(manifest.samples["label"][request.samples].astype(np.int64))
        labels = labels.to(device, non_blocking=True)
        yield Batch(images, labels, request.samples, request.position, request.substituted)

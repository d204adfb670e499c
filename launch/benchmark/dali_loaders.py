"""The data benchmark's loaders that need DALI: ours, and DALI's own WebDataset reader.

loaders.py has the others, and the interface.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import torch
from nvidia.dali import pipeline_def, types
from nvidia.dali.auto_aug.rand_augment import rand_augment
from nvidia.dali.data_node import DataNode

from dataio.augment.params import train_params
from dataio.decode import BatchRequest, decode_batches
from dataio.loader import EvalLoader
from dataio.manifest import Manifest, load_manifest
from dataio.sampler import ShuffledSampler, draws_at
from dataio.shards import open_shards
from launch.benchmark.loaders import EXTENSIONS, SEED, SHUFFLE_BUFFER, LoadedBatch, LoaderConfig, grid_of
from launch.config import DataSection

_PREFETCH_QUEUE_DEPTH = 2  # batches in flight, as in dataio


class DataioLoader:
    """dataio, as launch/train.py and launch/evaluate.py use it."""

    def __init__(self, config: LoaderConfig) -> None:
        self.config, self.manifest = config, load_manifest(config.folder)
        self._options, self._device = config.data(), torch.device(config.device)

    def epoch(self, number: int) -> Iterator[LoadedBatch]:
        """Every image once, in batches."""
        if self.config.workload == "read":
            return self._read(number)
        if self.config.workload == "evaluation":
            return self._evaluate()
        return self._train(number)

    def _read(self, number: int) -> Iterator[LoadedBatch]:
        with closing(open_shards(self.manifest)) as shards:
            for _, samples in _training_order(self.manifest, number, self.config.batch):
                encoded = [shards.read(sample) for sample in samples]
                yield LoadedBatch(encoded, self.manifest.samples["label"][samples], samples)

    def _evaluate(self) -> Iterator[LoadedBatch]:
        for batch in EvalLoader(self.manifest, self._options, self.config.batch, 0, 1, self._device):
            yield LoadedBatch(batch.images, batch.labels, batch.samples)

    def _train(self, number: int) -> Iterator[LoadedBatch]:
        """TrainLoader's batches of one epoch; itself it never ends, and would decode ahead while others are timed."""
        requests = self._requests(number)
        for request, images in decode_batches(self.manifest, self._options, requests, self.config.batch, self._device):
            labels = torch.from_numpy(self.manifest.samples["label"][request.samples].astype(np.int64))
            yield LoadedBatch(images, labels.to(self._device), request.samples)

    def _requests(self, number: int) -> Iterator[BatchRequest]:
        for first, samples in _training_order(self.manifest, number, self.config.batch):
            draws = draws_at(SEED, first, len(samples), self._options.draws_per_image)
            yield BatchRequest(first, samples, train_params(self.manifest.samples[samples], draws, self._options))


class DaliWebDatasetLoader:
    """DALI alone: fn.readers.webdataset, decoding, cropping and normalising in one graph."""

    def __init__(self, config: LoaderConfig) -> None:
        self.config, self._manifest = config, load_manifest(config.folder)
        self._pipeline = _webdataset_pipeline(config, self._manifest, **_pipeline_arguments(config))
        self._started = False

    def epoch(self, number: int) -> Iterator[LoadedBatch]:
        """Every image once, in batches."""
        samples, batch = len(self._manifest), self.config.batch
        batches = -(-samples // batch)
        for _ in range(_PREFETCH_QUEUE_DEPTH if self._started else 1):  # the first call fills the queue by itself
            self._pipeline.schedule_run()
        self._started = True
        for index in range(batches):
            images, texts = self._pipeline.share_outputs()
            first = index * batch
            count = min(batch, samples - first)  # the last batch is padded
            loaded = LoadedBatch(
                _to_output(images, self.config)[:count],
                torch.tensor([int(texts.at(number).tobytes()) for number in range(count)]).to(self.config.device),
                None if self.config.shuffled else np.arange(first, first + count),
            )
            self._pipeline.release_outputs()
            if index + _PREFETCH_QUEUE_DEPTH < batches:  # nothing of the next epoch while others are timed
                self._pipeline.schedule_run()
            yield loaded


class DataioDecodeLoader:
    """dataio's reader of shards and DALI's decoder, in stored order: training never decodes whole images."""

    def __init__(self, config: LoaderConfig) -> None:
        self.config, self._manifest = config, load_manifest(config.folder)

    def epoch(self, number: int) -> Iterator[LoadedBatch]:
        """Every image once, in batches."""
        samples, batch = len(self._manifest), self.config.batch
        requests = (np.arange(first, min(first + batch, samples)) for first in range(0, samples, batch))
        in_flight: list[np.ndarray] = []

        def feed() -> list[np.ndarray]:
            in_flight.append(next(requests))
            return [np.frombuffer(shards.read(sample), dtype=np.uint8) for sample in in_flight[-1]]

        with closing(open_shards(self._manifest)) as shards:
            pipeline = _decode_pipeline(feed, self.config, **_pipeline_arguments(self.config))
            pipeline.schedule_run()
            while in_flight:
                (images,) = pipeline.share_outputs()
                rows = in_flight.pop(0)
                loaded = LoadedBatch(_to_output(images, self.config), self._manifest.samples["label"][rows], rows)
                pipeline.release_outputs()
                pipeline.schedule_run()
                yield loaded


def _training_order(manifest: Manifest, epoch: int, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """Batches of an epoch in training order: (position of the first sample, samples)."""
    order = ShuffledSampler(SEED, manifest.shard_samples)
    first, end = epoch * len(manifest), (epoch + 1) * len(manifest)
    for position in range(first, end, batch):
        yield position, order.samples_at(np.arange(position, min(position + batch, end)))


def _pipeline_arguments(config: LoaderConfig) -> dict[str, Any]:
    device_id = None if config.device == "cpu" else torch.cuda.current_device()
    return {
        "batch_size": config.batch,
        "num_threads": config.cores,
        "device_id": device_id,
        "prefetch_queue_depth": _PREFETCH_QUEUE_DEPTH,
        "seed": SEED,
    }


@pipeline_def(enable_conditionals=True)
def _webdataset_pipeline(config: LoaderConfig, manifest: Manifest) -> tuple[DataNode, DataNode]:
    encoded, text = fn.readers.webdataset(  # type: ignore[misc]
        paths=[str(manifest.folder / shard.name) for shard in manifest.shards],
        index_paths=[str(manifest.folder / shard.idx_name) for shard in manifest.shards],
        ext=[";".join(EXTENSIONS), "cls"],
        missing_component_behavior="error",
        random_shuffle=config.shuffled,
        initial_fill=SHUFFLE_BUFFER,
        pad_last_batch=True,
        prefetch_queue_depth=1,
    )
    if config.workload == "read":
        return encoded, text
    if config.workload == "decode":
        return _decode(encoded, config), text
    return _normalised(encoded, config, config.data()), text


@pipeline_def
def _decode_pipeline(feed: Callable[[], list[np.ndarray]], config: LoaderConfig) -> DataNode:
    return _decode(fn.external_source(feed, ndim=1, dtype=types.UINT8), config)  # type: ignore[attr-defined]


def _decode(encoded: DataNode, config: LoaderConfig) -> DataNode:
    return fn.decoders.image(encoded, device=_decoder(config), adjust_orientation=False, jpeg_fancy_upsampling=True)


def _normalised(encoded: DataNode, config: LoaderConfig, data: DataSection) -> DataNode:
    """Images for evaluation or training, with DALI's own random numbers."""
    decoding: dict[str, Any] = {
        "device": _decoder(config),
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    images: Any
    mirror: Any = 0
    if config.workload == "evaluation":
        images, side = fn.decoders.image(encoded, **decoding), int(config.size / data.crop_pct)
        margin = max(1, side - config.size)
        position = round(margin / 2) / margin  # half to even, as in PIL; DALI's own default rounds up
    else:
        images = fn.decoders.image_random_crop(
            encoded, random_area=data.crop_scale, random_aspect_ratio=data.crop_ratio, **decoding
        )
        side, position, mirror = config.size, 0.5, fn.random.coin_flip(probability=data.hflip)
    cubic = types.INTERP_CUBIC  # type: ignore[attr-defined]
    images = fn.resize(images, size=(side, side), interp_type=cubic, antialias=True, subpixel_scale=False)
    if config.workload == "rand-augment":
        for _ in range(data.rand_augment.num_layers):
            images = _rand_augment(images, data)
    return fn.crop_mirror_normalize(
        images,
        crop=(config.size, config.size),
        crop_pos_x=position,
        crop_pos_y=position,
        mirror=mirror,
        mean=[255 * mean for mean in data.mean],
        std=[255 * std for std in data.std],
        dtype=types.FLOAT,  # type: ignore[attr-defined]
        output_layout="HWC",  # channels_last, as ours
    )


def _rand_augment(images: DataNode, data: DataSection) -> DataNode:
    """One of DALI's own 13 operations, nearly timm's 15, of the same strength on average."""
    settings = data.rand_augment
    if fn.random.coin_flip(probability=settings.prob, dtype=types.BOOL):  # type: ignore[attr-defined]
        images = rand_augment(
            images,
            n=1,
            m=round(settings.magnitude),
            num_magnitude_bins=11,
            shape=(data.image_size, data.image_size),
            max_translate_rel=0.45,
        )
    return images


def _decoder(config: LoaderConfig) -> str:
    return "cpu" if config.device == "cpu" else "mixed"


def _to_output(output: Any, config: LoaderConfig) -> Any:
    """Convert the images of a batch to what `LoadedBatch` has."""
    if config.workload == "read":
        return [output.at(index).tobytes() for index in range(len(output))]
    if config.workload == "decode":
        output = output.as_cpu()
        return np.stack([grid_of(output.at(index)) for index in range(len(output))])
    return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)  # not copied, as DALI's own iterators do it

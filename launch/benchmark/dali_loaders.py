"""The data benchmark's contenders that need DALI: ours, and DALI's own WebDataset reader.

loaders.py has the others, and says what a contender has to do.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.auto_aug.rand_augment import rand_augment
from nvidia.dali.data_node import DataNode

from dataio.augment.views import train_views
from dataio.decode import Request, decode_batches
from dataio.loader import EvalLoader
from dataio.manifest import Manifest, load_manifest
from dataio.sampler import Order, draws_at
from dataio.shards import open_shards
from launch.benchmark.loaders import ENDINGS, SEED, SHUFFLED, Delivery, Task, grid_of
from launch.config import DataSection
from launch.plan import image_options

_DEPTH = 2  # batches under way, as ours has


class Ours:
    """dataio, as launch/train.py and launch/evaluate.py use it."""

    def __init__(self, task: Task) -> None:
        self.task, self.manifest = task, load_manifest(task.folder)
        self._options, self._device = image_options(task.data()), torch.device(task.device)

    def epoch(self, number: int) -> Iterator[Delivery]:
        if self.task.work == "read":
            return self._read(number)
        if self.task.work == "evaluation":
            return self._evaluate()
        return self._train(number)

    def _read(self, number: int) -> Iterator[Delivery]:
        with closing(open_shards(self.manifest)) as shards:
            for _, samples in _training_order(self.manifest, number, self.task.batch):
                encoded = [shards.read(sample) for sample in samples]
                yield Delivery(encoded, self.manifest.samples["label"][samples], samples)

    def _evaluate(self) -> Iterator[Delivery]:
        for batch in EvalLoader(self.manifest, self._options, self.task.batch, 0, 1, self._device):
            yield Delivery(batch.images, batch.labels, batch.samples)

    def _train(self, number: int) -> Iterator[Delivery]:
        """TrainLoader has no end, and would be decoding the next epoch when a rival's turn begins."""
        requests = self._requests(number)
        for request, images in decode_batches(self.manifest, self._options, requests, self.task.batch, self._device):
            labels = torch.from_numpy(self.manifest.samples["label"][request.samples].astype(np.int64))
            yield Delivery(images, labels.to(self._device), request.samples)

    def _requests(self, number: int) -> Iterator[Request]:
        for first, samples in _training_order(self.manifest, number, self.task.batch):
            draws = draws_at(SEED, first, len(samples), self._options.draws_per_image)
            yield Request(first, samples, train_views(self.manifest.samples[samples], draws, self._options))


class NativeReader:
    """DALI alone: fn.readers.webdataset, decoding, cropping, normalising in one graph."""

    def __init__(self, task: Task) -> None:
        self.task, self._manifest = task, load_manifest(task.folder)
        self._pipeline = _native_graph(task, self._manifest, **_pipeline_arguments(task))
        self._started = False

    def epoch(self, number: int) -> Iterator[Delivery]:
        samples, batch = len(self._manifest), self.task.batch
        batches = -(-samples // batch)
        for _ in range(_DEPTH if self._started else 1):  # the first call starts `_DEPTH` batches
            self._pipeline.schedule_run()
        self._started = True
        for place in range(batches):
            images, texts = self._pipeline.share_outputs()
            first = place * batch
            count = min(batch, samples - first)  # the last batch is padded
            delivery = Delivery(
                _hand_over(images, self.task)[:count],
                torch.tensor([int(texts.at(number).tobytes()) for number in range(count)]).to(self.task.device),
                None if self.task.shuffled else np.arange(first, first + count),
            )
            self._pipeline.release_outputs()
            if place + _DEPTH < batches:  # none of the next epoch while others have their turn
                self._pipeline.schedule_run()
            yield delivery


class OursDecoding:
    """Our shards' reader and DALI's decoder, in the order of a file: training never decodes whole images."""

    def __init__(self, task: Task) -> None:
        self.task, self._manifest = task, load_manifest(task.folder)

    def epoch(self, number: int) -> Iterator[Delivery]:
        samples, batch = len(self._manifest), self.task.batch
        requests = (np.arange(first, min(first + batch, samples)) for first in range(0, samples, batch))
        under_way: list[np.ndarray] = []

        def feed() -> list[np.ndarray]:
            under_way.append(next(requests))
            return [np.frombuffer(shards.read(sample), dtype=np.uint8) for sample in under_way[-1]]

        with closing(open_shards(self._manifest)) as shards:
            pipeline = _decoding_graph(feed, self.task, **_pipeline_arguments(self.task))
            pipeline.schedule_run()
            while under_way:
                (images,) = pipeline.share_outputs()
                rows = under_way.pop(0)
                delivery = Delivery(_hand_over(images, self.task), self._manifest.samples["label"][rows], rows)
                pipeline.release_outputs()
                pipeline.schedule_run()
                yield delivery


def _training_order(manifest: Manifest, epoch: int, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """An epoch's batches: (position of the first sample, samples)."""
    order = Order(SEED, manifest.shard_samples)
    first, end = epoch * len(manifest), (epoch + 1) * len(manifest)
    for position in range(first, end, batch):
        yield position, order.samples_at(np.arange(position, min(position + batch, end)))


def _pipeline_arguments(task: Task) -> dict[str, Any]:
    device_id = None if task.device == "cpu" else torch.cuda.current_device()
    return {
        "batch_size": task.batch,
        "num_threads": task.cores,
        "device_id": device_id,
        "prefetch_queue_depth": _DEPTH,
        "seed": SEED,
    }


@pipeline_def(enable_conditionals=True)
def _native_graph(task: Task, manifest: Manifest) -> tuple[DataNode, DataNode]:
    encoded, text = fn.readers.webdataset(
        paths=[str(manifest.folder / shard.name) for shard in manifest.shards],
        index_paths=[str(manifest.folder / shard.idx_name) for shard in manifest.shards],
        ext=[";".join(ENDINGS), "cls"],
        missing_component_behavior="error",
        random_shuffle=task.shuffled,
        initial_fill=SHUFFLED,
        pad_last_batch=True,
        prefetch_queue_depth=1,
    )
    if task.work == "read":
        return encoded, text
    if task.work == "decode":
        return _decode(encoded, task), text
    return _normalised(encoded, task, task.data()), text


@pipeline_def
def _decoding_graph(feed: Callable[[], list[np.ndarray]], task: Task) -> DataNode:
    return _decode(fn.external_source(feed, ndim=1, dtype=types.UINT8), task)


def _decode(encoded: DataNode, task: Task) -> DataNode:
    return fn.decoders.image(encoded, device=_decoder(task), adjust_orientation=False, jpeg_fancy_upsampling=True)


def _normalised(encoded: DataNode, task: Task, data: DataSection) -> DataNode:
    """The evaluation's or the training's images, with DALI's own random numbers."""
    decoding = {"device": _decoder(task), "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    if task.work == "evaluation":
        images, side, mirror = fn.decoders.image(encoded, **decoding), int(task.size / data.eval_crop_fraction), 0
        margin = max(1, side - task.size)
        place = round(margin / 2) / margin  # half to even, as PIL's users have it; DALI's own default rounds up
    else:
        images = fn.decoders.image_random_crop(
            encoded, random_area=data.crop_scale, random_aspect_ratio=data.crop_ratio, **decoding
        )
        side, place, mirror = task.size, 0.5, fn.random.coin_flip(probability=data.flip_probability)
    images = fn.resize(images, size=(side, side), interp_type=types.INTERP_CUBIC, antialias=True, subpixel_scale=False)
    if task.work == "rand-augment":
        for _ in range(data.rand_augment.layers):
            images = _rand_augment(images, data)
    return fn.crop_mirror_normalize(
        images,
        crop=(task.size, task.size),
        crop_pos_x=place,
        crop_pos_y=place,
        mirror=mirror,
        mean=[255 * mean for mean in data.mean],
        std=[255 * std for std in data.std],
        dtype=types.FLOAT,
        output_layout="HWC",  # channels_last, as ours
    )


def _rand_augment(images: DataNode, data: DataSection) -> DataNode:
    """One of DALI's own 13 operations; they are nearly timm's 15, of the same strength on average."""
    settings = data.rand_augment
    if fn.random.coin_flip(probability=settings.probability, dtype=types.BOOL):
        images = rand_augment(
            images,
            n=1,
            m=round(settings.magnitude),
            num_magnitude_bins=11,
            shape=(data.image_size, data.image_size),
            max_translate_rel=0.45,
        )
    return images


def _decoder(task: Task) -> str:
    return "cpu" if task.device == "cpu" else "mixed"


def _hand_over(output: Any, task: Task) -> Any:
    """What the consumer gets of a batch."""
    if task.work == "read":
        return [output.at(place).tobytes() for place in range(len(output))]
    if task.work == "decode":
        output = output.as_cpu()
        return np.stack([grid_of(output.at(place)) for place in range(len(output))])
    return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)  # not copied, as DALI's own iterators do it

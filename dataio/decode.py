"""Decodes batches: reads the encoded images of each request, feeds them to the DALI pipeline, returns tensors.

loader.py says which samples, augment/params.py how each is transformed. A batch that DALI fails on is repaired by
bad_samples.py and decoded again.

B: images of a batch, S: the side of the decoded ones.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dataio.augment.params import ImageOptions, TransformParams
from dataio.bad_samples import BadSampleFinder, Encoded, SubstitutedSample, as_array
from dataio.manifest import Manifest
from dataio.pipeline import DALI_ERRORS, build_pipeline, make_resizer, pipeline_inputs, to_torch
from dataio.shards import BadSampleError, EncodedImages, open_shards


class BatchRequest(NamedTuple):
    """A batch to decode: the position of its first sample, (B,) rows of the manifest, and their transforms.

    shards: needed for it and soon after, in that order; prefetched where the data set is remote.
    """

    position: int
    samples: npt.NDArray[np.int64]
    params: TransformParams
    shards: tuple[int, ...] = ()
    substituted: tuple[SubstitutedSample, ...] = ()


#: (a request, what is to be substituted in it) → the request with other samples and their transforms.
SubstituteFn = Callable[[BatchRequest, list[SubstitutedSample]], BatchRequest]


def decode_batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[BatchRequest],
    max_batch: int,
    device: torch.device,
    substitute: SubstituteFn | None = None,
) -> Iterator[tuple[BatchRequest, torch.Tensor]]:
    """Each request with its images: (B, 3, S, S) float32, normalised, channels_last, on `device`.

    nvJPEG decodes on a CUDA device, libjpeg on the CPU. While the caller has a batch, `prefetch_batches` more are
    in flight. A request holds 1 to `max_batch` samples. With `substitute`, an undecodable image is replaced by the next
    decodable sample of its shard, and the request that comes back says so. `requests` must not refer to what holds
    this iterator: DALI keeps them, where Python cannot see that both are garbage. Raises RuntimeError, naming the
    sample, if an image cannot be read, or cannot be decoded and may not be substituted; no batch follows then.
    """
    Image.init()  # a format that PIL cannot load later, for want of memory, would be "not an image"
    with closing(open_shards(manifest)) as shards:
        decoder = _BatchDecoder(
            manifest, shards, options, device, BadSampleFinder(manifest, shards, options, device), substitute
        )
        batches = map(decoder.load, requests)
        retry: list[_EncodedBatch] = []
        while True:
            in_flight: deque[_EncodedBatch] = deque()  # oldest first; DALI returns them in this order
            try:
                yield from _decode(decoder, chain(retry, batches), in_flight, max_batch)
                return
            except _DecodingError as error:  # the pipeline cannot be used any more
                retry = decoder.repair(in_flight, error)


class _EncodedBatch(NamedTuple):
    """A request and its encoded images."""

    request: BatchRequest
    encoded: list[Encoded]


class _DecodingError(Exception):
    """DALI's: it does not say which image of a batch it failed on."""


def _decode(
    decoder: "_BatchDecoder", batches: Iterator[_EncodedBatch], in_flight: deque[_EncodedBatch], max_batch: int
) -> Iterator[tuple[BatchRequest, torch.Tensor]]:
    """Each batch, decoded by one pipeline. Those that were fed and not returned yet are in `in_flight`."""

    def feed() -> tuple[Any, ...]:
        in_flight.append(next(batches))  # DALI takes its StopIteration for the end
        request, encoded = in_flight[-1]
        return encoded, *pipeline_inputs(request.params, decoder.options)

    resizer = make_resizer(decoder.options, decoder.device)
    pipeline = build_pipeline(decoder.options, feed, max_batch, decoder.device, resizer)
    pipeline.schedule_run()  # feeds and starts the first `prefetch_batches`; every later call, the next one
    while in_flight:
        try:
            output, sizes = pipeline.share_outputs()
        except DALI_ERRORS as error:
            if resizer:
                resizer.check()
            raise _DecodingError(*error.args) from error
        if not decoder.sizes_match(in_flight[0].request.samples, sizes):
            raise _DecodingError("an image has another size than it was packed with")
        images = to_torch(output, decoder.device)
        pipeline.release_outputs()
        request = in_flight.popleft().request
        pipeline.schedule_run()
        yield request, images


@dataclass(frozen=True)
class _BatchDecoder:
    """Loads the encoded images of a batch, and repairs batches that DALI fails on."""

    manifest: Manifest
    shards: EncodedImages
    options: ImageOptions
    device: torch.device
    finder: BadSampleFinder
    substitute: SubstituteFn | None

    def load(self, request: BatchRequest) -> _EncodedBatch:
        """A request with its images as they lie in the shards."""
        self.shards.prefetch(request.shards)
        self.shards.read_ahead(request.samples)
        encoded, reasons = [], {}
        for index, sample in enumerate(request.samples):
            try:
                encoded.append(as_array(self.shards.read(sample)))
            except BadSampleError as error:
                encoded.append(as_array(b""))
                reasons[index] = str(error)
        batch = _EncodedBatch(request, encoded)
        return self._with_substitutes(reasons, batch) if reasons else batch

    def repair(self, in_flight: Iterable[_EncodedBatch], error: Exception) -> list[_EncodedBatch]:
        """The batches to decode again, the first that DALI fails on without its undecodable images.

        Raises RuntimeError if none has one, or it may not be substituted.
        """
        batches = list(in_flight)
        for number, batch in enumerate(batches):  # DALI returns them in order: as a rule it is the first
            reasons = self.finder.find(batch.request.samples, batch.encoded, batch.request.params)
            if reasons:
                batches[number] = self._with_substitutes(reasons, batch)
                return batches
        raise RuntimeError(
            "DALI failed on a batch, and on none of its images alone; free some memory, or lower data.threads,"
            f" --threads or data.prefetch_batches: {error}"
        ) from error

    def _with_substitutes(self, reasons: dict[int, str], batch: _EncodedBatch) -> _EncodedBatch:
        """The batch with substitutes for the images at these indices. Raises RuntimeError where there may be none."""
        request, encoded = batch
        if self.substitute is None:
            raise self.finder.error({int(request.samples[index]): reason for index, reason in reasons.items()})
        substituted = []
        for index, reason in reasons.items():
            sample = int(request.samples[index])
            other, encoded[index] = self.finder.substitute(sample, reason)
            substituted.append(SubstitutedSample(index, sample, reason, other))
        return _EncodedBatch(self.substitute(request, substituted), encoded)

    def sizes_match(self, samples: npt.NDArray[np.int64], sizes: Any) -> bool:
        """Whether these heights and widths, (B, 2), are the packed ones."""
        rows = self.manifest.samples[samples]
        return np.array_equal(np.array(sizes.as_tensor()), np.stack([rows["height"], rows["width"]], axis=1))

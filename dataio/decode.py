"""Batch decoding: encoded images from the shards, through the DALI pipeline, to tensors on the training device.

loader.py requests batches: samples, and the transform parameters of each. If DALI fails on a batch, bad_samples.py
finds the images at fault and substitutes for them, and the batch is decoded again.

B: images of a batch, S: their side.
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
    """Batch to decode: the position of its first sample, (B,) manifest rows, and their transform parameters.

    shards: those needed for this batch and soon after, in order, to prefetch from a remote data set.
    substituted: bad samples, whose substitutes `samples` holds.
    """

    position: int
    samples: npt.NDArray[np.int64]
    params: TransformParams
    shards: tuple[int, ...] = ()
    substituted: tuple[SubstitutedSample, ...] = ()


#: (request, bad samples of it) → the request with their substitutes, and the parameters of these.
SubstituteFn = Callable[[BatchRequest, list[SubstitutedSample]], BatchRequest]


def decode_batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[BatchRequest],
    max_batch_size: int,
    device: torch.device,
    substitute: SubstituteFn | None = None,
) -> Iterator[tuple[BatchRequest, torch.Tensor]]:
    """Yield each request with its images: (B, 3, S, S) float32, normalised, channels_last, on `device`.

    nvJPEG decodes on a CUDA device, libjpeg on the CPU. While the caller has a batch, `prefetch_batches` more are
    in flight. A request holds 1 to `max_batch_size` samples. With `substitute`, the next decodable sample of its shard
    substitutes for an undecodable one, and the request that is yielded says so. `requests` must not refer to the owner
    of this iterator: DALI holds them where Python's garbage collector cannot see the cycle.
    Raises RuntimeError, naming the sample, if an image cannot be read, or cannot be decoded and may not be
    substituted; the iterator ends then.
    """
    Image.init()  # loads PIL's plugins now: one that failed to load later would be reported as "not an image"
    with closing(open_shards(manifest)) as shards:
        decoder = _BatchDecoder(
            manifest, shards, options, device, BadSampleFinder(manifest, shards, options, device), substitute
        )
        batches = map(decoder.load, requests)
        retry: list[_EncodedBatch] = []
        while True:
            in_flight: deque[_EncodedBatch] = deque()  # oldest first; DALI returns them in this order
            try:
                yield from _decode(decoder, chain(retry, batches), in_flight, max_batch_size)
                return
            except _DecodingError as error:  # no further batch comes from this pipeline
                retry = decoder.repair(in_flight, error)


class _EncodedBatch(NamedTuple):
    """Request with its encoded images."""

    request: BatchRequest
    encoded: list[Encoded]


class _DecodingError(Exception):
    """Failure of DALI on a batch; which image caused it is not known."""


def _decode(
    decoder: "_BatchDecoder", batches: Iterator[_EncodedBatch], in_flight: deque[_EncodedBatch], max_batch_size: int
) -> Iterator[tuple[BatchRequest, torch.Tensor]]:
    """Yield each batch, decoded by one pipeline. Batches that were fed and not yet returned are kept in `in_flight`."""

    def feed() -> tuple[Any, ...]:
        in_flight.append(next(batches))  # its StopIteration ends DALI's input
        request, encoded = in_flight[-1]
        return encoded, *pipeline_inputs(request.params, decoder.options)

    resizer = make_resizer(decoder.options, decoder.device)
    pipeline = build_pipeline(decoder.options, feed, max_batch_size, decoder.device, resizer)
    # Feeds and starts the first `prefetch_batches`; every later call, the next one.
    pipeline.schedule_run()  # type: ignore[no-untyped-call]  # DALI has no annotations, here and below
    while in_flight:
        try:
            output, sizes = pipeline.share_outputs()  # type: ignore[no-untyped-call]
        except DALI_ERRORS as error:
            if resizer:
                resizer.check()
            raise _DecodingError(*error.args) from error
        if not decoder.sizes_match(in_flight[0].request.samples, sizes):
            raise _DecodingError("an image has another size than it was packed with")
        images = to_torch(output, decoder.device)
        pipeline.release_outputs()  # type: ignore[no-untyped-call]
        request = in_flight.popleft().request
        pipeline.schedule_run()  # type: ignore[no-untyped-call]
        yield request, images


@dataclass(frozen=True)
class _BatchDecoder:
    """Loader of encoded batches, which it repairs where they have bad samples."""

    manifest: Manifest
    shards: EncodedImages
    options: ImageOptions
    device: torch.device
    finder: BadSampleFinder
    substitute: SubstituteFn | None

    def load(self, request: BatchRequest) -> _EncodedBatch:
        """Read the encoded images of a request from the shards, with substitutes for those that fail their checks."""
        self.shards.prefetch(request.shards)
        samples = request.samples.tolist()
        self.shards.read_ahead(samples)
        encoded, reasons = [], {}
        for index, sample in enumerate(samples):
            try:
                encoded.append(as_array(self.shards.read(sample)))
            except BadSampleError as error:
                encoded.append(as_array(b""))
                reasons[index] = str(error)
        batch = _EncodedBatch(request, encoded)
        return self._with_substitutes(reasons, batch) if reasons else batch

    def repair(self, in_flight: Iterable[_EncodedBatch], error: Exception) -> list[_EncodedBatch]:
        """Return the batches to decode again, with substitutes in the first that has undecodable images.

        Raises RuntimeError if none has any, or they may not be substituted.
        """
        batches = list(in_flight)
        for number, batch in enumerate(batches):  # mostly it is the first, as DALI returns them in order
            reasons = self.finder.find(batch.request.samples, batch.encoded, batch.request.params)
            if reasons:
                batches[number] = self._with_substitutes(reasons, batch)
                return batches
        raise RuntimeError(
            "DALI failed on a batch, and on none of its images alone; free some memory, or lower data.threads,"
            f" --threads or data.prefetch_batches: {error}"
        ) from error

    def _with_substitutes(self, reasons: dict[int, str], batch: _EncodedBatch) -> _EncodedBatch:
        """Substitute for the images at these indices. Raises RuntimeError if that is not allowed."""
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
        """Whether these heights and widths, DALI's (B, 2), are those in the manifest."""
        rows = self.manifest.samples[samples]
        return np.array_equal(np.array(sizes.as_tensor()), np.stack([rows["height"], rows["width"]], axis=1))

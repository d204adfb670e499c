"""Batches of images out of shards, through pipeline.py's graph, with what becomes of an image that is not decoded.

loader.py says which samples, params.py how each is looked at. DALI does not say which image of a batch it failed on, nor
whether it was the image's fault. So each is then decoded alone, and beside a blank one; PIL finds the words.

B: images of a batch, S: the side of those that come out.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dataio.augment.params import ImageOptions, TransformParams, eval_params
from dataio.manifest import Manifest
from dataio.pil import pil_without_limits
from dataio.pipeline import DALI_ERRORS, build_pipeline, make_resizer, pipeline_inputs, to_torch
from dataio.shards import BadSampleError, EncodedImages, open_shards

_FAULTS_SHOWN = 5
_MAX_SUBSTITUTE_TRIES = 100
_JPEG_SIDE = 65500  # pixels at most


class SubstitutedSample(NamedTuple):
    """A broken image: its index in the batch, its row of the manifest, why, and the row that stands for it."""

    batch_index: int
    sample: int
    reason: str
    substitute: int


class BatchRequest(NamedTuple):
    """A batch to be: the position of its first sample, (B,) int64 rows of the manifest, and their params.

    shards: needed for it and soon after, in that order; only remote data sets care.
    """

    position: int
    samples: np.ndarray
    params: TransformParams
    shards: tuple[int, ...] = ()
    substituted: tuple[SubstitutedSample, ...] = ()


#: A request, and what is to be substituted in it → the request with other samples and their params.
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
    under way. A request holds 1 to `max_batch` samples. With `substitute`, a broken image gives way to the next sample
    of its shard that can be decoded, and the request that comes back says so. `requests` must not refer to what holds
    this iterator: DALI keeps them, where Python cannot see that both are garbage. Raises RuntimeError, naming the
    sample, if an image cannot be read, or cannot be decoded and is not to be substituted; no batch follows then.
    """
    Image.init()  # a format that PIL cannot load later, for want of memory, would be "not an image"
    with closing(open_shards(manifest)) as shards:
        decoder = _BatchDecoder(manifest, shards, options, device, substitute)
        batches = map(decoder.load, requests)
        retry: list[_EncodedBatch] = []
        while True:
            in_flight: deque[_EncodedBatch] = deque()  # oldest first; DALI answers in this order
            try:
                yield from _decode(decoder, chain(retry, batches), in_flight, max_batch)
                return
            except _DecodingError as error:  # after which DALI's pipeline cannot be used again
                retry = decoder.repair(in_flight, error)


class _EncodedBatch(NamedTuple):
    """A request and its encoded images."""

    request: BatchRequest
    encoded: list[np.ndarray]


class _DecodingError(Exception):
    """DALI's: it does not say which image of a batch it failed on."""


def _decode(
    decoder: "_BatchDecoder", batches: Iterator[_EncodedBatch], in_flight: deque[_EncodedBatch], max_batch: int
) -> Iterator[tuple[BatchRequest, torch.Tensor]]:
    """Each batch, decoded by one pipeline. Those that were fed and are not answered yet are in `in_flight`."""

    def feed() -> tuple:
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
        if not decoder.sizes_match(in_flight[0].request.samples, sizes).all():
            raise _DecodingError("an image has another size than it was packed with")
        images = to_torch(output, decoder.device)
        pipeline.release_outputs()
        request = in_flight.popleft().request
        pipeline.schedule_run()
        yield request, images


@dataclass(frozen=True)
class _BatchDecoder:
    """Where encoded images are laid out, looked at one by one if DALI refused a batch, and broken ones substituted."""

    manifest: Manifest
    shards: EncodedImages
    options: ImageOptions
    device: torch.device
    substitute: SubstituteFn | None

    def load(self, request: BatchRequest) -> _EncodedBatch:
        """A request with its images as they lie in the shards."""
        self.shards.prefetch(request.shards)
        self.shards.read_ahead(request.samples)
        encoded, faults = [], {}
        for index, sample in enumerate(request.samples):
            try:
                encoded.append(_as_array(self.shards.read(sample)))
            except BadSampleError as error:
                encoded.append(_as_array(b""))
                faults[index] = str(error)
        loaded = _EncodedBatch(request, encoded)
        return self._with_substitutes(faults, loaded) if faults else loaded

    def repair(self, in_flight: Iterable[_EncodedBatch], error: Exception) -> list[_EncodedBatch]:
        """The batches to be decoded again, of which the first that DALI cannot decode has no broken image any more.

        Raises RuntimeError if none has one, or it is not to be substituted.
        """
        batches = list(in_flight)
        for number, loaded in enumerate(batches):  # DALI answers in their order: as a rule it is the first
            request, encoded = loaded
            undecodable = self._undecodable(request.samples, encoded, request.params)
            if undecodable:
                batches[number] = self._with_substitutes(undecodable, loaded)
                return batches
        raise RuntimeError(
            "DALI failed on a batch, and on none of its images alone; free some memory, or lower data.threads,"
            f" --threads or data.prefetch_batches: {error}"
        ) from error

    def _with_substitutes(self, faults: dict[int, str], loaded: _EncodedBatch) -> _EncodedBatch:
        """The batch with substitutes for the images at these places."""
        request, encoded = loaded
        if self.substitute is None:
            raise self._error({int(request.samples[index]): reason for index, reason in faults.items()})
        substituted = []
        for index, reason in faults.items():
            sample = int(request.samples[index])
            substitute, encoded[index] = self._find_substitute(sample, reason)
            substituted.append(SubstitutedSample(index, sample, reason, substitute))
        return _EncodedBatch(self.substitute(request, substituted), encoded)

    def _find_substitute(self, sample: int, reason: str) -> tuple[int, np.ndarray]:
        """The next sample of the shard that can be decoded whole, after the last the first; and its encoded image.

        It depends on the broken sample alone, so that every rank and every resumed run chooses the same.
        """
        rows = self.manifest.samples
        first, end = np.searchsorted(rows["shard"], [rows["shard"][sample], rows["shard"][sample] + 1])
        for step in range(1, min(end - first, _MAX_SUBSTITUTE_TRIES + 1)):
            other = int(first + (sample - first + step) % (end - first))
            try:
                encoded = _as_array(self.shards.read(other))
            except BadSampleError:
                continue
            if not self._undecodable(np.array([other]), [encoded], eval_params(rows[[other]], self.options)):
                return other, encoded
        raise self._error({sample: f"{reason}, and no sample after it can stand for it"})

    def sizes_match(self, samples: Sequence[int], sizes: Any) -> np.ndarray:
        """(B,) bool: whether these heights and widths, (B, 2), are the packed ones."""
        rows = self.manifest.samples[samples]
        return (np.array(sizes.as_tensor()) == np.stack([rows["height"], rows["width"]], axis=1)).all(axis=1)

    def _undecodable(self, samples: np.ndarray, encoded: list[np.ndarray], params: TransformParams) -> dict[int, str]:
        """What is wrong with each of these images that DALI does not decode alone, by index; nothing with most.

        Raises RuntimeError if it is no image's fault.
        """
        undecodable, first = {}, 0
        while first < len(encoded):
            failed = self._first_undecodable(samples[first:], encoded[first:], _subset(params, slice(first, None)))
            if failed is None:
                break
            index, dali_message = first + failed[0], failed[1]
            fault = self._diagnose(samples[[index]], encoded[index], _subset(params, [index]), dali_message)
            if fault:
                undecodable[index] = fault
            first = index + 1
        return undecodable

    def _first_undecodable(
        self, samples: np.ndarray, encoded: list[np.ndarray], params: TransformParams
    ) -> tuple[int, str] | None:
        """(index, what DALI says) of the first of these images that it does not decode, each alone, to its size."""
        options = self.options.without_ops.replace(prefetch_batches=1)
        params = params._replace(ops=params.ops[:, :0], op_args=params.op_args[:, :0])  # which refuse nothing
        index = 0

        def feed() -> tuple:
            return [encoded[index]], *pipeline_inputs(_subset(params, [index]), options)

        resizer = make_resizer(options, self.device)
        pipeline = build_pipeline(options, feed, 1, self.device, resizer)  # 15 ms on the CPU
        try:
            for index in range(len(encoded)):
                _, sizes = pipeline.run()
                if not self.sizes_match(samples[[index]], sizes).all():
                    return index, "another size"
        except DALI_ERRORS as error:  # the end of this pipeline
            if resizer:
                resizer.check()
            text = str(error)
            dali_message = text.partition("encountered:")[2].partition("Current pipeline")[0]
            return index, " ".join((dali_message or text).split())
        return None

    def _diagnose(
        self, sample: np.ndarray, encoded: np.ndarray, params: TransformParams, dali_message: str
    ) -> str | None:
        """What is wrong with an image of which DALI has said this; None if it decodes it after all. sample: (1,).

        Without memory DALI and PIL fail with the same words as on a broken image. So, unless its header is wrong, an
        image is at fault only if another one of its size is decoded, and then not this one. Raises RuntimeError if that
        other one is not.
        """
        row = self.manifest.samples[sample[0]]
        fault = _header_fault(encoded, row["width"], row["height"])
        if fault:
            return fault
        try:
            control = _blank(row["width"], row["height"])
            failed = self._first_undecodable(sample, [control], params)
            _decode_with_pil(control)
        except Exception as error:  # PIL raises whatever its plugins raise
            failed = 0, str(error) or type(error).__name__
        if failed:
            raise RuntimeError(
                f"cannot decode {self.manifest.describe(sample[0])}, nor a blank image of its size ({failed[1]});"
                " free some memory, or lower data.threads, --threads or data.prefetch_batches"
            )
        if self._first_undecodable(sample, [encoded], params) is None:
            return None
        try:
            _decode_with_pil(encoded)  # which has words for it: DALI has only numbers
        except Exception as error:
            return str(error) or type(error).__name__
        return f"DALI refuses it, though PIL decodes it: {dali_message}"

    def _error(self, faults: dict[int, str]) -> RuntimeError:
        """faults: reasons by sample."""
        named = [f"{self.manifest.describe(sample)}: {reason}" for sample, reason in faults.items()]
        if len(named) > _FAULTS_SHOWN:
            named[_FAULTS_SHOWN:] = [f"and {len(named) - _FAULTS_SHOWN} more"]
        return RuntimeError(
            f"cannot decode {', '.join(named)}; {self.manifest.remedy} and pack it again without broken images"
        )


def _subset(params: TransformParams, places: slice | list[int]) -> TransformParams:
    return TransformParams(*(field[places] for field in params))


def _header_fault(encoded: np.ndarray, width: int, height: int) -> str | None:
    """What is wrong with an image as far as its header tells, which should name this width and height."""
    try:
        with pil_without_limits():
            found = Image.open(io.BytesIO(encoded.tobytes())).size
    except UnidentifiedImageError:
        return "not an image"
    except Exception:  # PIL raises whatever its plugins raise, for want of memory too
        return None
    if found == (width, height):
        return None
    return f"it has {found[0]}×{found[1]} pixels where {width}×{height} were packed"


def _blank(width: int, height: int) -> np.ndarray:
    """An encoded image of this size. A progressive JPEG, if there can be one, takes more memory to decode than most."""
    file = io.BytesIO()
    kind = "JPEG" if max(width, height) <= _JPEG_SIDE else "PNG"
    Image.new("RGB", (int(width), int(height))).save(file, kind, progressive=True, subsampling=0)
    return _as_array(file.getvalue())


def _decode_with_pil(encoded: np.ndarray) -> None:
    with pil_without_limits():
        Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")


def _as_array(encoded: bytes) -> np.ndarray:
    return np.frombuffer(encoded, dtype=np.uint8)

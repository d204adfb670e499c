"""Batches of images out of shards, through pipeline.py's graph, with what becomes of an image that is not decoded.

loader.py says which samples, views.py how each is looked at. DALI does not say which image of a batch it failed on, nor
whether it was the image's fault. So each is then decoded alone, and beside a blank one; PIL finds the words.

B: images of a batch, S: the side of those that come out.
"""

import dataclasses
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

from dataio.augment.views import ImageOptions, Views, eval_views
from dataio.images import patient_pil
from dataio.manifest import Manifest
from dataio.pipeline import FAILURES, graph_inputs, make_graph, make_resizer, to_torch
from dataio.shards import BrokenSampleError, EncodedImages, open_shards

_FAULTS_SHOWN = 5
_NEIGHBOURS_TRIED = 100
_JPEG_SIDE = 65500  # pixels at most


class Replaced(NamedTuple):
    """A broken image: its place in the batch, its row of the manifest, why, and the row that stands for it."""

    place: int
    sample: int
    reason: str
    by: int


class Request(NamedTuple):
    """A batch to be: the position of its first sample, (B,) int64 rows of the manifest, and their views.

    shards: needed for it and soon after, in that order; only remote data sets care.
    """

    position: int
    samples: np.ndarray
    views: Views
    shards: tuple[int, ...] = ()
    replaced: tuple[Replaced, ...] = ()


#: A request, and what is to be replaced in it → the request with other samples and their views.
Replace = Callable[[Request, list[Replaced]], Request]


def decode_batches(
    manifest: Manifest,
    options: ImageOptions,
    requests: Iterator[Request],
    max_batch: int,
    device: torch.device,
    replace: Replace | None = None,
) -> Iterator[tuple[Request, torch.Tensor]]:
    """Each request with its images: (B, 3, S, S) float32, normalised, channels_last, on `device`.

    nvJPEG decodes on a CUDA device, libjpeg on the CPU. While the caller has a batch, `prefetch_batches` more are
    under way. A request holds 1 to `max_batch` samples. With `replace`, a broken image gives way to the next sample
    of its shard that can be decoded, and the request that comes back says so. `requests` must not refer to what holds
    this iterator: DALI keeps them, where Python cannot see that both are garbage. Raises RuntimeError, naming the
    sample, if an image cannot be read, or cannot be decoded and is not to be replaced; no batch follows then.
    """
    Image.init()  # a format that PIL cannot load later, for want of memory, would be "not an image"
    with closing(open_shards(manifest)) as shards:
        bench = _Bench(manifest, shards, options, device, replace)
        batches = map(bench.load, requests)
        again: list[_Loaded] = []
        while True:
            under_way: deque[_Loaded] = deque()  # oldest first; DALI answers in this order
            try:
                yield from _decode(bench, chain(again, batches), under_way, max_batch)
                return
            except _DecodingError as error:  # after which DALI's pipeline cannot be used again
                again = bench.mend(under_way, error)


class _Loaded(NamedTuple):
    """A request and its encoded images."""

    request: Request
    encoded: list[np.ndarray]


class _DecodingError(Exception):
    """DALI's: it does not say which image of a batch it failed on."""


def _decode(
    bench: "_Bench", batches: Iterator[_Loaded], under_way: deque[_Loaded], max_batch: int
) -> Iterator[tuple[Request, torch.Tensor]]:
    """Each batch, decoded by one pipeline. Those that were fed and are not answered yet are in `under_way`."""

    def feed() -> tuple:
        under_way.append(next(batches))  # DALI takes its StopIteration for the end
        request, encoded = under_way[-1]
        return encoded, *graph_inputs(request.views, bench.options)

    resizer = make_resizer(bench.options, bench.device)
    pipeline = make_graph(bench.options, feed, max_batch, bench.device, resizer)
    pipeline.schedule_run()  # feeds and starts the first `prefetch_batches`; every later call, the next one
    while under_way:
        try:
            output, sizes = pipeline.share_outputs()
        except FAILURES as error:
            if resizer:
                resizer.check()
            raise _DecodingError(*error.args) from error
        if not bench.are_sizes(under_way[0].request.samples, sizes).all():
            raise _DecodingError("an image has another size than it was packed with")
        images = to_torch(output, bench.device)
        pipeline.release_outputs()
        request = under_way.popleft().request
        pipeline.schedule_run()
        yield request, images


@dataclass(frozen=True)
class _Bench:
    """Where encoded images are laid out, looked at one by one if DALI refused a batch, and broken ones replaced."""

    manifest: Manifest
    shards: EncodedImages
    options: ImageOptions
    device: torch.device
    replace: Replace | None

    def load(self, request: Request) -> _Loaded:
        """A request with its images as they lie in the shards."""
        self.shards.hold(request.shards)
        self.shards.read_ahead(request.samples)
        encoded, faults = [], {}
        for place, sample in enumerate(request.samples):
            try:
                encoded.append(_as_array(self.shards.read(sample)))
            except BrokenSampleError as error:
                encoded.append(_as_array(b""))
                faults[place] = str(error)
        loaded = _Loaded(request, encoded)
        return self._without(faults, loaded) if faults else loaded

    def mend(self, under_way: Iterable[_Loaded], error: Exception) -> list[_Loaded]:
        """The batches to be decoded again, of which the first that DALI cannot decode has no broken image any more.

        Raises RuntimeError if none has one, or it is not to be replaced.
        """
        batches = list(under_way)
        for number, loaded in enumerate(batches):  # DALI answers in their order: as a rule it is the first
            request, encoded = loaded
            refused = self._refused(request.samples, encoded, request.views)
            if refused:
                batches[number] = self._without(refused, loaded)
                return batches
        raise RuntimeError(
            "DALI failed on a batch, and on none of its images alone; free some memory, or lower data.threads,"
            f" --threads or data.prefetch_batches: {error}"
        ) from error

    def _without(self, faults: dict[int, str], loaded: _Loaded) -> _Loaded:
        """The batch with stand-ins for the images at these places."""
        request, encoded = loaded
        if self.replace is None:
            raise self._error({int(request.samples[place]): reason for place, reason in faults.items()})
        replaced = []
        for place, reason in faults.items():
            sample = int(request.samples[place])
            by, encoded[place] = self._stand_in(sample, reason)
            replaced.append(Replaced(place, sample, reason, by))
        return _Loaded(self.replace(request, replaced), encoded)

    def _stand_in(self, sample: int, reason: str) -> tuple[int, np.ndarray]:
        """The next sample of the shard that can be decoded whole, after the last the first; and its encoded image.

        It depends on the broken sample alone, so that every rank and every resumed run chooses the same.
        """
        rows = self.manifest.samples
        first, end = np.searchsorted(rows["shard"], [rows["shard"][sample], rows["shard"][sample] + 1])
        for step in range(1, min(end - first, _NEIGHBOURS_TRIED + 1)):
            other = int(first + (sample - first + step) % (end - first))
            try:
                encoded = _as_array(self.shards.read(other))
            except BrokenSampleError:
                continue
            if not self._refused(np.array([other]), [encoded], eval_views(rows[[other]], self.options)):
                return other, encoded
        raise self._error({sample: f"{reason}, and no sample after it can stand for it"})

    def are_sizes(self, samples: Sequence[int], sizes: Any) -> np.ndarray:
        """(B,) bool: whether these heights and widths, (B, 2), are the packed ones."""
        rows = self.manifest.samples[samples]
        return (np.array(sizes.as_tensor()) == np.stack([rows["height"], rows["width"]], axis=1)).all(axis=1)

    def _refused(self, samples: np.ndarray, encoded: list[np.ndarray], views: Views) -> dict[int, str]:
        """What is wrong with each of these images that DALI does not decode alone, by place; nothing with most.

        Raises RuntimeError if it is no image's fault.
        """
        refused, first = {}, 0
        while first < len(encoded):
            failed = self._first_failure(samples[first:], encoded[first:], _part(views, slice(first, None)))
            if failed is None:
                break
            place, said = first + failed[0], failed[1]
            fault = self._fault(samples[[place]], encoded[place], _part(views, [place]), said)
            if fault:
                refused[place] = fault
            first = place + 1
        return refused

    def _first_failure(self, samples: np.ndarray, encoded: list[np.ndarray], views: Views) -> tuple[int, str] | None:
        """(place, what DALI says) of the first of these images that it does not decode, each alone, to its size."""
        options = dataclasses.replace(self.options.plain, prefetch_batches=1)
        views = views._replace(kinds=views.kinds[:, :0], amounts=views.amounts[:, :0])  # which refuse nothing
        place = 0

        def feed() -> tuple:
            return [encoded[place]], *graph_inputs(_part(views, [place]), options)

        resizer = make_resizer(options, self.device)
        pipeline = make_graph(options, feed, 1, self.device, resizer)  # 15 ms on the CPU
        try:
            for place in range(len(encoded)):
                _, sizes = pipeline.run()
                if not self.are_sizes(samples[[place]], sizes).all():
                    return place, "another size"
        except FAILURES as error:  # the end of this pipeline
            if resizer:
                resizer.check()
            text = str(error)
            said = text.partition("encountered:")[2].partition("Current pipeline")[0]
            return place, " ".join((said or text).split())
        return None

    def _fault(self, sample: np.ndarray, encoded: np.ndarray, view: Views, said: str) -> str | None:
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
            failed = self._first_failure(sample, [control], view)
            _decode_with_pil(control)
        except Exception as error:  # PIL raises whatever its plugins raise
            failed = 0, str(error) or type(error).__name__
        if failed:
            raise RuntimeError(
                f"cannot decode {self.manifest.describe(sample[0])}, nor a blank image of its size ({failed[1]});"
                " free some memory, or lower data.threads, --threads or data.prefetch_batches"
            )
        if self._first_failure(sample, [encoded], view) is None:
            return None
        try:
            _decode_with_pil(encoded)  # which has words for it: DALI has only numbers
        except Exception as error:
            return str(error) or type(error).__name__
        return f"DALI refuses it, though PIL decodes it: {said}"

    def _error(self, faults: dict[int, str]) -> RuntimeError:
        """faults: reasons by sample."""
        named = [f"{self.manifest.describe(sample)}: {reason}" for sample, reason in faults.items()]
        if len(named) > _FAULTS_SHOWN:
            named[_FAULTS_SHOWN:] = [f"and {len(named) - _FAULTS_SHOWN} more"]
        return RuntimeError(
            f"cannot decode {', '.join(named)}; {self.manifest.remedy} and pack it again without broken images"
        )


def _part(views: Views, places: slice | list[int]) -> Views:
    return Views(*(field[places] for field in views))


def _header_fault(encoded: np.ndarray, width: int, height: int) -> str | None:
    """What is wrong with an image as far as its header tells, which should name this width and height."""
    try:
        with patient_pil():
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
    with patient_pil():
        Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")


def _as_array(encoded: bytes) -> np.ndarray:
    return np.frombuffer(encoded, dtype=np.uint8)

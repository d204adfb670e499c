"""Bad samples: which images of a batch cannot be decoded and why, what takes their place, and how many may be bad.

DALI does not say which image of a batch it failed on, nor whether the image was at fault or memory was short. So each
is decoded alone, and one that fails is compared with a blank image of its size; PIL gives the reason.

B: images of a batch.
"""

import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import Pipeline
from PIL import Image, UnidentifiedImageError

from dataio.augment.params import ImageOptions, TransformParams, eval_params
from dataio.manifest import Manifest
from dataio.pil import pil_without_limits
from dataio.pipeline import DALI_ERRORS, build_pipeline, make_resizer, pipeline_inputs
from dataio.shards import BadSampleError, EncodedImages

_NAMED = 5  # bad samples in a message
_MAX_SUBSTITUTE_TRIES = 100
_MAX_JPEG_SIDE = 65500  # pixels

Encoded = npt.NDArray[np.uint8]


class SubstitutedSample(NamedTuple):
    """A bad sample: its index in the batch, its row of the manifest, what is wrong, and the row that replaces it."""

    batch_index: int
    sample: int
    reason: str
    substitute: int


class BadSampleBudget:
    """Counts the substituted samples of each epoch. Raises RuntimeError, naming them, when there are over `limit`."""

    def __init__(self, manifest: Manifest, limit: int) -> None:
        self._manifest, self._limit = manifest, limit
        self._by_epoch: dict[int, list[SubstitutedSample]] = {}

    def add(self, position: int, substituted: Iterable[SubstitutedSample]) -> None:
        """Counts those of a batch that begins at this position of the run; the same one again counts once."""
        for bad in substituted:
            epoch = (position + bad.batch_index) // len(self._manifest)
            counted = self._by_epoch.setdefault(epoch, [])
            if bad not in counted:
                counted.append(bad)
            if len(counted) > self._limit:
                named = name_samples(self._manifest, {each.sample: each.reason for each in counted})
                raise RuntimeError(
                    f"more than {self._limit} broken images in epoch {epoch}: {named}; {self._manifest.remedy},"
                    " or raise data.max_bad_samples"
                )

    def count(self, epoch: int) -> int:
        """Substituted samples of an epoch so far, on this rank."""
        return len(self._by_epoch.get(epoch, []))


def describe_excess(count: int, limit: int, step: int) -> str:
    """The message for a run whose ranks together substituted more samples of an epoch than are allowed."""
    return (
        f"{count} broken images in this epoch at step {step}, data.max_bad_samples allows {limit}; check the shards"
        " with python -m dataio.verify, or raise it"
    )


def name_samples(manifest: Manifest, reasons: dict[int, str]) -> str:
    """Samples and what is wrong with them, for messages: the first few in full."""
    named = [f"{manifest.describe(sample)}: {reason}" for sample, reason in reasons.items()]
    if len(named) > _NAMED:
        named[_NAMED:] = [f"and {len(named) - _NAMED} more"]
    return ", ".join(named)


class BadSampleFinder:
    """Finds the undecodable images of a batch, and substitutes for them."""

    def __init__(self, manifest: Manifest, shards: EncodedImages, options: ImageOptions, device: torch.device) -> None:
        self._manifest, self._shards = manifest, shards
        self._options = options.without_ops.replace(prefetch_batches=1)
        self._decoder = _SingleImageDecoder(self._options, device)

    def find(self, samples: npt.NDArray[np.int64], encoded: list[Encoded], params: TransformParams) -> dict[int, str]:
        """What is wrong with each undecodable image, by index in the batch; most often nothing.

        Raises RuntimeError if one cannot be decoded for want of memory.
        """
        params = params._replace(ops=params.ops[:, :0], op_args=params.op_args[:, :0])  # which fail on no image
        reasons = {}
        for index, sample in enumerate(samples.tolist()):
            reason = self._diagnose(sample, encoded[index], select_params(params, [index]))
            if reason:
                reasons[index] = reason
        return reasons

    def substitute(self, sample: int, reason: str) -> tuple[int, Encoded]:
        """(row, encoded image) of the next decodable sample of the same shard, from its start again after its end.

        It depends on the bad sample alone, so that every rank and every resumed run chooses the same.
        Raises RuntimeError if there is none.
        """
        rows = self._manifest.samples
        first, end = np.searchsorted(rows["shard"], [rows["shard"][sample], rows["shard"][sample] + 1])
        for step in range(1, min(end - first, _MAX_SUBSTITUTE_TRIES + 1)):
            other = int(first + (sample - first + step) % (end - first))
            try:
                encoded = as_array(self._shards.read(other))
            except BadSampleError:
                continue
            if not self.find(np.array([other]), [encoded], eval_params(rows[[other]], self._options)):
                return other, encoded
        raise self.error({sample: f"{reason}, and no sample after it can stand for it"})

    def error(self, reasons: dict[int, str]) -> RuntimeError:
        """The error about these samples, by row of the manifest."""
        return RuntimeError(
            f"cannot decode {name_samples(self._manifest, reasons)}; {self._manifest.remedy} and pack it again without"
            " broken images"
        )

    def _diagnose(self, sample: int, encoded: Encoded, params: TransformParams) -> str | None:
        """What is wrong with an image; None if it can be decoded.

        Without memory DALI and PIL fail with the same words as on a damaged image. So, unless its header is wrong, an
        image is at fault only if it fails twice, and a blank image of its size does not fail in between.
        Raises RuntimeError if that one does.
        """
        row = self._manifest.samples[sample]
        size = (int(row["width"]), int(row["height"]))
        failure = self._decoder.find_failure(encoded, params, size)
        if failure is None:
            return None
        reason = _find_header_fault(encoded, size)
        if reason:
            return reason
        try:
            blank = _encode_blank(size)
            shortage = self._decoder.find_failure(blank, params, size) or _find_pil_failure(blank)
        except Exception as error:  # PIL raises whatever its plugins raise
            shortage = str(error) or type(error).__name__
        if shortage:
            raise RuntimeError(
                f"cannot decode {self._manifest.describe(sample)}, nor a blank image of its size ({shortage});"
                " free some memory, or lower data.threads, --threads or data.prefetch_batches"
            )
        if self._decoder.find_failure(encoded, params, size) is None:
            return None
        return _find_pil_failure(encoded) or f"DALI refuses it, though PIL decodes it: {failure}"


class _SingleImageDecoder:
    """Decodes images by DALI, one at a time. Its pipeline takes 15 ms to build on the CPU, and ends with an error."""

    def __init__(self, options: ImageOptions, device: torch.device) -> None:
        self._options, self._device = options, device
        self._inputs: list[tuple[Any, ...]] = []  # DALI keeps the function that feeds it: it must not know this object
        self._pipeline: Pipeline | None = None

    def find_failure(self, encoded: Encoded, params: TransformParams, size: tuple[int, int]) -> str | None:
        """What DALI says of an image that it does not decode to this width and height. params: of this image alone."""
        self._inputs[:] = [([encoded], *pipeline_inputs(params, self._options))]
        if self._pipeline is None:
            self._resizer = make_resizer(self._options, self._device)
            feed = self._inputs.__getitem__
            self._pipeline = build_pipeline(self._options, lambda: feed(0), 1, self._device, self._resizer)
        try:
            _, sizes = self._pipeline.run()
        except DALI_ERRORS as error:
            self._pipeline = None
            if self._resizer:
                self._resizer.check()
            text = str(error)
            message = text.partition("encountered:")[2].partition("Current pipeline")[0]
            return " ".join((message or text).split())
        height, width = np.array(sizes.as_tensor())[0]
        return None if (width, height) == size else "another size"


def select_params(params: TransformParams, indices: slice | list[int]) -> TransformParams:
    """The parameters of some images of a batch."""
    return TransformParams(*(field[indices] for field in params))


def as_array(encoded: bytes) -> Encoded:
    """The bytes as DALI takes them, not copied."""
    return np.frombuffer(encoded, dtype=np.uint8)


def _find_header_fault(encoded: Encoded, size: tuple[int, int]) -> str | None:
    """What an image's header says that is wrong: no image, or another width and height."""
    try:
        with pil_without_limits():
            found = Image.open(io.BytesIO(encoded.tobytes())).size
    except UnidentifiedImageError:
        return "not an image"
    except Exception:  # PIL raises whatever its plugins raise, for want of memory too
        return None
    if found == size:
        return None
    return f"it has {found[0]}×{found[1]} pixels where {size[0]}×{size[1]} were packed"


def _find_pil_failure(encoded: Encoded) -> str | None:
    """What PIL says of an image that it does not decode."""
    try:
        with pil_without_limits():
            Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")
    except Exception as error:  # PIL raises whatever its plugins raise
        return str(error) or type(error).__name__
    return None


def _encode_blank(size: tuple[int, int]) -> Encoded:
    """A blank image. As progressive JPEG, where that can be so large, it takes more memory to decode than most."""
    file = io.BytesIO()
    kind = "JPEG" if max(size) <= _MAX_JPEG_SIDE else "PNG"
    Image.new("RGB", size).save(file, kind, progressive=True, subsampling=0)
    return as_array(file.getvalue())

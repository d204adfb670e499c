"""Bad samples: diagnosis of undecodable images, their substitutes, and the budget of a rank and of all ranks.

DALI fails on a whole batch, and says neither which image it failed on, nor whether that is damaged or memory ran out.
So each image is decoded alone, and one that fails is compared with a blank image of its size; PIL gives the reason.
decode.py calls this for batches that fail, loader.py counts what was substituted.

B: images of a batch.
"""

import io
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from dataio.augment.params import ImageOptions, TransformParams, eval_params
from dataio.augment.resize import Resizer
from dataio.manifest import Manifest
from dataio.pil import pil_without_limits
from dataio.pipeline import DALI_ERRORS, build_pipeline, make_resizer, pipeline_inputs
from dataio.shards import BadSampleError, EncodedImages

_MAX_NAMED_SAMPLES = 5  # in a message
_MAX_SUBSTITUTE_TRIES = 100
_MAX_JPEG_SIDE = 65500  # pixels

Encoded = npt.NDArray[np.uint8]


class SubstitutedSample(NamedTuple):
    """Bad sample of a batch: its index there, its manifest row, the reason, and the row that substitutes for it."""

    batch_index: int
    sample: int
    reason: str
    substitute: int


class BadSampleBudget:
    """Counter of the samples that a rank substitutes in each epoch, of which `limit` are allowed."""

    def __init__(self, manifest: Manifest, limit: int) -> None:
        self._manifest, self._limit = manifest, limit
        self._reasons: defaultdict[int, dict[int, str]] = defaultdict(dict)  # by epoch, then by sample: one occurrence

    def add(self, position: int, substituted: Iterable[SubstitutedSample]) -> None:
        """Count the substituted samples of a batch that begins at `position`; a batch that is met again counts once.

        Raises RuntimeError, naming the epoch's bad samples, if they exceed the limit.
        """
        for bad in substituted:
            epoch = (position + bad.batch_index) // len(self._manifest)
            reasons = self._reasons[epoch]
            reasons[bad.sample] = bad.reason
            if len(reasons) > self._limit:
                raise RuntimeError(
                    f"more than {self._limit} bad samples in epoch {epoch}: {name_samples(self._manifest, reasons)};"
                    f" {self._manifest.remedy}, or raise data.max_bad_samples"
                )

    def count(self, epoch: int) -> int:
        """Return how many samples of an epoch were substituted so far, on this rank."""
        return len(self._reasons[epoch])


def describe_excess(count: int, limit: int, step: int) -> str:
    """Format the error of a run whose ranks together substituted more samples in an epoch than are allowed."""
    return (
        f"{count} bad samples in this epoch at step {step}, data.max_bad_samples allows {limit}; check the shards"
        " with python -m dataio.verify, or raise it"
    )


def name_samples(manifest: Manifest, reasons: dict[int, str]) -> str:
    """Format bad samples, manifest rows with their reasons, for messages: the first few, and how many more."""
    named = [f"{manifest.describe(sample)}: {reason}" for sample, reason in reasons.items()]
    if len(named) > _MAX_NAMED_SAMPLES:
        named[_MAX_NAMED_SAMPLES:] = [f"and {len(named) - _MAX_NAMED_SAMPLES} more"]
    return ", ".join(named)


class BadSampleFinder:
    """Diagnosis of batches that DALI fails on, and choice of substitutes for their bad samples."""

    def __init__(self, manifest: Manifest, shards: EncodedImages, options: ImageOptions, device: torch.device) -> None:
        self._manifest, self._shards = manifest, shards
        self._options = options.without_ops.replace(prefetch_batches=1)
        self._decoder = _SingleImageDecoder(self._options, device)

    def find(self, samples: npt.NDArray[np.int64], encoded: list[Encoded], params: TransformParams) -> dict[int, str]:
        """Find the undecodable images of a batch: the reason of each, by index in the batch.

        Raises RuntimeError if one cannot be decoded because memory is short.
        """
        params = params.without_ops  # ops fail on no image
        reasons = {}
        try:
            for index, sample in enumerate(samples.tolist()):
                reason = self._diagnose(sample, encoded[index], params.select([index]))
                if reason:
                    reasons[index] = reason
        finally:
            self._decoder.close()  # bad samples are rare: its threads and memory are not kept for the next
        return reasons

    def substitute(self, sample: int, reason: str) -> tuple[int, Encoded]:
        """Return manifest row and encoded image of the next decodable sample of the same shard, which is cyclic.

        The choice depends on the bad sample alone, so it is the same on every rank and after a resume.
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
        """Create the error that names these samples, manifest rows with their reasons."""
        return RuntimeError(
            f"cannot decode {name_samples(self._manifest, reasons)}; {self._manifest.remedy} and pack it again without"
            " broken images"
        )

    def _diagnose(self, sample: int, encoded: Encoded, params: TransformParams) -> str | None:
        """Find out why an image cannot be decoded; None if it can.

        When memory is short, DALI and PIL raise the same errors as for a damaged image. So, unless its header is
        wrong, an image counts as bad only if it fails twice, and a blank image of its size does not fail in between.
        Raises RuntimeError if the blank one does.
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
    """DALI graph for one image at a time, built again after a failure or `close`, which takes 15 ms on the CPU."""

    def __init__(self, options: ImageOptions, device: torch.device) -> None:
        self._options, self._device = options, device
        self._inputs: list[tuple[Any, ...]] = []  # one batch; DALI keeps the list, and must not keep this object
        self._pipeline: Any = None  # a DALI Pipeline
        self._resizer: Resizer | None = None

    def find_failure(self, encoded: Encoded, params: TransformParams, size: tuple[int, int]) -> str | None:
        """Decode an image of this (width, height) with its parameters; return DALI's error, None if it succeeds."""
        self._inputs[:] = [([encoded], *pipeline_inputs(params, self._options))]
        if self._pipeline is None:
            inputs, self._resizer = self._inputs, make_resizer(self._options, self._device)
            self._pipeline = build_pipeline(self._options, lambda: inputs[0], 1, self._device, self._resizer)
        try:
            _, sizes = self._pipeline.run()
        except DALI_ERRORS as error:
            resizer = self._resizer
            self.close()
            if resizer:
                resizer.check()
            text = str(error)
            message = text.partition("encountered:")[2].partition("Current pipeline")[0]
            return " ".join((message or text).split())
        height, width = np.array(sizes.as_tensor())[0]
        return None if (width, height) == size else "another size"

    def close(self) -> None:
        """Let go of the graph, which the next image builds again."""
        self._pipeline = self._resizer = None
        self._inputs.clear()


def as_array(encoded: bytes) -> Encoded:
    """View the bytes of an encoded image as the uint8 array that DALI takes."""
    return np.frombuffer(encoded, dtype=np.uint8)


def _find_header_fault(encoded: Encoded, size: tuple[int, int]) -> str | None:
    """Compare an image's header with its (width, height) in the manifest; return what is wrong, None if nothing."""
    try:
        with pil_without_limits():
            found = Image.open(io.BytesIO(encoded.tobytes())).size
    except UnidentifiedImageError:
        return "not an image"
    except Exception:  # PIL raises whatever its plugins raise, when memory is short too
        return None
    if found == size:
        return None
    return f"it has {found[0]}×{found[1]} pixels where {size[0]}×{size[1]} were packed"


def _find_pil_failure(encoded: Encoded) -> str | None:
    """Decode an image by PIL; return its error, None if it succeeds."""
    try:
        with pil_without_limits():
            Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")
    except Exception as error:  # PIL raises whatever its plugins raise
        return str(error) or type(error).__name__
    return None


def _encode_blank(size: tuple[int, int]) -> Encoded:
    """Encode a blank image, progressive if JPEG allows its size: decoding that takes more memory than most images."""
    file = io.BytesIO()
    image_format = "JPEG" if max(size) <= _MAX_JPEG_SIDE else "PNG"
    Image.new("RGB", size).save(file, image_format, progressive=True, subsampling=0)
    return as_array(file.getvalue())

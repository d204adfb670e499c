"""Processes of the data benchmark's loaders: comparison of their outputs, peak memory, timed epochs.

Each loader has a process of its own, which waits until it is asked. A trial is one epoch, from the first request to the
last batch delivered, so that nobody decodes ahead while others are timed. The first epoch's outputs are compared:
nothing is timed unless all loaders deliver the same. The second is for peak memory; then trials are timed in turn.
"""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import psutil
import torch

from dataio.workers import sigint_blocked
from launch.benchmark import loaders
from launch.benchmark.loaders import AUGMENTATIONS, LoadedBatch, Loader, LoaderConfig
from launch.benchmark.measure import Trial, cpu_seconds, describe_error, rotate_order, synchronize
from launch.benchmark.report import missing_modules

#: The workloads of each loader.
LOADERS = {
    "ours": ("read", "decode", "evaluation", *AUGMENTATIONS),
    "webdataset": ("read", "decode"),
    "torchvision": ("evaluation", "simple"),
    "timm": ("evaluation", *AUGMENTATIONS),
    "dali": ("read", "decode", "evaluation", "simple", "rand-augment"),
}
_COMPARED = 32  # images
#: Allowed differences from the first loader, in levels of 255: the mean, and a single value's. Their filters differ.
_TOLERANCES = (0.5, 16.0)
_SAMPLED_SECONDS = 0.02


class OutputMismatch(Exception):
    """A loader does not deliver what the others do, so that its time would mean nothing."""


@dataclass(frozen=True)
class OutputFingerprint:
    """The comparable part of an epoch's output."""

    labels: tuple[int, ...]
    shape: tuple[int, ...] = ()  # shape of an image, if all have the same
    digest: str = ""  # hash of all labels with images (read) or rows (decode, evaluation), whatever their order
    levels: np.ndarray | None = None  # decode, evaluation: pixels of the first rows, float32 in [0, 255]
    statistics: np.ndarray | None = None  # augmented: the channels' means, then their standard deviations


@dataclass
class PeakMemory:
    """Peak memory in bytes. resident: of the process, and what its workers do not share; own: without mapped files."""

    resident: int = 0
    own: int = 0


def make_loader(name: str, config: LoaderConfig) -> Loader:
    """Make the loader of that name. DALI is imported for its users alone: it would take memory of the others."""
    if name in ("ours", "dali"):
        from launch.benchmark import dali_loaders

        own = dali_loaders.DataioDecodeLoader if config.workload == "decode" else dali_loaders.DataioLoader
        return (own if name == "ours" else dali_loaders.DaliWebDatasetLoader)(config)
    if name == "webdataset":
        return loaders.WebDataset(config, loaders.pil_grid if config.workload == "decode" else None)
    make = {"torchvision": loaders.torchvision_transform, "timm": loaders.timm_transform}[name]
    return loaders.WebDataset(config, make(config))


def run_trial(loader: Loader, config: LoaderConfig, number: int, classes: int) -> Trial:
    """Time one epoch, whose consumer counts labels and does nothing else."""
    labels = np.zeros(classes, dtype=np.int64)
    cpu, began = _cpu_seconds(), time.perf_counter()
    for loaded in loader.epoch(number):
        labels += _count_labels(loaded, classes)
    synchronize(torch.device(config.device))
    return Trial(time.perf_counter() - began, _cpu_seconds() - cpu, tuple(labels.tolist()))


def fingerprint(loader: Loader, config: LoaderConfig, number: int, classes: int) -> OutputFingerprint:
    """Take the fingerprint of one epoch. Raises OutputMismatch if its batches differ in shape or dtype."""
    labels, digests, shapes = np.zeros(classes, dtype=np.int64), [], set()
    levels: dict[int, np.ndarray] = {}
    moments = []
    data = config.data()
    for loaded in loader.epoch(number):
        labels += _count_labels(loaded, classes)
        if config.workload == "read":
            pairs = zip(np.asarray(loaded.labels).tolist(), loaded.images, strict=True)
            digests += [sha256(b"%d %s" % (label, bytes(image))).hexdigest() for label, image in pairs]
            continue
        if not config.shuffled:
            pairs = zip(loaded.rows, np.asarray(loaded.labels), strict=True)
            digests += [f"row {row} label {label} " for row, label in pairs]
        images = torch.as_tensor(loaded.images).cpu()
        shapes.add((str(images.dtype), *images.shape[1:]))
        if config.workload in AUGMENTATIONS:
            moments.append((len(images), images.mean((0, 2, 3)), images.square().mean((0, 2, 3))))
            continue
        if config.workload == "evaluation":
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
            images = 255 * (images * std + mean)
        levels |= {row: images[index].numpy() for index, row in enumerate(loaded.rows) if row < _COMPARED}
    if len(shapes) > 1:
        raise OutputMismatch(f"its batches differ: {sorted(shapes)}")
    return OutputFingerprint(
        tuple(labels.tolist()),
        next(iter(shapes), ()),
        sha256("".join(sorted(digests)).encode()).hexdigest() if digests else "",
        np.stack([levels[row] for row in sorted(levels)]).astype(np.float32) if levels else None,
        _statistics(moments) if moments else None,
    )


def _count_labels(loaded: LoadedBatch, classes: int) -> np.ndarray:
    labels = np.asarray(torch.as_tensor(loaded.labels).cpu()).astype(np.int64)
    if len(labels) != len(loaded.images):
        raise OutputMismatch(f"{len(loaded.images)} images came with {len(labels)} labels")
    return np.bincount(labels, minlength=classes)


def _statistics(moments: list[tuple[int, torch.Tensor, torch.Tensor]]) -> np.ndarray:
    """Channel means, then standard deviations, of batches with (images, channel means, means of squares)."""
    counts = np.array([count for count, _, _ in moments])[:, None]
    mean = (counts * np.stack([mean.numpy() for _, mean, _ in moments])).sum(0) / counts.sum()
    square = (counts * np.stack([square.numpy() for _, _, square in moments])).sum(0) / counts.sum()
    return np.concatenate([mean, np.sqrt(square - mean**2)])


def _cpu_seconds() -> float:
    """CPU time so far of this process and its workers, running ones included; theirs in ticks of 10 ms."""
    spent = cpu_seconds()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            own = child.cpu_times()
            spent += own.user + own.system
    return spent


def compare(
    config: LoaderConfig, fingerprints: dict[str, OutputFingerprint], expected_labels: tuple[int, ...]
) -> dict[str, dict[str, float]]:
    """Compute the differences of each loader's images from the first one's: by loader, by quantity.

    Raises OutputMismatch if one delivers other labels, bytes, shapes or pixels.
    """
    first = next(iter(fingerprints))
    found: dict[str, dict[str, float]] = {}
    for name, own in fingerprints.items():
        _require_labels(config, name, own.labels, expected_labels)
        if own.shape != fingerprints[first].shape or own.digest != fingerprints[first].digest:
            fault = f"images of {own.shape}, not {fingerprints[first].shape},"
            if own.shape == fingerprints[first].shape:
                fault = "bytes" if config.workload == "read" else "labels of the same images"
            raise OutputMismatch(f"{config.workload}: {name} delivers other {fault} than {first}; nothing was timed")
        found[name] = {}
        if own.levels is not None:
            difference = np.abs(own.levels - fingerprints[first].levels)
            found[name] = {"mean_levels": float(difference.mean()), "largest_levels": float(difference.max())}
            allowed = dict(zip(found[name], _TOLERANCES, strict=True))
        elif own.statistics is not None:
            found[name] = {"statistics": float(np.abs(own.statistics - fingerprints[first].statistics).max())}
            allowed = {"statistics": _statistics_tolerance(sum(expected_labels))}
        for quantity, value in found[name].items():
            if not value <= allowed[quantity]:
                raise OutputMismatch(
                    f"{config.workload}: {name} delivers other pixels than {first}: {quantity} {value:.3g}, allowed"
                    f" {allowed[quantity]:g}; nothing was timed"
                )
    return found


def _statistics_tolerance(images: int) -> float:
    """Tolerance of channel means and deviations, in normalised units: chance, and that operations differ."""
    return 0.1 + 4 / math.sqrt(images)


def _require_labels(config: LoaderConfig, name: str, labels: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if labels != expected:
        raise OutputMismatch(
            f"{config.workload}: {name} delivers {sum(labels)} images, {labels} of each class, where {sum(expected)},"
            f" {expected}, are packed; its time would mean nothing"
        )


def serve(connection: Connection, name: str, config: LoaderConfig, classes: int) -> None:
    """Body of a loader's process: runs epochs on request until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with suppress(EOFError, ConnectionError):  # the parent has closed it, or is gone
        try:
            loader = make_loader(name, config)
            connection.send(None)
            while True:
                act, number = connection.recv()
                connection.send(act(loader, config, number, classes))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # whatever libraries raise, as one line
            connection.send(error if isinstance(error, OutputMismatch) else RuntimeError(describe_error(error)))
    _leave()


def _leave() -> None:
    """End this process and its workers at once: torch waits 5 s for each worker whose images have run out."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker that is killed
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)


class LoaderProcess:
    """The parent's side of a loader's process."""

    def __init__(self, name: str, config: LoaderConfig, classes: int) -> None:
        self.name, self._config = name, config
        context = multiprocessing.get_context("spawn")  # with nothing of this process, DALI's threads least of all
        self._connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, name, config, classes))
        with sigint_blocked():
            self.process.start()
        other.close()
        self._epochs = 0

    def ready(self) -> None:
        """Wait until the loader is made."""
        self._answer()

    def run(self, act: Any, meanwhile: Callable[[], None] | None = None) -> Any:
        """Call `fingerprint` or `run_trial` on the next epoch, and `meanwhile` every 20 ms until it returns.

        Raises RuntimeError or OutputMismatch if it fails.
        """
        self._connection.send((act, self._epochs))
        self._epochs += 1
        while meanwhile and not self._connection.poll(_SAMPLED_SECONDS):
            meanwhile()
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self.process.join()
            raise RuntimeError(
                f"{self._config.workload}: {self.name}'s process ended with status {self.process.exitcode};"
                " free some memory, or leave it out with --loaders"
            ) from error
        if isinstance(answer, Exception):
            raise type(answer)(f"{self._config.workload}: {self.name} failed: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()


@contextmanager
def loader_processes(names: list[str], config: LoaderConfig, classes: int) -> Iterator[list[LoaderProcess]]:
    """Start a process for each loader, and wait until the loaders are made; they end with the block."""
    started: list[LoaderProcess] = []
    try:
        for name in names:
            started.append(LoaderProcess(name, config, classes))
        for worker in started:
            worker.ready()
        yield started
    finally:
        for worker in started:
            worker.close()


def watch_memory(worker: LoaderProcess) -> PeakMemory:
    """Measure the peak memory of one epoch."""
    process, peak = psutil.Process(worker.process.pid), PeakMemory()
    _sample(process, peak)  # an epoch may be shorter than the first wait
    worker.run(run_trial, meanwhile=lambda: _sample(process, peak))
    return peak


def _sample(process: psutil.Process, peak: PeakMemory) -> None:
    with suppress(psutil.NoSuchProcess):
        resident, files = process.memory_info().rss, _mapped_files(process)
        of_workers = sum(child.memory_full_info().uss for child in process.children(recursive=True))
        peak.resident = max(peak.resident, resident + of_workers)
        peak.own = max(peak.own, resident - files + of_workers)


def _mapped_files(process: psutil.Process) -> int:
    with open(f"/proc/{process.pid}/status") as file:
        [line] = [line for line in file if line.startswith("RssFile:")]
    return 1024 * int(line.split()[1])


def require_tools(names: Iterable[str]) -> None:
    """Raise RuntimeError if a library that these loaders need is not installed."""
    if set(names) - {"ours", "dali"} and (missing := missing_modules("webdataset")):
        raise RuntimeError(f"{missing}; install it, or choose --loaders ours dali")


def benchmark_loaders(
    names: list[str], config: LoaderConfig, expected_labels: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Measure by loader: its differences from the first one, peak memory and trials.

    Raises OutputMismatch if one does not deliver what the others do, RuntimeError if one fails.
    """
    with loader_processes(names, config, len(expected_labels)) as workers:
        fingerprints = {worker.name: worker.run(fingerprint) for worker in workers}
        differences = compare(config, fingerprints, expected_labels)
        peaks = {worker.name: watch_memory(worker) for worker in workers}
        trials: dict[str, list[Trial]] = {worker.name: [] for worker in workers}
        for number in range(rounds):
            for worker in rotate_order(workers, number % len(workers)):
                trials[worker.name].append(worker.run(run_trial))
    for name, own in trials.items():
        for trial in own:
            _require_labels(config, name, trial.labels, expected_labels)
    return {name: {"differences": differences[name], "peak": peaks[name], "trials": trials[name]} for name in trials}

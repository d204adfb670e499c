"""Monitoring of a run: a progress bar or lines, TensorBoard, and the same scalars in metrics.jsonl.

Losses stay on the device until `write`, where the host waits for it. A full disk gives one
warning, and does not end the training.
"""

import json
import math
import re
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from dataio.bad_samples import describe_excess
from dataio.files import append, atomic_write
from launch.distributed import RunError, gather_objects
from launch.flops import MfuConstants
from launch.stragglers import SlowestRank, StragglerAlarm, WorkTimer, find_slowest

METRICS_NAME = "metrics.jsonl"


class Monitor:
    """Collects and writes the metrics of a run. Every rank has one; rank 0's writes.

    first_step: the step at which the run starts or resumes.
    max_bad_samples: how many images may be substituted in an epoch, over all ranks.
    own_work: an attribute, for the caller to time the part of each step in which this rank waits for no other.
    evaluates_first: the run begins with the evaluation after `first_step`; an earlier start may have got to it too.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        steps: int,
        log_every_steps: int,
        mfu_constants: MfuConstants,
        max_bad_samples: int = 0,
        evaluates_first: bool = False,
    ) -> None:
        self._log_every_steps, self._steps = log_every_steps, steps
        self._mfu_constants, self._max_bad_samples = mfu_constants, max_bad_samples
        self._warned: set[str] = set()
        self._losses: list[torch.Tensor] = []
        self._waited, self._images, self._last = 0.0, 0, time.perf_counter()
        self.own_work, self._alarm = WorkTimer(torch.cuda.is_available()), StragglerAlarm()
        self._folder, self._is_rank_zero = folder, dist.get_rank() == 0
        if not self._is_rank_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        replaced = truncate_metrics(folder / METRICS_NAME, first_step, evaluates_first)
        self._open(first_step)
        self._previous_excepthook, threading.excepthook = threading.excepthook, self._excepthook
        self._console = Console(markup=False, emoji=False, highlight=False)
        self._bar = None
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("", total=steps, completed=first_step)
            self._bar.start()
        if replaced is not None:
            self.log(
                f"no checkpoint to resume from, the run starts over; the metrics of the last start are in {replaced}"
            )

    def _open(self, first_step: int) -> None:
        """Open the files for the steps after `first_step`."""
        self._tensorboard: SummaryWriter | None = None
        self._metrics_file = open(self._folder / METRICS_NAME, "ab", buffering=0)  # noqa: SIM115  (closed by close())
        self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=first_step + 1)

    def rewind(self, step: int) -> None:
        """Forget all steps after `step` completed ones, to which the run goes back."""
        self._losses, self._waited, self._images, self._last = [], 0.0, 0, time.perf_counter()
        self.own_work.take()
        if not self._is_rank_zero:
            return
        self._to_tensorboard("close")
        self._metrics_file.close()
        try:
            truncate_metrics(self._folder / METRICS_NAME, step)
        except OSError as error:
            self.warn(
                f"cannot remove the steps after {step} from {error.filename}: {error.strerror}; they are repeated"
            )
        try:
            self._open(step)
        except OSError as error:
            self._warn_of_tensorboard(error)

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the time inside the block as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, losses: list[torch.Tensor], images: int) -> None:
        """Add a step: the losses of its micro-steps, scalars on the device, each over so many images of this rank."""
        self._losses += losses
        self._images += len(losses) * images

    def due(self, step: int) -> bool:
        """Return whether `write` is due after `step`, counted from 0."""
        return (step + 1) % self._log_every_steps == 0 or step + 1 == self._steps

    def write(
        self,
        step: int,
        lr: float,
        gradient_norm: torch.Tensor | float,
        bad_samples: int = 0,
        goodput: Mapping[str, float] | None = None,
    ) -> None:
        """Write the means over ranks and over all steps since the last call. Every rank calls it.

        gradient_norm: of this step; left out if it is not finite, as the loss is if all steps were skipped.
        bad_samples: images that this rank substituted in this epoch; summed over ranks.
        goodput: the scalars of `Goodput.shares`; rank 0's are written.
        Raises RunError on every rank if there are too many bad samples.
        """
        mean_loss, bad_sum, slowest = self._reduce(bad_samples)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = self._images * dist.get_world_size() / seconds
        scalars = {
            "train/loss": mean_loss,
            "train/learning_rate": lr,
            "train/gradient_norm": float(gradient_norm),
            "speed/images_per_second": rate,
            "speed/waiting_for_data": self._waited / seconds,
            "speed/mfu": rate * self._mfu_constants.flops_per_image / self._mfu_constants.peak_flops,
            "speed/slowest_rank": slowest and slowest.rank,
            "speed/slowest_over_median": slowest and slowest.over_median,
            "memory/peak_gib": _peak_memory() / 2**30,
            "data/broken_images": bad_sum,
            **(goodput or {}),
        }
        self._losses, self._waited, self._images = [], 0.0, 0
        self.scalars(step + 1, scalars)
        if slowest is not None:
            self._warn_of_straggler(slowest)
        if bad_sum > self._max_bad_samples:
            raise RunError(describe_excess(bad_sum, self._max_bad_samples, step + 1))
        self.log(
            f"step {step + 1}/{self._steps}  {'skipped' if mean_loss is None else f'loss {mean_loss:.4f}'}"
            f"  lr {lr:.2e}  {rate:,.0f} images/s"
            f"  {scalars['speed/waiting_for_data']:.0%} waiting for data",
            step + 1,
        )

    def _reduce(self, bad_samples: int) -> tuple[float | None, int, SlowestRank | None]:
        """Return the mean loss over ranks and steps, None if all steps were skipped, the sum of bad samples, and the
        slowest rank of several.
        """
        own_seconds = self.own_work.take()
        if not self._losses:
            return None, sum(gather_objects(bad_samples)), None
        sums = torch.zeros(2 + dist.get_world_size())
        sums[1], sums[2 + dist.get_rank()] = bad_samples, own_seconds
        sums = sums.to(self._losses[0].device)
        sums[0] = torch.stack(self._losses).mean()
        dist.all_reduce(sums)
        loss_sum, bad_sum, *by_rank = sums.tolist()  # synchronises with the device
        return loss_sum / dist.get_world_size(), int(bad_sum), find_slowest(by_rank)

    def _warn_of_straggler(self, slowest: SlowestRank) -> None:
        """Warn, on rank 0, if a rank has been much slower than the others for a while. Every rank calls it."""
        if not self._alarm.is_due(slowest):
            return
        host = gather_objects(socket.gethostname())[slowest.rank]
        if self._is_rank_zero:
            line = (
                f"rank {slowest.rank} ({host}) is slow, and the others wait for it: its data and forward passes take"
                f" {slowest.over_median:.1f} times as long as the median rank's"
            )
            self.warn(line)
            self.text("slow rank", line)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block out of all rates: it is not training."""
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write named numbers after `step` completed steps, on rank 0; None and what is not finite are left out."""
        if not self._is_rank_zero:
            return
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._append_metrics(json.dumps({"step": step, "time": round(time.time(), 3), **known}).encode() + b"\n")
        for name, value in known.items():
            self._to_tensorboard("add_scalar", name, value, step)

    def images(self, images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Show up to 64 normalized (B, 3, S, S) training images as one grid on TensorBoard."""
        if self._is_rank_zero:
            scale, shift = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (std, mean))
            pixels = (images[:64].float() * scale + shift).clamp(0, 1)
            self._to_tensorboard("add_image", "train/images", make_grid(pixels.cpu(), nrow=8), 0)

    def text(self, name: str, text: str) -> None:
        """Show a text verbatim on TensorBoard."""
        if self._is_rank_zero:
            self._to_tensorboard("add_text", name, f"```\n{text}\n```")

    def warn(self, line: str) -> None:
        """Print a line on standard error, from any rank; a repeated line is printed once."""
        if line not in self._warned:
            self._warned.add(line)
            sys.stderr.write(f"rank {dist.get_rank()}: {line}\n")  # print would write the newline separately
            sys.stderr.flush()

    def log(self, line: str, completed: int | None = None) -> None:
        """Print a line on rank 0; with `completed` steps it goes to the progress bar if there is one."""
        if not self._is_rank_zero:
            return
        if self._bar and completed is not None:
            self._bar.update(self._task, completed=completed, description=line.partition("  ")[2])
        else:
            self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Close the files and the progress bar."""
        if self._is_rank_zero:
            self._to_tensorboard("close")
            threading.excepthook = self._previous_excepthook
            self._metrics_file.close()
            if self._bar:
                self._bar.stop()

    def _append_metrics(self, line: bytes) -> None:
        """Append a whole line, or nothing if the disk is full."""
        try:
            append(self._metrics_file, line)
        except OSError as error:
            self.warn(
                f"cannot write to {self._metrics_file.name}: {error.strerror}; training goes on, with steps missing"
            )

    def _to_tensorboard(self, method: str, *arguments: Any) -> None:
        """Call a method of TensorBoard's writer, whose thread ends at the first error; then do without it."""
        if self._tensorboard is None:
            return
        try:
            getattr(self._tensorboard, method)(*arguments)
        except OSError as error:
            self._tensorboard = None
            self._warn_of_tensorboard(error)

    def _warn_of_tensorboard(self, error: OSError) -> None:
        folder = self._folder / "tensorboard"
        self.warn(f"cannot write to {folder}: {error.strerror}; training goes on, without TensorBoard")

    def _excepthook(self, fault: threading.ExceptHookArgs) -> None:
        """Print the exception that ended a thread; TensorBoard's is left to `_to_tensorboard`, which meets it again."""
        if not (isinstance(fault.exc_value, OSError) and type(fault.thread).__module__.startswith("tensorboard.")):
            self._previous_excepthook(fault)


def truncate_metrics(path: Path, step: int, evaluates_first: bool = False) -> Path | None:
    """Remove the lines of later steps than `step`, which a killed run wrote after the checkpoint it resumes from.

    evaluates_first: remove the evaluation after `step` as well.
    At step 0 the checkpoints may have been lost, so all lines are kept in another file, which is returned.
    """
    if not path.is_file():
        return None
    lines = path.read_bytes().split(b"\n")
    replaced = None
    if step == 0 and (steps := [found for found in map(_step_of, lines) if found < math.inf]):
        replaced = path.with_name(f"{path.stem}-to-step-{max(steps):08.0f}{path.suffix}")
        shutil.copyfile(path, replaced)
    again = re.compile(rb'"step": %d,.*"eval/' % step) if evaluates_first else None
    kept = [line for line in lines if _step_of(line) <= step and not (again and again.search(line))]
    atomic_write(path, b"".join(line + b"\n" for line in kept))
    return replaced


def _step_of(line: bytes) -> float:
    """Return the step of a line of metrics.jsonl; infinity if it is truncated or malformed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def _peak_memory() -> int:
    """Return the peak memory in bytes, of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

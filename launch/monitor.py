"""What a run tells: a progress bar or lines, TensorBoard, and the same scalars as lines of metrics.jsonl.

Everything measured stays on the device until `write`, the only place where the host waits for it.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from launch.distributed import Refusal
from launch.flops import Rates

METRICS_NAME = "metrics.jsonl"


class Monitor:
    """Every rank has one; rank 0's writes. `first_step` is where the run begins or goes on.

    max_broken: images that all ranks together may have replaced in an epoch.
    """

    def __init__(
        self, folder: Path, first_step: int, steps: int, every: int, rates: Rates, max_broken: int = 0
    ) -> None:
        self._every, self._rates, self._steps, self._max_broken = every, rates, steps, max_broken
        self._warned: set[str] = set()
        self._losses: list[torch.Tensor] = []
        self._waited, self._images, self._last = 0.0, 0, time.perf_counter()
        self._writes = dist.get_rank() == 0
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        drop_later_lines(folder / METRICS_NAME, first_step)
        self._lines = open(folder / METRICS_NAME, "a", buffering=1)  # noqa: SIM115  (closed by close())
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
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

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as spent waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, loss: torch.Tensor, images: int) -> None:
        """One micro-step: its loss () on the device, and how many images this rank computed in it."""
        self._losses.append(loss)
        self._images += images

    def due(self, step: int) -> bool:
        """Whether the steps so far are to be written after `step`, counted from 0."""
        return (step + 1) % self._every == 0 or step + 1 == self._steps

    def write(self, step: int, lr: float, gradient_norm: torch.Tensor | float | None, broken: int = 0) -> None:
        """Averages what was added since the last call over steps and ranks, and writes it. Every rank calls it.

        broken: images that this rank replaced in this epoch; summed over ranks.
        Raises Refusal on every rank if the loss or the gradient's norm is not finite, or too many images are broken.
        """
        loss = torch.stack(self._losses).mean()
        sums = torch.stack([loss, torch.full_like(loss, broken)])
        dist.all_reduce(sums)
        loss_sum, broken_sum = sums.tolist()  # waits for the device
        mean_loss = loss_sum / dist.get_world_size()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = self._images * dist.get_world_size() / seconds
        scalars = {
            "train/loss": mean_loss,
            "train/learning_rate": lr,
            "train/gradient_norm": None if gradient_norm is None else float(gradient_norm),
            "speed/images_per_second": rate,
            "speed/waiting_for_data": self._waited / seconds,
            "speed/mfu": rate * self._rates.flops_per_image / self._rates.peak_flops,
            "memory/peak_gib": _peak_memory() / 2**30,
            "data/broken_images": int(broken_sum),
        }
        self._losses, self._waited, self._images = [], 0.0, 0
        norm = scalars["train/gradient_norm"]
        if not math.isfinite(mean_loss) or not math.isfinite(norm or 0.0):
            raise Refusal(
                f"the loss is {mean_loss} and the gradient's norm {norm} at step {step + 1}; lower optimizer.lr or set"
                " optimizer.clip, and start again: the last checkpoint is from before"
            )
        self.scalars(step + 1, scalars)
        if broken_sum > self._max_broken:
            raise Refusal(
                f"{broken_sum:.0f} broken images in this epoch at step {step + 1}, data.max_broken allows"
                f" {self._max_broken}; check the shards with python -m dataio.verify, or raise it"
            )
        self.say(
            f"step {step + 1}/{self._steps}  loss {mean_loss:.4f}  lr {lr:.2e}  {rate:,.0f} images/s"
            f"  {scalars['speed/waiting_for_data']:.0%} waiting for data",
            step + 1,
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside is no training and counts for no rate."""
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Writes named numbers of the run after `step` completed steps; None is left out. Rank 0 writes."""
        if not self._writes:
            return
        known = {name: value for name, value in values.items() if value is not None}
        self._lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **known}) + "\n")
        for name, value in known.items():
            self._board.add_scalar(name, value, step)

    def images(self, images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """One grid of up to 64 normalised (B, 3, S, S) training images as the model sees them."""
        if self._writes:
            scale, shift = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (std, mean))
            pixels = (images[:64].float() * scale + shift).clamp(0, 1)
            self._board.add_image("train/images", make_grid(pixels.cpu(), nrow=8), 0)

    def text(self, name: str, text: str) -> None:
        """Puts a text on TensorBoard as it is."""
        if self._writes:
            self._board.add_text(name, f"```\n{text}\n```")

    def warn(self, line: str) -> None:
        """A line for people from any rank, on standard error; once, however often its cause is met."""
        if line not in self._warned:
            self._warned.add(line)
            sys.stderr.write(f"rank {dist.get_rank()}: {line}\n")  # at once: print writes the line's end by itself
            sys.stderr.flush()

    def say(self, line: str, completed: int | None = None) -> None:
        """A line for people, on rank 0; with `completed` steps it becomes the progress bar's where there is one."""
        if not self._writes:
            return
        if self._bar and completed is not None:
            self._bar.update(self._task, completed=completed, description=line.partition("  ")[2])
        else:
            self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        if self._writes:
            self._board.close()
            self._lines.close()
            if self._bar:
                self._bar.stop()


def drop_later_lines(path: Path, step: int) -> None:
    """Removes what a killed run wrote after the checkpoint that it goes on from."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if _is_whole(line) and json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".part")
        temporary.write_text("".join(f"{line}\n" for line in lines))
        temporary.replace(path)


def _is_whole(line: str) -> bool:
    return line.startswith("{") and line.endswith("}")


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

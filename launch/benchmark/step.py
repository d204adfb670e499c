"""Times of whole training steps: PolaFormer++ b5 and b4 beside timm's models of the same size.

python -m launch.benchmark step
python -m launch.benchmark step --models polaformerpp_b5 vit_base_patch16_224 --modes eager --output step.json
python -m launch.benchmark step --device cpu --models polaformerpp_b0 --modes eager --batch 8 --resolution 64
python -m launch.benchmark step --show step.json --markdown

A step is forward, cross-entropy, backward and fused AdamW on one batch of noise that stays on the device; on a GPU
under bf16 autocast, on the CPU in float32. Every model drops residual branches with the same probability, 0.1. "MFU"
compares the operations that a step must do with a large matrix product of the same dtype, measured on the same device.
A model that does not run is skipped with its reason. The file is rewritten after each model, so that a later crash
loses nothing.
"""

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, aten, conv_flop_count

from launch.benchmark.cli import AddOption, Command, Report, require_positive, resolve_device
from launch.benchmark.kernel_runner import implementation_of_ours
from launch.benchmark.measure import (
    Clock,
    Quantiles,
    describe_error,
    dtype_name,
    matmul_throughput,
    quantiles,
    rounds_within,
    synchronize,
)
from launch.benchmark.report import Column, describe_run, format_quantiles, heading, tabulate, write_report
from polaformer import PRESETS
from polaformer.model import TOTAL_STRIDE

MODES = ("eager", "compiled")
_MODELS = ("polaformerpp_b5", "vit_base_patch16_224", "convnext_base", "polaformerpp_b4", "caformer_m36")  # by worth
_CLASSES = 1000
_DROP_PATH_RATE = 0.1
_WARM_UP_STEPS = 3  # the first compiles and lets cuDNN choose


@dataclass(frozen=True)
class Batch:
    """The size of a training batch: square images of `resolution` pixels a side, on a device."""

    images: int
    resolution: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def draw(self) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) float32 noise in channels_last, and B random labels."""
        images = torch.randn(self.images, 3, self.resolution, self.resolution, device=self.device)
        labels = torch.randint(_CLASSES, (self.images,), device=self.device)
        return images.to(memory_format=torch.channels_last), labels


class Training:
    """A model in training with its optimizer, fused AdamW; on a GPU under bf16 autocast."""

    def __init__(self, model: nn.Module, device: torch.device, mode: str = "eager") -> None:
        self._device = device
        self.model = model.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._forward = torch.compile(self.model, dynamic=False) if mode == "compiled" else self.model
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on a batch; returns the loss before the step."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            loss = F.cross_entropy(self._forward(images), labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def create_model(name: str, resolution: int) -> nn.Module:
    """Create a model of timm's with fresh weights, for this resolution if its parameters depend on it."""
    config = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"img_size": resolution} if config and config.fixed_input_size else {}
    return timm.create_model(name, num_classes=_CLASSES, drop_path_rate=_DROP_PATH_RATE, **options)


def train_on_noise(name: str, mode: str, batch: Batch) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Create a model, and return it with its training step on one batch of noise that stays on the device."""
    torch.manual_seed(0)
    training = Training(create_model(name, batch.resolution), batch.device, mode)
    return training.model, partial(training.step, *batch.draw())


def count_flops(name: str, batch: Batch) -> int:
    """Operations of a step's matrix products and convolutions, a multiply-add counted as two; computes none of them.

    Softmax attention counts without the second computation of its scores, whatever the kernel that will run does.
    """
    formulas = {aten.convolution_backward: _convolution_backward_flops}
    with (
        torch.device("meta"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=formulas) as counter,
    ):
        model = create_model(name, batch.resolution).train()
        model(torch.empty(batch.images, 3, batch.resolution, batch.resolution)).sum().backward()
    return counter.get_total_flops()


def _convolution_backward_flops(
    grad: Any, x: Any, weight: Any, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, transposed: bool,
    _output_padding: Any, _groups: int, needed: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    """Count as many as forward for each of the two gradients; PyTorch's own formula takes grouped ones for dense."""
    return sum(needed[:2]) * conv_flop_count(x, weight, grad, transposed=transposed)


def measure(models: Sequence[str], modes: Sequence[str], batch: Batch, seconds: float, path: Path) -> Report:
    """Measure everything and return the report, written to `path` after each model and mode."""
    report = describe_run("step", batch.device)
    report["versions"]["timm"] = timm.__version__
    report["implementation_of_ours"] = implementation_of_ours(batch.device)
    report |= {"batch": batch.images, "resolution": batch.resolution, "drop_path_rate": _DROP_PATH_RATE}
    report["dtype"] = dtype_name(batch.dtype)
    rate = matmul_throughput(Clock(batch.device), batch.device, batch.dtype)
    report["product_flops_per_second"] = asdict(rate)
    report["results"] = []
    for mode in modes:
        for model in models:
            print(f"measuring {model}, {mode}", file=sys.stderr)
            entry = {"model": model, "mode": mode}
            try:
                entry |= measure_model(model, mode, batch, seconds, rate)
            except Exception as error:  # this model failed; the next ones may run
                entry["skipped"] = describe_error(error)
            report["results"].append(entry)
            write_report(path, report)
    return report


def measure_model(name: str, mode: str, batch: Batch, seconds: float, rate: Quantiles) -> dict[str, Any]:
    """Time, memory, size and operations of a model's steps. Raises whatever keeps it from running."""
    is_cuda = batch.device.type == "cuda"
    gc.collect()  # the last model
    torch.compiler.reset()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.backends.cudnn.benchmark = True
    flops = count_flops(name, batch)
    model, step = train_on_noise(name, mode, batch)
    began = perf_counter()
    step().item()  # waits for a GPU
    first = perf_counter() - began
    for _ in range(_WARM_UP_STEPS - 1):
        step()
    synchronize(batch.device)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(batch.device)
    steps = clock.time_back_to_back(step, rounds_within(seconds, min(clock.time_back_to_back(step, 2))))
    peak = torch.cuda.max_memory_allocated() if is_cuda else None
    loss = step().item()
    if not torch.tensor(loss).isfinite():
        raise RuntimeError(f"the loss became {loss}")
    times = quantiles(steps)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": flops,
        "seconds": asdict(times),
        "images_per_second": asdict(quantiles([batch.images / step for step in steps])),
        "share_of_product_rate": flops / times.median / rate.median,
        "peak_bytes": peak,
        "first_step_seconds": first,
        "loss": loss,
    }


def show(report: Report, markdown: bool) -> None:
    """Print a report."""
    print(
        f"{heading(report, ('torch', 'timm'))}\n"
        f"training steps of {report['batch']} images of {report['resolution']} × {report['resolution']} pixels in"
        f" {report['dtype']}; measured: products {report['product_flops_per_second']['median'] / 1e12:.3g} TFLOP/s;"
        f" ours is the {report['implementation_of_ours']}; medians (quantiles 0.2–0.8)\n"
    )
    columns: dict[str, Column] = {
        "model": lambda entry: entry["model"],
        "mode": lambda entry: entry["mode"],
        "images/s": lambda entry: format_quantiles(entry["images_per_second"], "{:.1f}".format),
        "ms a step": lambda entry: format_quantiles(entry["seconds"], "{:.1f}".format, 1000),
        "peak GiB": lambda entry: "" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 2**30:.1f}",
        "M parameters": lambda entry: f"{entry['parameters'] / 1e6:.1f}",
        "GFLOP an image": lambda entry: f"{entry['flops'] / report['batch'] / 1e9:.3g}",
        "MFU %": lambda entry: f"{100 * entry['share_of_product_rate']:.1f}",
    }
    print(tabulate(report["results"], columns, left=2, markdown=markdown))
    for entry in report["results"]:
        if "skipped" in entry:
            print(f"\nskipped: {entry['model']}, {entry['mode']}: {entry['skipped']}")


def headline(report: Report) -> str:
    """Each model's images per second, in a line."""
    rates = (
        f"{entry['model']} " + (f"{entry['images_per_second']['median']:.0f}" if "seconds" in entry else "failed")
        for entry in report["results"]
    )
    return f"images/s: {', '.join(rates)}"


def add_options(add: AddOption) -> None:
    """Declare the options."""
    models = f"of timm's, ours among them, in the order of measuring (default: {' '.join(_MODELS)})"
    add("--models", nargs="+", default=list(_MODELS), metavar="NAME", help=models)
    modes = f"of {', '.join(MODES)}; all models in the first, then all in the second (default: both)"
    add("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=modes)
    add("--batch", type=int, default=128, metavar="IMAGES", help="default 128")
    add("--resolution", type=int, default=224, metavar="PIXELS", help="a side (default 224)")
    seconds = "to time each model and mode, about; at least 5 steps; warming up comes on top (default 5)"
    add("--seconds", type=float, default=5, help=seconds)


def resolve_batch(arguments: argparse.Namespace, models: Sequence[str]) -> Batch:
    """Make the batch that --device, --batch and --resolution describe.

    Raises RuntimeError without that device; ValueError for too few images, a model that timm does not know, or a
    size that a model does not take.
    """
    device = resolve_device(arguments.device)
    require_positive(arguments, "batch", "resolution")
    for model in models:
        if not timm.is_model(model):
            raise ValueError(f"timm knows no model {model!r}; use one that timm.list_models() names, or {_MODELS[0]}")
        if model in PRESETS and arguments.resolution % TOTAL_STRIDE:
            raise ValueError(f"--resolution is {arguments.resolution}; {model} needs a multiple of {TOTAL_STRIDE}")
    return Batch(arguments.batch, arguments.resolution, device)


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError or RuntimeError."""
    batch = resolve_batch(arguments, arguments.models)
    require_positive(arguments, "seconds")
    models, modes = dict.fromkeys(arguments.models), dict.fromkeys(arguments.modes)
    return partial(measure, list(models), list(modes), batch, arguments.seconds)


COMMAND = Command("step", __doc__, add_options, resolve, show, needs_result=True)
parse, main = COMMAND.parse, COMMAND.main

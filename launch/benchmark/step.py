"""Times whole training steps: PolaFormer++ b5 and b4 beside models of timm that are used at the same size.

python -m launch.benchmark step
python -m launch.benchmark step --models polaformerpp_b5 vit_base_patch16_224 --modes eager --output step.json
python -m launch.benchmark step --device cpu --models polaformerpp_b0 --modes eager --batch 8 --resolution 64
python -m launch.benchmark step --show step.json --markdown

A step is forward, cross-entropy, backward and fused AdamW on one batch of noise that stays on the device; on a GPU
under bf16 autocast, on the CPU in float32. Every model drops residual branches with the same probability, 0.1. "MFU"
compares the operations that a step must do with a large matrix product of the same dtype, measured on the same device.
A model that does not run has an entry that says why. The file is written anew after each model, so that what was
measured outlives what comes next.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, aten, conv_flop_count

from launch.benchmark.measure import Clock, Quantiles, matmul_throughput, quantiles, rounds_within
from launch.benchmark.report import (
    default_path,
    describe_run,
    format_table,
    prepare_output,
    read_report,
    user_path,
    write_report,
)
from launch.distributed import default_device_type
from polaformer import PRESETS, ops
from polaformer.model import TOTAL_STRIDE

MODES = ("eager", "compiled")
_MODELS = ("polaformerpp_b5", "vit_base_patch16_224", "convnext_base", "polaformerpp_b4", "caformer_m36")  # by worth
_CLASSES = 1000
_DROP_PATH_RATE = 0.1
_WARM_UP_STEPS = 3  # of which the first compiles and lets cuDNN choose
_LONGEST_REASON = 400  # characters


@dataclass(frozen=True)
class Batch:
    """What every model is trained on: so many square images of so many pixels a side, on a device."""

    images: int
    resolution: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrix products."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


class Training:
    """A model in training with its optimizer and its batch; `step` is what is measured."""

    def __init__(self, name: str, mode: str, batch: Batch) -> None:
        torch.manual_seed(0)
        self._batch = batch
        self.model = create_model(name, batch.resolution).to(batch.device, memory_format=torch.channels_last).train()
        self._forward = torch.compile(self.model, dynamic=False) if mode == "compiled" else self.model
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        images = torch.randn(batch.images, 3, batch.resolution, batch.resolution, device=batch.device)
        self._images = images.to(memory_format=torch.channels_last)
        self._labels = torch.randint(_CLASSES, (batch.images,), device=batch.device)

    def step(self) -> Tensor:
        """The loss before the step."""
        with torch.autocast(self._batch.device.type, torch.bfloat16, enabled=self._batch.dtype == torch.bfloat16):
            loss = F.cross_entropy(self._forward(self._images), self._labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def create_model(name: str, resolution: int) -> nn.Module:
    """timm's model with fresh weights; one whose parameters depend on the image's size is made for this one."""
    options = {"img_size": resolution} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, num_classes=_CLASSES, drop_path_rate=_DROP_PATH_RATE, **options)


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


def _convolution_backward_flops(grad, x, weight, _bias, _stride, _padding, _dilation, transposed, *rest, **_) -> int:
    """As many as forward for each of the two gradients. PyTorch's own formula takes grouped ones for dense."""
    _output_padding, _groups, needed = rest
    return sum(needed[:2]) * conv_flop_count(x, weight, grad, transposed=transposed)


def time_steps(training: Training, device: torch.device, seconds: float) -> list[float]:
    """Seconds of each step, one right after the other, for about so long in all; waiting for the host counts."""

    def run(steps: int) -> list[float]:
        marks = [_mark(device)]
        for _ in range(steps):
            training.step()
            marks.append(_mark(device))
        if device.type == "cuda":
            torch.cuda.synchronize()
            return [began.elapsed_time(ended) / 1000 for began, ended in zip(marks, marks[1:], strict=False)]
        return [ended - began for began, ended in zip(marks, marks[1:], strict=False)]

    return run(rounds_within(seconds, min(run(2))))


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(batch: Batch, models: Sequence[str], modes: Sequence[str], seconds: float, path: Path) -> dict[str, Any]:
    """The whole report, written to `path` after each model and mode."""
    report = describe_run("step", batch.device)
    report["versions"]["timm"] = timm.__version__
    compiled = ops.has_compiled_kernels(batch.device.type)
    report["implementation_of_ours"] = "compiled kernel" if compiled else "reference"
    report |= {"batch": batch.images, "resolution": batch.resolution, "drop_path_rate": _DROP_PATH_RATE}
    report["dtype"] = str(batch.dtype).removeprefix("torch.")
    rate = matmul_throughput(Clock(batch.device), batch.device, batch.dtype)
    report["product_flops_per_second"] = asdict(rate)
    report["results"] = []
    for mode in modes:
        for model in models:
            print(f"measuring {model}, {mode}", file=sys.stderr)
            entry = {"model": model, "mode": mode}
            try:
                entry |= measure_model(model, mode, batch, seconds, rate)
            except Exception as error:  # of a model; the next ones may run
                entry["skipped"] = describe_error(error)
            report["results"].append(entry)
            write_report(path, report)
    return report


def measure_model(name: str, mode: str, batch: Batch, seconds: float, rate: Quantiles) -> dict[str, Any]:
    """Time, memory, size and operations of a model's steps. Raises whatever keeps it from running."""
    device = batch.device
    gc.collect()  # the last model
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.backends.cudnn.benchmark = True
    flops = count_flops(name, batch)
    training = Training(name, mode, batch)
    began = perf_counter()
    training.step().item()  # waits for a GPU
    first = perf_counter() - began
    for _ in range(_WARM_UP_STEPS - 1):
        training.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    steps = time_steps(training, device, seconds)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    loss = training.step().item()
    if not torch.tensor(loss).isfinite():
        raise RuntimeError(f"the loss became {loss}")
    times = quantiles(steps)
    return {
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "flops": flops,
        "seconds": asdict(times),
        "images_per_second": asdict(quantiles([batch.images / step for step in steps])),
        "share_of_product_rate": flops / times.median / rate.median,
        "peak_bytes": peak,
        "first_step_seconds": first,
        "loss": loss,
    }


def describe_error(error: Exception) -> str:
    """One line, not too long."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    message = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0]  # advice for PyTorch's developers follows
    line = " ".join(f"{type(error).__name__}: {message}".split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} …"


def show(report: dict[str, Any], markdown: bool) -> None:
    """Prints a report, for people."""
    print(
        f"{report['device']['name']}, {report['threads']} threads, torch {report['versions']['torch']},"
        f" timm {report['versions']['timm']}, commit {report['commit']}, {report['date']}\n\n"
        f"training steps of {report['batch']} images of {report['resolution']} × {report['resolution']} pixels in"
        f" {report['dtype']}; measured: products {report['product_flops_per_second']['median'] / 1e12:.3g} TFLOP/s;"
        f" ours is the {report['implementation_of_ours']}; medians (quantiles 0.2–0.8)\n"
    )
    columns = ("model", "mode", "images/s", "ms a step", "peak GiB", "M parameters", "GFLOP an image", "MFU %")
    rows = [_row(entry, report["batch"]) for entry in report["results"]]
    print(format_table(columns, rows, left=2, markdown=markdown))
    for entry in report["results"]:
        if "skipped" in entry:
            print(f"\nskipped: {entry['model']}, {entry['mode']}: {entry['skipped']}")


def _row(entry: dict[str, Any], images: int) -> tuple[str, ...]:
    name = entry["model"], entry["mode"]
    if "skipped" in entry:
        return *name, "skipped"
    peak = entry["peak_bytes"]
    return (
        *name,
        _with_quantiles(entry["images_per_second"], 1),
        _with_quantiles(entry["seconds"], 1000),
        "" if peak is None else f"{peak / 2**30:.1f}",
        f"{entry['parameters'] / 1e6:.1f}",
        f"{entry['flops'] / images / 1e9:.3g}",
        f"{100 * entry['share_of_product_rate']:.1f}",
    )


def _with_quantiles(times: dict[str, float], unit: float) -> str:
    median, low, high = (f"{unit * times[name]:.1f}" for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark step",
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    models = f"that timm knows, ours among them, in the order of measuring (default: {' '.join(_MODELS)})"
    add("--models", nargs="+", default=list(_MODELS), metavar="NAME", help=models)
    modes = f"of {', '.join(MODES)}; all models in the first, then all in the second (default: both)"
    add("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=modes)
    add("--batch", type=int, default=128, metavar="IMAGES", help="default 128")
    add("--resolution", type=int, default=224, metavar="PIXELS", help="a side (default 224)")
    add("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    seconds = "to time each model and mode, about; at least 5 steps; warming up comes on top (default 5)"
    add("--seconds", type=float, default=5, help=seconds)
    add("--output", type=user_path, metavar="FILE.json", help="default: a new file below runs/benchmark")
    add("--markdown", action="store_true", help="print the table as Markdown")
    add("--show", type=user_path, metavar="FILE.json", help="print the table of this file and measure nothing")
    return parser.parse_args(argv)


def resolve_device(name: str | None) -> torch.device:
    """Raises RuntimeError if it is not there."""
    device = torch.device(name or default_device_type())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no NVIDIA GPU; use --device cpu")
    return device


def resolve_batch(models: Sequence[str], images: int, resolution: int, device: torch.device) -> Batch:
    """Raises ValueError if timm does not know a model, or the images are too few, or not of a size that it takes."""
    for name, value in (("batch", images), ("resolution", resolution)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; give a number above 0")
    for model in models:
        if not timm.is_model(model):
            raise ValueError(f"timm knows no model {model!r}; use one that timm.list_models() names, or {_MODELS[0]}")
        if model in PRESETS and resolution % TOTAL_STRIDE:
            raise ValueError(f"--resolution is {resolution}; {model} needs a multiple of {TOTAL_STRIDE}")
    return Batch(images, resolution, device)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.show:
            show(read_report(arguments.show, "step"), arguments.markdown)
            return 0
        device = resolve_device(arguments.device)
        batch = resolve_batch(arguments.models, arguments.batch, arguments.resolution, device)
        if not arguments.seconds > 0:
            raise ValueError(f"--seconds is {arguments.seconds}; give a number above 0")
        path = prepare_output(arguments.output or default_path("step"))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    models, modes = dict.fromkeys(arguments.models), dict.fromkeys(arguments.modes)
    report = measure(batch, list(models), list(modes), arguments.seconds, path)
    show(report, arguments.markdown)
    print(f"written to {path}", file=sys.stderr)
    return int(all("skipped" in entry for entry in report["results"]))

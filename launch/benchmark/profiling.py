"""Time of every kernel of polarity attention, or of every operator of a model's training step.

python -m launch.benchmark profile
python -m launch.benchmark profile --shapes 128,1,56x56,96 --dtype float16 --output profile.json
python -m launch.benchmark profile --device cpu --shapes 2,1,14x14,32
python -m launch.benchmark profile --model polaformerpp_b5 --batch 128 --resolution 224
python -m launch.benchmark profile --show profile.json --markdown

Forward is training's, which keeps what backward needs. Each run on a GPU starts with a cold L2 cache. Times are medians
over the runs, from PyTorch's profiler: of kernels on a GPU, of PyTorch's operators on the CPU. "with gaps" is from the
first kernel's start to the last one's end. "% of copy" compares the bytes that no implementation can avoid, over the
kernels' time, with a large copy on the same device. A shape that does not run is skipped with its reason.
"""

import argparse
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from launch.benchmark.cli import AddOption, Command, Report, require_positive, resolve_device
from launch.benchmark.kernel_runner import call_ours, implementation_of_ours
from launch.benchmark.measure import (
    Clock,
    copy_bandwidth,
    describe_error,
    dtype_name,
    quantiles,
    quiet_profile,
    synchronize,
)
from launch.benchmark.report import Column, describe_run, format_quantiles, heading, tabulate, write_report
from launch.benchmark.shapes import MIN_TRAFFIC_ELEMENTS, Shape, parse_shape
from launch.benchmark.step import Batch, resolve_batch, train_on_noise

_SHAPES = ("128,1,56x56,96", "128,2,28x28,96", "256,1,56x56,32", "1,1,56x56,96")
_DTYPES = ("float32", "bfloat16", "float16")
_WARM_UP_RUNS = 3
_RUN = "launch.benchmark.profiling: one run"  # the name of a range in a profile
_FLUSHING_ROWS, _FLUSHING_COLUMNS = 1 << 16, 1 << 13  # bytes: 512 MiB, several times the L2 cache of any GPU
_OPERATORS_SHOWN = 25


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, or an operator's call on the CPU without the operators that it calls."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """The launches of one run, and the time from the first one's start to the last one's end."""

    launches: list[Launch]
    seconds_with_gaps: float


class ColdCacheProfiler:
    """Profiler of kernels on a GPU that flushes the L2 cache before each run.

    The cache is flushed by reading, since written lines would still have to go to memory during the run. What reads is
    a maximum of bytes along rows: one kernel, of a name that nothing else here has, so that it marks the runs' starts.
    """

    def __init__(self) -> None:
        self._flushing = torch.zeros(_FLUSHING_ROWS, _FLUSHING_COLUMNS, dtype=torch.uint8, device="cuda")
        self._largest = torch.zeros(_FLUSHING_ROWS, dtype=torch.uint8, device="cuda")
        self._flush()
        recorded = {event.name for event in self._record(self._flush, 1)}
        self._markers = {name for name in recorded if not name.startswith("Mem")}  # others may fill memory, too
        if not self._markers:
            raise RuntimeError("PyTorch's profiler sees no kernels; end other profilers of this GPU and run again")

    def profile(self, run: Callable[[], Any], runs: int) -> list[Run]:
        """Profile the runs, after some to warm up. Raises RuntimeError if the profiler did not see all of them."""

        def flushed_run() -> None:
            self._flush()
            run()

        for _ in range(_WARM_UP_RUNS):
            run()
        divided = split_by_markers(self._record(flushed_run, runs), self._markers)
        if len(divided) != runs or not all(divided):
            raise RuntimeError(f"PyTorch's profiler saw {sum(map(bool, divided))} of {runs} runs; use a smaller --runs")
        return [
            Run(
                [Launch(event.name, event.time_range.elapsed_us() / 1e6) for event in events],
                (max(event.time_range.end for event in events) - events[0].time_range.start) / 1e6,
            )
            for events in divided
        ]

    def _flush(self) -> None:
        torch.amax(self._flushing, dim=1, out=self._largest)

    def _record(self, run: Callable[[], Any], repetitions: int) -> list[Any]:
        """Record the device's events, by their start."""
        torch.cuda.synchronize()
        with quiet_profile([ProfilerActivity.CUDA]) as profiler:
            for _ in range(repetitions):
                run()
            torch.cuda.synchronize()
        return sorted(device_events(profiler.events()), key=lambda event: event.time_range.start)


def device_events(events: Iterable[Any]) -> list[Any]:
    """Select the GPU's kernels, copies and fills from a profile's events, without named ranges."""
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def split_by_markers(events: Iterable[Any], markers: set[str]) -> list[list[Any]]:
    """Split events at the markers; those before the first one belong to no run."""
    divided: list[list[Any]] = []
    for event in events:
        if event.name in markers:
            divided.append([])
        elif divided:
            divided[-1].append(event)
    return divided


def profile_on_cpu(run: Callable[[], Any], runs: int) -> list[Run]:
    """Profile the operators of the runs, after some to warm up; the caches are as the last run left them."""
    for _ in range(_WARM_UP_RUNS):
        run()
    with quiet_profile([ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            with record_function(_RUN):
                run()
    found = []
    for event in profiler.events():
        if event.name == _RUN:
            calls = sorted(_descendants(event), key=lambda call: call.time_range.start)
            launches = [Launch(call.name, call.self_cpu_time_total / 1e6) for call in calls]
            found.append(Run(launches, event.time_range.elapsed_us() / 1e6))
    return found


def _descendants(event: Any) -> list[Any]:
    return [call for child in event.cpu_children for call in (child, *_descendants(child))]


def profile_shape(
    shape: Shape, dtype: torch.dtype, device: torch.device, profile_runs: Callable[[Callable[[], Any]], list[Run]]
) -> dict[str, Any]:
    """Profile the kernels of forward and backward, with their shares of both together."""
    call = call_ours(shape, dtype, device)
    out, inputs = call.forward(), call.inputs

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs.tensors, inputs.grad_out, retain_graph=True)

    kernels, passes = [], {}
    for name, run in (("forward", call.forward), ("backward", backward)):
        found = profile_runs(run)
        kernels += [{"pass": name} | kernel for kernel in summarize(found)]
        passes[name] = {
            "seconds": asdict(quantiles([sum(launch.seconds for launch in one.launches) for one in found])),
            "seconds_with_gaps": asdict(quantiles([one.seconds_with_gaps for one in found])),
            "floor_bytes": MIN_TRAFFIC_ELEMENTS[name] * shape.elements * dtype.itemsize,
        }
    total = sum(kernel["seconds"]["median"] for kernel in kernels)
    for kernel in kernels:
        kernel["share"] = kernel["seconds"]["median"] / total
    return {"kernels": kernels, "passes": passes}


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each kernel's time and launches in a run, in the order of the first run."""
    names = dict.fromkeys(launch.name for run in runs for launch in run.launches)
    kernels = []
    for name in names:
        own = [[launch.seconds for launch in run.launches if launch.name == name] for run in runs]
        kernels.append(
            {
                "name": short_name(name),
                "signature": name,
                "launches": statistics.median_high(map(len, own)),
                "seconds": asdict(quantiles([sum(seconds) for seconds in own])),
            }
        )
    return kernels


def short_name(signature: str) -> str:
    """Name of a kernel without namespaces, types and arguments; for PyTorch's generic kernels, with the functor.

    Names of operators, copies and fills stay as they are.
    """
    if not re.search(r"\w[<(]", signature):
        return signature
    plain = signature.replace("(anonymous namespace)", "").replace("<unnamed>", "")
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)", "", plain)) != plain:
        plain = shorter
    name = re.split(r"::|\s", plain.strip())[-1] or signature
    purpose = re.search(r"\b\w*(?:Functor|Ops|_kernel_cuda|_kernel_impl)\b", signature)
    return f"{name} {purpose.group()}" if purpose and "at::native" in signature else name


def measure_shapes(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, runs: int, path: Path) -> Report:
    """Profile polarity attention; the report is written to `path` after each shape.

    Raises RuntimeError if the profiler sees nothing.
    """
    report = _start_report(device)
    copy = copy_bandwidth(Clock(device), device)
    report |= {"dtype": dtype_name(dtype), "runs": runs, "copy_bytes_per_second": asdict(copy), "results": []}
    profile_runs = partial(ColdCacheProfiler().profile if device.type == "cuda" else profile_on_cpu, runs=runs)
    for shape in shapes:
        print(f"profiling {shape}", file=sys.stderr)
        entry: dict[str, Any] = {"shape": str(shape)}
        try:
            entry |= profile_shape(shape, dtype, device, profile_runs)
            for numbers in entry["passes"].values():
                numbers["bytes_per_second"] = numbers["floor_bytes"] / numbers["seconds"]["median"]
                numbers["share_of_copy_rate"] = numbers["bytes_per_second"] / copy.median
        except Exception as error:  # this shape failed; the next ones may run
            entry["skipped"] = describe_error(error)
        report["results"].append(entry)
        write_report(path, report)
    return report


def _start_report(device: torch.device) -> Report:
    kind = "kernels" if device.type == "cuda" else "operators"
    return describe_run("profile", device) | {
        "implementation_of_ours": implementation_of_ours(device),
        "profiled": kind,
    }


def measure_model(name: str, batch: Batch, steps: int, _path: Path) -> Report:
    """Profile a model's eager training step: its operators, the slowest first."""
    activities = [ProfilerActivity.CPU]
    if batch.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        activities.append(ProfilerActivity.CUDA)
    _, step = train_on_noise(name, "eager", batch)
    for _ in range(_WARM_UP_RUNS):
        step()
    synchronize(batch.device)
    with quiet_profile(activities) as profiler:
        for _ in range(steps):
            step()
        synchronize(batch.device)
    found = operators(profiler.events(), batch.device.type, steps)
    return _start_report(batch.device) | {
        "profiled": "model",
        "model": name,
        "batch": batch.images,
        "resolution": batch.resolution,
        "dtype": dtype_name(batch.dtype),
        "runs": steps,
        "seconds": sum(one["seconds"] for one in found),
        "operators": found,
    }


def operators(events: Iterable[Any], device_type: str, steps: int) -> list[dict[str, Any]]:
    """Each operator's calls and seconds in a step, on average, and its share, without the operators that it calls.

    The seconds are those of the kernels that it launches on a GPU, its own on the CPU.
    """
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    events = list(events)
    for event in events:
        if event.device_type != DeviceType.CPU or event.is_user_annotation:
            continue
        on_gpu = sum(kernel.duration for kernel in event.kernels)
        own = (on_gpu if device_type == "cuda" else event.self_cpu_time_total) / 1e6
        if own > 0:
            seconds[event.name] += own
            calls[event.name] += 1
    if device_type == "cuda":
        launched = sum(event.time_range.elapsed_us() for event in device_events(events)) / 1e6
        if (rest := launched - sum(seconds.values())) > 0.001 * launched:
            seconds["(kernels of no operator)"] = rest
    total = sum(seconds.values())
    return [
        {"name": name, "calls": calls[name] / steps, "seconds": own / steps, "share": own / total}
        for name, own in seconds.most_common()
    ]


def show(report: Report, markdown: bool) -> None:
    """Print a report."""
    print(heading(report))
    if report["profiled"] == "model":
        _show_model(report, markdown)
        return
    print(
        f"{report['profiled']} of ours, the {report['implementation_of_ours']}, in {report['dtype']}: medians"
        f" (quantiles 0.2–0.8) of {report['runs']} runs;"
        f" measured: copy {report['copy_bytes_per_second']['median'] / 1e9:.4g} GB/s"
    )
    kernels: dict[str, Column] = {
        "pass": lambda kernel: kernel["pass"],
        report["profiled"].removesuffix("s"): lambda kernel: kernel["name"],
        "µs": lambda kernel: _microseconds(kernel["seconds"]),
        "share %": lambda kernel: _percent(kernel["share"]),
        "launches": lambda kernel: str(kernel["launches"]),
    }
    for entry in report["results"]:
        print(f"\n{entry['shape']}\n")
        if "skipped" in entry:
            print(f"skipped: {entry['skipped']}")
            continue
        print(tabulate(entry["kernels"], kernels, left=2, markdown=markdown), end="\n\n")
        passes = ({"pass": name} | numbers for name, numbers in entry["passes"].items())
        print(tabulate(passes, _PASS_COLUMNS, markdown=markdown))


def _show_model(report: Report, markdown: bool) -> None:
    kind = "kernels" if report["device"]["type"] == "cuda" else "operators"
    found = report["operators"]
    print(
        f"a training step of {report['model']}, {report['batch']} images of {report['resolution']} ×"
        f" {report['resolution']} pixels, {report['dtype']}, eager: {1000 * report['seconds']:.4g} ms in {kind},"
        f" means of {report['runs']} steps; the first {min(len(found), _OPERATORS_SHOWN)} of {len(found)} operators\n"
    )
    print(tabulate(found[:_OPERATORS_SHOWN], _OPERATOR_COLUMNS, markdown=markdown))


def headline(report: Report) -> str:
    """Time of forward and backward on every shape, or of a model's slowest operators, in a line."""
    if report["profiled"] == "model":
        slowest = ", ".join(f"{one['name']} {100 * one['share']:.0f} %" for one in report["operators"][:3])
        return f"{report['model']}: {1000 * report['seconds']:.0f} ms a step; {slowest}"
    times = []
    for entry in report["results"]:
        passes = (f"{1e6 * one['seconds']['median']:.0f}" for one in entry.get("passes", {}).values())
        times.append(f"{entry['shape']} " + ("failed" if "skipped" in entry else " + ".join(passes) + " µs"))
    return "; ".join(times)


def _microseconds(seconds: dict[str, float]) -> str:
    return format_quantiles(seconds, "{:.1f}".format, 1e6)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


_PASS_COLUMNS: dict[str, Column] = {
    "pass": lambda numbers: numbers["pass"],
    "µs": lambda numbers: _microseconds(numbers["seconds"]),
    "with gaps": lambda numbers: _microseconds(numbers["seconds_with_gaps"]),
    "floor MB": lambda numbers: f"{numbers['floor_bytes'] / 1e6:.4g}",
    "floor GB/s": lambda numbers: f"{numbers['bytes_per_second'] / 1e9:.4g}",
    "% of copy": lambda numbers: _percent(numbers["share_of_copy_rate"]),
}
_OPERATOR_COLUMNS: dict[str, Column] = {
    "operator": lambda one: one["name"],
    "ms": lambda one: f"{1000 * one['seconds']:.3f}",
    "share %": lambda one: _percent(one["share"]),
    "calls": lambda one: f"{one['calls']:g}",
}


def add_options(add: AddOption) -> None:
    """Declare the options."""
    add("--shapes", nargs="+", metavar="B,H,HEIGHTxWIDTH,D", help=f"default: {' '.join(_SHAPES)}")
    dtypes = f"of {', '.join(_DTYPES)} (default: bfloat16 on a GPU, float32 on the CPU)"
    add("--dtype", choices=_DTYPES, metavar="DTYPE", help=dtypes)
    add("--runs", type=int, help="of each pass, or steps of a model (default: 30; 5 steps)")
    add("--model", metavar="NAME", help="profile a training step of this model of timm's or ours instead")
    add("--batch", type=int, default=128, metavar="IMAGES", help="of --model's step (default 128)")
    add("--resolution", type=int, default=224, metavar="PIXELS", help="of --model's images, a side (default 224)")


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError or RuntimeError."""
    device = resolve_device(arguments.device)
    require_positive(arguments, "runs")
    if arguments.model:
        if arguments.shapes or arguments.dtype:
            raise ValueError("--model profiles a whole model in its own dtype; leave --shapes and --dtype out")
        return partial(measure_model, arguments.model, resolve_batch(arguments, [arguments.model]), arguments.runs or 5)
    shapes = [parse_shape(text) for text in dict.fromkeys(arguments.shapes or _SHAPES)]
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    return partial(measure_shapes, shapes, dtype, device, arguments.runs or 30)


COMMAND = Command(
    "profile", __doc__, add_options, resolve, show,
    failures={Exception: 1}, describe_failure=describe_error, needs_result=True,
)  # fmt: skip
parse, main = COMMAND.parse, COMMAND.main

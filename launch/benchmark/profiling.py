"""The time of every kernel of polarity attention, or of every operator of a model's training step.

python -m launch.benchmark profile
python -m launch.benchmark profile --shapes 128,1,56x56,96 --dtype float16 --output profile.json
python -m launch.benchmark profile --device cpu --shapes 2,1,14x14,32
python -m launch.benchmark profile --model polaformerpp_b5 --batch 128 --resolution 224
python -m launch.benchmark profile --show profile.json --markdown

Forward is training's, which keeps what backward needs. Before each run on a GPU its L2 cache is emptied of what the run
will read. Times are medians over the runs, as PyTorch's profiler saw the kernels; on the CPU, where there are none,
those of PyTorch's operators. "with gaps" is from the first kernel's start to the last one's end. "% of copy" compares
the bytes that no implementation can leave unmoved, over the kernels' time, with a large copy on the same device. A
shape that does not run has an entry that says why.
"""

import argparse
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from launch.benchmark.implementations import (
    MIN_TRAFFIC_ELEMENTS,
    AttentionCall,
    Shape,
    get_implementation,
    make_inputs,
    parse_shape,
)
from launch.benchmark.measure import Clock, Quantiles, copy_bandwidth, quantiles
from launch.benchmark.report import (
    default_path,
    describe_run,
    format_table,
    prepare_output,
    read_report,
    user_path,
    write_report,
)
from launch.benchmark.step import Batch, Training, describe_error, resolve_batch, resolve_device
from polaformer import ops

_SHAPES = ("128,1,56x56,96", "128,2,28x28,96", "256,1,56x56,32", "1,1,56x56,96")
_DTYPES = ("float32", "bfloat16", "float16")
_WARM_UP_RUNS = 3
_RUN = "launch.benchmark.profiling: one run"  # the name of a range in a profile
_FLUSHING_ROWS, _FLUSHING_COLUMNS = 1 << 16, 1 << 13  # bytes: 512 MiB, several times the L2 cache of any GPU
_OPERATORS_SHOWN = 25


@dataclass(frozen=True)
class Launch:
    """A kernel's launch, or a call of an operator on the CPU, without what that calls itself."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Run:
    """All launches of one run, and the time from the first one's start to the last one's end."""

    launches: list[Launch]
    seconds_with_gaps: float


class ColdCacheProfiler:
    """Profiles kernels on a GPU, one run at a time, each with a cold L2 cache.

    The cache is flushed by reading, since written lines would still have to go to memory during the run. What reads is
    a maximum of bytes along rows: one kernel, of a name that nothing else here has, so that it divides the runs.
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
        """Raises RuntimeError if the profiler did not see all of them."""

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
        """The device's events, by their start."""
        torch.cuda.synchronize()
        with _quiet_profile([ProfilerActivity.CUDA]) as profiler:
            for _ in range(repetitions):
                run()
            torch.cuda.synchronize()
        return sorted(device_events(profiler.events()), key=lambda event: event.time_range.start)


def _quiet_profile(activities: Sequence[ProfilerActivity]) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # without a driver it complains of that, loudly
    return profile(activities=activities, acc_events=True)


def device_events(events: Iterable[Any]) -> list[Any]:
    """Kernels, copies and fills of the GPU, without the ranges that a program names."""
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def split_by_markers(events: Iterable[Any], markers: set[str]) -> list[list[Any]]:
    """The events after each marker, up to the next one; what is before the first belongs to no run."""
    divided: list[list[Any]] = []
    for event in events:
        if event.name in markers:
            divided.append([])
        elif divided:
            divided[-1].append(event)
    return divided


def profile_on_cpu(run: Callable[[], Any], runs: int) -> list[Run]:
    """Profiles operators; the caches are as the last run left them."""
    for _ in range(_WARM_UP_RUNS):
        run()
    with _quiet_profile([ProfilerActivity.CPU]) as profiler:
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
    """The kernels of forward and of backward, with their shares of both together."""
    inputs = make_inputs(shape, dtype, device)
    call = AttentionCall(get_implementation("ours"), inputs)
    out = call.forward()

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
    """For each kernel its time and launches in a run, in the order of the first run."""
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
    """A kernel's name without namespaces, types and arguments; of PyTorch's general ones, also what they compute.

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


def measure_shapes(
    shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device, runs: int, path: Path
) -> dict[str, Any]:
    """The whole report on polarity attention, written to `path` after each shape.

    Raises RuntimeError if the profiler sees nothing.
    """
    report = _start_report(device)
    rate = copy_bandwidth(Clock(device), device)
    report |= {"dtype": str(dtype).removeprefix("torch."), "runs": runs, "copy_bytes_per_second": asdict(rate)}
    report["results"] = []
    profile_runs = partial(ColdCacheProfiler().profile if device.type == "cuda" else profile_on_cpu, runs=runs)
    for shape in shapes:
        print(f"profiling {shape}", file=sys.stderr)
        entry = {"shape": str(shape)}
        try:
            entry |= profile_shape(shape, dtype, device, profile_runs)
            for numbers in entry["passes"].values():
                numbers |= _rates(numbers, rate)
        except Exception as error:  # of a shape; the next ones may run
            entry["skipped"] = describe_error(error)
        report["results"].append(entry)
        write_report(path, report)
    return report


def _start_report(device: torch.device) -> dict[str, Any]:
    compiled = ops.has_compiled_kernels(device.type)
    return describe_run("profile", device) | {
        "implementation_of_ours": "compiled kernel" if compiled else "reference",
        "profiled": "kernels" if device.type == "cuda" else "operators",
    }


def _rates(numbers: dict[str, Any], copy: Quantiles) -> dict[str, float]:
    bytes_per_second = numbers["floor_bytes"] / numbers["seconds"]["median"]
    return {"bytes_per_second": bytes_per_second, "share_of_copy_rate": bytes_per_second / copy.median}


def measure_model(name: str, batch: Batch, steps: int, path: Path) -> dict[str, Any]:
    """The whole report on a model's eager training step, written to `path`: its operators, the slowest first."""
    if batch.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    training = Training(name, "eager", batch)
    for _ in range(_WARM_UP_RUNS):
        training.step()
    activities = [ProfilerActivity.CPU]
    if batch.device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with _quiet_profile(activities) as profiler:
        for _ in range(steps):
            training.step()
        if batch.device.type == "cuda":
            torch.cuda.synchronize()
    found = operators(profiler.events(), batch.device.type, steps)
    report = _start_report(batch.device) | {
        "profiled": "model",
        "model": name,
        "batch": batch.images,
        "resolution": batch.resolution,
        "dtype": str(batch.dtype).removeprefix("torch."),
        "runs": steps,
        "seconds": sum(one["seconds"] for one in found),
        "operators": found,
    }
    write_report(path, report)
    return report


def operators(events: Iterable[Any], device_type: str, steps: int) -> list[dict[str, Any]]:
    """Each operator's calls and seconds in a step, on average, and its share; without what it calls itself.

    On a GPU the seconds of the kernels that it launches; on the CPU its own.
    """
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    events = list(events)
    for event in events:
        if event.device_type != DeviceType.CPU or event.is_user_annotation:
            continue
        on_gpu = sum(kernel.duration for kernel in event.kernels)
        own = (on_gpu if device_type == "cuda" else event.self_cpu_time_total) / 1e6
        if own > 0:
            seconds[event.name] = seconds.get(event.name, 0) + own
            calls[event.name] = calls.get(event.name, 0) + 1
    if device_type == "cuda":
        launched = sum(event.time_range.elapsed_us() for event in device_events(events)) / 1e6
        if (rest := launched - sum(seconds.values())) > 0.001 * launched:
            seconds["(kernels of no operator)"] = rest
    total = sum(seconds.values())
    return [
        {
            "name": name,
            "calls": calls.get(name, 0) / steps,
            "seconds": seconds[name] / steps,
            "share": seconds[name] / total,
        }
        for name in sorted(seconds, key=seconds.get, reverse=True)
    ]


def show(report: dict[str, Any], markdown: bool) -> None:
    """Prints a report, for people."""
    print(
        f"{report['device']['name']}, {report['threads']} threads, torch {report['versions']['torch']},"
        f" commit {report['commit']}, {report['date']}\n"
    )
    if report["profiled"] == "model":
        _show_model(report, markdown)
        return
    print(
        f"{report['profiled']} of ours, the {report['implementation_of_ours']}, in {report['dtype']}: medians"
        f" (quantiles 0.2–0.8) of {report['runs']} runs;"
        f" measured: copy {report['copy_bytes_per_second']['median'] / 1e9:.4g} GB/s"
    )
    for entry in report["results"]:
        print(f"\n{entry['shape']}\n")
        if "skipped" in entry:
            print(f"skipped: {entry['skipped']}")
            continue
        columns = ("pass", report["profiled"].removesuffix("s"), "µs", "share %", "launches")
        rows = [
            (kernel["pass"], kernel["name"], _microseconds(kernel["seconds"]), _percent(kernel["share"]),
             str(kernel["launches"]))
            for kernel in entry["kernels"]
        ]  # fmt: skip
        print(format_table(columns, rows, left=2, markdown=markdown), end="\n\n")
        columns = ("pass", "µs", "with gaps", "floor MB", "floor GB/s", "% of copy")
        rows = [(name, *_pass_cells(numbers)) for name, numbers in entry["passes"].items()]
        print(format_table(columns, rows, markdown=markdown))


def _pass_cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    return (
        _microseconds(numbers["seconds"]),
        _microseconds(numbers["seconds_with_gaps"]),
        f"{numbers['floor_bytes'] / 1e6:.4g}",
        f"{numbers['bytes_per_second'] / 1e9:.4g}",
        _percent(numbers["share_of_copy_rate"]),
    )


def _show_model(report: dict[str, Any], markdown: bool) -> None:
    kind = "kernels" if report["device"]["type"] == "cuda" else "operators"
    found = report["operators"]
    print(
        f"a training step of {report['model']}, {report['batch']} images of {report['resolution']} ×"
        f" {report['resolution']} pixels, {report['dtype']}, eager: {1000 * report['seconds']:.4g} ms in {kind},"
        f" means of {report['runs']} steps; the first {min(len(found), _OPERATORS_SHOWN)} of {len(found)} operators\n"
    )
    rows = [
        (one["name"], f"{1000 * one['seconds']:.3f}", _percent(one["share"]), f"{one['calls']:g}")
        for one in found[:_OPERATORS_SHOWN]
    ]
    print(format_table(("operator", "ms", "share %", "calls"), rows, markdown=markdown))


def _microseconds(seconds: dict[str, float]) -> str:
    median, low, high = (f"{1e6 * seconds[name]:.1f}" for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark profile",
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    add("--shapes", nargs="+", metavar="B,H,HEIGHTxWIDTH,D", help=f"default: {' '.join(_SHAPES)}")
    dtypes = f"of {', '.join(_DTYPES)} (default: bfloat16 on a GPU, float32 on the CPU)"
    add("--dtype", choices=_DTYPES, metavar="DTYPE", help=dtypes)
    add("--runs", type=int, help="of each pass, or steps of a model (default: 30; 5 steps)")
    add("--model", metavar="NAME", help="profile a training step of this model of timm's or ours instead")
    add("--batch", type=int, default=128, metavar="IMAGES", help="of --model's step (default 128)")
    add("--resolution", type=int, default=224, metavar="PIXELS", help="of --model's images, a side (default 224)")
    add("--output", type=user_path, metavar="FILE.json", help="default: a new file below runs/benchmark")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--show", type=user_path, metavar="FILE.json", help="print the tables of this file and measure nothing")
    return parser.parse_args(argv)


def choose_measurement(arguments: argparse.Namespace) -> Callable[[Path], dict[str, Any]]:
    """What will measure and write its report to a path.

    Raises ValueError or RuntimeError if the arguments, or this machine, do not allow it.
    """
    device = resolve_device(arguments.device)
    if arguments.runs is not None and arguments.runs < 1:
        raise ValueError(f"--runs is {arguments.runs}; give a number above 0")
    if arguments.model:
        if arguments.shapes or arguments.dtype:
            raise ValueError("--model profiles a whole model in its own dtype; leave --shapes and --dtype out")
        batch = resolve_batch([arguments.model], arguments.batch, arguments.resolution, device)
        return partial(measure_model, arguments.model, batch, arguments.runs or 5)
    shapes = [parse_shape(text) for text in dict.fromkeys(arguments.shapes or _SHAPES)]
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    return partial(measure_shapes, shapes, dtype, device, arguments.runs or 30)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.show:
            show(read_report(arguments.show, "profile"), arguments.markdown)
            return 0
        measure = choose_measurement(arguments)
        path = prepare_output(arguments.output or default_path("profile"))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        report = measure(path)
    except Exception as error:  # of a model, of the device, of the profiler
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 1
    show(report, arguments.markdown)
    print(f"written to {path}", file=sys.stderr)
    return int(report["profiled"] != "model" and all("skipped" in entry for entry in report["results"]))

"""Instruction counts of polarity attention's compiled bf16 CUDA kernels, and the bounds and times that follow.

python -m launch.benchmark sass
python -m launch.benchmark sass --gpu a100 --shape 128,2,28x28,96 --markdown
python -m launch.benchmark sass --extension build/_cuda.so --output runs/sass.json

It needs no GPU. The kernels of depthwise convolution are not counted. Warp instructions are counted for 16 tokens of
one head, over all warps that share them (kernel_costs.py), in the code for the GPU's architecture. What follows for a
shape is a model's prediction, not a measurement:

  issue    4 warp instructions a clock and multiprocessor, of any kind
  FMA      FP32, packed 16-bit and IMAD: 4 a clock on an H100 (128 lanes), 2 on an A100 (64); IMAD alone 2
  ALU      2 a clock (64 lanes): integers, logic, comparisons, selection, conversion to bf16
  MUFU     1 in 2 clocks (16 lanes): exponentials, reciprocals
  HMMA     m16n8k16 in bf16: 0.5 a clock on an A100; 1 on an H100 by wgmma (HGMMA), mma.sync reaches about 62 % of it
  shared   128 bytes a clock for shared memory and L1 together, no bank conflicts; a shuffle takes a clock
  memory   each row of q, k, v, … once, at 90 % of the data sheet's rate: about what a copy attains

Lanes are from the CUDA C++ Programming Guide ("Throughput of Native Arithmetic Instructions", 8.0 and 9.0) and the
white papers of A100 and H100, as are clocks (boost; an H200's was read while these kernels ran) and multiprocessors;
pipes from Nsight Compute's documentation; the 62 % from Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture" (2024). A kernel's time is the longest of its bounds, each divided by the share of it that kernels attain:
90 % for memory, 45 % for all else; on an H200 it was 31 to 48 % (results/kernel-log.md). A launch takes 3 µs, as do
kernels that only add up or fill tables. Loading S into each block is not counted, and there must be enough tokens to
fill the GPU.
"""

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.cli import USAGE_ERRORS, AddOption, Command, Report
from launch.benchmark.kernel_costs import TILE_TOKENS, WORK, Cost, cost
from launch.benchmark.machine_code import (
    CLASSES,
    PADDED_HEAD_DIMS,
    Kernel,
    UnmatchedLoops,
    find_extension,
    read_kernels,
)
from launch.benchmark.report import Column, describe_run, format_table, tabulate, user_path
from launch.benchmark.shapes import MIN_TRAFFIC_ELEMENTS, Shape, parse_shape

BYTES_PER_ELEMENT = 2  # bf16
LAUNCH_SECONDS = 3e-6
EFFICIENCY = {"memory": 0.9}  # the share of a bound that kernels attain
DEFAULT_EFFICIENCY = 0.45  # that of the other bounds


@dataclass(frozen=True)
class GpuSpec:
    """Rates of a GPU; those of the pipes in warp instructions per clock and multiprocessor."""

    architecture: str
    multiprocessors: int
    clocks_per_second: float
    memory_bytes_per_second: float
    fma: float
    hmma: float  # m16n8k16 by mma.sync
    hgmma: float = 0  # the same by wgmma, if the GPU has that
    issue: float = 4
    imad: float = 2
    alu: float = 2
    mufu: float = 0.5

    @property
    def copy_bytes_per_second(self) -> float:
        """What a large copy attains of the memory bandwidth."""
        return 0.9 * self.memory_bytes_per_second


GPU_SPECS = {  # SXM modules
    "h100": GpuSpec("sm_90a", 132, 1.755e9, 3.35e12, fma=4, hmma=0.62, hgmma=1),
    "h200": GpuSpec("sm_90a", 132, 1.94e9, 4.8e12, fma=4, hmma=0.62, hgmma=1),
    "a100": GpuSpec("sm_80", 108, 1.41e9, 2.039e12, fma=2, hmma=0.5),
    "a100-40gb": GpuSpec("sm_80", 108, 1.41e9, 1.555e12, fma=2, hmma=0.5),
}


@dataclass(frozen=True)
class Pass:
    """The kernels of WORK that take the time of a pass, and how many launches it has with all others."""

    kernels: tuple[str, ...]
    launches: int


PASSES = {
    "forward": Pass(("sum_keys", "attend"), launches=5),
    "backward": Pass(("differentiate_queries", "sum_queries", "differentiate_keys"), launches=7),
}


def require_counted(shape: Shape) -> Shape:
    """Return the same shape. Raises ValueError if the kernels for aligned bf16 do not take it."""
    if shape.head_dim % 16 or shape.head_dim > max(PADDED_HEAD_DIMS):
        raise ValueError(
            f"shape {shape} has head dimension {shape.head_dim}, which the kernels counted here do not take;"
            f" give a multiple of 16 up to {max(PADDED_HEAD_DIMS)}"
        )
    return shape


def _row_bytes(shape: Shape) -> int:
    """Bytes of one row of D elements for each token of each head."""
    return shape.elements * BYTES_PER_ELEMENT


def _tiles(shape: Shape) -> int:
    return shape.batch * shape.heads * -(-shape.tokens // TILE_TOKENS)


def bounds(cost: Cost, rows: int, gpu: GpuSpec, shape: Shape) -> dict[str, float]:
    """Lower bounds of a kernel's seconds, by limit. rows: of D elements that it moves for each token."""
    counts = cost.classes
    clocks = {
        "issue": cost.instructions / gpu.issue,
        "FMA": max((counts["FP32/HFMA2"] + counts["IMAD"]) / gpu.fma, counts["IMAD"] / gpu.imad),
        "ALU": counts["ALU"] / gpu.alu,
        "MUFU": counts["MUFU"] / gpu.mufu,
        "HMMA": counts["HMMA"] / gpu.hmma + (cost.warpgroup_products / gpu.hgmma if gpu.hgmma else 0),
        "shared": cost.shared_clocks,
    }
    per_clock = _tiles(shape) / (gpu.multiprocessors * gpu.clocks_per_second)
    seconds = {name: count * per_clock for name, count in clocks.items()}
    return seconds | {"memory": rows * _row_bytes(shape) / gpu.copy_bytes_per_second}


def predict(costs: dict[str, Cost], gpu: GpuSpec, shape: Shape) -> dict[str, Any]:
    """Bounds and time of each kernel, time and share of copy bandwidth of each pass. costs: by kernel, at its width."""
    kernels: dict[str, dict[str, Any]] = {}
    for name, each in costs.items():
        least = bounds(each, WORK[name].rows, gpu, shape)
        taken = {bound: seconds / EFFICIENCY.get(bound, DEFAULT_EFFICIENCY) for bound, seconds in least.items()}
        binding = max(taken, key=lambda bound: taken[bound])
        kernels[name] = {"bounds": least, "binding": binding, "seconds": taken[binding]}
    passes = {}
    for name, declared in PASSES.items():
        in_kernels = sum(kernels[kernel]["seconds"] for kernel in declared.kernels)
        seconds = in_kernels + declared.launches * LAUNCH_SECONDS
        floor = MIN_TRAFFIC_ELEMENTS[name] * _row_bytes(shape) / gpu.copy_bytes_per_second
        passes[name] = {"seconds": seconds, "floor_seconds": floor, "share_of_copy_rate": floor / seconds}
    return {"kernels": kernels, "passes": passes}


def describe(kernel: Kernel, cost: Cost) -> dict[str, Any]:
    """Entry of the report for a kernel."""
    return {
        "kernel": kernel.name,
        "architecture": kernel.architecture,
        "padded_width": kernel.width,
        "warps_sharing_16_tokens": cost.warps,
        "instructions": cost.classes,
        "all_instructions": cost.instructions,
        "shared_memory_clocks": cost.shared_clocks,
        "loop_trips": {f"{address:#x}": float(trips) for address, trips in cost.trips.items()},
        "registers": kernel.usage["REG"],
        "threads": kernel.threads,
        "blocks_by_registers": kernel.blocks_by_registers,
        "static_shared_bytes": kernel.usage["SHARED"],
        "stack_bytes": kernel.usage["STACK"],
        "local_accesses": kernel.count("LDL") + kernel.count("STL"),
    }


def measure(extension: Path, gpu_name: str, shape: Shape, _path: Path | None) -> Report:
    """Count everything. Raises RuntimeError if the extension lacks a kernel, or code for the GPU."""
    gpu = GPU_SPECS[gpu_name]
    architectures = set()

    def is_wanted(kernel: Kernel) -> bool:
        architectures.add(kernel.architecture)
        return kernel.architecture == gpu.architecture and kernel.name in WORK and kernel.operand == "bf16"

    found = read_kernels(extension, is_wanted)
    if gpu.architecture not in architectures:
        raise RuntimeError(
            f"{extension} has code for {', '.join(sorted(architectures))}, {gpu_name} runs {gpu.architecture};"
            " build it with that in TORCH_CUDA_ARCH_LIST, or name another --gpu"
        )
    kernels = {(kernel.name, kernel.width): kernel for kernel in found}
    order = [(name, width) for name in WORK for width in PADDED_HEAD_DIMS]
    if lacking := [f"{name}<{width}>" for name, width in order if (name, width) not in kernels]:
        raise RuntimeError(f"{extension} lacks {', '.join(lacking)} for bf16; build it from these sources")
    costs = {key: cost(kernels[key]) for key in order}
    run = describe_run("sass", torch.device("cpu"))
    return {
        **{key: run[key] for key in ("benchmark", "date", "commit", "versions")},
        "extension": str(extension),
        "card": {"name": gpu_name, **asdict(gpu)},
        "shape": str(shape),
        "assumptions": {
            "attained": {**EFFICIENCY, "otherwise": DEFAULT_EFFICIENCY},
            "launch_seconds": LAUNCH_SECONDS,
            "copy_bytes_per_second": gpu.copy_bytes_per_second,
        },
        "kernels": [describe(kernels[key], costs[key]) for key in order],
        "prediction": predict({name: costs[name, -(-shape.head_dim // 32) * 32] for name in WORK}, gpu, shape),
    }


def show(report: Report, markdown: bool) -> None:
    """Print a report."""
    title = "### {}\n" if markdown else "{}"
    print(title.format("Polarity attention's CUDA kernels for bf16; those of depthwise convolution are not counted"))
    for name in WORK:
        entries = [entry for entry in report["kernels"] if entry["kernel"] == name]
        architecture = entries[0]["architecture"]
        print(title.format(f"{name}, {architecture}: warp instructions for {TILE_TOKENS} tokens of one head"))
        print(_count_table(entries, markdown), end="\n\n")
    gpu, prediction = report["card"]["name"], report["prediction"]
    print(title.format(f"Lower bounds for {report['shape']} in bf16 on one {gpu.upper()}, µs: predicted, not measured"))
    kernels = [{"": name} | entry for name, entry in prediction["kernels"].items()]
    columns: dict[str, Column] = {
        "": lambda entry: entry[""],
        **{bound: partial(_bound_cell, bound) for bound in kernels[0]["bounds"]},
        "binds": lambda entry: entry["binding"],
        "predicted": lambda entry: f"{1e6 * entry['seconds']:.1f}",
    }
    print(tabulate(kernels, columns, markdown=markdown), end="\n\n")
    if not markdown:
        shares = f"{EFFICIENCY['memory']:.0%} of memory, {DEFAULT_EFFICIENCY:.0%} of all else"
        print(f"What binds is the longest, once divided by the share that kernels attain: {shares}.\n")
    print(title.format("Both passes, with launches: predicted, not measured"))
    passes = ({"": name} | entry for name, entry in prediction["passes"].items())
    print(tabulate(passes, _PASS_COLUMNS, markdown=markdown))


def _bound_cell(bound: str, entry: dict[str, Any]) -> str:
    return f"{1e6 * entry['bounds'][bound]:.1f}"


_PASS_COLUMNS: dict[str, Column] = {
    "": lambda entry: entry[""],
    "predicted µs": lambda entry: f"{1e6 * entry['seconds']:.1f}",
    "of memory µs, each tensor once": lambda entry: f"{1e6 * entry['floor_seconds']:.1f}",
    "share of copy bandwidth": lambda entry: f"{entry['share_of_copy_rate']:.0%}",
}


def _count_table(entries: list[dict[str, Any]], markdown: bool) -> str:
    rows = [[name, *(f"{entry['instructions'][name]:.0f}" for entry in entries)] for name in CLASSES]
    rows.append(["all", *(f"{entry['all_instructions']:.0f}" for entry in entries)])
    labels = {
        "warps_sharing_16_tokens": "warps that share them",
        "registers": "registers",
        "threads": "threads of a block",
        "blocks_by_registers": "blocks by registers",
        "static_shared_bytes": "static shared memory, bytes",
        "stack_bytes": "stack, bytes",
        "local_accesses": "spills (LDL, STL)",
    }
    rows += [[label, *(str(entry[key]) for entry in entries)] for key, label in labels.items()]
    return format_table(["", *(f"W = {entry['padded_width']}" for entry in entries)], rows, markdown=markdown)


def add_options(add: AddOption) -> None:
    """Declare the options."""
    add("--extension", type=user_path, metavar="FILE.so", help="default: polaformer/_cuda*.so, as built in place")
    add("--gpu", default="h100", help=f"of {', '.join(GPU_SPECS)} (default h100)")
    add("--shape", default="128,1,56x56,96", metavar="B,H,HEIGHTxWIDTH,D", help="default: 128,1,56x56,96")


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what counts. Raises ValueError or RuntimeError."""
    name = arguments.gpu.lower()
    if name not in GPU_SPECS:
        raise ValueError(f"GPU {name!r} is unknown; name one of {', '.join(GPU_SPECS)}")
    shape = require_counted(parse_shape(arguments.shape))
    return partial(measure, arguments.extension or find_extension(), name, shape)


COMMAND = Command(
    "sass", __doc__, add_options, resolve, show,
    failures={UnmatchedLoops: 1, **USAGE_ERRORS}, device_help="", writes_by_default=False,
)  # fmt: skip
parse, main = COMMAND.parse, COMMAND.main

"""What the compiler made of the CUDA kernels for bf16: instructions, bounds, predicted times; needs no GPU.

python -m launch.benchmark sass
python -m launch.benchmark sass --gpu a100 --shape 128,2,28x28,96 --markdown
python -m launch.benchmark sass --extension build/_cuda.so --output runs/sass.json

Counted are warp instructions for 16 tokens of one head, by all warps that share them (kernel_costs.py), of the code
for the card's architecture. What follows for a shape is a model's prediction, not a measurement:

  issue    4 warp instructions a clock and multiprocessor, of any kind
  FMA      FP32, packed 16-bit and IMAD: 4 a clock on an H100 (128 lanes), 2 on an A100 (64); IMAD alone 2
  ALU      2 a clock (64 lanes): integers, logic, comparisons, selection, conversion to bf16
  MUFU     1 in 2 clocks (16 lanes): exponentials, reciprocals
  HMMA     m16n8k16 in bf16: 0.5 a clock on an A100; 1 on an H100 by wgmma, of which mma.sync reaches about 62 %
  shared   128 bytes a clock for shared memory and L1 together, no bank conflicts; a shuffle takes a clock
  memory   each row of q, k, v, … once, at 90 % of the data sheet's rate: about what a copy attains

Lanes are from the CUDA C++ Programming Guide ("Throughput of Native Arithmetic Instructions", 8.0 and 9.0) and the
white papers of A100 and H100, as are clocks (boost) and multiprocessors; pipes from Nsight Compute's documentation; the
62 % from Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture" (2024). A kernel is said to take
the longest of its bounds, each over the share of it that kernels attain: 90 % for memory, 60 % for all else, which is
an assumption until a GPU confirms it. A launch takes 3 µs; kernels that only add up, or fill tables, no more than that.
Loading S into each block is not counted, and there are to be enough tokens to fill the gpu.
"""

import argparse
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.kernel_costs import TILE_TOKENS, WORK, Cost, cost
from launch.benchmark.machine_code import (
    CLASSES,
    PADDED_HEAD_DIMS,
    Kernel,
    UnmatchedLoops,
    find_extension,
    read_kernels,
)
from launch.benchmark.report import describe_run, format_table, prepare_output, user_path, write_report

BYTES_PER_ELEMENT = 2  # bf16
LAUNCH_SECONDS = 3e-6
EFFICIENCY = {"memory": 0.9}  # of each bound; of the others …
DEFAULT_EFFICIENCY = 0.6


@dataclass(frozen=True)
class GpuSpec:
    """What a GPU does in a second, or a multiprocessor of it in a clock, in warp instructions."""

    architecture: str
    multiprocessors: int
    clocks_per_second: float
    memory_bytes_per_second: float
    fma: float
    hmma: float
    issue: float = 4
    imad: float = 2
    alu: float = 2
    mufu: float = 0.5

    @property
    def copy_bytes_per_second(self) -> float:
        return 0.9 * self.memory_bytes_per_second


GPU_SPECS = {  # SXM modules
    "h100": GpuSpec("sm_90", 132, 1.755e9, 3.35e12, fma=4, hmma=0.62),
    "h200": GpuSpec("sm_90", 132, 1.755e9, 4.8e12, fma=4, hmma=0.62),
    "a100": GpuSpec("sm_80", 108, 1.41e9, 2.039e12, fma=2, hmma=0.5),
    "a100-40gb": GpuSpec("sm_80", 108, 1.41e9, 1.555e12, fma=2, hmma=0.5),
}


@dataclass(frozen=True)
class Pass:
    """The kernels of WORK that take the time of a pass, and how many are launched with the others.

    min_traffic_rows: of D elements that no implementation can leave unmoved, for each token.
    """

    kernels: tuple[str, ...]
    launches: int
    min_traffic_rows: int


PASSES = {
    "forward": Pass(("sum_keys", "attend"), launches=5, min_traffic_rows=4),
    "backward": Pass(("differentiate_queries", "sum_queries", "differentiate_keys"), launches=7, min_traffic_rows=7),
}


@dataclass(frozen=True)
class Shape:
    """Heads of all images, tokens of each, head dimension; as --shape B,H,HEIGHTxWIDTH,D writes it."""

    heads: int
    tokens: int
    head_dim: int

    @property
    def padded_width(self) -> int:
        return -(-self.head_dim // 32) * 32

    @property
    def row_bytes(self) -> int:
        """Of one row of D elements for each token."""
        return self.heads * self.tokens * self.head_dim * BYTES_PER_ELEMENT

    @property
    def tiles(self) -> int:
        return self.heads * -(-self.tokens // TILE_TOKENS)


def parse_shape(text: str) -> Shape:
    """Raises ValueError if `text` writes no shape that the kernels for aligned bf16 take."""
    if not re.fullmatch(r"[1-9]\d*,[1-9]\d*,[1-9]\d*x[1-9]\d*,[1-9]\d*", text):
        raise ValueError(f"shape {text!r} is not B,H,HEIGHTxWIDTH,D; write for example 128,1,56x56,96")
    batch, heads, height, width, head_dim = map(int, re.split("[,x]", text))
    if head_dim % 16 or head_dim > max(PADDED_HEAD_DIMS):
        raise ValueError(
            f"shape {text} has head dimension {head_dim}, which the kernels counted here do not take;"
            f" give a multiple of 16 up to {max(PADDED_HEAD_DIMS)}"
        )
    return Shape(batch * heads, height * width, head_dim)


def bounds(cost: Cost, rows: int, gpu: GpuSpec, shape: Shape) -> dict[str, float]:
    """The least seconds of a kernel by each limit."""
    counts = cost.classes
    clocks = {
        "issue": cost.instructions / gpu.issue,
        "FMA": max((counts["FP32/HFMA2"] + counts["IMAD"]) / gpu.fma, counts["IMAD"] / gpu.imad),
        "ALU": counts["ALU"] / gpu.alu,
        "MUFU": counts["MUFU"] / gpu.mufu,
        "HMMA": counts["HMMA"] / gpu.hmma,
        "shared": cost.shared_clocks,
    }
    per_clock = shape.tiles / (gpu.multiprocessors * gpu.clocks_per_second)
    seconds = {name: count * per_clock for name, count in clocks.items()}
    return seconds | {"memory": rows * shape.row_bytes / gpu.copy_bytes_per_second}


def predict(costs: dict[str, Cost], gpu: GpuSpec, shape: Shape) -> dict[str, Any]:
    """Bounds and time of each kernel, time and share of copy bandwidth of each pass. costs: by kernel, at its width."""
    kernels = {}
    for name, each in costs.items():
        least = bounds(each, WORK[name].rows, gpu, shape)
        taken = {bound: seconds / EFFICIENCY.get(bound, DEFAULT_EFFICIENCY) for bound, seconds in least.items()}
        binding = max(taken, key=taken.get)
        kernels[name] = {"bounds": least, "binding": binding, "seconds": taken[binding]}
    passes = {}
    for name, each in PASSES.items():
        seconds = sum(kernels[kernel]["seconds"] for kernel in each.kernels) + each.launches * LAUNCH_SECONDS
        floor = each.min_traffic_rows * shape.row_bytes / gpu.copy_bytes_per_second
        passes[name] = {"seconds": seconds, "floor_seconds": floor, "share_of_copy_rate": floor / seconds}
    return {"kernels": kernels, "passes": passes}


def describe(kernel: Kernel, cost: Cost) -> dict[str, Any]:
    """Of one kernel, what its table says."""
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


def measure(extension: Path, gpu_name: str, shape_text: str) -> dict[str, Any]:
    """The whole report. Raises ValueError or RuntimeError if something asked for is not there."""
    gpu_name = gpu_name.lower()
    if gpu_name not in GPU_SPECS:
        raise ValueError(f"card {gpu_name!r} is unknown; name one of {', '.join(GPU_SPECS)}")
    gpu, shape = GPU_SPECS[gpu_name], parse_shape(shape_text)
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
        "shape": shape_text,
        "assumptions": {
            "attained": {**EFFICIENCY, "otherwise": DEFAULT_EFFICIENCY},
            "launch_seconds": LAUNCH_SECONDS,
            "copy_bytes_per_second": gpu.copy_bytes_per_second,
        },
        "kernels": [describe(kernels[key], costs[key]) for key in order],
        "prediction": predict({name: costs[name, shape.padded_width] for name in WORK}, gpu, shape),
    }


def show(report: dict[str, Any], markdown: bool) -> None:
    """Prints the report's tables."""
    title = "### {}\n" if markdown else "{}"
    for name in WORK:
        entries = [entry for entry in report["kernels"] if entry["kernel"] == name]
        print(
            title.format(
                f"{name}, {entries[0]['architecture']}: warp instructions for {TILE_TOKENS} tokens of one head"
            )
        )
        print(_count_table(entries, markdown), end="\n\n")
    gpu, prediction = report["card"]["name"], report["prediction"]
    print(title.format(f"Lower bounds for {report['shape']} in bf16 on one {gpu.upper()}, µs: predicted, not measured"))
    print(_bound_table(prediction["kernels"], markdown), end="\n\n")
    print(title.format("Both passes: predicted, not measured"))
    print(_pass_table(prediction["passes"], markdown))


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


def _bound_table(kernels: dict[str, dict[str, Any]], markdown: bool) -> str:
    names = list(next(iter(kernels.values()))["bounds"])
    rows = [
        [
            name,
            *(f"{1e6 * entry['bounds'][bound]:.1f}" for bound in names),
            entry["binding"],
            f"{1e6 * entry['seconds']:.1f}",
        ]
        for name, entry in kernels.items()
    ]
    return format_table(["", *names, "binds", "predicted"], rows, markdown=markdown)


def _pass_table(passes: dict[str, dict[str, float]], markdown: bool) -> str:
    rows = [
        [
            name,
            f"{1e6 * each['seconds']:.1f}",
            f"{1e6 * each['floor_seconds']:.1f}",
            f"{each['share_of_copy_rate']:.0%}",
        ]
        for name, each in passes.items()
    ]
    return format_table(["", "predicted µs", "of memory µs", "share of copy bandwidth"], rows, markdown=markdown)


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.benchmark sass",
        description=summary,
        epilog=f"examples:\n{rest}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--extension", type=user_path, metavar="FILE.so", help="default: polaformer/_cuda*.so, as built in place")
    add("--gpu", default="h100", help=f"of {', '.join(GPU_SPECS)} (default h100)")
    add("--shape", default="128,1,56x56,96", metavar="B,H,HEIGHTxWIDTH,D", help="default: 128,1,56x56,96")
    add("--markdown", action="store_true", help="print the tables as Markdown")
    add("--output", type=user_path, metavar="FILE.json", help="write all numbers there, too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.output:
            prepare_output(arguments.output)
        report = measure(arguments.extension or find_extension(), arguments.gpu, arguments.shape)
        if arguments.output:
            write_report(arguments.output, report)
    except UnmatchedLoops as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(report, arguments.markdown)
    return 0

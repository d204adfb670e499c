"""Launch planning of the depthwise convolution on the host: resident blocks, partial sums, unsupported shapes."""

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.benchmark.depthwise_runner import model_convolutions

KERNELS = Path(__file__).parents[3] / "polaformer/csrc/cuda"
BFLOAT16, HALF, FLOAT = range(3)  # of launch_params.h's Dtype
H100 = (132, 9, 227 << 10, 228 << 10)  # SMs, compute capability, shared memory per block and per SM
A100 = (108, 8, 163 << 10, 164 << 10)
RTX_4090 = (128, 8, 99 << 10, 100 << 10)
RTX_2080 = (46, 7, 64 << 10, 64 << 10)
THREADS_PER_SM = 512  # that registers allow


class Pass(NamedTuple):
    """Plan of one pass."""

    threads: int
    blocks: int
    steps: int
    splits: int
    shared_bytes: int


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Function (shapes (B, height, width, C, K, dtype), GPU) → for each (forward, backward, reason or "")."""
    program, source = tmp_path_factory.mktemp("plan") / "plan", Path(__file__).with_name("print_depthwise_plan.cpp")
    subprocess.run(["g++", "-std=c++20", f"-I{KERNELS}", source, "-o", program], check=True)

    def run(shapes, gpu=H100):
        lines = "\n".join(" ".join(map(str, (*shape, *gpu))) for shape in shapes)
        printed = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
        for line in printed:
            *numbers, reason = line.split(" ", 10)
            yield Pass(*map(int, numbers[:5])), Pass(*map(int, numbers[5:])), reason

    return run


def shapes_of(model: str, batch: int, dtype: int, resolution: int = 224):
    for each in model_convolutions(model, resolution, batch):
        yield each.batch, each.side, each.side, each.channels, each.kernel_size, dtype


@pytest.mark.parametrize("gpu", [H100, A100, RTX_4090])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT])
def test_blocks_fill_the_gpu_in_one_wave(plan, gpu, dtype):
    """With 128 images, every shape of b4 and b5 has blocks for at least 80 % of the slots, and for no more."""
    sm_count, _, per_block, per_sm = gpu
    shapes = [*shapes_of("polaformerpp_b4", 128, dtype), *shapes_of("polaformerpp_b5", 128, dtype)]
    for shape, (forward, backward, reason) in zip(shapes, plan(shapes, gpu), strict=True):
        assert not reason
        for name, each in (("forward", forward), ("backward", backward)):
            assert each.shared_bytes <= per_block, (shape, name)
            by_memory, by_threads = per_sm // (each.shared_bytes + 1024), THREADS_PER_SM // each.threads
            slots = sm_count * min(by_memory, by_threads)
            assert 0.8 * slots < each.blocks <= slots, (shape, name, each, slots)


@pytest.mark.parametrize("batch", [1, 8, 128])
def test_partial_sums_are_small(plan, batch):
    """At most 1 % of the input, or 4 MiB."""
    shapes = [*shapes_of("polaformerpp_b0", batch, BFLOAT16, 32), *shapes_of("polaformerpp_b5", batch, BFLOAT16)]
    for (_, height, width, channels, size, _), (_, backward, _) in zip(shapes, plan(shapes), strict=True):
        partial_sums = backward.splits * (size**2 + 1) * channels * 4
        assert partial_sums <= max(2 * batch * height * width * channels / 100, 4 << 20)


@pytest.mark.parametrize(
    ("gpu", "shape", "reason"),
    [
        (H100, (128, 112, 112, 8, 5, BFLOAT16), ""),
        (H100, (1, 7, 113, 8, 3, BFLOAT16), "the kernels serve up to 112 columns"),
        (H100, (1, 7, 7, 12, 3, BFLOAT16), "the channels of a position are no multiple of 16 bytes"),
        (H100, (1, 7, 7, 12, 3, FLOAT), ""),
        (H100, (1, 7, 7, 8, 7, HALF), "the kernels serve 3×3 and 5×5"),
        (H100, (1 << 30, 2, 1, 8, 3, HALF), "the kernels serve up to 2^30 rows"),
        (H100, (1, 7, 112, 8, 5, FLOAT), ""),
        (RTX_4090, (1, 56, 56, 96, 5, FLOAT), ""),
        (
            RTX_4090,
            (1, 7, 112, 8, 5, FLOAT),
            "rows this wide need more shared memory than a block of this GPU may take",
        ),
        (RTX_2080, (1, 7, 7, 8, 3, HALF), "the kernels need a GPU of compute capability 8.0 or higher"),
    ],
)
def test_unsupported_shapes_and_gpus(plan, gpu, shape, reason):
    [(*_, found)] = plan([shape], gpu)
    assert found == reason

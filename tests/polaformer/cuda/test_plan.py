"""Launch planning on the host: splits, workspaces, and shapes left to the reference."""

import itertools
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[3] / "polaformer/csrc/cuda"
BFLOAT16, HALF, FLOAT = range(3)  # of launch_params.h's Dtype
H100 = (132, 9, 227 << 10, 1)  # SMs, compute capability, maximum shared memory per block, whether warpgroups multiply
WITHOUT_WARPGROUPS = (*H100[:3], 0)
RTX_4090 = (128, 8, 99 << 10, 0)
RTX_2080 = (46, 7, 64 << 10, 0)


@dataclass(frozen=True)
class Planned:
    """workspaces: bytes of forward, backward; splits: (splits per head, tokens per split) of the four kernels."""

    workspaces: tuple[int, int]
    splits: list[tuple[int, int]]
    unsupported_reason: str


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Function (shapes (B, H, height, width, D, dtype), GPU) → a `Planned` for each."""
    program = tmp_path_factory.mktemp("plan") / "plan"
    subprocess.run(
        ["g++", "-std=c++20", f"-I{KERNELS}", Path(__file__).with_name("print_plan.cpp"), "-o", program], check=True
    )

    def run(shapes, gpu=H100):
        lines = "\n".join(" ".join(map(str, (*shape, *gpu))) for shape in shapes)
        printed = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.splitlines()
        for line in printed:
            *numbers, reason = line.split(" ", 10)
            forward, backward, *splits = map(int, numbers)
            yield Planned((forward, backward), list(zip(splits[::2], splits[1::2], strict=True)), reason)

    return run


def test_workspaces_are_no_larger_than_the_inputs(plan):
    """Partial sums of splits dominate: on 132 SMs two images would otherwise have 98 splits each."""
    sizes = [(14, 14), (28, 28), (56, 56), (113, 57), (256, 256), (1, 4000)]
    shapes = list(itertools.product((1, 2, 16, 128), (1, 2), sizes, (32, 64, 96, 128), (BFLOAT16, FLOAT)))
    shapes = [(batch, heads, *size, head_dim, dtype) for batch, heads, size, head_dim, dtype in shapes]
    for shape, planned in zip(shapes, plan(shapes), strict=True):
        batch, heads, height, width, head_dim, dtype = shape
        tokens = batch * heads * height * width
        inputs = 2 * tokens * head_dim * (4 if dtype == FLOAT else 2)  # k and v, or q and the gradient of out
        sums = inputs * (1 + 4 / head_dim)  # of splits: (2D, D), and a few more for each of 2D
        tables = (height + width) * head_dim * 6 + height * width * 8
        forward, backward = planned.workspaces
        assert forward <= sums + tables + 4096, shape
        gradients = batch * heads * 2 * head_dim * (head_dim + 5) * 4  # of S and m of every head
        assert backward <= sums + gradients + 16 * tokens + tables + 4096, shape


def test_splits_cover_every_token(plan):
    shapes = [(batch, 3, height, 7, 96, BFLOAT16) for batch in (1, 5, 64) for height in (1, 5, 64, 600)]
    for (batch, _, height, *_), planned in zip(shapes, plan(shapes), strict=True):
        for count, tokens in planned.splits:
            assert (count - 1) * tokens < height * 7 <= count * tokens, (batch, height)


def test_splits_fill_the_gpu(plan):
    """b5's first stage with 128 images: a little less than two blocks for each of 132 SMs, or than three."""
    [planned] = plan([(128, 1, 56, 56, 96, BFLOAT16)])
    [without] = plan([(128, 1, 56, 56, 96, BFLOAT16)], WITHOUT_WARPGROUPS)
    assert 240 < 128 * without.splits[1][0] <= 264
    assert [*without.splits[:1], *without.splits[2:]] == [*planned.splits[:1], *planned.splits[2:]]
    keys, queries, query_grads, key_grads = (128 * count for count, _ in planned.splits)
    assert 240 < keys <= 264
    assert 240 < query_grads <= 264
    assert 360 < queries <= 396
    assert 360 < key_grads <= 396


@pytest.mark.parametrize(
    ("gpu", "head_dim", "reason"),
    [
        (H100, 96, ""),
        (H100, 128, ""),
        (RTX_4090, 96, ""),
        (RTX_4090, 98, "D above 96 needs more shared memory than a block of this GPU may take"),
        (RTX_2080, 32, "the kernels need a GPU of compute capability 8.0 or higher"),
        (H100, 130, "the kernels serve D up to 128"),
    ],
)
def test_unsupported_shapes_and_gpus(plan, gpu, head_dim, reason):
    for dtype in (BFLOAT16, HALF, FLOAT):
        [planned] = plan([(1, 1, 4, 4, head_dim, dtype)], gpu)
        assert planned.unsupported_reason == reason

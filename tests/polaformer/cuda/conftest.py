"""Emulator of the CUDA kernels for tests without a GPU: builds it, feeds it, reads its results."""

import subprocess
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from polaformer import rotary

ROOT = Path(__file__).parents[3]
KERNELS = ROOT / "polaformer/csrc/cuda"
HERE = Path(__file__).parent
DTYPES = [torch.bfloat16, torch.float16, torch.float32]  # in the order of launch_params.h's Dtype
PATHS = ["bfloat16", "float32", "generic float32", "generic 16-bit"]  # of launch_params.h's Path


@dataclass(frozen=True)
class Emulated:
    """Results of the kernels: output, saved tensors, gradients of q, k, v and the logits; path and splits."""

    out: torch.Tensor
    state: torch.Tensor
    key_mean: torch.Tensor
    key_shift: torch.Tensor
    grads: tuple[torch.Tensor, ...]
    path: str
    splits_per_head: tuple[int, int, int, int]  # of keys, queries, query gradients, key gradients
    warpgroup_products: int = 0  # wgmma instructions of all threads, if there are gradients


@dataclass
class EmulatorInput:
    """Input file of the emulator: numbers and arrays in the order in which emulate.cpp reads them."""

    parts: list[bytes] = field(default_factory=list)

    def add_numbers(self, *numbers: int) -> None:
        self.parts.append(np.array(numbers, dtype=np.int64).tobytes())

    def add_array(self, x: torch.Tensor) -> None:
        content = x.detach().contiguous().view(torch.uint8).numpy().tobytes()
        self.add_numbers(len(content))
        self.parts.append(content)

    def add_strided(self, x: torch.Tensor) -> None:
        """Add the whole storage of x, so that the emulator reads x in place."""
        x = x.detach()
        self.add_numbers(x.storage_offset(), *x.stride()[:3])
        self.add_array(torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()))


def build(folder: Path, main: str, *options: str) -> Path:
    """Compile a program of this folder and its kernels with emulator.h in place of ptx.cuh."""
    program = folder / main
    warnings = "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers"
    command = ["g++", "-std=c++20", *warnings, *options, f"-I{KERNELS}", "-include", HERE / "emulator.h", "-x", "c++"]
    is_depthwise = main == "emulate_depthwise"
    kernels = [source for source in sorted(KERNELS.glob("*.cu")) if (source.stem == "depthwise") == is_depthwise]
    sources = [*kernels, HERE / f"{main}.cpp"]
    jobs = [subprocess.Popen([*command, "-c", source, "-o", folder / f"{source.stem}.o"]) for source in sources]
    failures = [job.wait() for job in jobs]
    assert not any(failures), "the kernels do not compile as plain C++"
    subprocess.run(["g++", *options, *folder.glob("*.o"), "-o", program], check=True)
    return program


class EmulatorAnswer:
    """Output file of the emulator, read from its start on."""

    def __init__(self, program: Path, folder: Path, request: EmulatorInput) -> None:
        """Run the program."""
        (folder / "request").write_bytes(b"".join(request.parts))
        done = subprocess.run([program, folder / "request", folder / "answer"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.rest = memoryview(bytearray((folder / "answer").read_bytes()))

    def take(self, shape, dtype) -> torch.Tensor:
        """The next tensor of the file."""
        count = int(np.prod(shape))
        content, self.rest = self.rest[: count * dtype.itemsize], self.rest[count * dtype.itemsize :]
        return torch.frombuffer(content, dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def run(program: Path, folder: Path, inputs, size, grad_out=None, seed=0, sm_count=4, has_warpgroups=False) -> Emulated:
    """Run the kernels on q, k, v, same_logits, opposite_logits, and on grad_out if given."""
    q, k, v, *logits = inputs
    batch, heads, tokens, head_dim = q.shape
    request = EmulatorInput()
    request.add_numbers(seed, sm_count, has_warpgroups, grad_out is not None)
    request.add_numbers(batch, heads, *size, head_dim, DTYPES.index(q.dtype))
    for x in (q, k, v):
        request.add_strided(x)
    for x in logits:
        request.add_array(x.float())
    request.add_array(rotary.rotary_frequencies(2 * head_dim))
    if grad_out is not None:
        request.add_strided(grad_out)
    take = EmulatorAnswer(program, folder, request).take

    def take_tokens():
        return take((batch, tokens, heads, head_dim), q.dtype).transpose(1, 2)

    path, *splits = take((5,), torch.int32).tolist()
    out, state = take_tokens(), take((batch, heads, 2 * head_dim, head_dim), torch.float32)
    mean, shift = take((batch, heads, 2 * head_dim), torch.float32), take((batch, heads, head_dim), torch.float32)
    grads, warpgroup_products = (), 0
    if grad_out is not None:
        warpgroup_products = int(take((1,), torch.int64))
        grads = *(take_tokens() for _ in range(3)), *(take((heads, 2 * head_dim), torch.float32) for _ in range(2))
    return Emulated(out, state, mean, shift, grads, PATHS[path], tuple(splits), warpgroup_products)


@dataclass(frozen=True)
class EmulatedConvolution:
    """Results of the depthwise convolution's kernels: by name; images beside each other, and splits, of both passes."""

    results: dict[str, torch.Tensor]
    images_per_block: list[int]
    splits: list[int]


def run_depthwise(
    program: Path, folder: Path, x, weight, bias, residual=None, grad_out=None, seed=0, sm_count=4
) -> EmulatedConvolution:
    """Run the kernels on (B, height, width, C), and on grad_out if given. The residual may be x."""
    adds_input = residual is x
    request = EmulatorInput()
    request.add_numbers(seed, sm_count, residual is not None and not adds_input, grad_out is not None, adds_input)
    request.add_numbers(*x.shape, weight.shape[2], DTYPES.index(x.dtype))
    request.add_strided(x)
    request.add_array(weight)
    request.add_array(bias)
    if residual is not None and not adds_input:
        request.add_strided(residual)
    if grad_out is not None:
        request.add_strided(grad_out)
    take = EmulatorAnswer(program, folder, request).take
    plans = [take((2,), torch.int32).tolist()]
    results = {"out": take(x.shape, x.dtype)}
    if grad_out is not None:
        plans.append(take((2,), torch.int32).tolist())
        results["x"] = take(x.shape, x.dtype)
        results["weight"], results["bias"] = take(weight.shape, torch.float32), take(bias.shape, torch.float32)
    images, splits = (list(numbers) for numbers in zip(*plans, strict=True))
    return EmulatedConvolution(results, images, splits)


FAST = ("-O1",)
# GCC wrongly warns of uninitialized variables in what the sanitizers add.
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-maybe-uninitialized")


def make_emulator(tmp_path_factory, function, main: str, options):
    folder = tmp_path_factory.mktemp(main)
    return partial(function, build(folder, main, *options), folder)


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    """Function (inputs, (height, width), grad_out) → `Emulated`."""
    return make_emulator(tmp_path_factory, run, "emulate", FAST)


@pytest.fixture(scope="session")
def emulate_sanitized(tmp_path_factory):
    """The same with address and undefined-behaviour sanitizers."""
    return make_emulator(tmp_path_factory, run, "emulate", SANITIZED)


@pytest.fixture(scope="session")
def emulate_depthwise(tmp_path_factory):
    """Function (x, weight, bias, residual, grad_out) → `EmulatedConvolution`."""
    return make_emulator(tmp_path_factory, run_depthwise, "emulate_depthwise", FAST)


@pytest.fixture(scope="session")
def emulate_depthwise_sanitized(tmp_path_factory):
    """The same with address and undefined-behaviour sanitizers."""
    return make_emulator(tmp_path_factory, run_depthwise, "emulate_depthwise", SANITIZED)

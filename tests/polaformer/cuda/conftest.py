"""Emulator of the CUDA kernels for tests without a GPU: builds it, feeds it, reads its results."""

import subprocess
from dataclasses import dataclass, field
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


def build(folder: Path, *options: str) -> Path:
    """Compile the kernels with emulator.h in place of ptx.cuh."""
    program = folder / "emulate"
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [
        "-Wno-missing-field-initializers",
        *options,
        f"-I{KERNELS}",
        "-include",
        HERE / "emulator.h",
        "-x",
        "c++",
    ]
    sources = [*sorted(KERNELS.glob("*.cu")), HERE / "emulate.cpp"]
    jobs = [subprocess.Popen([*command, "-c", source, "-o", folder / f"{source.stem}.o"]) for source in sources]
    failures = [job.wait() for job in jobs]
    assert not any(failures), "the kernels do not compile as plain C++"
    subprocess.run(["g++", *options, *folder.glob("*.o"), "-o", program], check=True)
    return program


def run(program: Path, folder: Path, inputs, size, grad_out=None, seed=0, sm_count=4) -> Emulated:
    """Run the kernels on q, k, v, same_logits, opposite_logits, and on grad_out if given."""
    q, k, v, *logits = inputs
    batch, heads, tokens, head_dim = q.shape
    request = EmulatorInput()
    request.add_numbers(seed, sm_count, grad_out is not None)
    request.add_numbers(batch, heads, *size, head_dim, DTYPES.index(q.dtype))
    for x in (q, k, v):
        request.add_strided(x)
    for x in logits:
        request.add_array(x.float())
    request.add_array(rotary.rotary_frequencies(2 * head_dim))
    if grad_out is not None:
        request.add_strided(grad_out)
    (folder / "request").write_bytes(b"".join(request.parts))
    done = subprocess.run([program, folder / "request", folder / "answer"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = memoryview(bytearray((folder / "answer").read_bytes()))

    def take(shape, dtype):
        nonlocal answer
        count = int(np.prod(shape))
        content, answer = answer[: count * dtype.itemsize], answer[count * dtype.itemsize :]
        return torch.frombuffer(content, dtype=dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)

    def take_tokens():
        return take((batch, tokens, heads, head_dim), q.dtype).transpose(1, 2)

    path, *splits = take((5,), torch.int32).tolist()
    out, state = take_tokens(), take((batch, heads, 2 * head_dim, head_dim), torch.float32)
    mean, shift = take((batch, heads, 2 * head_dim), torch.float32), take((batch, heads, head_dim), torch.float32)
    grads = ()
    if grad_out is not None:
        grads = *(take_tokens() for _ in range(3)), *(take((heads, 2 * head_dim), torch.float32) for _ in range(2))
    return Emulated(out, state, mean, shift, grads, PATHS[path], tuple(splits))


def make_emulator(tmp_path_factory, *options: str):
    folder = tmp_path_factory.mktemp("emulator")
    program = build(folder, *options)
    return lambda *arguments, **settings: run(program, folder, *arguments, **settings)


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    """Function (inputs, (height, width), grad_out) → `Emulated`."""
    return make_emulator(tmp_path_factory, "-O1")


@pytest.fixture(scope="session")
def emulate_sanitized(tmp_path_factory):
    """The same with address and undefined-behaviour sanitizers."""
    checks = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    return make_emulator(tmp_path_factory, "-O0", *checks, "-Wno-maybe-uninitialized")  # false positive in the checks

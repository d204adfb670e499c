"""ptx.cuh and wgmma.cuh against their emulation, function by function: what the emulated tests replace."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "polaformer/csrc/cuda"
# Relative and absolute tolerance where rounding differs, such as in the order of sums; all else is bit-identical.
NEAR = {
    "mma_m16n8k16_bf16": 1e-5,
    "mma_m16n8k8_tf32": 1e-5,
    "wgmma_k_major": 1e-5,
    "wgmma_n_major": 1e-5,
    "ex2_approx": 1e-6,
    "lg2_approx": 1e-6,
    "reciprocal": 1e-6,
}


def emulate(folder: Path) -> dict[str, np.ndarray]:
    program = folder / "emulated"
    options = ("-std=c++20", "-O1", f"-I{KERNELS}", "-include", HERE / "emulator.h", "-x", "c++")
    subprocess.run(["g++", *options, HERE / "primitives.cu", "-o", program], check=True)
    return run(program)


def run(program: Path) -> dict[str, np.ndarray]:
    """Results (lane, word) by function name."""
    finished = subprocess.run([program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    received: dict[str, list[list[int]]] = {}
    for line in finished.stdout.splitlines():
        name, lane, *words = line.split()
        assert int(lane) == len(received.setdefault(name, []))
        received[name].append([int(word, 16) for word in words])
    return {name: np.array(lanes, np.uint32) for name, lanes in received.items()}


def bf16(words: np.ndarray) -> np.ndarray:
    """Values of the lower halves of words."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def build_for_gpu(folder: Path, architecture: str) -> Path:
    """Build the program for a GPU; skip where there is no CUDA toolkit."""
    home = cpp_extension.CUDA_HOME or os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc") if home else None
    if nvcc is None:
        pytest.skip("no CUDA toolkit")
    program = folder / "on_gpu"
    options = (f"-arch={architecture}", "-std=c++17", "--expt-relaxed-constexpr", f"-I{KERNELS}")
    subprocess.run([nvcc, *options, HERE / "primitives.cu", "-o", program], check=True)
    return program


def test_emulated_primitives(tmp_path):
    received, lanes = emulate(tmp_path), np.arange(32)
    assert set(NEAR) < set(received)
    zeros = np.array([0, 0x8000])
    given = np.array([0, 0x8000, 0x7C00, 0x7E01, 1, 0x3F80, 0xFC00, 0x8001])[lanes % 8]
    assert ((received["nonzero_bf16x2"][:, 0] & 0xFFFF) == np.where(np.isin(given, zeros), 0, 0xFFFF)).all()
    assert (received["ex2_approx"][:, 1:3] == 0x3F800000).all()
    assert set(np.unique(received["low_signs"][:, 0] & 0xFFFF)) == {0, 0xFFFF}
    assert set(np.unique(received["high_signs"][:, 0] >> 16)) == {0, 0xFFFF}


@pytest.mark.parametrize("major", ["k", "n"])
def test_emulated_warpgroup(tmp_path, major):
    """Twice the product of A, 64 × 16, and B, 16 × 48, whose fragments and core matrices are put together here."""
    received = emulate(tmp_path)
    given = received["given"][:, :3].ravel()
    thread, register, half = np.meshgrid(np.arange(128), np.arange(4), np.arange(2), indexing="ij")
    row = 16 * (thread // 32) + thread % 32 // 4 + register % 2 * 8
    a = np.zeros((64, 16))
    a[row, thread % 4 * 2 + half + register // 2 * 8] = bf16(given[(4 * thread + register) % 96] >> (16 * half))
    element = np.arange(16 * 48)
    stored = bf16(given[element % 96] >> (element // 96 % 2 * 16))
    k, n = np.meshgrid(np.arange(16), np.arange(48), indexing="ij")
    if major == "k":  # six core matrices of the first eight rows, each column in 16 bytes
        b = stored[(k // 8 * 6 + n // 8) * 64 + n % 8 * 8 + k % 8]
    else:  # two core matrices of the first eight columns, each row in 16 bytes
        b = stored[(n // 8 * 2 + k // 8) * 64 + k % 8 * 8 + n % 8]
    thread, i = np.meshgrid(np.arange(128), np.arange(24), indexing="ij")
    row = thread // 32 * 16 + thread % 32 // 4 + i % 4 // 2 * 8
    expected = 2 * (a @ b)[row, i // 4 * 8 + thread % 4 * 2 + i % 2]
    found = received[f"wgmma_{major}_major"].view(np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_compiles_for_a_gpu(tmp_path, architecture):
    build_for_gpu(tmp_path, architecture)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_gpu_equals_emulator(tmp_path):
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" * ((major, minor) == (9, 0))
    on_gpu, emulated = run(build_for_gpu(tmp_path, f"sm_{major}{minor}{suffix}")), emulate(tmp_path)
    lacking = set() if suffix else {"wgmma_k_major", "wgmma_n_major"}
    assert on_gpu.keys() == emulated.keys() - lacking
    different = []
    for name, words in on_gpu.items():
        if name in NEAR:
            found, expected = words.view(np.float32), emulated[name].view(np.float32)
            if not np.allclose(found, expected, rtol=NEAR[name], atol=NEAR[name]):
                different.append(name)
        elif not (words == emulated[name]).all():
            different.append(name)
    assert not different

"""ptx.cuh against its emulation, function by function: the one file that the emulated tests replace."""

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
    received: dict[str, np.ndarray] = {}
    for line in finished.stdout.splitlines():
        name, lane, *words = line.split()
        received.setdefault(name, np.zeros((32, len(words)), np.uint32))[int(lane)] = [int(word, 16) for word in words]
    return received


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


@pytest.mark.slow
def test_compiles_for_a_gpu(tmp_path):
    build_for_gpu(tmp_path, "sm_80")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_gpu_equals_emulator(tmp_path):
    major, minor = torch.cuda.get_device_capability()
    on_gpu, emulated = run(build_for_gpu(tmp_path, f"sm_{major}{minor}")), emulate(tmp_path)
    assert on_gpu.keys() == emulated.keys()
    different = []
    for name, words in on_gpu.items():
        if name in NEAR:
            found, expected = words.view(np.float32), emulated[name].view(np.float32)
            if not np.allclose(found, expected, rtol=NEAR[name], atol=NEAR[name]):
                different.append(name)
        elif not (words == emulated[name]).all():
            different.append(name)
    assert not different

"""What setup.py installs: every module of the three packages, the type marker, one version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import polaformer

ROOT = Path(__file__).parents[2]


def start_setup(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"POLAFORMER_KERNELS": "none", **variables}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def run_setup(*command: str | Path, **variables: str) -> str:
    finished = start_setup(*command, **variables)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_version_has_one_source():
    assert run_setup("--version").splitlines()[-1] == polaformer.__version__


def test_every_module_is_installed(tmp_path):
    run_setup("build_py", "--build-lib", tmp_path)
    installed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
    sources = [path for package in ("polaformer", "dataio", "launch") for path in (ROOT / package).rglob("*.py")]
    assert installed == {str(path.relative_to(ROOT)) for path in sources}
    assert (tmp_path / "polaformer/py.typed").is_file()


needs_toolkit = pytest.mark.skipif(
    cpp_extension.CUDA_HOME is None or torch.version.cuda is None, reason="no CUDA toolkit, or a torch without CUDA"
)


@needs_toolkit
@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        ("8.0;9.0", "8.0;9.0a"),
        ("7.0 7.5 8.0 9.0 12.0+PTX", "8.0;9.0a;12.0+PTX"),  # as NVIDIA's containers have it
        ("8.6,9.0+PTX", "8.6;8.0+PTX;9.0a"),
        ("Ampere;Hopper", "Ampere;8.0+PTX;9.0a"),
        ("9.0a+PTX;10.0a", "8.0+PTX;9.0a;10.0a"),
    ],
)
def test_architectures_that_kernels_are_built_for(wanted, built):
    printed = run_setup("--version", POLAFORMER_KERNELS="all", TORCH_CUDA_ARCH_LIST=wanted)
    assert f"building CUDA kernels for {built} with" in printed
    assert ("leaving out 7.0, 7.5: the kernels need compute capability 8.0 or higher" in printed) == ("7.5" in wanted)


@needs_toolkit
@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ("8.0 sm_90", "TORCH_CUDA_ARCH_LIST names 'sm_90'; use compute capabilities, as in 8.0;9.0;12.0+PTX"),
        ("7.0;7.5", "TORCH_CUDA_ARCH_LIST names 7.0, 7.5 alone; add one from 8.0 on, or set POLAFORMER_KERNELS=cpu"),
    ],
)
def test_lists_of_architectures_that_are_refused(wanted, error):
    finished = start_setup("--version", POLAFORMER_KERNELS="all", TORCH_CUDA_ARCH_LIST=wanted)
    assert finished.returncode == 1
    assert finished.stderr.endswith(f"{error}\n")

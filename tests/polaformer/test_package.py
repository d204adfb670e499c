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


def run_setup(*command: str | Path, **variables: str) -> str:
    environment = os.environ | {"POLAFORMER_KERNELS": "none", **variables}
    finished = subprocess.run(
        [sys.executable, "setup.py", "-q", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
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


@pytest.mark.skipif(
    cpp_extension.CUDA_HOME is None or torch.version.cuda is None, reason="no CUDA toolkit, or a torch without CUDA"
)
@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        ("9.0", "9.0a"),
        ("8.0;9.0", "8.0;9.0a"),
        ("9.0 12.0+PTX", "9.0a 12.0+PTX"),
        ("8.6;9.0+PTX", "8.6;8.0+PTX;9.0a"),
        ("Ampere;Hopper", "Ampere;8.0+PTX;9.0a"),
        ("9.0a;10.0", "9.0a;10.0"),
        ("8.9", "8.9"),
    ],
)
def test_compute_capability_9_gets_its_tensor_cores_instructions(wanted, built):
    printed = run_setup("--version", POLAFORMER_KERNELS="all", TORCH_CUDA_ARCH_LIST=wanted)
    assert f"building CUDA kernels for {built} with" in printed

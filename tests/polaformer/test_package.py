"""What setup.py installs: every module of the three packages, the type marker, one version."""

import os
import subprocess
import sys
from pathlib import Path

import polaformer

ROOT = Path(__file__).parents[2]


def run_setup(*command: str | Path) -> str:
    environment = os.environ | {"POLAFORMER_KERNELS": "none"}
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

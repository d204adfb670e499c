"""The scripts that set up .venv, as far as they run without installing anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture
def project(tmp_path) -> Path:
    """A checkout without .venv, with the files that environment.sh reads."""
    for name in ("requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(ROOT / "polaformer" / "csrc", tmp_path / "polaformer" / "csrc")
    return tmp_path


def test_the_scripts_are_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PYTHON": "python2.6"}, "python2.6 is missing or older than Python 3.10; install one and name it: PYTHON="),
        ({"POLAFORMER_INSTALLER": "conda"}, "POLAFORMER_INSTALLER is 'conda'; use uv or pip, or leave it out"),
    ],
)
def test_unusable_settings_are_errors_before_anything_is_created(project, variables, message):
    command = ["bash", "-c", "source launch/environment.sh"]
    done = subprocess.run(command, cwd=project, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert not (project / ".venv").exists()

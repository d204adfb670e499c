"""The scripts that set up .venv, as far as they run without installing anything."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path) -> Path:
    """A checkout without .venv, with the files that environment.sh reads."""
    for name in ("requirements.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copytree(ROOT / "polaformer" / "csrc", tmp_path / "polaformer" / "csrc")
    return tmp_path


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


def test_no_shell_sees_the_values_of_the_quickstart(project, hostile, tmp_path):
    """The very script, called from a folder with a hostile name: the command gets folder and value as typed."""
    for name in ("dataio", "configs"):
        (project / name).symlink_to(ROOT / name)
    shutil.rmtree(project / "polaformer")
    (project / "polaformer").symlink_to(ROOT / "polaformer")
    (project / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (project / ".venv" / name).symlink_to(Path(sys.prefix, name))
    [line] = re.findall(r"^wanted=.*", (project / "launch" / "environment.sh").read_text(), re.MULTILINE)
    up_to_date = ["bash", "-c", f'{line}; echo "$wanted" >.venv/installed']
    subprocess.run(up_to_date, cwd=project, check=True)
    called_from = tmp_path / "called" / hostile
    called_from.mkdir(parents=True)
    command = ["bash", project / "launch" / "quickstart.sh", "--data", hostile, f"output={hostile}"]
    environ = os.environ | {"PYTHON": "none", "PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=called_from, env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --data {called_from / hostile} is not there; name a folder, zip or tar")
    assert not list(tmp_path.rglob("created"))

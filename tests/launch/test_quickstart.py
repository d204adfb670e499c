"""The quickstart after its set-up, on a small class folder, in a project folder of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from launch.quickstart import SUMMARY_NAME, main, name_of

ROOT = Path(__file__).parents[2]
SHORT = ["optimizer.epochs=0.2", "optimizer.warmup_epochs=0.1", "optimizer.global_batch=32", "data.image_size=32"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project as a checkout has it, where data/ and runs/ may be written."""
    root = tmp_path_factory.mktemp("project")
    for name in ("launch", "dataio", "polaformer", "configs"):
        (root / name).symlink_to(ROOT / name)
    return root


def quickstart(project: Path, *arguments: object) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = os.environ | {"PATH": path, "PYTHONPATH": str(project), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, "-m", "launch.quickstart", *map(str, arguments)]
    return subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True)


def commands(finished: subprocess.CompletedProcess) -> list[str]:
    return [line for line in finished.stdout.splitlines() if line.startswith("$ ")]


@pytest.mark.slow
def test_a_folder_of_ones_own_becomes_a_model_and_is_reused(project, fashion):
    finished = quickstart(project, "--data", fashion, *SHORT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    run = f"runs/quickstart-{name_of(fashion)}"
    weights = project / run / "export" / "model.safetensors"
    for line in ("top-1 of the weights", "top-1 of the EMA", "altogether", f"tensorboard --logdir {run}"):
        assert line in finished.stdout
    summary = json.loads((project / run / SUMMARY_NAME).read_text())
    assert re.search(rf"top-1 of the weights +│ {summary['top1']['weights']:.2f} %", finished.stdout)
    assert f"cores: {summary['cores']}" in finished.stdout
    assert "of which steps" in finished.stdout
    assert 0 < summary["speed"]["seconds"] < summary["seconds"]["training"]
    model = timm.create_model("polaformerpp_b0", num_classes=10, checkpoint_path=weights).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)

    kept = [project / run / "checkpoints" / "latest", project / run / SUMMARY_NAME]
    before = [path.stat().st_mtime_ns for path in kept]
    again = quickstart(project, "--data", fashion, *SHORT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "was there already" in again.stdout
    assert "step 1" not in again.stdout
    assert len(commands(finished)) == 2 + len(commands(again))  # two of them packed
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert "of which steps" not in again.stdout


def test_no_such_folder(tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(["--data", str(tmp_path / "nowhere")])
    said = " ".join(capsys.readouterr().err.split())
    assert f"--data {tmp_path / 'nowhere'} is no folder; name one that holds a folder of images" in said


def test_folders_of_one_name_are_kept_apart(tmp_path):
    first, second = (tmp_path / parent / "images" for parent in "ab")
    assert name_of(first) != name_of(second)
    assert name_of(first) == name_of(tmp_path / "a" / "." / "images")
    assert name_of(None) == "fashion-mnist"

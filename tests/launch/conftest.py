"""Commands as people start them, a process group inside the test, and one small run for all tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from launch.config import Config, load_config
from launch.distributed import placement, start, stop

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
_OF_LAUNCHERS = ("SLURM_", "MASTER_", "LOCAL_", "DS_", "RANK", "WORLD_SIZE")


@pytest.fixture
def no_launcher() -> Iterator[None]:
    """An environment without any launcher's variables; what the test adds to it is gone afterwards."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(_OF_LAUNCHERS):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def alone(no_launcher) -> Iterator[torch.device]:
    """A process group of this process only, over gloo; the CPU."""
    yield start(placement(os.environ), "cpu", timedelta(minutes=1))
    stop()


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """Returns a function: runs Python with these arguments in the project's root, on the CPU; its output is text."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHERS)}
    environ = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments: object) -> subprocess.CompletedProcess:
        words = [sys.executable, *map(str, arguments)]
        return subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture(scope="session")
def torchrun(command) -> Callable[..., subprocess.CompletedProcess]:
    """Returns a function: the same on a number of ranks."""
    return lambda ranks, *arguments: command(
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments
    )


@pytest.fixture
def configure(fashion_shards, tmp_path) -> Callable[..., Config]:
    """Returns a function: overrides → the quickstart's configuration, on `fashion_shards`."""
    places = [f"data.{part}={fashion_shards / part}" for part in ("train", "val")]
    return lambda *overrides: load_config(QUICKSTART, [*places, f"output={tmp_path / 'run'}", *overrides])


@pytest.fixture(scope="session")
def trained_run(fashion_shards, command, tmp_path_factory) -> Path:
    """The folder of a real run of b0: four epochs of `fashion_shards` at 32×32 pixels on one rank."""
    output = tmp_path_factory.mktemp("run") / "b0"
    finished = command(
        *("launch/train.py", "--config", QUICKSTART, f"output={output}"),
        *(f"data.train={fashion_shards / 'train'}", f"data.val={fashion_shards / 'val'}", "data.threads=1"),
        *("optimizer.epochs=4", "optimizer.global_batch=16", "optimizer.lr=1.6e-2", "optimizer.ema_decay=0.8"),
        *("log.eval_every_epochs=2", "checkpoint.every_epochs=2"),
    )
    assert finished.returncode == 0, finished.stderr
    return output

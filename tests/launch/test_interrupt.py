"""Ctrl-C on real commands, while they import and while they work: one line, status 130, no traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from launch.interrupt import exit_on_interrupt

ROOT = Path(__file__).parents[2]
TRAINING = "interrupted; the same command resumes from the last checkpoint, if there is one\n"


def start(words: Iterable[object], environ: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_for(words: str, lines: Iterable[str]) -> None:
    seen = []
    for line in lines:
        seen.append(line)
        if words in line:
            return
    pytest.fail(f"{words!r} was not printed: {''.join(seen)}")


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "launch.evaluate", "--weights", "x", "--data", "y"),
        ("-m", "launch.export", "x"),
        ("-m", "launch.plan", "--config", "configs/quickstart.yaml"),
        ("-m", "launch.quickstart"),
        ("-m", "launch.benchmark", "resume"),
        ("launch/train.py", "--config", "configs/quickstart.yaml"),
    ],
    ids=lambda words: words[-1],
)
def test_ctrl_c_during_imports(environ, words):
    process = start(("-X", "importtime", *words), environ)
    wait_for("torch.torch_version", process.stderr)  # one of the first of PyTorch's modules
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    printed = [line for line in errors.splitlines(keepends=True) if not line.startswith("import time:")]
    assert printed == [TRAINING if words[0] == "launch/train.py" else "interrupted\n"]
    assert process.returncode == 130
    assert "trained" not in output


@pytest.mark.slow
def test_ctrl_c_during_training_ends_all_ranks(environ, small_config, free_port, tmp_path):
    """Whatever each rank waits for; rank 0 prints the line for both."""
    words = "launch/train.py", "--config", small_config, f"output={tmp_path / 'run'}", "log.every_steps=1"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "WORLD_SIZE": "2"}
    ranks = [start(words, environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    try:
        wait_for("step 1/", ranks[0].stdout)
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        ends = [rank.communicate() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [130, 130]
    assert [errors.count("interrupted") for _, errors in ends] == [1, 0]
    assert ends[0][1].endswith(TRAINING)
    assert "Traceback" not in ends[0][1] + ends[1][1]


@pytest.mark.slow
def test_ctrl_c_ends_a_benchmark_and_its_processes(environ):
    process = start(("-m", "launch.benchmark", "resume", "--samples", "600", "--device", "cpu"), environ)
    wait_for("round 1 of", process.stderr)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate()
    assert (errors, process.returncode) == ("interrupted\n", 130)


def test_a_background_job_ignores_ctrl_c(no_launcher):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        exit_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

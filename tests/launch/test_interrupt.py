"""Ctrl-C on real commands, while they import and while they work: one line, status 130, no traceback.

Training, which other signals stop as well, ends with status 75, or 143; test_stop.py stops it everywhere else.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from launch.checkpoint import layout
from launch.interrupt import STOP_SIGNALS, exit_on_interrupt

ROOT = Path(__file__).parents[2]
TRAINING = "stopped by {} before the first step; the same command starts it again\n"


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
    ],
    ids=lambda words: words[1],
)
def test_ctrl_c_during_imports(environ, words):
    assert end_during_imports(environ, words, signal.SIGINT) == (["interrupted\n"], 130)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_during_the_imports_of_training(environ, number):
    words = "launch/train.py", "--config", "configs/quickstart.yaml"
    # Launchers send SIGTERM where another rank was refused: the job must not be put back into the queue.
    status = 143 if number == signal.SIGTERM else 75
    assert end_during_imports(environ, words, number) == ([TRAINING.format(number.name)], status)


def end_during_imports(environ: dict[str, str], words: Iterable[str], number: signal.Signals) -> tuple[list[str], int]:
    """Sends a signal to a command while it imports PyTorch; returns the lines of its errors, and its status."""
    process = start(("-X", "importtime", *words), environ)
    wait_for("torch.torch_version", process.stderr)  # one of the first of PyTorch's modules
    process.send_signal(number)
    output, errors = process.communicate()
    assert "trained" not in output
    return [
        line for line in errors.splitlines(keepends=True) if not line.startswith("import time:")
    ], process.returncode


@pytest.mark.slow
def test_ctrl_c_during_training_stops_all_ranks(environ, small_config, free_port, tmp_path):
    """Rank 0 prints the lines for both."""
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
    assert [rank.returncode for rank in ranks] == [75, 75]
    assert [errors.count("SIGINT: the run stops") for _, errors in ends] == [1, 0]
    assert [output.count("stopped by SIGINT after step ") for output, _ in ends] == [1, 0]
    assert "Traceback" not in ends[0][1] + ends[1][1]
    assert layout.find_newest(tmp_path / "run" / "checkpoints")[0] is not None


@pytest.mark.slow
def test_ctrl_c_ends_a_benchmark_and_its_processes(environ):
    process = start(("-m", "launch.benchmark", "resume", "--samples", "600", "--device", "cpu"), environ)
    wait_for("round 1 of", process.stderr)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate()
    assert (errors, process.returncode) == ("interrupted\n", 130)


@pytest.mark.parametrize(("status", "output"), [(0, "unflushed, at exit"), (2, "unflushed")])
def test_a_process_ends_without_being_torn_down(environ, status, output):
    script = """
import atexit, sys
from launch.interrupt import exit_process

class Object:
    def __del__(self):
        print(", torn down")

kept = Object()
atexit.register(print, ", at exit", end="")
print("unflushed", end="")
exit_process(int(sys.argv[1]))
"""
    process = start(("-c", script, status), environ)
    assert process.communicate() == (output, "")
    assert process.returncode == status


def test_a_background_job_ignores_ctrl_c(no_launcher):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        exit_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

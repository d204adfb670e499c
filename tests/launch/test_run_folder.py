"""A run's folder with real starts: two at once, a full disk, and files that users or copying have damaged."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from launch.checkpoint import layout
from launch.run_lock import LOCK_NAME

ROOT = Path(__file__).parents[2]
TRAIN = "launch/train.py"
RECORDED_RUN = Path(__file__).with_name("recorded_run.py")


@pytest.fixture
def arguments(small_config) -> Callable[..., list[object]]:
    """Returns a function: output, overrides → the small run's arguments, with a checkpoint every half epoch."""
    often = "checkpoint.every_epochs=0.5", "log.every_steps=1", "optimizer.epochs=1", "log.eval_every_epochs=9"
    return lambda output, *more: ["--config", small_config, f"output={output}", *often, *more]


@contextmanager
def held_run(words: list[object], environ: dict[str, str], output: Path) -> Iterator[subprocess.Popen]:
    """A run of one rank that waits in its first step."""
    command = [sys.executable, *map(str, words)]
    log = output.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environ | {"HOLD_AT": "0"}, stdout=file, stderr=file)
    try:
        while not output.with_suffix(".record-0.jsonl").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_second_start_is_an_error_until_the_first_is_killed(
    forked, command, environ, arguments, trained_run, tmp_path
):
    """While it runs, its weights can be exported; after kill -9 the same command resumes at once.

    Of several ranks one prints the error.
    """
    run = shutil.copytree(trained_run, tmp_path / "run")
    words = arguments(run, "optimizer.epochs=5", "checkpoint.every_epochs=2", "log.every_steps=50")
    before = (run / "metrics.jsonl").read_bytes()
    with held_run([RECORDED_RUN, run.with_suffix(".record"), *words], environ, run) as first:
        for ranks, rank in ((1, ""), (2, "rank 0: ")):
            refused = forked(ranks, TRAIN, *words)
            assert refused.returncode == 2
            assert refused.stderr.startswith(
                f"error: {rank}{run} is in use by another run (process {first.pid} on {os.uname().nodename}, started "
            )
            assert refused.stderr.count("\n") == 1
        assert (run / "metrics.jsonl").read_bytes() == before
        exported = forked(1, "-m", "launch.export", run)
        assert exported.returncode == 0, exported.stderr
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert (run / LOCK_NAME).exists()
        finished = forked(1, TRAIN, *words)
    assert finished.returncode == 0, finished.stderr
    assert f"resumes from {run / 'checkpoints' / 'step-00000075'}" in finished.stdout
    assert not (run / LOCK_NAME).exists()


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=$1m none "$2"; shift
output=$1 kept=$2; shift 2
"$@"; status=$?
cp -r "$output/." "$kept"
exit $status
"""


@pytest.fixture
def on_small_disk(environ, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Returns a function: MiB, output, words → a command with `output` on such a disk, then copied to tmp_path/kept."""

    def run(mib: int, output: Path, *words: object) -> subprocess.CompletedProcess:
        output.mkdir()
        (tmp_path / "kept").mkdir()
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"]
        command += [mib, output, tmp_path / "kept", sys.executable, *words]
        return subprocess.run(list(map(str, command)), cwd=ROOT, env=environ, capture_output=True, text=True)

    return run


@pytest.mark.slow
def test_a_disk_with_space_for_one_checkpoint(on_small_disk, arguments, tmp_path):
    """Two ranks save one; the next is a warning, and an error only at the end. The first checkpoint stays."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    finished = on_small_disk(150, tmp_path / "run", *launcher, TRAIN, *arguments(tmp_path / "run"))
    assert finished.returncode == 1
    folder = tmp_path / "run" / "checkpoints"
    warned = [line for line in finished.stderr.splitlines() if "cannot write the checkpoint step-00000019" in line]
    assert re.fullmatch(
        rf"rank 0: cannot write the checkpoint step-00000019 in {folder} \(rank 0: no space\): it needs 85 MiB,"
        r" [0-9]+ MiB are free. The newest is step-00000010; training goes on",
        "".join(warned),
    )
    [line] = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert line == (
        "error: trained for 19 steps, but the last checkpoint is not written, for the reason above; the same command"
        " goes on from step 10"
    )
    assert "Traceback (most recent call last)" not in finished.stderr.partition("error: ")[0]
    failed = [json.loads(line) for line in (tmp_path / "kept" / "metrics.jsonl").read_text().splitlines()]
    assert [line["checkpoint/failed"] for line in failed if "checkpoint/failed" in line] == [1]
    found, faults = layout.find_newest(tmp_path / "kept" / "checkpoints")
    assert (found.name, faults) == ("step-00000010", [])
    assert sorted(path.name for path in found.parent.iterdir()) == ["latest", "step-00000010"]


@pytest.mark.slow
def test_a_disk_with_space_for_none_is_an_error_at_the_start(on_small_disk, arguments, tmp_path):
    finished = on_small_disk(60, tmp_path / "run", TRAIN, *arguments(tmp_path / "run"))
    assert finished.returncode == 2
    assert finished.stderr.endswith(
        f"error: no space for a checkpoint in {tmp_path / 'run'}: it needs 85 MiB, 60 MiB are free; make room, or"
        " choose an output on a larger disk\n"
    )
    assert list((tmp_path / "kept").iterdir()) == []


ONE_RANK_IS_LIMITED = """
import os, resource, sys
from launch import train
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_rank_that_cannot_write_ends_all(forked, arguments, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK_IS_LIMITED)
    finished = forked(2, script, *arguments(tmp_path / "run"))
    assert finished.returncode == 1
    folder = tmp_path / "run" / "checkpoints"
    for step in (10, 19):
        assert f"cannot write the checkpoint step-{step:08d} in {folder} (rank 1: " in finished.stderr
    assert "2 saves of checkpoints failed, see the warnings above" in finished.stderr
    assert "error: trained for 19 steps, but the last checkpoint is not written" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_run_resumes_from_a_damaged_folder(forked, arguments, trained_run, tmp_path):
    """The newest checkpoint lacks its largest file, `best` names none, metrics and configuration are truncated."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    folder = run / "checkpoints"
    (folder / "step-00000075" / layout.MODEL_NAME).unlink()
    (folder / "best").write_text("step-00000011\n")
    lines = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(lines[: len(lines) // 3] + b"\xff\n" + lines + b'{"step": 3')
    (run / "config.yaml").write_text("model: [b0\noutput: x")
    finished = forked(1, TRAIN, *arguments(run, "optimizer.epochs=3", "checkpoint.every_epochs=1"))
    assert finished.returncode == 0, finished.stderr
    printed = finished.stdout.splitlines()
    assert any("step-00000075 cannot be read ([Errno 2] No such file" in line for line in printed)
    assert f"resumes from {folder / 'step-00000038'}" in printed
    [line] = [
        line for line in printed if line.startswith(f"{run / 'config.yaml'} held no configuration (while parsing")
    ]
    assert line.endswith("; it is rewritten, and what changed since the last start is unknown")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set(range(39, 57)) < set(steps)
    assert layout.find_newest(folder)[0].name == "step-00000056"
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["epochs"] == 3


@pytest.mark.slow
def test_unusable_folders_are_errors(forked, arguments, trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "checkpoints" / "best").unlink()
    shutil.copytree(run / "checkpoints" / "step-00000038", run / "checkpoints" / "best")
    refused = forked(1, TRAIN, *arguments(run))
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {run / 'checkpoints' / 'best'} is a folder, where a run keeps a file with the name of a checkpoint;"
        " move it away\n"
    )
    assert not (run / LOCK_NAME).exists()
    refused = forked(1, TRAIN, *arguments("/sys/kernel"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: cannot write to the run's folder /sys/kernel: ")
    assert refused.stderr.count("\n") == 1

"""What common.sh makes of a run's end: its functions in bash, without a cluster."""

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from launch.watchdog import Heartbeat

ROOT = Path(__file__).parents[2]
LOST = "start-id\n7.1\nrank 1 (node2, process 5)\n"


@pytest.mark.parametrize(
    ("status", "record", "heartbeats", "lost"),
    [
        (0, LOST, {"job": "7.1"}, False),
        (1, LOST, {}, True),  # killed for lack of memory, which Slurm reports as 1
        (1, LOST.replace("7.1", "7.0"), {}, False),  # of the start before
        (1, "", {}, False),
        (1, "", {"job": "7.1"}, True),  # all killed for lack of memory
        (1, "", {"job": "7.1", "failed": True}, False),
        (1, "", {"job": "7.1", "done": True}, False),
        (137, "", {}, True),  # in its start-up
        (137, "", {"job": "7.1"}, True),
        (137, "", {"job": "7.1", "failed": True}, False),  # killed after another one had failed
        (137, "", {"job": "6.0", "failed": True}, True),  # which was an earlier job
        (75, "", {}, True),  # in its start-up
        (75, "", {"job": "7.1"}, True),
        (75, "", {"job": "7.1", "done": True}, False),  # stopped by a signal
        (2, "", {"job": "7.1"}, False),
        (143, "", {"job": "7.1"}, False),
    ],
)
def test_which_ends_are_losses(tmp_path, status, record, heartbeats, lost):
    folder = tmp_path / "heartbeats"
    folder.mkdir()
    if record:
        (folder / "lost").write_text(record)
    if heartbeats:
        for rank, entries in enumerate(({"job": heartbeats["job"], "done": True}, heartbeats)):
            (folder / f"rank-{rank:05d}.json").write_text(json.dumps(asdict(Heartbeat(rank, "node", 17, **entries))))
    assert call_common(tmp_path, f"lost_a_rank {tmp_path} {status} && echo lost || true") == ("lost\n" if lost else "")


def test_the_third_loss_without_a_new_checkpoint_ends_the_job(tmp_path):
    """Also where there is no folder of heartbeats yet."""
    run = tmp_path / "run"
    for _ in range(2):
        assert call_common(tmp_path, f"require_progress {run}; echo goes on") == "goes on\n"
    (run / "checkpoints").mkdir()
    (run / "checkpoints/latest").write_text("step-00000003\n")
    for _ in range(2):
        assert call_common(tmp_path, f"require_progress {run}; echo goes on") == "goes on\n"
    assert "ranks were lost three times since step-00000003" in call_common(tmp_path, f"require_progress {run}", 75)
    assert call_common(tmp_path, f"require_progress {run}; echo goes on") == "goes on\n"  # it begins anew


def call_common(folder, command, status=0):
    """Run a command in bash with common.sh, as the templates do; return its output, errors included."""
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    script = f"set -euo pipefail; source {ROOT}/slurm/common.sh; {command}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr

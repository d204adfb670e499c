"""Training on 1,000 damaged packed folders: no variant hangs, crashes or gives a wrong label."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # making the damaged folders takes a minute

VARIANTS, PROCESSES, SEED = 1000, 2, 0
DAMAGE = Path(__file__).with_name("corrupt_shards.py")
VERIFY = """
import json, sys
from pathlib import Path
from dataio.verify import verify

for folder in Path(sys.argv[1]).iterdir():
    print(json.dumps({"number": int(folder.name), "faults": verify(folder, workers=1)}), flush=True)
"""


def run_all(commands: list[list]) -> list[dict]:
    """Run these commands in parallel, one on each core; return the lines that they print. Each must succeed."""
    environ = os.environ | {"PYTHONPATH": str(DAMAGE.parents[2]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    lines = []
    try:
        for process in processes:
            out, err = process.communicate()
            lines += out.splitlines()
            assert process.returncode == 0, f"after {lines[-1:]}: {err[-3000:]}"
    finally:
        for process in processes:
            process.kill()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def outcomes(few_photographs, tmp_path_factory) -> list[dict]:
    """Outcome of each variant; where that is "nothing" or "pixels", with the faults that verify finds."""
    share = VARIANTS // PROCESSES
    scratch = [tmp_path_factory.mktemp("damage") for _ in range(PROCESSES)]
    outcomes = run_all(
        [[DAMAGE, few_photographs, folder, share * part, share, SEED] for part, folder in enumerate(scratch)]
    )
    verified = run_all([["-c", VERIFY, folder] for folder in scratch])
    faults = {entry["number"]: entry["faults"] for entry in verified}
    return [outcome | {"faults": faults.get(outcome["number"])} for outcome in outcomes]


def test_every_variant_has_an_outcome(outcomes):
    """corrupt_shards.py itself has compared the labels; all kinds of outcome occur."""
    assert [outcome["number"] for outcome in outcomes] == list(range(VARIANTS))
    counts = collections.Counter(outcome["outcome"] for outcome in outcomes)
    assert counts.keys() == {"refused", "error", "substituted", "pixels", "nothing"}
    assert min(counts["refused"], counts["substituted"], counts["error"]) >= VARIANTS // 20
    assert counts["pixels"] <= VARIANTS // 10


def test_every_error_is_one_line_with_a_remedy(outcomes):
    for outcome in outcomes:
        if outcome["outcome"] in ("refused", "error"):
            message = outcome["message"]
            assert "\n" not in message, outcome
            assert "Traceback" not in message, outcome
            assert len(message) < 700, outcome
            remedies = (
                "pack the folder again",
                "Pack the folder again",
                "check ",
                "copy ",
                "dataio.pack",
                "dataio.verify",
            )
            assert any(remedy in message for remedy in remedies), outcome


def test_fetched_shards_are_never_damaged(outcomes):
    """A remote shard that changed is an error before anything is decoded; indices are not fetched."""
    remote = [outcome for outcome in outcomes if outcome["remote"] and outcome["outcome"] != "refused"]
    assert len(remote) > VARIANTS // 50
    for outcome in remote:
        assert outcome["outcome"] in ("error", "nothing"), outcome
        assert outcome["outcome"] != "error" or "cannot fetch file://" in outcome["message"], outcome


def test_verify_finds_what_training_misses(outcomes):
    """Damaged indices and padding, and images that still decode: all are found unless the damage changes no byte."""
    unnoticed = [outcome for outcome in outcomes if outcome["outcome"] in ("pixels", "nothing")]
    harmless = [outcome for outcome in unnoticed if not outcome["faults"]]
    assert all(outcome["outcome"] == "nothing" for outcome in harmless)
    assert len(harmless) <= VARIANTS // 25  # a lost line end, a block overwritten with its like
    for outcome in unnoticed:
        damaged = any(word in outcome["damage"] for word in (".idx", "shard-", "images", "sha256"))
        assert damaged or outcome in harmless, outcome

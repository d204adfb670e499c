"""1,000 ways to damage shards, indexes, manifests, tables and images: none hangs, crashes or gives a wrong label."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIANTS, PROCESSES, SEED = 1000, 2, 0
DAMAGE = Path(__file__).with_name("damage.py")


@pytest.fixture(scope="module")
def outcomes(few_photographs, tmp_path_factory) -> list[dict]:
    """What came of each variant. A process that ends early, or not at all, fails here, with its last variant."""
    share = VARIANTS // PROCESSES
    environ = os.environ | {"PYTHONPATH": str(DAMAGE.parents[2]), "OMP_NUM_THREADS": "1"}
    processes = []
    for first in range(0, VARIANTS, share):
        words = [sys.executable, DAMAGE, few_photographs, tmp_path_factory.mktemp("damage"), first, share, SEED]
        processes.append(
            subprocess.Popen(
                list(map(str, words)), env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    lines = []
    for process in processes:
        out, err = process.communicate(timeout=150)
        lines += out.splitlines()
        assert process.returncode == 0, f"after {lines[-1:]}: {err[-3000:]}"
    return [json.loads(line) for line in lines]


def test_every_variant_has_an_outcome(outcomes):
    """damage.py itself has compared labels and pixels; no kind of outcome is all there is."""
    assert [outcome["number"] for outcome in outcomes] == list(range(VARIANTS))
    counts = collections.Counter(outcome["outcome"] for outcome in outcomes)
    assert counts.keys() <= {"refused", "error", "replaced", "found", "harmless"}
    assert min(counts[kind] for kind in ("refused", "error", "replaced", "found")) >= VARIANTS // 20
    assert counts["harmless"] <= VARIANTS // 25  # what is overwritten with itself, a lost line end


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


def test_what_is_fetched_is_never_damaged(outcomes):
    """From afar, a shard that changed is an error before anything is decoded."""
    far = [outcome for outcome in outcomes if outcome["far"] and outcome["outcome"] not in ("refused", "harmless")]
    assert len(far) > VARIANTS // 50
    for outcome in far:
        of_index = outcome["outcome"] == "found" and ".idx" in outcome["damage"]  # which training does not fetch
        assert of_index or (outcome["outcome"] == "error" and "cannot fetch file://" in outcome["message"]), outcome


def test_what_stays_unnoticed_in_training_is_found_by_verify(outcomes):
    """Bits within an image that decode to other pixels, and what no training reads: indexes, what pads a tar file."""
    for outcome in outcomes:
        if outcome["outcome"] == "found":
            assert any(word in outcome["damage"] for word in (".idx", "shard-", "images", "sha256")), outcome

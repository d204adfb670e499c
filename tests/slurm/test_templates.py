"""The Slurm templates: as text, and submitted to a real Slurm of two nodes."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "slurm").glob("train_*.sh"))

# What makes the very template of a GPU cluster run on the test's two nodes of one CPU.
TWO_CPU_NODES = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"]


def overrides(fashion_shards, run_folder: Path) -> list[str]:
    """Overrides for a b0 small enough for two CPU ranks: some steps, one evaluation, one checkpoint."""
    return [
        "model.name=polaformerpp_b0",
        f"data.train={fashion_shards}/train",
        f"data.val={fashion_shards}/val",
        f"output={run_folder}",
        "data.image_size=32",
        "data.threads=1",
        "engine.precision=fp32",
        "optimizer.global_batch_size=32",
        "optimizer.epochs=0.6",
        "optimizer.warmup_epochs=0",
        "log.every_steps=1",
    ]


def begin(cluster, template, *arguments, root, log, **environ) -> str:
    """Submits a template from the folder `root`; returns the job's id."""
    sbatch = ["sbatch", "--parsable", *TWO_CPU_NODES, f"--output={log}", template, *arguments]
    done = cluster.run(*sbatch, folder=root, **{"POLAFORMER_PYTHON": sys.executable} | environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit(cluster, template, *arguments, root, log, **environ):
    """The same, and waits; returns Slurm's fields of the ended job, and its log."""
    job = cluster.wait(begin(cluster, template, *arguments, root=root, log=log, **environ))
    return job, log.read_text()


# --- The scripts as text ------------------------------------------------------------------------------------


def test_the_templates_differ_in_the_model_only():
    b4, b5 = ((ROOT / "slurm" / f"train_{size}.sh").read_text() for size in ("b4", "b5"))
    assert b4 != b5
    assert b4.replace("b4", "b5") == b5
    assert [path.name for path in TEMPLATES] == ["train_b4.sh", "train_b5.sh"]


# --- The templates on the cluster, with a launch/train.py that reports what reached it -----------------------

REPORT = """
import json, os, signal, sys, time
rank = os.environ["SLURM_PROCID"]
names = ("SLURM_STEP_NUM_TASKS", "SLURMD_NODENAME", "MASTER_ADDR", "MASTER_PORT", "NCCL_SOCKET_IFNAME")
found = {"arguments": sys.argv[1:], "cwd": os.getcwd(), **{name: os.environ.get(name) for name in names}}
print(f"rank {rank} was here")  # reaches the log without a flush, as the templates promise
json.dump(found, open(f"rank{rank}.json", "w"))
if "fail" in sys.argv and rank == "1":
    while not os.path.exists("rank0.json"):
        time.sleep(0.05)
    sys.exit(7)
if "fail" in sys.argv:
    signal.pause()
if "lose" in sys.argv:  # as launch/train.py: a rank that is killed, and one that records it
    if rank == "0":
        with open("run/heartbeats/lost", "w") as file:
            file.write("id\\n" + os.environ["SLURM_JOB_ID"] + ".0\\nrank 1\\n")
        sys.exit(75)
    while not os.path.exists("run/heartbeats/lost"):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
if {"stop", "die"} & {*sys.argv}:  # as launch/train.py: the rank that exits last does not end by srun's signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    open(f"blocked{rank}", "w")
    while not (os.path.exists("blocked0") and os.path.exists("blocked1")):
        time.sleep(0.05)
    if "die" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "0":
        signal.sigwait({signal.SIGTERM})
    sys.exit(75)
"""


@pytest.fixture
def project(tmp_path):
    """A project's root with slurm/ and a launch/train.py that reports its arguments and environment."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (root / "launch").mkdir()
    (root / "launch/train.py").write_text(REPORT)
    return root


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_every_task_gets_its_rank_and_the_arguments(cluster, project, hostile, tmp_path, template):
    """Whatever characters they hold: no shell sees the values."""
    words = ["data.note=two words, a * and a '", f"data.note={hostile}", "optimizer.lr=1e-3"]
    job, log = submit(
        cluster, template, *words, root=project, log=tmp_path / "job.log", NCCL_SOCKET_IFNAME="ib0",
        POLAFORMER_TRAIN_DATA="/data/a b", POLAFORMER_VAL_DATA=hostile,
    )  # fmt: skip
    assert job["JobState"] == "COMPLETED", log
    model = "polaformerpp_" + template.stem.removeprefix("train_")
    ranks = [json.loads((project / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found, node in zip(ranks, cluster.nodes, strict=True):
        assert found["arguments"][:2] == ["--config", f"configs/{model}.yaml"]
        assert "data.train=/data/a b" in found["arguments"]
        assert f"data.val={hostile}" in found["arguments"]
        assert f"output={project}/runs/{model}" in found["arguments"]
        assert found["arguments"][-len(words) :] == words, "the command line must come last, so that it wins"
        assert (found["SLURMD_NODENAME"], found["SLURM_STEP_NUM_TASKS"]) == (node, "2")
        assert (found["MASTER_ADDR"], found["NCCL_SOCKET_IFNAME"]) == (cluster.nodes[0], "ib0")
        assert found["MASTER_PORT"] == str(10000 + int(job["JobId"]))
        assert found["cwd"] == str(project)
    assert not list(tmp_path.rglob("created"))
    assert job["Requeue"] == "1"
    assert "rank 0 was here" in log


def test_an_exported_port_takes_precedence(cluster, project, tmp_path):
    job, log = submit(cluster, TEMPLATES[0], root=project, log=tmp_path / "job.log", MASTER_PORT="29876")
    assert job["JobState"] == "COMPLETED", log
    assert json.loads((project / "rank1.json").read_text())["MASTER_PORT"] == "29876"


def test_a_failed_task_ends_the_others_and_fails_the_job(cluster, project, tmp_path):
    job, log = submit(cluster, TEMPLATES[0], "fail", root=project, log=tmp_path / "job.log")
    assert job["JobState"] == "FAILED", log
    assert "task 1: Exited with exit code 7" in log
    assert "First task exited" not in log, "the others were left for --wait"
    assert "rank 0 was here" in log, "its last output was lost"


def test_a_job_is_not_requeued_for_ever(cluster, project, tmp_path):
    log = tmp_path / "job.log"
    job, log = submit(cluster, TEMPLATES[0], "stop", root=project, log=log, POLAFORMER_MAX_RESTARTS="0")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), log
    assert log.endswith("was restarted 0 times and POLAFORMER_MAX_RESTARTS is 0; submit it again to resume\n")


@pytest.mark.parametrize("fault", ["lose", "die"])
def test_a_job_that_loses_ranks_and_gets_no_further_is_not_requeued(cluster, project, tmp_path, fault):
    """It has lost ranks twice before after the same checkpoint. A run that gets further is below."""
    latest, losses = project / "run/checkpoints/latest", project / "run/heartbeats/newest_when_lost"
    for path, lines in ((latest, "step-00000003\n"), (losses, "step-00000002\n" + 2 * "step-00000003\n")):
        path.parent.mkdir(parents=True)
        path.write_text(lines)
    log = tmp_path / "job.log"
    job, log = submit(cluster, TEMPLATES[0], fault, "output=run", root=project, log=log)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), log
    assert f"error: job {job['JobId']}: ranks were lost three times since step-00000003, or" in log
    assert not losses.exists()


def test_submitting_from_another_folder_is_an_error(cluster, tmp_path):
    job, log = submit(cluster, TEMPLATES[0], root=tmp_path, log=tmp_path / "job.log")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert log == f"error: {tmp_path} is not the project's root; cd there, then: sbatch slurm/train_b4.sh\n"


def test_a_missing_python_is_an_error(cluster, project, tmp_path):
    missing = tmp_path / "no/python"
    job, log = submit(cluster, TEMPLATES[0], root=project, log=tmp_path / "job.log", POLAFORMER_PYTHON=str(missing))
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert log.startswith(f"error: there is no Python at {missing} on ")
    assert log.endswith("; export POLAFORMER_PYTHON, or change it in slurm/common.sh\n")


def test_starting_without_sbatch_is_an_error():
    done = subprocess.run(["bash", TEMPLATES[0]], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0
    assert "SLURM_SUBMIT_DIR: is not set; start this file with: sbatch slurm/train_b4.sh" in done.stderr


# --- The ranks, for real ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plain_srun_ranks_join_one_group(cluster, tmp_path):
    """Without a template: `srun python`, where launch.distributed finds the address itself."""
    report_rank = ROOT / "tests/launch/report_rank.py"
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    done = cluster.run(*srun, sys.executable, report_rank, "cpu", tmp_path, folder=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    for rank, node in enumerate(cluster.nodes):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["rank"], found["local_rank"], found["world_size"]) == (rank, 0, 2)
        assert (found["launcher"], found["group"], found["sum"]) == ("srun", [rank, 2], 3.0)
        assert (found["node"], found["master"][0]) == (node, cluster.nodes[0])


@pytest.mark.slow
def test_a_batch_script_itself_is_one_rank(cluster, tmp_path):
    """`python` in a batch script without srun is a single rank, although Slurm sets SLURM_PROCID and SLURM_NTASKS=2."""
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {ROOT}/tests/launch/report_rank.py cpu {tmp_path}\n")
    _, log = submit(cluster, script, root=tmp_path, log=tmp_path / "job.log", PYTHONPATH=str(ROOT))
    assert (tmp_path / "0.json").exists(), log
    found = json.loads((tmp_path / "0.json").read_text())
    assert (found["launcher"], found["group"], found["node"]) == ("python", [0, 1], cluster.nodes[0])


@pytest.fixture(scope="module")
def whole(cluster, fashion_shards, tmp_path_factory) -> Path:
    """The folder of an undisturbed run on two nodes."""
    folder = tmp_path_factory.mktemp("whole")
    run_folder = folder / "run"
    job, log = submit(cluster, TEMPLATES[0], *overrides(fashion_shards, run_folder), root=ROOT, log=folder / "job.log")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), log
    assert cluster.nodes_with_tasks(job["JobId"]) == list(cluster.nodes)
    assert "= 2 ranks × 1 accumulation × 16" in log
    assert f"steps; {run_folder} holds the run" in log
    return run_folder


def metrics(folder: Path) -> list[dict]:
    """Losses, learning rates and accuracies of a run, without speeds."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k.startswith(("step", "train/", "eval"))} for line in lines]


@pytest.mark.slow
def test_train_b4_trains_to_the_end_on_two_nodes(whole):
    assert [line["step"] for line in metrics(whole) if "train/loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_job_is_requeued_and_resumes_after_a_signal_a_lost_rank_and_a_hang(cluster, whole, fashion_shards, tmp_path):
    """As before a time limit, USR1 to the tasks in their second step → checkpoint.

    Then a task that is killed in its fifth step; then one that is stopped in its sixth, and that srun therefore kills.
    """
    root, run_folder, log = tmp_path / "project", tmp_path / "run", tmp_path / "job.log"
    (root / "launch").mkdir(parents=True)
    for name in ("slurm", "configs"):
        (root / name).symlink_to(ROOT / name)
    (root / "launch/train.py").symlink_to(ROOT / "tests/launch/faults/harmed_run.py")
    settings = [*overrides(fashion_shards, run_folder), "guard.hang_seconds=20", "checkpoint.every_epochs=0.2"]
    harm = [{"step": 2, "to": "wait", "rank": rank} for rank in (0, 1)]
    harm += [{"step": 5, "to": "life", "rank": 1, "restart": 1}, {"step": 6, "to": "process", "rank": 1, "restart": 2}]
    held = {"HARM": json.dumps(harm), "HELD": str(tmp_path / "held"), "PYTHONPATH": str(ROOT)}
    job_id = begin(cluster, TEMPLATES[0], *settings, root=root, log=log, **held)
    while not all((tmp_path / f"held-{rank}").exists() for rank in (0, 1)):
        assert cluster.job(job_id)["JobState"] in ("PENDING", "RUNNING"), log.read_text()
        time.sleep(0.2)
    assert cluster.run("scancel", "--signal=USR1", job_id, folder=root).returncode == 0
    job = cluster.wait(job_id)
    text = log.read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "3"), text
    assert f"stopped by SIGUSR1 after step 3/6; the same command resumes from {run_folder}/checkpoints" in text
    assert "Exited with exit code 75" in text
    assert f"resumes from {run_folder}/checkpoints/step-00000003" in text
    for line in (
        r"error: rank 1 \(.*\) gone in step 5, killed or out of memory; the same command goes on",
        r"error: no progress for 20 s: rank 1 \(.*\) in step [456], .*: stopped or gone\. ",  # as it told last
    ):
        assert re.search(line, text), text
    assert "Traceback" not in text
    assert metrics(run_folder) == metrics(whole)

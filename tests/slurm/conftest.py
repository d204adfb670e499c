"""A real Slurm cluster on this host: a controller and two nodes of one CPU each, from Debian's packages.

Configuration, ports and a munged with its key are its own, in a temporary folder: it does not disturb the machine's
Slurm or munge, and needs neither systemd nor root. The nodes are named by loopback addresses, because a template takes
MASTER_ADDR from the name of a node.
"""

import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

NODES = ("127.0.0.2", "127.0.0.3")
SBIN = ":/usr/sbin:/sbin"  # where the daemons are, which is not on everybody's PATH
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")

# A machine may be slow: Slurm's own limits, of 2 s (TCPTimeout), 10 s and 60 s, are set to what none needs.
CONFIGURATION = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
TCPTimeout=100
MessageTimeout=100
BatchStartTimeout=3600
EioTimeout=3600
SlurmdTimeout=3600
UnkillableStepTimeout=3600
KillWait=30
NodeName={nodes[0]} NodeHostname=localhost NodeAddr={nodes[0]} Port={ports[1]} CPUs=1
NodeName={nodes[1]} NodeHostname=localhost NodeAddr={nodes[1]} Port={ports[2]} CPUs=1
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """The running cluster. Its logs and jobs' spool folders are in `folder`."""

    folder: Path
    nodes: tuple[str, ...] = NODES

    @property
    def environ(self) -> dict[str, str]:
        """The environment of Slurm's commands: this process's, without variables that launchers or templates set."""
        ours = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": os.environ["PATH"] + SBIN}
        others = ("SLURM_", "SBATCH_", "MASTER_", "LOCAL_", "DS_", "RANK", "WORLD_SIZE", "PYTHONUNBUFFERED")
        return {name: value for name, value in os.environ.items() if not name.startswith(others)} | ours

    def run(self, *command: str | Path, folder: Path, **environ: str) -> subprocess.CompletedProcess:
        """Runs a command in `folder`, with `environ` added to its environment; output as text."""
        return subprocess.run(command, cwd=folder, env=self.environ | environ, capture_output=True, text=True)

    def wait(self, job_id: str) -> dict[str, str]:
        """Waits for the job's end and returns the fields of `scontrol show job`: JobState, ExitCode, …

        Slurm starts a requeued job after 120 s, when its credentials have expired. It need not wait: nodes take newer
        credentials, by the second, once they have ended the job.
        """
        restarts = 0
        while True:
            job = self.job(job_id)
            if job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"):
                return job
            if job["JobState"] == "PENDING" and int(job["Restarts"]) > restarts:
                restarts = int(job["Restarts"])
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+2", folder=self.folder)
            time.sleep(0.2)  # `sbatch --wait` looks every 10 s only

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job_id, folder=self.folder).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def nodes_with_tasks(self, job_id: str) -> list[str]:
        """The nodes whose slurmd has started tasks of the job's first step."""
        launched = f"launch task StepId={job_id}.0 "
        return [node for node in self.nodes if launched in (self.folder / f"slurmd-{node}.log").read_text()]


def _free_ports(count: int) -> list[int]:
    """Free ports below the ephemeral ones of Linux and above those of the templates, so that they stay free."""
    ports: set[int] = set()
    while len(ports) < count:
        port = secrets.choice(range(30_000, 32_768))
        with suppress(OSError), socket.create_server(("", port)):
            ports.add(port)
    return list(ports)


@contextmanager
def _daemon(cluster: Cluster, name: str, *command: str) -> Iterator[subprocess.Popen]:
    with (cluster.folder / f"{name}.out").open("w") as output:
        process = subprocess.Popen(
            command, cwd=cluster.folder, env=cluster.environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_until_idle(cluster: Cluster, daemons: list[subprocess.Popen]) -> None:
    while all(daemon.poll() is None for daemon in daemons):
        states = cluster.run("sinfo", "--noheader", "--Node", "--format=%T", folder=cluster.folder).stdout.split()
        if states == ["idle"] * len(cluster.nodes):
            return
        time.sleep(0.2)
    outputs = "\n".join(path.name + ":\n" + path.read_text() for path in sorted(cluster.folder.glob("*.out")))
    raise RuntimeError(f"the Slurm cluster did not come up\n{outputs}")


def _end_jobs(cluster: Cluster) -> None:
    """Cancels all jobs, so that no test leaves a process."""
    cluster.run("scancel", f"--user={getpass.getuser()}", folder=cluster.folder)
    while cluster.run("squeue", "--noheader", folder=cluster.folder).stdout.strip():
        time.sleep(0.2)


def _kill_remaining(cluster: Cluster) -> None:
    """Kills processes that outlived the cluster."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == cluster.environ["SLURM_CONF"]:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    if any(shutil.which(command, path=os.environ["PATH"] + SBIN) is None for command in COMMANDS):
        missing = "slurm is not installed (apt-get install slurm-wlm munge)"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    folder = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(folder)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder,
            user=getpass.getuser(),
            ports=_free_ports(3),
            nodes=NODES,
            first_job=secrets.randbelow(19_000) + 1,  # the templates' port follows from it
        )
    )
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
    files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
    with ExitStack() as running:
        running.callback(_kill_remaining, cluster)
        daemons = [running.enter_context(_daemon(cluster, "munged", *munged))]
        while not (folder / "munge.socket").exists() and daemons[0].poll() is None:
            time.sleep(0.05)
        daemons.append(running.enter_context(_daemon(cluster, "slurmctld", "slurmctld", "-D", "-c")))
        for node in NODES:
            daemons.append(running.enter_context(_daemon(cluster, f"slurmd-{node}", "slurmd", "-D", "-N", node)))
        _wait_until_idle(cluster, daemons)
        running.callback(_end_jobs, cluster)
        yield cluster

"""Goodput of a training run that is killed again and again, beside what `launch.plan --mtbf` expects of it.

python -m launch.benchmark goodput
python -m launch.benchmark goodput --minutes 60 --mtbf-seconds 45 --world-size 2 checkpoint.every_minutes=0.1
python -m launch.benchmark goodput --show launch/benchmark/results/goodput-cpu.json

Processes of launch/train.py, by default with the quickstart's configuration on generated images, are killed by SIGKILL:
one rank after exponentially distributed times, in start-up too. The same command then starts again at once. At the end
SIGUSR1 stops the run. Goodput is the share of all seconds, from the first start to the last end, that trained and was
not lost. A restart takes from the kill to the first new step, the end of the other ranks included.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from dataio.files import user_path
from launch.benchmark.cli import USAGE_ERRORS, AddOption, Command, Report, require_positive, resolve_device
from launch.benchmark.measure import quantiles
from launch.benchmark.report import ROOT, describe_run, heading
from launch.benchmark.sample_images import DESCRIPTION, pack_images
from launch.config import load_config
from launch.distributed import find_free_port
from launch.goodput import SAVING, START, TRAINING, expected_goodput, read_ledger
from launch.monitor import METRICS_NAME

_IMAGES = 512
_SETTINGS = (
    *("log.every_steps=1", "log.eval_every_epochs=100000"),
    *("optimizer.epochs=100000", "checkpoint.every_epochs=100000", "checkpoint.every_minutes=0.1"),
)
_LONGEST_STOP = 120.0  # seconds until a rank ends after SIGUSR1
_LONGEST_END = 30.0  # seconds that torchrun gives ranks to end after SIGTERM


class _Job:
    """All ranks of one start of a run, as a launcher would start them on this machine."""

    def __init__(self, arguments: list[str], world_size: int, device_type: str) -> None:
        common = os.environ | {
            "DS_ACCELERATOR": device_type,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(find_free_port()),
            "WORLD_SIZE": str(world_size),
        }
        common["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        if device_type == "cpu":
            common["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, str(ROOT / "launch/train.py"), *arguments]
        self._ranks = [
            subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=2)
            for rank in range(world_size)
        ]

    def wait(self, seconds: float) -> bool:
        """Wait until a rank ends, but no longer than this; return whether one has ended."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if any(rank.poll() is not None for rank in self._ranks):
                return True
            time.sleep(0.05)
        return False

    def signal(self, number: int, rank: int) -> None:
        self._ranks[rank].send_signal(number)

    def end(self) -> list[int]:
        """End all ranks as launchers do when one has ended, first by SIGTERM; return their exit statuses."""
        for rank in self._ranks:
            rank.terminate()
        deadline = time.monotonic() + _LONGEST_END
        for rank in self._ranks:
            with suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, deadline - time.monotonic()))
            rank.kill()
        return [rank.wait() for rank in self._ranks]


def measure(
    config: Path, overrides: list[str], world_size: int, minutes: float, mtbf: float, seed: int,
    device: torch.device, _path: Path | None,
) -> Report:  # fmt: skip
    """Measure everything and return the report. Raises RuntimeError if the run ends by itself."""
    chance = random.Random(seed)  # noqa: S311  (no secret)
    report = describe_run("goodput", device) | {"world_size": world_size, "mtbf": mtbf, "seed": seed}
    with tempfile.TemporaryDirectory(prefix="goodput-") as folder:
        run, data = Path(folder, "run"), pack_images(Path(folder), _IMAGES, cores=1).folder
        paths = f"output={run}", f"data.train={data}", f"data.val={data}"
        settings = [*paths, *_SETTINGS, *overrides]
        interval = 60 * (load_config(config, settings).checkpoint.every_minutes or math.inf)
        report |= {"data": DESCRIPTION, "config": config.name, "interval": interval}
        arguments = ["--config", str(config), *settings]
        report |= _kill_repeatedly(arguments, run, world_size, 60 * minutes, mtbf, chance, device.type)
        ledger = read_ledger(run)
    starts, saves, spent = ledger["starts"], ledger["saves"], ledger["seconds"]
    report |= {"starts": starts, "saves": saves, "spent": spent}
    report["goodput"] = spent.get(TRAINING, 0.0) / report["seconds"]
    report["expected_goodput"] = None
    if saves and spent.get(SAVING, 0.0) > 0:
        save, start = spent[SAVING] / saves, spent[START] / starts
        report["expected_goodput"] = expected_goodput(report["interval"], mtbf, save, start)
    return report


def _kill_repeatedly(
    arguments: list[str], run: Path, world_size: int, seconds: float, mtbf: float, chance: random.Random, device: str
) -> Report:
    """Train for so long, killing a rank now and then; return the number of kills, and all seconds."""
    began, restarts, kills, killed_at, ended_at = time.monotonic(), list[float](), 0, 0.0, 0.0
    job = _Job(arguments, world_size, device)
    try:
        while (left := began + seconds - time.monotonic()) > 0:
            ended = job.wait(min(left, chance.expovariate(1 / mtbf)))
            restarts += [step_at - killed_at for step_at in _first_step_after(run, ended_at)]
            if ended:
                raise RuntimeError(f"the run ended by itself, with {job.end()}, after {kills} kills; see above")
            if time.monotonic() >= began + seconds:
                break
            kills, killed_at = kills + 1, time.time()
            job.signal(signal.SIGKILL, chance.randrange(world_size))
            job.end()
            ended_at = time.time()
            job = _Job(arguments, world_size, device)
        job.signal(signal.SIGUSR1, 0)
        if not job.wait(_LONGEST_STOP):
            raise RuntimeError(f"no rank ended within {_LONGEST_STOP:g} s of SIGUSR1")
    finally:
        job.end()
    restart = asdict(quantiles(restarts)) | {"longest": max(restarts)} if restarts else None
    return {"kills": kills, "seconds": time.monotonic() - began, "restart": restart}


def _first_step_after(run: Path, ended_at: float) -> list[float]:
    """Return when the first step after the end of a start ended, as the only item; nothing if none did, or none was."""
    if not ended_at or not (run / METRICS_NAME).exists():
        return []
    times = (json.loads(line)["time"] for line in (run / METRICS_NAME).read_text().splitlines())
    return [step_at for step_at in times if step_at > ended_at][:1]


def show(report: Report, _markdown: bool) -> None:
    """Print a report."""
    total = report["seconds"]
    print(
        heading(report)
        + f"{report['kills']} kills of a rank of {report['world_size']} in {total / 60:.1f} min, one due"
        f" in {report['mtbf']:g} s; {report['saves']} checkpoints, one due in {report['interval']:g} s"
    )
    unrecorded = total - sum(report["spent"].values())
    for kind, seconds in {**report["spent"], "between starts, or killed in start-up": unrecorded}.items():
        print(f"  {kind:38} {seconds:8.1f} s  {seconds / total:6.1%}")
    expected = report["expected_goodput"]
    beside = "no checkpoint, so none is expected" if expected is None else f"expected {expected:.1%}"
    print(f"goodput {report['goodput']:.1%}, {beside}")
    if report["restart"]:
        print("a restart takes {median:.1f} s in the median, {longest:.1f} s at most".format(**report["restart"]))


def add_options(add: AddOption) -> None:
    """Declare the options."""
    add("--config", type=user_path, default=ROOT / "configs/quickstart.yaml", help="default: configs/quickstart.yaml")
    add("--world-size", type=int, default=2, help="ranks, all on this machine (default 2)")
    add("--minutes", type=float, default=20, help="of the whole run (default 20)")
    add("--mtbf-seconds", type=float, default=45, help="mean time between two kills (default 45)")
    add("--seed", type=int, default=0, help="of the times, and of which rank is killed (default 0)")
    add("overrides", nargs="*", metavar="key=value", help="of the configuration, such as checkpoint.every_minutes=0.2")


def resolve(arguments: argparse.Namespace) -> partial[Report]:
    """Check the arguments and return what measures. Raises ValueError, RuntimeError or OSError."""
    require_positive(arguments, "world-size", "minutes", "mtbf-seconds")
    device = resolve_device(arguments.device)
    settings = ["output=run", "data.train=train", "data.val=val", *_SETTINGS, *arguments.overrides]
    if load_config(arguments.config, settings).checkpoint.every_minutes is None:
        raise ValueError("the key every_minutes of checkpoint is null; give a number, as the expectation depends on it")
    return partial(
        measure, arguments.config, arguments.overrides, arguments.world_size, arguments.minutes, arguments.mtbf_seconds,
        arguments.seed, device,
    )  # fmt: skip


COMMAND = Command(
    "goodput", __doc__, add_options, resolve, show,
    failures=USAGE_ERRORS, device_help="of the ranks (default: a GPU where there is one)",
)  # fmt: skip
parse, main = COMMAND.parse, COMMAND.main

"""Runs that signals or the time limit stop, at chosen points and under each launcher, and that resume to the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from launch import interrupt
from launch.checkpoint import layout
from launch.distributed import destroy_process_group, failed_rank_check, init_distributed, read_rank_info
from launch.interrupt import EXIT_FATAL, EXIT_REFUSED, EXIT_RESUME, StopSignals
from launch.stop import StopAgreement

ROOT = Path(__file__).parents[2]
STOPPED_RUN = str(Path(__file__).with_name("stopped_run.py"))
STEPS = 11  # of train_arguments, with evaluations after steps 6 and 11


def stop_at(point: str, *names: str, **more: object) -> dict[str, str]:
    return {"STOP_AT": json.dumps({"at": point, "signals": names, **more})}


def metrics(folder: Path) -> list[dict]:
    """Losses, learning rates and accuracies of a run, without speeds."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k.startswith(("step", "train/", "eval"))} for line in lines]


def newest(folder: Path) -> layout.RunState:
    found, faults = layout.find_newest(folder / "checkpoints")
    assert not faults
    assert found.name == (folder / "checkpoints" / "latest").read_text().strip()
    return layout.read_state(found)


# --- All points of a run ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_stopped_everywhere_equals_an_undisturbed_one(
    forked, torchrun, train_arguments, small_shards, tmp_path
):
    """Two ranks; some signals reach one of them only. Both evaluations are left to the next start."""
    run = tmp_path / "run"
    arguments = train_arguments(small_shards, run)

    def stopped(*wanted: str, **more: object) -> subprocess.CompletedProcess:
        finished = forked(2, STOPPED_RUN, *arguments, **stop_at(*wanted, **more))
        assert finished.returncode == EXIT_RESUME, finished.stderr
        assert "Traceback" not in finished.stderr
        return finished

    finished = stopped("build", "SIGUSR2", rank=1)
    assert "stopped by SIGUSR2 before the first step; the same command starts it again\n" in finished.stdout
    assert not run.exists()

    finished = stopped("step 2", "SIGTERM", rank=1)
    folder = run / "checkpoints"
    message = f"stopped by SIGTERM after step 3/{STEPS}; the same command resumes from {folder / 'step-00000003'}\n"
    assert finished.stdout.endswith(message)
    assert (newest(run).step, newest(run).evaluation_due) == (3, False)

    finished = stopped("batch 2", "SIGINT")
    assert finished.stderr.count("SIGINT: the run stops, and saves what it has trained; a third signal ends it") == 1
    assert (newest(run).step, newest(run).evaluation_due) == (6, True)
    before = sorted(folder.iterdir())
    finished = stopped("batch 1", "SIGUSR1", rank=0)
    assert f"stopped by SIGUSR1 after step 6/{STEPS}" in finished.stdout
    assert sorted(folder.iterdir()) == before, "there was no new step to save"
    assert not [line for line in metrics(run) if "eval/top1" in line]

    stopped(f"step {STEPS - 1}", "SIGTERM", rank=1)
    assert (newest(run).step, newest(run).evaluation_due) == (STEPS, True)
    finished = torchrun(2, "launch/train.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert f"trained for {STEPS} steps" in finished.stdout

    whole = tmp_path / "whole"
    finished = forked(2, "launch/train.py", *train_arguments(small_shards, whole))
    assert finished.returncode == 0, finished.stderr
    assert metrics(run) == metrics(whole)
    assert newest(run) == newest(whole)
    for file in (layout.MODEL_NAME, layout.EMA_NAME, *layout.MOMENT_NAMES.values()):
        left, right = (load_file(each / "checkpoints" / f"step-{STEPS:08d}" / file) for each in (run, whole))
        assert left.keys() == right.keys()
        assert all(left[name].equal(right[name]) for name in left)


@pytest.fixture
def short(train_arguments, small_shards, tmp_path) -> list[str]:
    """Arguments of a run of four steps, in tmp_path/run, with a checkpoint and an evaluation at its end."""
    seldom = "checkpoint.every_epochs=9", "log.eval_every_epochs=9", "optimizer.epochs=0.7", "optimizer.warmup_epochs=0"
    return train_arguments(small_shards, tmp_path / "run", *seldom)


def test_the_time_limit_counts_from_the_start_of_the_process(forked, short, tmp_path):
    """It has passed before the first step: each start makes two steps nevertheless."""
    for step in (2, 4):
        finished = forked(1, STOPPED_RUN, *short, "checkpoint.stop_after_minutes=1e-4")
        assert finished.returncode == EXIT_RESUME, finished.stderr
        assert f"stopped by checkpoint.stop_after_minutes after step {step}/4" in finished.stdout
        assert (newest(tmp_path / "run").step, newest(tmp_path / "run").evaluation_due) == (step, step == 4)
    assert forked(1, STOPPED_RUN, *short, "checkpoint.stop_after_minutes=60").returncode == 0


def test_a_second_signal_while_saving_changes_nothing(forked, short, tmp_path):
    finished = forked(
        1, STOPPED_RUN, *short, "checkpoint.stop_after_minutes=1e-4", **stop_at("save", "SIGINT", "SIGTERM")
    )
    assert finished.returncode == EXIT_RESUME, finished.stderr
    assert "SIGTERM: the run is stopping already; one more signal ends it at once\n" in finished.stderr
    assert newest(tmp_path / "run").step == 2


def test_a_third_signal_ends_it_at_once(forked, short, tmp_path):
    limit = "checkpoint.stop_after_minutes=1e-4"
    finished = forked(1, STOPPED_RUN, *short, limit, **stop_at("save", "SIGINT", "SIGTERM", "SIGUSR2"))
    assert finished.returncode == 128 + signal.SIGUSR2
    assert finished.stderr.endswith(
        "ended by SIGUSR2; the same command resumes from the last checkpoint, if there is one\n"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_signal_during_the_last_save_of_a_run_leaves_it_done(forked, short, tmp_path):
    finished = forked(1, STOPPED_RUN, *short, **stop_at("save", "SIGTERM"))
    assert finished.returncode == 0, finished.stderr
    assert (newest(tmp_path / "run").step, newest(tmp_path / "run").evaluation_due) == (4, False)


def test_an_evaluation_that_was_made_but_not_saved_is_made_again_once(forked, short, tmp_path):
    """A start that is killed after it has evaluated the checkpoint of a stop leaves a line of metrics behind."""
    run = tmp_path / "run"
    assert forked(1, STOPPED_RUN, *short, **stop_at("batch 1", "SIGTERM")).returncode == EXIT_RESUME
    stopped = shutil.copytree(run / "checkpoints", tmp_path / "stopped")
    epoch = newest(run).epoch
    for _ in range(2):  # the second finds the first's line
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(stopped, run / "checkpoints")
        assert forked(1, STOPPED_RUN, *short).returncode == 0
        assert [line["step"] for line in metrics(run) if "eval/top1" in line] == [4]
        assert (newest(run).evaluation_due, newest(run).epoch) == (False, epoch)
    assert (run / "checkpoints" / "best").read_text() == "step-00000004\n"


# --- Ranks and signals -------------------------------------------------------------------------------------------

AGREE = """
import json, os, sys, torch
from datetime import timedelta
from pathlib import Path
from launch.distributed import run_distributed
from launch.interrupt import StopSignals
from launch.stop import StopAgreement, Stopped

def body(rank_info, device):
    signals = StopSignals()
    stop, found = StopAgreement(signals, device), {}
    def seen(batches, stops_after=None):
        numbers = []
        try:
            for number in stop.polled(range(batches)):
                numbers.append(number)
                if number == stops_after:
                    signals.received = "SIGUSR1"
        except Stopped as stopped:
            numbers.append(str(stopped))
        return numbers
    found["undisturbed"] = seen(3 - 2 * rank_info.rank)
    found["stopped"] = seen(9) if rank_info.rank == 0 else seen(1, stops_after=0)
    signals.received = None if rank_info.rank == 0 else "SIGINT"
    try:
        stop.check()
    except Stopped as stopped:
        found["start-up"] = str(stopped)
    Path(sys.argv[1], f"{rank_info.rank}.json").write_text(json.dumps(found))
    return 0

sys.exit(run_distributed(body, "cpu", timedelta(hours=1)))
"""


def test_ranks_with_unequal_numbers_of_batches_stop_after_the_same(forked, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(AGREE)
    finished = forked(2, script, tmp_path)
    assert finished.returncode == 0, finished.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks == [
        {"undisturbed": [0, 1, 2], "stopped": [0, 1, "SIGUSR1"], "start-up": "SIGINT"},
        {"undisturbed": [0], "stopped": [0, "SIGUSR1"], "start-up": "SIGINT"},
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_agreement_does_not_synchronise_with_the_gpu(no_launcher):
    """PyTorch raises an error at each hidden synchronisation; only the event of the step before is waited for."""
    device = init_distributed(read_rank_info(os.environ), "cuda", timedelta(hours=1))
    signals = StopSignals()
    stop = StopAgreement(signals, device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        reasons = []
        for received in (None, "SIGUSR2", "SIGUSR2"):
            signals.received = received
            reasons.append(stop.exchange(stop.flags(loss=torch.ones((), device=device))).reason)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        destroy_process_group()
    assert reasons == [None, None, "SIGUSR2"]


FAIL = """
import sys, time
from datetime import timedelta
from launch.distributed import failed_rank_check, get_local_world_size, run_distributed
from launch.interrupt import StopSignals
signals = StopSignals().listen()

def body(rank_info, device):
    signals.defer(failed_rank_check())
    assert get_local_world_size() == 2
    if rank_info.rank == 1:
        raise KeyError("a mistake")
    while True:  # as in a collective of NCCL, which does not notice that another rank is gone
        time.sleep(3600)

sys.exit(run_distributed(body, "cpu", timedelta(hours=1)))
"""


def test_the_signal_for_the_others_when_a_rank_has_failed_ends_them(forked, tmp_path):
    """Otherwise they would wait for an agreement until the launcher kills them, after half a minute each."""
    script = tmp_path / "script.py"
    script.write_text(FAIL)
    finished = forked(2, script)
    assert finished.returncode == 1
    assert "KeyError: 'a mistake'" in finished.stderr


LAST = """
import os, signal, sys
from launch import distributed, train
from launch.interrupt import StopSignals, exit_process
signals = StopSignals().listen()
train.failed_rank_check = lambda: lambda: 1  # as when rank 0 has exited, and with it the store that answers this
leave = distributed.destroy_process_group

def get_signals_and_leave():
    for _ in range(2):  # the second is received when the first has been dealt with
        os.kill(os.getpid(), signal.SIGTERM)
        while signal.SIGTERM in signal.sigpending():
            pass
    leave()

distributed.destroy_process_group = get_signals_and_leave
exit_process(train.main(sys.argv[1:], signals))
"""


@pytest.mark.parametrize(
    ("change", "status"), [("checkpoint.stop_after_minutes=1e-4", EXIT_RESUME), ("data.train=missing", EXIT_REFUSED)]
)
def test_signals_to_a_rank_that_exits_after_others_keep_its_status(forked, short, tmp_path, change, status):
    """srun sends them; the job would end with 143, and not be requeued if it were to."""
    script = tmp_path / "script.py"
    script.write_text(LAST)
    assert forked(1, script, *short, change).returncode == status


def test_the_check_for_a_failed_rank_does_not_wait_for_the_store(no_launcher):
    """As while ranks wait for each other to form a group: a signal must still be heard."""
    init_distributed(read_rank_info(os.environ), "cpu", timedelta(hours=1))
    store, status_without_rank = torch.distributed.distributed_c10d._get_default_store(), failed_rank_check()
    other = store.clone()
    waiting = threading.Thread(target=store.wait, args=(["never set"],), daemon=True)
    waiting.start()
    assert status_without_rank() is None
    assert waiting.is_alive()
    other.set("launch: a rank has failed", "")
    other.get("launch: a rank has failed")  # setting does not wait for the store to have the value
    assert status_without_rank() == EXIT_FATAL
    other.set("never set", "")
    waiting.join()
    destroy_process_group()


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def ends(monkeypatch) -> None:
    def leave(status: int) -> None:
        raise Ended(status)

    monkeypatch.setattr(interrupt.os, "_exit", leave)


def test_signals_within_a_second_count_as_one(no_launcher, ends, capfd):
    """Ctrl-C under deepspeed, three times in a hurry, as ranks were seen to get it; then two deliberate ones."""
    signals = StopSignals()
    signals.defer()
    for now in (10.0, 10.01, 10.3, 10.31, 10.6, 10.61):
        signals._handle(signal.SIGINT if now * 10 % 1 == 0 else signal.SIGTERM, now)
    assert signals.received == "SIGINT"
    assert capfd.readouterr().err.count("\n") == 1
    signals._handle(signal.SIGINT, 11.5)
    with pytest.raises(Ended, match="130"):
        signals._handle(signal.SIGINT, 13.0)
    assert signals.received == "SIGINT"


def test_only_rank_0_prints(no_launcher, ends, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    signals = StopSignals()
    with pytest.raises(Ended, match=str(EXIT_RESUME)):
        signals._handle(signal.SIGUSR1, 1.0)
    assert capfd.readouterr().err == ""


def test_child_processes_are_not_ended_by_the_signals(environ):
    """A whole process group gets them; Ctrl-C is ignored in a background job and stays so."""
    script = """
import os, signal, subprocess, sys, time
from launch.interrupt import STOP_SIGNALS, StopSignals
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signals = StopSignals().listen()
signals.defer()
child = subprocess.Popen([sys.executable, "-c", "input(); print('alive')"], stdin=subprocess.PIPE)
for number in STOP_SIGNALS:
    os.killpg(0, number)
while not signals.received:
    time.sleep(0.01)
child.communicate(b"\\n")
print(child.returncode, signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN)
"""
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, start_new_session=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "alive\n0 True\n"), done.stderr


# --- Launchers ----------------------------------------------------------------------------------------------------


def wait_for(condition, process: subprocess.Popen, log: Path) -> None:
    while not condition():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "sent", "ranks", "status"),
    [
        ("torchrun", "SIGTERM", 2, 1),
        ("torchrun", "Ctrl-C", 1, 1),  # a terminal sends it to all ranks: one is enough
        ("deepspeed", "Ctrl-C", 1, -2),
        ("deepspeed", "a rank", 2, 75),
    ],
)
def test_launchers_pass_signals_on(environ, short, free_port, tmp_path, launcher, sent, ranks, status):
    """A checkpoint is written, whatever the launcher makes of the ranks' exit code; the README has a table of that."""
    commands = {
        "torchrun": ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"),
        "deepspeed": ("deepspeed.launcher.runner", f"--num_accelerators={ranks}", f"--master_port={free_port}"),
    }
    command = [sys.executable, "-m", *commands[launcher], STOPPED_RUN, *short]
    held = stop_at("step 1", reached=str(tmp_path / "reached"), rank=ranks - 1)
    log = tmp_path / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ | held, stdout=file, stderr=file, start_new_session=True
        )
    others: list[psutil.Process] = []
    try:
        reached = tmp_path / f"reached-{ranks - 1}"
        wait_for(reached.exists, process, log)
        others = psutil.Process(process.pid).children(recursive=True)
        if sent == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif sent == "a rank":
            os.kill(int(reached.read_text()), signal.SIGUSR1)
        else:
            process.send_signal(signal.Signals[sent])
        assert process.wait() == status, log.read_text()
        psutil.wait_procs(others)
    finally:
        for member in (*others, process):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
    name = {"Ctrl-C": "SIGINT", "a rank": "SIGUSR1"}.get(sent, sent)
    assert f"stopped by {name} after step 2/4; the same command resumes from" in log.read_text()
    assert newest(tmp_path / "run").step == 2

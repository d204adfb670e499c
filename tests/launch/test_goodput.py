"""Where a run's time goes, over starts that end in any way; and what the planner expects of it."""

import json
import os
import random
import socket
import time
from dataclasses import asdict

import pytest

from launch import goodput
from launch.goodput import DATA, EVALUATION, LOST, SAVING, START, TRAINING, Goodput, best_interval, expected_goodput
from launch.plan import main
from launch.watchdog import Heartbeat


@pytest.fixture
def clock(monkeypatch):
    """Returns a function: lets so many seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_each_second_is_of_one_kind(tmp_path, clock):
    run = Goodput(tmp_path, start_seconds=30)
    clock(4)
    with run.spending(DATA):  # of the first step
        clock(1)
    with run.spending(TRAINING):
        clock(100)
        with run.spending(DATA):
            clock(20)
        with run.spending(EVALUATION):
            clock(10)
            with run.spending(SAVING):
                clock(1)
        clock(34)
    assert run.seconds == {TRAINING: 134, DATA: 20, EVALUATION: 10, SAVING: 1, START: 35, LOST: 0}
    assert str(run) == "67.0 % of 3.3 min trained"
    assert run.shares()["goodput/waiting_for_data"] == 0.1
    assert sum(run.shares().values()) == pytest.approx(1)


def test_a_restart_loses_what_came_after_its_checkpoint(tmp_path, clock):
    first = Goodput(tmp_path, 10)
    with first.spending(TRAINING):
        clock(100)
        first.begin_save(5)
        with first.spending(SAVING):
            clock(2)
        clock(30)
        with first.spending(DATA):
            clock(3)
        first.begin_save(7)
        clock(40)
        first.write()
        clock(4)
        heartbeat = Heartbeat(0, socket.gethostname(), os.getpid(), clock=time.monotonic())  # then it is killed
        (tmp_path / "heartbeats").mkdir()
        (tmp_path / "heartbeats/rank-00000.json").write_text(json.dumps(asdict(heartbeat)))
        clock(1e6)  # the machine is off
    second = Goodput(tmp_path, 10)
    second.resume(5)  # that of step 7 is damaged
    assert second.seconds == {TRAINING: 100, DATA: 0, EVALUATION: 0, SAVING: 2, START: 20, LOST: 30 + 3 + 40 + 4}
    with second.spending(TRAINING):
        clock(50)
        second.begin_save(7)
        clock(10)
        second.resume(7)  # the run goes back by itself
    assert second.seconds[TRAINING] == 150
    assert second.seconds[LOST] == 87
    assert str(second) == "57.9 % of 4.3 min trained; 1.4 min lost; the start and 1 restart took 20 s"
    second.write()
    third = Goodput(tmp_path)
    third.resume(0)
    assert third.seconds[TRAINING] == 0


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "Invalid JSON"),
        (b'{"starts": -1}', "starts: Input should be greater than or equal to 0"),
        (
            b'{"starts": 1, "saves": 0, "seconds": {"lost": NaN}, "at_step": {}}',
            "seconds.lost: Input should be",
        ),
    ],
)
def test_a_damaged_ledger_is_begun_anew(tmp_path, content, fault):
    (tmp_path / goodput.LEDGER_NAME).write_bytes(content)
    warnings = list[str]()
    run = Goodput(tmp_path, warn=warnings.append)
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{tmp_path / goodput.LEDGER_NAME} cannot be read (")
    assert fault in warnings[0]
    assert warnings[0].endswith("); it is begun anew")
    run.write()
    assert json.loads((tmp_path / goodput.LEDGER_NAME).read_bytes())["starts"] == 1


def test_other_ranks_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Goodput(None).write()
    assert not list(tmp_path.iterdir())


def simulated_goodput(interval: float, mtbf: float, save: float, start: float) -> float:
    """The useful share of the time of 20,000 failures at random; an interval counts when its checkpoint is there."""
    chance, useful, total = random.Random(0), 0.0, 0.0
    for _ in range(20_000):
        lifetime = chance.expovariate(1 / mtbf)
        total += lifetime
        useful += interval * (max(0.0, lifetime - start) // (interval + save))
    return useful / total


def test_an_interval_that_never_succeeds_has_no_goodput():
    assert expected_goodput(36_000, 45, 0.1, 10) == 0


def test_another_process_s_heartbeat_says_nothing_of_this_ledger(tmp_path, clock):
    Goodput(tmp_path).write()
    ledger = goodput.read_ledger(tmp_path)
    host, process, _ = ledger["written"]
    assert goodput.unrecorded_seconds(ledger, Heartbeat(0, host, process, clock=1007.0)) == 7
    assert goodput.unrecorded_seconds(ledger, Heartbeat(0, host, process, clock=999.0)) == 0
    assert goodput.unrecorded_seconds(ledger, Heartbeat(0, host, process + 1, clock=1007.0)) == 0
    assert goodput.unrecorded_seconds(ledger, Heartbeat(0, "other", process, clock=1007.0)) == 0
    assert goodput.unrecorded_seconds(ledger, None) == 0


@pytest.mark.parametrize(("mtbf", "save", "start"), [(3600.0, 2.0, 30.0), (45.0, 0.2, 10.0), (600.0, 60.0, 5.0)])
def test_the_expectation_is_that_of_a_simulation(mtbf, save, start):
    best = best_interval(mtbf, save)
    expected = expected_goodput(best, mtbf, save, start)
    assert expected == pytest.approx(simulated_goodput(best, mtbf, save, start), abs=0.03)
    for other in (best / 3, best * 3):
        assert expected_goodput(other, mtbf, save, start) < expected


def test_the_planner_takes_what_a_run_has_measured(small_config, tmp_path, capsys, clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--config", str(small_config), f"output={tmp_path}", "--mtbf=3"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert (
        f"{tmp_path} holds no run that has measured how long saving and starting take; give --save-seconds and" in error
    )
    run = Goodput(tmp_path, start_seconds=40)
    for step in (1, 2):
        run.begin_save(step)
        with run.spending(SAVING):
            clock(3)
    run.write()
    assert main([*arguments, "checkpoint.every_minutes=60"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "failures one in 3 h; a checkpoint takes 3 s of training, a start 40 s" in printed
    assert "best interval checkpoint.every_minutes=4.2, expected goodput 97.3 %" in printed
    assert "configured interval checkpoint.every_minutes=60, expected goodput 83.9 %" in printed
    assert main([*arguments, "--mtbf=30000", "--save-seconds=134"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "a checkpoint takes 130 s of training, a start 40 s" in printed
    assert "checkpoint.every_minutes=2800," in printed
    assert main([*arguments, "--save-seconds=-1"]) == 2
    assert "--save-seconds is -1; use a finite number above 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments[:-1], "--start-seconds=3"])
    assert "give --mtbf as well" in capsys.readouterr().err

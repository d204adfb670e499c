"""When a watchdog ends a run, and whom it names; tests/launch/faults has runs that hang."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import watchdog
from launch.watchdog import FOLDER_NAME, HUNG_NAME, Heartbeat, Watchdog, describe_hang, slurm_start

HANG_SECONDS = 40


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator[Callable[..., Watchdog]]:
    """Returns a function: rank, world size → its watchdog, without its thread."""
    monkeypatch.setattr(Watchdog, "_watch", lambda dog: None)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    with contextlib.ExitStack() as stack:

        def start_one(rank: int, world_size: int = 2, start_id: str = "this start") -> Watchdog:
            dog = Watchdog(tmp_path, rank, world_size, HANG_SECONDS, start_id)
            dog._tick_seconds = 0.0
            stack.callback(dog.close)
            return dog

        yield start_one


@pytest.fixture
def ranks(start, monkeypatch) -> tuple[Watchdog, Watchdog]:
    """Two ranks whose processes run: whenever the first ticks, so does the other."""
    dogs = start(0), start(1)
    tick = dogs[0]._tick
    monkeypatch.setattr(dogs[0], "_tick", lambda: (tick(), dogs[1]._tick()))
    return dogs


def is_hung(dog: Watchdog) -> bool:
    dog._tick()  # shows what came before
    return dog._is_hung()


def said(folder: Path) -> list[str]:
    """Lines of the file that the first rank to find the run hung leaves for the others."""
    path = folder / FOLDER_NAME / HUNG_NAME
    return path.read_text().splitlines() if path.exists() else []


def test_a_rank_that_is_behind(ranks, tmp_path, capfd):
    ranks[0].beat(4, "computing")
    ranks[0].beat(4, "hearing from the other ranks")
    ranks[1].beat(4, "computing")
    assert is_hung(ranks[0])
    start_id, job, reason = said(tmp_path)
    assert (start_id, job) == ("this start", "")
    assert reason.startswith("rank 1 (")
    assert reason.endswith(") in step 5, computing: behind the others")
    assert capfd.readouterr().err.startswith(f"error: no progress for {HANG_SECONDS:g} s: {reason}. The stacks")
    assert ranks[1]._is_known(HUNG_NAME)
    assert is_hung(ranks[1])  # it says nothing more
    assert capfd.readouterr().err == ""


def test_one_that_makes_progress_is_not_hung(ranks, monkeypatch):
    tick = ranks[0]._tick
    monkeypatch.setattr(ranks[0], "_tick", lambda: (ranks[1].beat(4, "computing"), tick()))
    assert not is_hung(ranks[0])


@pytest.mark.parametrize("pausing", [0, 1])
def test_ranks_wait_for_one_that_pauses(ranks, pausing, tmp_path):
    with ranks[pausing].paused():
        assert not is_hung(ranks[0])
    assert said(tmp_path) == []
    assert is_hung(ranks[0])


@pytest.mark.parametrize("pausing", [True, False])
def test_a_process_that_is_stopped_is_named_in_pauses_too(start, pausing, tmp_path):
    """There after a second look: heartbeats may wait for the same disk."""
    dog, _ = start(0), start(1)
    with dog.paused() if pausing else contextlib.nullcontext():
        assert is_hung(dog) != pausing
        assert is_hung(dog)
    assert said(tmp_path)[2].startswith("rank 1 (")
    assert said(tmp_path)[2].endswith(") in step 0, start-up: stopped or gone")


def test_a_disk_that_all_wait_for_is_no_hang(start, tmp_path):
    dog, other = start(0), start(1)
    with dog.paused():
        for _ in range(3):
            assert not is_hung(dog)
            other._tick()  # at last
    assert said(tmp_path) == []


def test_after_a_stop_of_this_process_the_others_have_time(start, monkeypatch, tmp_path):
    dog, _ = start(0), start(1)
    tick = dog._tick

    def long_tick():
        monkeypatch.setattr(time, "monotonic", lambda: 100.0)
        tick()

    monkeypatch.setattr(dog, "_tick", long_tick)
    assert not dog._is_hung()
    monkeypatch.setattr(dog, "_tick", tick)
    assert is_hung(dog)


def test_a_rank_that_has_left_is_not_stopped(start, tmp_path):
    start(1).close()
    assert is_hung(start(0))
    assert "stopped" not in said(tmp_path)[2]


def test_a_heartbeat_that_cannot_be_read(start, tmp_path):
    dog, _ = start(0), start(1)
    (tmp_path / FOLDER_NAME / "rank-00001.json").unlink()
    assert is_hung(dog)
    assert said(tmp_path)[2] == "rank 1: no heartbeat can be read"


def test_without_its_folder_a_pause_goes_on(ranks, tmp_path):
    (tmp_path / FOLDER_NAME).rename(tmp_path / "elsewhere")
    with ranks[0].paused():
        assert not is_hung(ranks[0])


def test_what_earlier_starts_left_is_not_of_this_one(start, tmp_path):
    assert is_hung(start(0, 1, "an earlier start"))
    later = start(1, 2, "this start")  # rank 0 has not removed the file yet
    assert said(tmp_path)[0] == "an earlier start"
    assert not later._is_known(HUNG_NAME)
    start(0, 2, "this start")
    assert said(tmp_path) == []


def test_the_first_of_several_ranks_says_why(ranks, tmp_path, capfd):
    (tmp_path / FOLDER_NAME / HUNG_NAME).write_text("an earlier start\n\nsomething\n")
    assert is_hung(ranks[0])
    assert capfd.readouterr().err == ""
    assert said(tmp_path)[0] == "an earlier start"


def test_a_standard_error_that_nobody_reads_does_not_keep_the_process(monkeypatch):
    monkeypatch.setattr(watchdog, "_WRITE_SECONDS", 0.01)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, bytes(4096))
    os.set_blocking(write_end, True)
    standard_error = os.dup(2)
    try:
        os.dup2(write_end, 2)
        watchdog._write_stderr("error: no progress\n")
    finally:
        os.dup2(standard_error, 2)
        os.close(read_end)  # which ends the thread that still writes
        os.close(write_end)
        os.close(standard_error)


def test_whom_the_others_wait_for():
    beats = [Heartbeat(rank, "node7", 10 + rank, step=5, phase="computing", beats=9 - (rank == 2)) for rank in range(3)]
    assert describe_hang(beats, [1], []) == "rank 1 (node7, process 11) in step 5, computing: stopped or gone"
    assert describe_hang(beats, [], []) == "rank 2 (node7, process 12) in step 5, computing: behind the others"
    assert describe_hang(beats, [], [7, 9]) == "rank 7, 9: no heartbeat can be read"
    assert describe_hang(beats[:2], [], []) == (
        "all ranks have come to the same point, as rank 0 (node7, process 10) in step 5, computing"
    )


def test_starts_of_a_slurm_job():
    assert slurm_start({}) == ""
    assert slurm_start({"SLURM_JOB_ID": "4711"}) == "4711.0"
    assert slurm_start({"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"}) == "4711.2"

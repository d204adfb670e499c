"""A watchdog in each rank: it ends a run that hangs or has lost a rank, and says for which rank the others wait.

When one rank hangs, all others soon wait for it in a collective, and none makes progress. So each rank also shows that
its process runs: a thread rewrites a small file in the run's folder, with the number of *beats*, points of the run that
all ranks pass in the same order. A rank whose file no longer changes is stopped or gone; if there is none, the rank
with the fewest beats is behind.

A rank that is killed ends the others at once: their collectives fail, or the launcher signals them. One on the same
machine finds that its process has ended without having left the run, and names it.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from dataio.files import refresh_folder
from launch.connection_loss import connection_loss
from launch.distributed import RunError
from launch.flight_recorder import dump_path, write_dump
from launch.interrupt import EXIT_FATAL, EXIT_RESUME, exit_process
from launch.run_lock import is_alive, process_table, start_ticks
from launch.stop import Stopped

FOLDER_NAME = "heartbeats"  # in the run's folder
# Files in it of a start that hung, or lost a rank: lines with its id, its start of a Slurm job, the reason.
HUNG_NAME, LOST_NAME = "hung", "lost"
_RECORD_BYTES = 1024  # of a heartbeat's file, whose content is replaced in place: other hosts see that soonest
_TICKS = 30  # of the watchdog in the time that makes a hang
_SHORTEST_TICK, _LONGEST_TICK = 0.1, 10.0  # seconds
_SHORTEST_LOOK = 5.0  # seconds in which a process that runs has ticked, on a busy machine too
_RANKS_TO_LOOK = 8  # at a time, whether the run hangs; the next ones look if these do not find out
_LOST_SECONDS, _LOOK_SECONDS = 2.0, 0.05  # in which a rank of the lost one's machine has named it, by many looks
_WRITE_SECONDS = 5.0  # for a line on standard error, which may be a pipe that nobody reads


@dataclass
class Heartbeat:
    """What a rank shows of itself."""

    rank: int
    host: str
    process: int
    step: int = 0  # from 1
    phase: str = "start-up"
    beats: int = 0
    ticks: int = 0  # of its watchdog
    clock: float = 0.0  # seconds, of its host's monotonic clock, at the last tick
    pauses: int = 0  # that it is in
    done: bool = False  # it has left the run
    failed: bool = False  # by an exception of its own
    job: str = ""  # start of a Slurm job, as of `slurm_start`
    machine: str = ""  # in whose process table it has this id
    born: int | None = None  # its start, as of `start_ticks`

    @property
    def name(self) -> str:
        """Which rank this is: `rank 3 (node7, process 4711)`."""
        return f"rank {self.rank} ({self.host}, process {self.process})"

    def __str__(self) -> str:
        """Return where it is: `rank 3 (node7, process 4711) in step 12, waiting for data`."""
        return f"{self.name} in step {self.step}, {self.phase}"


class Watchdog:
    """Shows this rank's heartbeat in a run's folder, and ends the process when the run hangs.

    hang_seconds: without a beat of any rank. They count from the first call of `arm`; what comes before, such as
    compilation, may take any time. start_id: the same on all ranks of this start, and another than those of others.
    Raises OSError if the folder cannot be written to.
    """

    def __init__(self, run_folder: Path, rank: int, world_size: int, hang_seconds: float, start_id: str) -> None:
        self._folder, self._world_size, self._hang_seconds = run_folder / FOLDER_NAME, world_size, hang_seconds
        self._start_id, self._ending = start_id, threading.Lock()
        self._tick_seconds, self._ticks_to_look = _tick_seconds(hang_seconds), _ticks_to_look(hang_seconds)
        # All ranks find themselves without a beat at once, but need not all read the files of all.
        self._turn_seconds = rank // _RANKS_TO_LOOK * self._ticks_to_look * self._tick_seconds
        process = os.getpid()
        self._own = Heartbeat(rank, socket.gethostname(), process, machine=process_table(), born=start_ticks(process))
        self._own.job = slurm_start(os.environ)
        self._armed, self._closed, self._last_look = False, threading.Event(), dict[int, Heartbeat]()
        self._folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for name in (HUNG_NAME, LOST_NAME):
                (self._folder / name).unlink(missing_ok=True)
        self._path(rank).with_suffix(".txt").unlink(missing_ok=True)
        dump_path(self._folder, rank).unlink(missing_ok=True)
        self._path(rank).write_bytes(b"")
        self._show()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """Note that this rank has come to a phase of `step`, counted from 0."""
        self._own.step, self._own.phase = step + 1, phase
        self._own.beats += 1

    def arm(self) -> None:
        """Begin to watch."""
        self._armed = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block, wait for other ranks as long as their processes run, and let them wait for this one.

        It is for waits that may take any time or have a limit of their own, such as for a slow disk.
        """
        self._own.beats += 1
        self._own.pauses += 1
        try:
            yield
        finally:
            self._own.pauses -= 1
            self._own.beats += 1

    def close(self) -> None:
        """Leave the run."""
        self._closed.set()
        self._thread.join()
        self._own.done = True
        self._show()

    @contextmanager
    def ending_lost_runs(self) -> Iterator[None]:
        """End the process if a collective inside the block fails because another rank is gone."""
        try:
            yield
        except (RunError, Stopped):  # on all ranks
            raise
        except Exception as error:
            loss = connection_loss(error)
            if loss is None:
                self._own.failed = True  # before this process ends, which the others notice
                self._show()
                raise
            exit_process(self.status_without_rank(loss) or EXIT_FATAL)

    def status_without_rank(self, loss: str = "") -> int | None:
        """Return the exit status if the run cannot go on without another rank; None if all are there.

        It is EXIT_RESUME if that rank is gone or hangs, which one rank says for all, and EXIT_FATAL if it has failed.
        loss: of a connection, which says that some rank is gone; "" if that is only a question.
        """
        with self._ending:
            ranks, deadline = [rank for rank in range(self._world_size) if rank != self._own.rank], time.monotonic()
            deadline += _LOST_SECONDS if loss else 0.0
            while True:
                if self._is_known(HUNG_NAME) or self._is_known(LOST_NAME):
                    return EXIT_RESUME
                others = self._heartbeats(ranks).values()
                if any(found.failed for found in others):  # and more may be gone because of that
                    return EXIT_FATAL
                names = ", ".join(found.name for found in others if self._is_lost(found))
                if names or time.monotonic() >= deadline:
                    break
                ranks = [found.rank for found in others if found.machine == self._own.machine]
                time.sleep(_LOOK_SECONDS)
            if names or loss:
                self._report_lost(names or f"a rank on another machine ({loss})")
                return EXIT_RESUME
        return None

    def _report_lost(self, names: str) -> None:
        if self._record(LOST_NAME, names):
            _write_stderr(
                f"error: {names} gone in step {self._own.step}, killed or out of memory; the same command goes on from"
                " the last checkpoint, if there is one\n"
            )

    def _is_lost(self, other: Heartbeat) -> bool:
        """Return whether the process of another rank has ended without leaving the run, on this machine."""
        return not other.done and other.machine == self._own.machine and not is_alive(other.process, other.born)

    def _watch(self) -> None:
        beats, changed = 0, time.monotonic()
        while not self._closed.is_set():
            began = time.monotonic()
            self._tick()
            now = time.monotonic()
            was_stopped = now - began > 2 * self._tick_seconds + 1  # as this process was, or its machine
            if self._own.beats != beats or was_stopped or not self._armed:
                beats, changed = self._own.beats, now
            with self._ending:  # a rank that has found one to be gone prints a line first
                if self._is_known(LOST_NAME):
                    os._exit(EXIT_RESUME)
            if self._is_known(HUNG_NAME):
                self._end()
            if now - changed > self._hang_seconds + self._turn_seconds:
                if self._is_hung():
                    self._end()
                changed = time.monotonic()

    def _tick(self) -> None:
        self._closed.wait(self._tick_seconds)
        self._own.ticks += 1
        self._own.clock = time.monotonic()
        self._show()

    def _is_known(self, name: str) -> bool:
        """Return whether a rank of this start has left the file HUNG_NAME or LOST_NAME."""
        with suppress(OSError):
            refresh_folder(self._folder)
            return (self._folder / name).read_bytes().startswith(self._start_id.encode())
        return False

    def _record(self, name: str, reason: str) -> bool:
        """Leave such a file for the other ranks and the Slurm job; return False if another rank was quicker."""
        try:
            with open(self._folder / name, "x", encoding="utf-8") as file:
                file.write(f"{self._start_id}\n{slurm_start(os.environ)}\n{reason}\n")
        except FileExistsError:
            return False
        except OSError:  # a full disk, for example: more than one rank may say the same
            pass
        return True

    def _is_hung(self) -> bool:
        """Return whether no rank makes progress; the first one to know says why, and leaves the file for the others.

        Ends the process if the others wait for a rank that has failed: not every launcher ends them.
        """
        before, began = self._heartbeats(), time.monotonic()
        for _ in range(self._ticks_to_look):
            self._tick()
            if self._closed.is_set():
                return False
            if self._is_known(HUNG_NAME):
                return True
        was_stopped = time.monotonic() - began > 2 * self._ticks_to_look * self._tick_seconds + 1
        after = self._heartbeats()
        if failed := ", ".join(found.name for found in after.values() if found.failed):
            _write_stderr(f"error: {failed} has failed, for the reason that it has printed\n")
            os._exit(EXIT_FATAL)
        known = after.keys() & before.keys()
        if was_stopped or any(after[rank].beats != before[rank].beats for rank in known):
            return False
        silent = [rank for rank in known if after[rank].ticks == before[rank].ticks and not after[rank].done]
        # If not even this rank's can be read, it is the folder that is lost.
        lost = set(range(self._world_size)) - after.keys() - before.keys() if self._own.rank in after else set()
        if self._own.pauses or any(found.pauses for found in after.values()):
            # The disk that they wait for may be that of the heartbeats: it had time since the look before.
            earlier, self._last_look = self._last_look, after
            silent = [rank for rank in silent if rank in earlier and earlier[rank].ticks == after[rank].ticks]
            lost = set()
            if not silent:
                return False
        reason = describe_hang(list(after.values()) or [self._own], silent, sorted(lost))
        if self._record(HUNG_NAME, reason):
            _write_stderr(
                f"error: no progress for {self._hang_seconds:g} s: {reason}. The stacks of the ranks are in"
                f" {self._folder}; the same command goes on from the last checkpoint, if there is one\n"
            )
        return True

    def _end(self) -> NoReturn:
        """Write the stacks of this rank's threads, give the other ranks the time to do so, and end the process.

        NCCL's flight recorder is written meanwhile, in a thread: NCCL may hang there too.
        """
        try:
            stacks = f"{self._own}\n{_stacks()}"
            with suppress(OSError):
                self._path(self._own.rank).with_suffix(".txt").write_text(stacks)
            _write_stderr(stacks)
            threading.Thread(target=write_dump, args=(self._folder, self._own.rank), daemon=True).start()
            for _ in range(self._ticks_to_look):  # launchers end all ranks as soon as the first one has ended
                self._tick()
        finally:
            os._exit(EXIT_RESUME)

    def _path(self, rank: int) -> Path:
        return _heartbeat_path(self._folder.parent, rank)

    def _show(self) -> None:
        record = json.dumps(asdict(self._own)).encode().ljust(_RECORD_BYTES - 1) + b"\n"
        with suppress(OSError), open(self._path(self._own.rank), "r+b", buffering=0) as file:
            file.write(record)

    def _heartbeats(self, ranks: Iterable[int] | None = None) -> dict[int, Heartbeat]:
        """Return the heartbeats of these ranks, or all, that can be read, by rank."""
        ranks = range(self._world_size) if ranks is None else ranks
        read = {rank: read_heartbeat(self._folder.parent, rank) for rank in ranks}
        return {rank: found for rank, found in read.items() if found is not None}


def read_heartbeat(run_folder: Path, rank: int) -> Heartbeat | None:
    """Return the last heartbeat of a rank; None if it cannot be read."""
    with suppress(OSError, ValueError, TypeError):
        return Heartbeat(**json.loads(_heartbeat_path(run_folder, rank).read_bytes()))
    return None


def _heartbeat_path(run_folder: Path, rank: int) -> Path:
    return run_folder / FOLDER_NAME / f"rank-{rank:05d}.json"


def seconds_until_end(hang_seconds: float) -> float:
    """Return how long after the last beat a watchdog ends the process, at the latest."""
    ticks = 2 + 2 * _ticks_to_look(hang_seconds)
    return hang_seconds + ticks * _tick_seconds(hang_seconds)


def slurm_start(environ: Mapping[str, str]) -> str:
    """Return which start of a Slurm job this is, `4711.0`; "" outside Slurm."""
    job = environ.get("SLURM_JOB_ID")
    return f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def _tick_seconds(hang_seconds: float) -> float:
    return min(max(hang_seconds / _TICKS, _SHORTEST_TICK), _LONGEST_TICK)


def _ticks_to_look(hang_seconds: float) -> int:
    return max(4, round(_SHORTEST_LOOK / _tick_seconds(hang_seconds)))


def describe_hang(heartbeats: list[Heartbeat], silent: list[int], lost: list[int]) -> str:
    """Say for which ranks the others wait.

    heartbeats: all that can be read. silent, lost: ranks whose heartbeat has stopped, or cannot be read.
    """
    if lost:
        return f"rank {', '.join(map(str, lost))}: no heartbeat can be read"
    fewest = min(heartbeat.beats for heartbeat in heartbeats)
    if silent:
        named, fault = [found for found in heartbeats if found.rank in silent], "stopped or gone"
    elif all(found.beats == fewest for found in heartbeats):
        return f"all ranks have come to the same point, as {heartbeats[0]}"
    else:
        named, fault = [found for found in heartbeats if found.beats == fewest], "behind the others"
    return f"{'; '.join(map(str, named))}: {fault}"


def _stacks() -> str:
    """Return the stacks of all threads. faulthandler writes in small pieces, which several ranks' would mix."""
    with open(os.memfd_create("stacks"), "w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()


def _write_stderr(text: str) -> None:
    """Write to standard error, whatever the main thread holds, and do not wait long for one that nobody reads."""

    def write() -> None:
        with suppress(OSError):
            os.write(2, text.encode())

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_WRITE_SECONDS)

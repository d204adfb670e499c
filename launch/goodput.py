"""Where the time of a run goes, over all its starts: *goodput* is the share that trained it and was not lost again.

All seconds are rank 0's. A start that resumes from a checkpoint counts as lost what the run spent on the steps after
it, which are made again. Time between two starts is nobody's.
"""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from dataio.files import read_small_file
from launch.checkpoint.layout import first_fault
from launch.watchdog import Heartbeat, read_heartbeat

LEDGER_NAME = "goodput.json"
TRAINING, DATA, EVALUATION, SAVING, START, LOST = KINDS = (
    *("training", "waiting for data", "evaluation", "saving", "start", "lost"),
)
_REPEATED = TRAINING, DATA, EVALUATION  # a resumed run spends them once more on the same steps
_CHECKPOINTS_KEPT = 100  # of which the ledger knows the seconds spent until then

_Seconds = dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class Ledger(TypedDict):
    """What a run has recorded."""

    starts: Annotated[int, Field(ge=0)]
    saves: Annotated[int, Field(ge=0)]
    seconds: _Seconds  # by kind
    at_step: dict[int, _Seconds]  # the same when a checkpoint of so many completed steps was begun
    written: tuple[str, int, float]  # host and process, and seconds of its monotonic clock, when this was written


class Goodput:
    """The seconds of a run by kind, kept in its folder from start to start.

    folder: the run's, on rank 0; None keeps nothing.
    start_seconds: what this start has taken so far. Time is of the kind START until `begin`.
    warn: is told of a damaged record, which is begun anew.
    """

    def __init__(
        self, folder: Path | None, start_seconds: float = 0.0, warn: Callable[[str], None] = lambda line: None
    ) -> None:
        self._path = None if folder is None else folder / LEDGER_NAME
        self._ledger = _new_ledger()
        if folder is not None:
            try:
                self._ledger = read_ledger(folder)
            except ValueError as error:
                warn(f"{error}; it is begun anew")
            self._add(LOST, unrecorded_seconds(self._ledger, read_heartbeat(folder, rank=0)))
        self._ledger["starts"] += 1
        self._kind, self._since = START, time.monotonic() - start_seconds

    def resume(self, step: int) -> None:
        """Count as lost what was spent on the steps after `step` completed ones, from which the run goes on."""
        self._book()
        seconds, before = self._ledger["seconds"], self._ledger["at_step"].get(step, {})
        for kind in _REPEATED if step == 0 or before else ():
            spent = max(0.0, seconds.get(kind, 0.0) - before.get(kind, 0.0))
            self._add(kind, -spent)
            self._add(LOST, spent)
        self._ledger["at_step"] = {saved: at for saved, at in self._ledger["at_step"].items() if saved <= step}

    def begin(self, kind: str) -> None:
        """Count the time from now on as of this kind."""
        self._book()
        self._kind = kind

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Count the time inside the block as of this kind, and no longer as of the kind around it.

        The wait for the first batch is part of the start.
        """
        if (self._kind, kind) == (START, DATA):
            yield
            return
        self._book()
        outer, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._book()
            self._kind = outer

    def begin_save(self, step: int) -> None:
        """Record what was spent until the checkpoint after `step` completed steps, before that is written."""
        self._book()
        self._ledger["saves"] += 1
        at_step = self._ledger["at_step"] | {step: dict(self._ledger["seconds"])}
        self._ledger["at_step"] = dict(sorted(at_step.items())[-_CHECKPOINTS_KEPT:])
        self.write()

    def write(self) -> None:
        """Record what was spent until now; on a full disk, the record of before remains."""
        self._book()
        if self._path is None:
            return
        self._ledger["written"] = socket.gethostname(), os.getpid(), time.monotonic()
        aside = self._path.with_name(f".{self._path.name}")
        with suppress(OSError):
            aside.write_text(json.dumps(self._ledger))
            aside.replace(self._path)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each kind until now."""
        self._book()
        return {kind: self._ledger["seconds"].get(kind, 0.0) for kind in KINDS}

    def shares(self) -> dict[str, float]:
        """Return the share of each kind in all time until now, as scalars: `goodput/training`."""
        seconds = self.seconds
        total = sum(seconds.values())
        return {f"goodput/{kind.replace(' ', '_')}": value / total for kind, value in seconds.items()}

    def __str__(self) -> str:
        """Return, for example, "92.1 % of 6.4 h trained; 11 min lost; the start and 3 restarts took 8.2 min"."""
        seconds, restarts = self.seconds, self._ledger["starts"] - 1
        total = sum(seconds.values())
        parts = [f"{100 * seconds[TRAINING] / total:.1f} % of {_duration(total)} trained"]
        if seconds[LOST] or restarts:
            parts.append(f"{_duration(seconds[LOST])} lost")
        if restarts:
            parts.append(f"the start and {restarts} restart{'s' * (restarts > 1)} took {_duration(seconds[START])}")
        return "; ".join(parts)

    def _book(self) -> None:
        now = time.monotonic()
        self._add(self._kind, now - self._since)
        self._since = now

    def _add(self, kind: str, seconds: float) -> None:
        self._ledger["seconds"][kind] = self._ledger["seconds"].get(kind, 0.0) + seconds


def unrecorded_seconds(ledger: Ledger, heartbeat: Heartbeat | None) -> float:
    """Return for how long a process that was killed lived after it had written the ledger, by its last heartbeat."""
    host, process, clock = ledger["written"]
    if heartbeat is None or (heartbeat.host, heartbeat.process) != (host, process):
        return 0.0
    return max(0.0, heartbeat.clock - clock)


def read_ledger(folder: Path) -> Ledger:
    """Return what the run in a folder has recorded, if anything. Raises ValueError if the file is damaged."""
    path = folder / LEDGER_NAME
    try:
        return TypeAdapter(Ledger).validate_json(read_small_file(path))
    except FileNotFoundError:
        return _new_ledger()
    except (OSError, ValueError) as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{path} cannot be read ({fault})") from error


def _new_ledger() -> Ledger:
    return {"starts": 0, "saves": 0, "seconds": {}, "at_step": {}, "written": ("", 0, 0.0)}


def expected_goodput(interval: float, mtbf: float, save: float, start: float) -> float:
    """Return the share of time that trains and is not lost, if failures come at random: Daly (2006), equation 20.

    All in seconds. interval: of training between two checkpoints. mtbf: mean time between failures of the whole job.
    save: for which training waits at a checkpoint. start: from a failure to the first step.
    """
    try:
        return interval / (mtbf * math.exp(start / mtbf) * math.expm1((interval + save) / mtbf))
    except OverflowError:  # of the time in which one interval succeeds
        return 0.0


def best_interval(mtbf: float, save: float) -> float:
    """Return the interval between checkpoints with the best expected goodput, in seconds: Daly (2006), equation 37."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(save / (2 * mtbf))
    return math.sqrt(2 * save * mtbf) * (1 + ratio / 3 + ratio**2 / 9) - save


def _duration(seconds: float) -> str:
    """Return a time in words: "11 min", "6.4 h"."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.{1 if seconds < 10 * unit else 0}f} {name}"
    return f"{seconds:.0f} s"

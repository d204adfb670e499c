"""Signals that end a command, even while it still imports; and the exit statuses of a run.

Commands call `exit_on_interrupt`, and training `StopSignals.listen`, before they import PyTorch, which takes seconds.
stop.py lets all ranks of a run agree on a stop.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import NoReturn

EXIT_FATAL = 1  # exit status: an error after the first step
EXIT_REFUSED = 2  # configuration, data or machine cannot work; nothing was trained
EXIT_RESUME = 75  # stopped or without a rank before its end; the same command resumes (EX_TEMPFAIL of sysexits.h)
EXIT_INTERRUPTED = 130  # Ctrl-C of a command that does not resume, as of shells: 128 + SIGINT

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
#: Signals closer together count as one: launchers pass Ctrl-C on to ranks that the terminal has sent it to already.
_SAME_REQUEST_SECONDS = 1.0
_ANSWER_SECONDS = 5.0  # in which the files that say whether a rank is missing can be read


def exit_on_interrupt(remedy: str = "") -> None:
    """Make Ctrl-C end this process at once; rank 0 prints "interrupted" and the remedy.

    Does nothing where Ctrl-C is ignored, as in a shell's background jobs, or has a handler already.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    is_rank_zero = _is_rank_zero()

    def leave(_signal: int, _frame: FrameType | None) -> None:
        if is_rank_zero:
            _write_line(f"interrupted{remedy}")
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, leave)


class StopSignals:
    """SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 as requests to stop a run.

    Until `defer`, the first one ends the process at once with status EXIT_RESUME, SIGTERM with 128 + SIGTERM: launchers
    send it where another rank was refused, which is no reason to start again. After `defer`, the first one is kept in
    `received`, the second changes nothing, and the third ends the process at once. Signals within a second count as
    one. After `ignore`, none has an effect.

    A thread waits for the signals, which are blocked everywhere else: it also acts while the main thread waits in a
    collective, where Python would not run a handler; no system call is interrupted; and child processes inherit the
    blocked signals, so those that are sent to a whole process group or job step do not end them.
    """

    def __init__(self) -> None:
        self.received: str | None = None  # name of the first signal after `defer`
        self._status_without_rank: Callable[[], int | None] = lambda: None
        self._deferred, self._ended, self._requests, self._last = False, False, 0, -_SAME_REQUEST_SECONDS
        self._lock = threading.Lock()
        self._is_rank_zero = _is_rank_zero()

    def listen(self) -> "StopSignals":
        """Start to wait for the signals, except those that are ignored, as Ctrl-C in a shell's background jobs.

        To be called from the main thread before it starts others, which inherit the blocked signals.
        """
        signals = {number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=self._listen, args=(signals,), name="signals", daemon=True).start()
        return self

    def defer(self, status_without_rank: Callable[[], int | None] = lambda: None) -> None:
        """Keep signals from now on instead of ending the process.

        status_without_rank: the exit status if another rank has failed or is gone, so that no agreement is possible:
        then the next signal, by which launchers end the others, ends this process at once; else None. It is called in
        a thread.
        """
        with self._lock:
            self._deferred, self._status_without_rank = True, status_without_rank

    def ignore(self) -> None:
        """Ignore signals from now on: this rank's exit status is settled, and launchers signal those that exit last."""
        self._ended = True

    def _listen(self, signals: set[signal.Signals]) -> None:
        while True:
            number = signal.sigwait(signals)
            if self._ended:
                continue
            # The others would wait for the missing rank for ever. A third signal ends the ranks one by one.
            if self._deferred and self._requests < 2 and (status := self._ask_for_status()) is not None:
                os._exit(status)
            with self._lock:
                self._handle(signal.Signals(number), time.monotonic())

    def _ask_for_status(self) -> int | None:
        """Return the exit status if a rank is missing; None if not, or a file system that hangs does not say it."""
        answers = SimpleQueue[int | None]()
        threading.Thread(target=lambda: answers.put(self._status_without_rank()), daemon=True).start()
        with suppress(Empty):
            return answers.get(timeout=_ANSWER_SECONDS)
        return None

    def _handle(self, number: signal.Signals, now: float) -> None:
        if now - self._last < _SAME_REQUEST_SECONDS:
            return
        self._last = now
        self._requests += 1
        if not self._deferred:
            self._say(f"stopped by {number.name} before the first step; the same command starts it again")
            os._exit(128 + number if number == signal.SIGTERM else EXIT_RESUME)
        if self._requests == 1:
            self.received = number.name
            self._say(f"{number.name}: the run stops, and saves what it has trained; a third signal ends it at once")
        elif self._requests == 2:
            self._say(f"{number.name}: the run is stopping already; one more signal ends it at once")
        else:
            self._say(f"ended by {number.name}; the same command resumes from the last checkpoint, if there is one")
            os._exit(128 + number)

    def _say(self, line: str) -> None:
        if self._is_rank_zero:
            _write_line(line)


def exit_process(status: int) -> NoReturn:
    """End this process with this status, without the two seconds in which Python and PyTorch are torn down.

    Functions registered with atexit are called if the status is 0. Otherwise there is no time: launchers kill all other
    ranks as soon as one has failed, and their statuses are lost.
    """
    if not status:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_rank_zero() -> bool:
    """Return whether this is rank 0 by the launcher's variables: launch.distributed would import PyTorch."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _write_line(line: str) -> None:
    """Write a line to standard error, from a signal handler or another thread, and show a progress bar's cursor."""
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")
    os.write(2, f"{line}\n".encode())

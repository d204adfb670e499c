"""Ctrl-C as the end of a command: one line and exit status 130, from its first import on.

Commands call `exit_on_interrupt` before they import PyTorch, which takes seconds. Nothing is cleaned up: what a killed
run leaves, the next start copes with.
"""

import os
import signal
from types import FrameType

EXIT_INTERRUPTED = 130  # exit status, as of shells: 128 + SIGINT


def exit_on_interrupt(remedy: str = "") -> None:
    """Lets Ctrl-C end this process at once; of several ranks, rank 0 says so, and what to do next.

    Changes nothing where Ctrl-C is ignored, as in a shell's background jobs, or handled already.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    is_rank_zero = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"

    def leave(_signal: int, _frame: FrameType | None) -> None:
        if is_rank_zero:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
            os.write(2, f"interrupted{remedy}\n".encode())
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, leave)

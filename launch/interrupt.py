"""Ctrl-C ends a command with one line and exit status 130, even while it still imports.

Commands call `exit_on_interrupt` before they import PyTorch, which takes seconds. There is no clean-up: the next start
handles what a killed run leaves.
"""

import os
import signal
from types import FrameType

EXIT_INTERRUPTED = 130  # exit status, as of shells: 128 + SIGINT


def exit_on_interrupt(remedy: str = "") -> None:
    """Make Ctrl-C end this process at once; rank 0 prints "interrupted" and the remedy.

    Does nothing where Ctrl-C is ignored, as in a shell's background jobs, or has a handler already.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    is_rank_zero = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"

    def leave(_signal: int, _frame: FrameType | None) -> None:
        if is_rank_zero:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h\n")  # shows the cursor, which a progress bar hides
            os.write(2, f"interrupted{remedy}\n".encode())
        os._exit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, leave)

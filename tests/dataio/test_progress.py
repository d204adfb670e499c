"""Progress on a real terminal, and none elsewhere."""

import os
import pty
import subprocess
import sys

CODE = """
from dataio.progress import progress_bar, spinner
with spinner("listing photographs"):
    pass
with progress_bar("packing", 4 * 2**20) as show:
    if show:
        show(2**20)
"""


def test_nothing_is_shown_without_a_terminal():
    command = subprocess.run([sys.executable, "-c", CODE], capture_output=True)
    assert (command.returncode, command.stdout, command.stderr) == (0, b"", b"")


def test_progress_on_a_terminal():
    ours, theirs = pty.openpty()
    command = subprocess.Popen([sys.executable, "-c", CODE], stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # its other end is closed
        pass
    os.close(ours)
    assert command.wait() == 0
    assert b"listing photographs" in shown
    assert b"packing" in shown
    assert b"1.0/4.0 MiB" in shown

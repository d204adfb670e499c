"""Progress display of commands, shown if their standard error is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """Show `text` beside a spinner while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # imported here, since commands in scripts never need it

    with Console(stderr=True, markup=False, emoji=False).status(text):
        yield


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """Give the block a function that shows how many of `total` bytes are done; None if it is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(text), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        row = bar.add_task("", total=total)
        yield lambda done: bar.update(row, completed=done)

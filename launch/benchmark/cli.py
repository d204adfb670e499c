"""The command-line runner of the benchmarks: parser, checks of arguments, errors, exit status, and the report's file.

Imports torch alone, as some benchmarks run where nothing else is installed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.benchmark.report import default_path, prepare_output, read_report, user_path, write_report
from launch.command_line import make_parser
from launch.distributed import default_device_type

Report = dict[str, Any]
AddOption = Callable[..., argparse.Action]  # argparse's add_argument
#: Errors of users and of the machine as failures of a `Command`: exit status 2.
USAGE_ERRORS: dict[type[Exception], int] = {ValueError: 2, RuntimeError: 2, OSError: 2}
_MOST_THREADS_PER_CPU = 4


def start(arguments: argparse.Namespace, prepare: Callable[[argparse.Namespace], Callable[[], int]]) -> int:
    """Run what `prepare` makes of the arguments and return its exit status.

    `prepare` checks the arguments; a ValueError, RuntimeError or OSError of its is printed, and the exit status is 2.
    """
    try:
        run = prepare(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run()


def resolve_device(name: str | None, remedy: str = "use --device cpu") -> torch.device:
    """Return the named or the default device. Raises RuntimeError if it is a GPU and there is none."""
    device = torch.device(name or default_device_type())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch sees no NVIDIA GPU; {remedy}")
    return device


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise ValueError if one of these options was given a number that is not above 0."""
    for name in names:
        value = getattr(arguments, name.replace("-", "_"))
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; give a number above 0")


def require_few_threads(arguments: argparse.Namespace, name: str) -> None:
    """Raise ValueError if this option asks for so many threads, or processes, that they would only wait for a CPU."""
    value, cpus = getattr(arguments, name), len(os.sched_getaffinity(0))
    most = _MOST_THREADS_PER_CPU * cpus
    if value is not None and value > most:
        raise ValueError(f"--{name} is {value}, and this process may use {cpus} CPUs; give at most {most}")


@dataclass(frozen=True)
class Command:
    """A benchmark as a command that measures, writes a report as JSON and prints it, or prints an earlier one.

    resolve: checks the arguments and returns what measures: path of the output → report.
    show: prints a report, as Markdown or plain.
    failures: errors of measuring that are printed in a line, by the exit status they lead to; others are bugs.
    """

    name: str
    doc: str  # the module's docstring: a summary, then examples
    add_options: Callable[[AddOption], None]
    resolve: Callable[[argparse.Namespace], Callable[..., Report]]
    show: Callable[[Report, bool], None]
    failures: Mapping[type[Exception], int] = field(default_factory=dict)
    describe_failure: Callable[[Exception], str] = str
    device_help: str = "default: a GPU where there is one"  # "" for a benchmark without the option
    writes_by_default: bool = True
    needs_result: bool = False  # exit status 1 if every entry of the results was skipped

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """Parse the arguments; --help and errors exit."""
        parser = make_parser(f"python -m launch.benchmark {self.name}", self.doc)
        add = parser.add_argument
        if self.device_help:
            add("--device", choices=("cuda", "cpu"), help=self.device_help)
        self.add_options(add)
        default = "a new file below runs/benchmark" if self.writes_by_default else "none is written"
        add("--output", type=user_path, metavar="FILE.json", help=f"default: {default}")
        add("--markdown", action="store_true", help="print tables as Markdown")
        add("--show", type=user_path, metavar="FILE.json", help="print the tables of this file and measure nothing")
        return parser.parse_args(argv)

    def main(self, argv: list[str] | None = None) -> int:
        """Run the command; returns its exit status."""
        return start(self.parse(argv), self._prepare)

    def _prepare(self, arguments: argparse.Namespace) -> Callable[[], int]:
        if arguments.show:
            return partial(self._show, read_report(arguments.show, self.name), arguments.markdown)
        measure = self.resolve(arguments)
        path = arguments.output or (default_path(self.name) if self.writes_by_default else None)
        return partial(self._measure, measure, path and prepare_output(path), arguments.markdown)

    def _measure(self, measure: Callable[..., Report], path: Path | None, markdown: bool) -> int:
        try:
            report = measure(path)
        except tuple(self.failures) as error:
            print(f"error: {self.describe_failure(error)}", file=sys.stderr)
            return next(status for kind, status in self.failures.items() if isinstance(error, kind))
        if path:
            write_report(path, report)
        self.show(report, markdown)
        if path:
            print(f"written to {path}", file=sys.stderr)
        return int(self.needs_result and all("skipped" in entry for entry in report.get("results", ({},))))

    def _show(self, report: Report, markdown: bool) -> int:
        self.show(report, markdown)
        return 0

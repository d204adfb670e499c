"""List the checkpoints of a run and check them, or compare two of them.

python -m launch.checkpoint runs/b5
python -m launch.checkpoint runs/b5 --verify
python -m launch.checkpoint runs/b5 --diff step-00001200 best
python -m launch.checkpoint --diff runs/a/checkpoints/latest runs/b/checkpoints/latest

Exit status: 0; 1 if a checkpoint is corrupt, as far as was looked, or the two differ; 2 for an error.
"""

from launch.interrupt import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()

import sys
from datetime import datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dataio.files import escape_unprintable, user_path
from launch.checkpoint import layout
from launch.checkpoint.layout import RunState
from launch.command_line import make_parser

_RUN_HELP = "a run's folder, its checkpoints folder, or a checkpoint (RUN/checkpoints/best, latest or step-…)"
_SHOWN_TENSORS = 10  # of a file, without --all


def main(argv: list[str] | None = None) -> int:
    """List or compare checkpoints as the command line says; return the exit status."""
    parser = make_parser("python -m launch.checkpoint", __doc__)
    parser.add_argument("run", nargs="?", type=user_path, help=_RUN_HELP)
    parser.add_argument("--verify", action="store_true", help="hash all files; otherwise only sizes are compared")
    parser.add_argument(
        "--diff", nargs=2, type=user_path, metavar=("A", "B"), help="compare two checkpoints: names in RUN, or paths"
    )
    parser.add_argument("--all", action="store_true", help=f"with --diff, list more than {_SHOWN_TENSORS} tensors")
    arguments = parser.parse_args(argv)
    if arguments.run is None and not arguments.diff:
        parser.error("give RUN, or two checkpoints with --diff")
    try:
        if arguments.diff:
            a, b = (find_named(name, arguments.run) for name in arguments.diff)
            return print_diff(a, b, sys.maxsize if arguments.all else _SHOWN_TENSORS)
        return print_list(*find_checkpoints(arguments.run), arguments.verify)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def find_checkpoints(path: Path) -> tuple[Path, list[Path]]:
    """Return the folder of checkpoints and those of its checkpoints that `path` means, the oldest first.

    Raises FileNotFoundError if there are none, ValueError if `path` is a pointer that names none.
    """
    if path.name in layout.POINTERS and path.is_file():
        path = layout.resolve_pointer(path)
    if layout.is_checkpoint(path) and path.is_dir():
        return path.parent, [path]
    folder = path if layout.list_checkpoints(path) else path / "checkpoints"
    if not (found := layout.list_checkpoints(folder)):
        remedy = "the run has none yet" if (path / "config.yaml").is_file() else f"give {_RUN_HELP}"
        raise FileNotFoundError(f"no checkpoints at {path}; {remedy}")
    return folder, found


def find_named(name: Path, run: Path | None) -> Path:
    """Return the one checkpoint that has this name in a run, or this path.

    Raises FileNotFoundError or ValueError if there is none.
    """
    if run is not None and len(name.parts) == 1:
        folder, found = find_checkpoints(run)
        name = folder / name
        if not (name.is_dir() or name.is_file()):
            there = ", ".join(path.name for path in found)
            raise FileNotFoundError(f"{folder} has no checkpoint {name.name}; there are: {there}")
    _, found = find_checkpoints(name)
    if len(found) > 1:
        raise ValueError(f"{name} holds {len(found)} checkpoints; give one of them, for example {found[-1]}")
    return found[0]


def print_list(folder: Path, checkpoints: list[Path], verify: bool) -> int:
    """Print a table of checkpoints and what is wrong with them; return the exit status."""
    marks, faults = read_pointers(folder)
    remarks: list[str] = []
    table = Table("checkpoint", "", title=escape_unprintable(folder), box=box.SIMPLE)
    for column in ("step", "epoch", "MiB", "ranks", "ZeRO"):
        table.add_column(column, justify="right")
    for column in ("version", "written", "files"):
        table.add_column(column)
    for checkpoint in checkpoints:
        fault, state = inspect(checkpoint, verify)
        if not checkpoint.exists():  # the run has removed it meanwhile
            continue
        if fault is not None:
            faults.append(fault)
        elif state is None:
            remarks.append(layout.describe_old_version(checkpoint))
        marked = ", ".join(name for name, target in marks.items() if target == checkpoint.name)
        status = "corrupt" if fault else "intact" if verify else "complete"
        table.add_row(*map(Text, (checkpoint.name, marked, *describe(checkpoint, state), status)))
    console = _console()
    console.print(table)
    for line in (*remarks, *faults):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if faults else 0


def inspect(checkpoint: Path, verify: bool) -> tuple[str | None, RunState | None]:
    """Return what is wrong with a checkpoint, and its run state, which those of version 0.1.0 lack."""
    if fault := layout.find_corruption(checkpoint, verify):
        return fault, None
    if layout.is_of_old_version(checkpoint):
        return None, None
    try:
        return None, layout.read_state(checkpoint)
    except (ValueError, OSError) as error:
        return str(error), None


def read_pointers(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the names of the checkpoints that `latest` and `best` name, and the faults of those that name none."""
    marks, faults = {}, []
    for pointer in (folder / name for name in layout.POINTERS):
        if pointer.is_dir():  # a link that a user has made, or a copy
            marks[pointer.name] = pointer.resolve().name
        elif pointer.exists() or pointer.is_symlink():
            try:
                marks[pointer.name] = layout.resolve_pointer(pointer).name
            except (ValueError, OSError) as error:
                faults.append(str(error))
    return marks, faults


def describe(checkpoint: Path, state: RunState | None) -> list[str]:
    """Return step, epoch, size, world size, ZeRO stage, version and date; "-" for what is unknown."""
    files = [path for path in (*checkpoint.glob("*"), *checkpoint.glob("*/*")) if path.is_file()]
    size = f"{sum(path.stat().st_size for path in files) / 2**20:,.1f}"
    dated = [path for path in files if path.name == layout.MANIFEST_NAME] or [checkpoint]
    changed = dated[0].stat().st_mtime
    written = f"{datetime.fromtimestamp(changed):%Y-%m-%d %H:%M}"
    if state is not None:
        known = f"{state.step:,}", f"{state.epoch:.2f}", size, str(state.world_size), str(state.zero_stage)
        return [*known, escape_unprintable(state.version), written]
    version = "0.1.0" if layout.is_of_old_version(checkpoint) else "-"
    step = f"{layout.step_of(checkpoint):,}" if layout.has_step_name(checkpoint) else "-"
    return [step, "-", size, "-", "-", version, written]


def print_diff(a: Path, b: Path, shown: int) -> int:
    """Print how two checkpoints differ, at most `shown` tensors of each file; return the exit status."""
    from launch.checkpoint.diff import diff_states, diff_tensors  # imports PyTorch

    console, differ = _console(), False
    console.print(f"A is {a}\nB is {b}", markup=False, highlight=False, soft_wrap=True)
    for file in diff_tensors(a, b):
        total = file.equal + len(file.tensors)
        differ |= bool(file.tensors)
        console.print(f"{file.name}: {file.equal} of {total} tensors are bit-identical", highlight=False)
        table = Table("tensor", "max |a - b|", "‖a - b‖ / ‖a‖", box=box.SIMPLE)
        for tensor in file.tensors[:shown]:
            numbers = (tensor.fault, "") if tensor.fault else (f"{tensor.max_abs:.3g}", f"{tensor.relative_error:.3g}")
            table.add_row(*map(Text, (escape_unprintable(tensor.name), *numbers)))
        if file.tensors:
            console.print(table)
        if len(file.tensors) > shown:
            console.print(f"and {len(file.tensors) - shown} more, which --all lists", highlight=False)
    fields = diff_states(a, b)
    console.print(f"{layout.STATE_NAME}: {len(fields)} fields differ", highlight=False)
    table = Table("field", "A", "B", box=box.SIMPLE)
    for field in fields:
        table.add_row(*map(Text, field))
    if fields:
        console.print(table)
    return 1 if differ or fields else 0


def _console() -> Console:
    """Return the console, wide enough for every row where lines do not wrap: in a pipe or a file."""
    return Console(width=None if sys.stdout.isatty() else 200)


if __name__ == "__main__":
    sys.exit(main())

"""No message names an option that its command does not take, or a key that the configuration does not have.

Messages are all strings in the source that contain a blank, except docstrings and the help of options. PRINTED_BY lists
which commands may print the messages of a module, since most modules serve several.
"""

import argparse
import ast
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from deepspeed.launcher import runner

from launch.benchmark.__main__ import _MODULES, COMMANDS
from launch.config import _DERIVED, _EXCLUDED, _USABLE, Config
from launch.typed_yaml import field_type

ROOT = Path(__file__).parents[2]
BENCHMARKS = [f"launch.benchmark.{_MODULES.get(name, name)}" for name in COMMANDS]
ENTRIES = [
    *("dataio.pack", "dataio.verify", "dataio.show", "dataio.pack.fashion_mnist"),
    *("launch.train", "launch.plan", "launch.evaluate", "launch.export", "launch.quickstart", "launch.checkpoint"),
    *BENCHMARKS,
    "launch.benchmark.kernel_checks",
]
TAKE_KEYS = ("launch.train", "launch.plan", "launch.quickstart")

_RUNS, _FETCHES = ("launch.train", "launch.plan"), ("launch.train", "launch.plan", "launch.evaluate", "dataio.show")
#: Module, or module:function or class → the commands that print its messages; a command prints its own.
PRINTED_BY = {
    "dataio/remote/prefetch.py": _FETCHES,
    "dataio/remote/cache_folder.py": _FETCHES,
    "dataio/remote/fetch.py": _FETCHES,
    "dataio/remote/options.py:_check_private": ("launch.train", "launch.plan", "launch.evaluate"),
    "dataio/remote/options.py": _FETCHES,
    "dataio/bad_samples.py": ("launch.train", "launch.evaluate"),
    "dataio/bad_samples.py:BadSampleBudget": _RUNS,
    "dataio/bad_samples.py:describe_excess": _RUNS,
    "dataio/decode.py": ("launch.train", "launch.evaluate"),
    "dataio/augment/resize.py": ("launch.train", "launch.evaluate"),
    "dataio/loader.py": _RUNS,
    "dataio/manifest.py:check_labels": _RUNS,
    "launch/benchmark/parity.py": ("launch.benchmark.parity", "launch.train"),  # its report is about training
    "dataio/pack/packer.py": ("dataio.pack",),
    "dataio/pack/source.py": ("dataio.pack",),
    "dataio/pack/image_checks.py": ("dataio.pack",),
    "dataio/pack/options.py": ("dataio.pack",),
    "dataio/pack/layout.py": ("dataio.pack",),
    "launch/checkpoint/layout.py": ("launch.train",),
    "launch/config.py": _RUNS,
    "launch/custom_dataset.py": ("launch.quickstart",),
    "launch/engine.py": ("launch.train",),
    "launch/guard.py": ("launch.train",),
    "launch/monitor.py": ("launch.train",),
    "launch/plan.py:main": ("launch.plan",),
    "launch/plan.py:describe_goodput": ("launch.plan",),
    "launch/plan.py:_positive": ("launch.plan",),
    "launch/distributed.py": ("launch.train", "launch.evaluate"),
    "launch/plan.py": _RUNS,
    "launch/benchmark/cli.py": tuple(
        f"launch.benchmark.{name}"
        for name in ("kernel", "depthwise", "data", "resume", "step", "profiling", "kernel_checks")
    ),
    "launch/benchmark/kernel_runner.py": ("launch.benchmark.kernel",),
    "launch/benchmark/kernel_runner.py:describe_checks": ("launch.benchmark.kernel", "launch.benchmark.depthwise"),
    "launch/benchmark/kernel_runner.py:check_resolutions": ("launch.benchmark.kernel", "launch.benchmark.depthwise"),
    "launch/benchmark/loader_processes.py": ("launch.benchmark.data",),
    "launch/benchmark/sample_images.py": ("launch.benchmark.data",),
    "launch/benchmark/machine_code.py": ("launch.benchmark.sass",),
    "polaformer/ops.py": ("launch.train", "launch.evaluate"),
}
#: Other commands that a message may recommend: a pattern of their names → the command, or its options.
OTHERS: dict[str, str | set[str]] = {
    r"dataio\.pack|\bpack\b|^ours, --check ": "dataio.pack",
    r"dataio\.verify": "dataio.verify",
    r"launch\.evaluate": "launch.evaluate",
    r"quickstart\.sh": "launch.quickstart",
    r"pip install": {"--no-build-isolation"},
    r"tensorboard": {"--logdir"},
    r"start it with deepspeed": "deepspeed",
}
_WORD = re.compile(
    r"(?<![\w-])--[a-z][\w-]*|(?<![\w./-])(?:model|data|optimizer|engine|checkpoint|log|deepspeed)(?:\.[a-z_0-9]+)+\b"
)


@dataclass(frozen=True)
class Message:
    """A string of the source, with … for what is filled in; `location` is its file and line."""

    location: str
    printed_by: tuple[str, ...]
    text: str

    @property
    def words(self) -> list[str]:
        """Options and keys that it names."""
        return _WORD.findall(self.text)


class _ParserMet(Exception):
    """Carries the parser of a command out of its main function."""


def main_of(command: str) -> Callable[[list[str]], object]:
    """The function behind `python -m COMMAND`, which is a module or a package."""
    module = importlib.import_module(command)
    return importlib.import_module(f"{command}.__main__").main if hasattr(module, "__path__") else module.main


def parser_of(start: Callable[[list[str]], object]) -> argparse.ArgumentParser:
    """The parser of a command that is started with arguments."""

    def meet(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _ParserMet(parser)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(argparse.ArgumentParser, name, meet)
        with pytest.raises(_ParserMet) as met:
            start([])
    return met.value.args[0]


@pytest.fixture(scope="session")
def options() -> dict[str, set[str]]:
    """Command → the options that it takes."""
    starts = {name: main_of(name) for name in ENTRIES} | {"deepspeed": runner.parse_args}
    return {name: set(parser_of(start)._option_string_actions) for name, start in starts.items()}


def messages_of(source: str, location: str) -> Iterator[Message]:
    """The sentences of a module that name an option or a key; `location` is its file below the project's root."""
    tree = ast.parse(source)
    assigned = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    constants = {getattr(node.targets[0], "id", ""): node.value.value for node in assigned}
    own = location.removesuffix(".py").replace("/", ".").removesuffix(".__main__")
    for scope in tree.body:
        name = f"{location}:{getattr(scope, 'name', '')}"
        printed_by = PRINTED_BY.get(name) or PRINTED_BY.get(location) or ((own,) if own in ENTRIES else ())
        for line, text in _strings(scope, constants):
            message = Message(f"{location}:{line}", printed_by, text)
            if " " in text and message.words:
                yield message


def _strings(node: ast.AST, constants: dict[str, object]) -> Iterator[tuple[int, str]]:
    """(line, text) of all strings below a node, without docstrings and arguments that describe options."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
        *("add_argument", "add", "ArgumentParser"),
    ):
        return
    if isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(_filled_in(part, constants) for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _strings(child, constants)


def _filled_in(part: ast.expr, constants: dict[str, object]) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    name = getattr(part.value, "id", None) if isinstance(part, ast.FormattedValue) else None
    return str(constants.get(name, "…"))


def is_key(word: str) -> bool:
    """Whether the configuration has this key, or may have it in DeepSpeed's section."""
    if word.startswith("deepspeed."):
        return word.removeprefix("deepspeed.").split(".")[0] in {*_DERIVED, *_EXCLUDED, *_USABLE}
    schema: object = Config
    for name in word.split("."):
        schema = field_type(schema, name)
    return schema is not None


def faults_of(message: Message, options: dict[str, set[str]]) -> list[str]:
    """The faults of a message: words that no command takes, and commands that print it and take none of its words.

    A module that serves several names the words of each, like `data.cache, --cache`.
    """
    elsewhere: set[str] = set()
    for called, other in OTHERS.items():
        if re.search(called, message.text):
            elsewhere |= options[other] if isinstance(other, str) else other
    if not message.printed_by and not set(message.words) <= elsewhere:
        return [f"{message.location}: add to PRINTED_BY which commands print: {message.text}"]
    faults, known = [], elsewhere.union(*(options[command] for command in message.printed_by))
    takes_keys = not set(message.printed_by).isdisjoint(TAKE_KEYS)
    for word in message.words:
        if not (word in known if word.startswith("--") else takes_keys and is_key(word)):
            printed_by = " or ".join(message.printed_by)
            faults.append(f"{message.location}: {word} is nothing that {printed_by} takes: {message.text}")
    for command in message.printed_by:
        takes_keys = command in TAKE_KEYS
        if not any(word in options[command] | elsewhere or (takes_keys and is_key(word)) for word in message.words):
            faults.append(f"{message.location}: {command} prints it and takes none of that: {message.text}")
    return faults


@pytest.fixture(scope="session")
def messages() -> list[Message]:
    files = [path for package in ("launch", "dataio", "polaformer") for path in sorted((ROOT / package).rglob("*.py"))]
    return [m for file in files for m in messages_of(file.read_text(), str(file.relative_to(ROOT)))]


def test_messages_name_what_their_commands_take(messages, options):
    assert len(messages) > 60
    assert [fault for message in messages for fault in faults_of(message, options)] == []


def test_quickstart_takes_the_options_that_packing_names(messages, options):
    """Those that users may set: which images are left out, and how many are held out."""
    named = {word for message in messages if "dataio.pack" in message.printed_by for word in message.words}
    assert {"--skip-broken", "--val-percent"} <= named
    assert {"--skip-broken", "--val-percent"} <= options["launch.quickstart"]


@pytest.mark.parametrize("name", ENTRIES)
def test_the_home_folder_is_known_to_every_argument_that_is_a_path(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for action in parser_of(main_of(name))._actions:
        if isinstance(action.type, type) or action.type is None or action.choices:
            assert action.type is not Path, action
        else:
            assert str(action.type("~/x")) == "/home/me/x", action


def test_derived_keys_name_keys_of_the_schema():
    assert all(is_key(home) for home in _DERIVED.values() if "." in home)


@pytest.mark.parametrize(
    ("location", "source", "fault"),
    [
        (
            "launch/evaluate.py",
            "raise ValueError(f'{x} is bad; use --wieghts')",
            "--wieghts is nothing that launch.eval",
        ),
        (
            "launch/evaluate.py",
            "print(f'error: {x}; lower data.threads')",
            "data.threads is nothing that launch.evaluat",
        ),
        (
            "launch/config.py",
            "raise ValueError('bad; set optimizer.lrr')",
            "optimizer.lrr is nothing that launch.train",
        ),
        ("launch/config.py", "x = 'set deepspeed.nonsense here'", "deepspeed.nonsense is nothing that launch.train"),
        (
            "dataio/remote/prefetch.py",
            "raise ValueError('full; raise data.cache_gib')",
            "launch.evaluate prints it and takes none",
        ),
        ("dataio/verify.py", "R = 'repair it'\nprint(f'{a}; {R} with --skip-broken')", "--skip-broken is nothing that"),
        (
            "polaformer/model.py",
            "raise ValueError('bad; set model.name')",
            "add to PRINTED_BY which commands print: bad",
        ),
    ],
)
def test_a_bad_message_is_found(options, location, source, fault):
    [message] = messages_of(f'"""Says --nothing at all."""\n{source}', location)
    assert any(fault in found for found in faults_of(message, options))


def test_a_good_message_is_none(options):
    source = "R = 'pack it again'\ndef f(parser):\n    parser.add_argument('--no', help='as --nothing of it')\n"
    source += "    print(f'{a}; {R} with --skip-broken')"
    [message] = messages_of(source, "dataio/verify.py")
    assert message.text == "…; pack it again with --skip-broken"
    assert faults_of(message, options) == []

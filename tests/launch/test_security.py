"""No file, value or archive that a command reads can execute code or leave its folder, by rules for our source.

Nothing unpickles or evaluates what it reads, passes it to a shell, unpacks an archive, or listens to other machines.
Object collectives of torch.distributed pickle between the ranks of a run, which trust each other; they read no files.
Real runs with hostile values are in test_environment.py, test_quickstart.py and tests/slurm, real archives in
tests/dataio/pack/test_hostile_archives.py, the files that commands create in test_created_files.py.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("polaformer", "dataio", "launch", "slurm", "configs")
FILES = [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]
SCRIPTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.sh"))]
DOCUMENTS = [ROOT / "README.md", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))]
#: Modules that execute what they load; only the error of one may be imported.
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"pickle.UnpicklingError"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all"),
    *("torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "torch.export.load"),
    *("torch.distributed.checkpoint.load", "pandas.read_pickle", "runpy.run_path", "runpy.run_module"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),  # a shell
    *("asyncio.create_subprocess_shell", "pty.spawn"),
    *(f"os.{name}" for name in dir(os) if name.startswith(("exec", "spawn", "posix_spawn"))),
    *("tempfile.mktemp", "shutil.unpack_archive"),
}
#: Methods of DeepSpeed's engine and their like that call torch.load inside; those that unpickle, or unpack an archive.
UNSAFE_METHODS = {
    *("load_checkpoint", "load_module_state_dict", "load_state_dict_from_url"),
    *("Unpickler", "ForkingPickler", "extract", "extractall"),
}
#: Functions that are safe with this argument alone.
SAFE_WITH = {
    **dict.fromkeys(("torch.load", "torch.serialization.load"), ("weights_only", "True")),
    "yaml.load": ("Loader", "yaml.SafeLoader"),
}
#: Functions that are safe unless this argument is true.
SAFE_WITHOUT = {
    **dict.fromkeys(("numpy.load", "numpy.lib.format.read_array"), "allow_pickle"),
    **{f"subprocess.{name}": "shell" for name in ("run", "Popen", "call", "check_call", "check_output")},
}
GUARDED = SAFE_WITH.keys() | SAFE_WITHOUT.keys()
SHELLS = {"sh", "bash", "dash", "zsh", "/bin/sh", "/bin/bash"}
#: Words of a shell script that execute a text; and what makes a server listen to other machines.
UNSAFE_WORDS = re.compile(r"(?<![\w-])(eval|(ba|da|z)?sh +-\w*c)(?![\w-])")
OPEN_TO_OTHERS = re.compile(r"""bind_all|0\.0\.0\.0|--host[ =](""|\'\'|::)|["']::["']|create_server\(\(["']{2}""")


def names_of(tree: ast.AST) -> dict[str, str]:
    """Name in a file → what it imports: `np` → numpy, `load` → torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_unsafe(name: str, call: ast.Call) -> bool:
    """Whether a call of a guarded function lacks the argument that makes it safe, or may hide one that does not."""
    words = {word.arg or "**": ast.unparse(word.value) for word in call.keywords}
    if "**" in words or len(call.args) > 1 or any(isinstance(arg, ast.Starred) for arg in call.args):
        return True
    if name in SAFE_WITH:
        keyword, value = SAFE_WITH[name]
        return words.get(keyword) != value
    return words.get(SAFE_WITHOUT[name], "False") != "False"


def faults_of(source: str) -> Iterator[str]:
    """What in a source would execute what it reads: imports, functions that are called or passed on, shells."""
    tree = ast.parse(source)
    names = names_of(tree)

    def full_name(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return names.get(first, first) + dot + rest

    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    called |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Subscript)}  # Popen[bytes], a type
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            imported = {f"{prefix}{alias.name}" for alias in node.names} - HARMLESS
            yield from (name for name in imported if name.partition(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call) and (name := full_name(node.func)) in GUARDED:
            if is_unsafe(name, node):
                yield ast.unparse(node)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            name = full_name(node)
            is_method = isinstance(node, ast.Attribute) and node.attr in UNSAFE_METHODS
            if name in UNSAFE_CALLS or is_method or (name in GUARDED and id(node) not in called):
                yield ast.unparse(node)
        elif isinstance(node, ast.List | ast.Tuple):
            match node.elts:
                case [ast.Constant(value=shell), ast.Constant(value=flag), text, *_]:
                    if shell in SHELLS and "c" in str(flag) and not isinstance(text, ast.Constant):
                        yield ast.unparse(node)


def script_faults(source: str) -> list[str]:
    """What shellcheck finds in a script, such as unquoted variables, and the words that execute a text."""
    shellcheck = [Path(sys.executable).with_name("shellcheck"), "--external-sources", "--format=gcc", "-"]
    checked = subprocess.run(shellcheck, cwd=ROOT, input=source, capture_output=True, text=True)
    return [*checked.stdout.splitlines(), *(found[0] for found in UNSAFE_WORDS.finditer(source))]


def test_nothing_that_is_read_is_executed():
    assert len(FILES) > 90
    faults = [f"{file.relative_to(ROOT)}: {fault}" for file in FILES for fault in faults_of(file.read_text())]
    assert faults == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from pickle import loads", "import torch\ntorch.load(x)", "eval(x)", "exec(x)"),
        *("import torch\ntorch.load(x, weights_only=False)", "from torch import load as l\nl(x)", "import dill as d"),
        *("import yaml\nyaml.load(x)", "import yaml\nyaml.load(x, Loader=yaml.Loader)", "engine.load_checkpoint(x)"),
        *("import numpy as np\nnp.load(x, allow_pickle=True)", "torch.serialization.pickle.Unpickler(x)"),
        *("import os\nos.system(x)", "from os import popen\npopen(x)", "import tempfile as t\nt.mktemp()"),
        *("import subprocess\nsubprocess.run(x, shell=True)", "from subprocess import Popen\nPopen(x, shell=y)"),
        *("import yaml\nyaml.unsafe_load(x)", "import builtins\nbuiltins.exec(x)", "tarfile.open(x).extractall()"),
        *("import shutil\nshutil.unpack_archive(x)", "import subprocess as s\ns.getoutput(x)"),
        "compile(x, '', 'exec')",
        *("import torch\nmap(torch.load, x)", "import torch\nload = torch.load", "f = eval", "archive.extract(x)"),
        *("import numpy as np\nnp.load(x, None, True)", "import torch\ntorch.serialization.load(x)"),
        *("import subprocess\nsubprocess.run(['bash', '-ec', x])", "command = 'sh', '-c', f'touch {x}', y"),
        *("import subprocess\nsubprocess.run(x, **y)", "import subprocess\nsubprocess.run(*x)"),
        *("import os\nos.execv(x, y)", "import pandas\npandas.read_pickle(x)", "from runpy import run_path as r\nr(x)"),
        "import numpy.lib.format as f\nf.read_array(x, allow_pickle=True)",
    ],
)
def test_what_would_be_executed_is_found(source):
    assert len(list(faults_of(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        *("import torch\ntorch.load(x, weights_only=True)", "from pickle import UnpicklingError", "model.eval()"),
        *("import yaml\nyaml.load(x, Loader=yaml.SafeLoader)", "import numpy as np\nnp.load(x)", "engine.compile()"),
        *("import subprocess\nsubprocess.run(x)", "import subprocess\nsubprocess.run(x, shell=False)", "re.compile(x)"),
        *("command = 'sh', '-c', 'touch \"$1\"', x", "import subprocess\nprocess: subprocess.Popen[bytes]"),
        *("import yaml\nyaml.safe_load(x)", "import tempfile\ntempfile.mkdtemp()", "zipfile.ZipFile(x).infolist()"),
    ],
)
def test_what_is_safe_is_no_fault(source):
    assert list(faults_of(source)) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_quote_values_and_execute_none(script):
    assert script_faults(script.read_text()) == []


def test_all_scripts_are_read():
    assert {path.parent.name for path in SCRIPTS} == {"launch", "slurm"}


@pytest.mark.parametrize(
    "source",
    ["touch $1", 'for word in "$1"; do touch ${word}; done', 'eval "$1"', 'bash -c "touch $1"', 'sh -ec "$1"'],
)
def test_scripts_that_execute_or_split_values_are_found(source):
    assert script_faults(f"#!/bin/bash\n{source}\n")


@pytest.mark.parametrize("source", ['touch "$1"', "python -m launch.evaluate -c x", "evaluation=1; echo $evaluation"])
def test_scripts_without_fault(source):
    assert script_faults(f"#!/bin/bash\n{source}\n") == []


def test_no_command_of_ours_opens_a_port_to_other_machines():
    """TensorBoard's default is localhost: test_quickstart.py starts the command that the quickstart prints."""
    read = [*FILES, *SCRIPTS, *DOCUMENTS]
    assert any("tensorboard --logdir" in path.read_text() for path in read)
    assert [path for path in read if OPEN_TO_OTHERS.search(path.read_text())] == []


@pytest.mark.parametrize(
    "source", ["--host 0.0.0.0", '--host ""', "--host=::", "--bind_all", 'create_server(("", 1))', 'run(host="::")']
)
def test_what_opens_a_port_to_other_machines_is_found(source):
    assert OPEN_TO_OTHERS.search(source)

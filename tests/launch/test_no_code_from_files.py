"""No file that a command reads can execute code: nothing in our source unpickles, or evaluates what it reads.

Object collectives of torch.distributed pickle between the ranks of a run, which trust each other; they read no files.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for package in ("polaformer", "dataio", "launch") for path in sorted((ROOT / package).rglob("*.py"))]
#: Modules that execute what they load; only the error of one may be imported.
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HARMLESS = {"pickle.UnpicklingError"}
UNSAFE_CALLS = {
    *("eval", "exec", "compile", "__import__", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
    *("torch.jit.load", "torch.package.PackageImporter", "torch.hub.load", "torch.export.load"),
}
#: Methods of DeepSpeed's engine and their like that call torch.load inside.
UNSAFE_METHODS = {"load_checkpoint", "load_module_state_dict", "load_state_dict_from_url", "Unpickler"}
#: Calls that are safe with this argument alone.
SAFE_WITH = {"torch.load": ("weights_only", "True"), "yaml.load": ("Loader", "yaml.SafeLoader")}
SAFE_WITHOUT = {"numpy.load": "allow_pickle"}


def names_of(tree: ast.AST) -> dict[str, str]:
    """Name in a file → what it imports: `np` → numpy, `load` → torch.load."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def faults_of(source: str) -> Iterator[str]:
    """The calls and imports in a source that would execute what they read."""
    tree = ast.parse(source)
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            imported = {f"{prefix}{alias.name}" for alias in node.names} - HARMLESS
            yield from (name for name in imported if name.partition(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            name = names.get(first, first) + dot + rest
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if (
                name in UNSAFE_CALLS
                or (isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_METHODS)
                or (name in SAFE_WITH and (SAFE_WITH[name][0], words.get(SAFE_WITH[name][0])) != SAFE_WITH[name])
                or words.get(SAFE_WITHOUT.get(name, ""), "False") != "False"
            ):
                yield ast.unparse(node)


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
    ],
)
def test_what_would_be_executed_is_found(source):
    assert len(list(faults_of(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        *("import torch\ntorch.load(x, weights_only=True)", "from pickle import UnpicklingError", "model.eval()"),
        *("import yaml\nyaml.load(x, Loader=yaml.SafeLoader)", "import numpy as np\nnp.load(x)", "engine.compile()"),
    ],
)
def test_what_is_safe_is_no_fault(source):
    assert list(faults_of(source)) == []

"""Module names that are allowed, and imports between packages, read from the source."""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("polaformer", "dataio", "launch")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def dotted_name(node: ast.AST) -> str | None:
    """`a.b.c` for the expression a.b.c."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted_name(node.value)):
        return f"{owner}.{node.attr}"
    return None


def imports_of(file: Path) -> Iterator[str]:
    """The dotted names that a file imports, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively; write the package's name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_levels(package: str) -> set[str]:
    names = (name for file in (ROOT / package).rglob("*.py") for name in imports_of(file))
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_all_three_packages_are_read():
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(PACKAGES)


def test_nothing_in_launch_hides_a_module_from_its_script():
    """`python launch/train.py` puts launch/ before everything else on Python's path."""
    ours = {path.stem for path in (ROOT / "launch").iterdir() if path.suffix == ".py" or path.is_dir()}
    ours -= {"__init__", "__pycache__"}
    assert "train" in ours
    assert not ours & (sys.stdlib_module_names | packages_distributions().keys())


@pytest.mark.parametrize(
    ("package", "may_import"),
    [("polaformer", {"polaformer"}), ("dataio", {"dataio"}), ("launch", {"launch", "polaformer", "dataio"})],
)
def test_imports_between_our_packages(package, may_import):
    assert top_levels(package) & set(PACKAGES) == may_import


def test_the_model_needs_neither_deepspeed_nor_dali():
    assert top_levels("polaformer") == {"polaformer", "torch", "timm", "safetensors"}


def test_the_model_alone_is_installed_without_them():
    """`pip install .` installs requirements without an extra; the extras add the rest."""
    needed = importlib.metadata.requires("polaformer-plus-plus")
    alone = {re.match(r"[\w-]+", line).group() for line in needed if "extra ==" not in line}
    assert alone == {"torch", "timm", "safetensors"}
    train = {re.match(r"[\w-]+", line).group() for line in needed if 'extra == "train"' in line}
    assert {"deepspeed", "nvidia-dali-cuda130", "pydantic"} < train


def test_only_launch_knows_deepspeed():
    assert "deepspeed" in top_levels("launch")
    assert "deepspeed" not in top_levels("dataio") | top_levels("polaformer")


def test_only_the_pipeline_and_its_benchmark_import_dali():
    users = {file for file in FILES if any(name.startswith("nvidia") for name in imports_of(file))}
    names = ("dataio/pipeline.py", "dataio/augment/dali_ops.py", "launch/benchmark/dali_loaders.py")
    assert users == {ROOT / name for name in names}


def test_only_ops_names_our_operators():
    def names_operators(file: Path) -> bool:
        used = {dotted_name(node) for node in ast.walk(ast.parse(file.read_text()))}
        return "torch.ops.polaformer" in used | set(imports_of(file))

    assert [file for file in FILES if names_operators(file)] == [ROOT / "polaformer" / "ops.py"]

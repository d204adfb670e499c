"""A class folder to spoil."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def source(photos, tmp_path) -> Path:
    """`photos` again, as hard links: to add to, to rename and to remove, not to write into its files."""
    return shutil.copytree(photos, tmp_path / "source", copy_function=os.link)

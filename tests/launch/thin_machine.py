"""Runs commands as where little is installed: thin_machine.py COMMANDS, a JSON list of the words after `python -m`.

Each runs in a fork of this process, which has imported torch and timm. Prints a JSON list of [status, output, errors].
"""

import importlib.abc
import json
import os
import runpy
import sys
import tempfile
import traceback
from typing import NoReturn

#: What a machine for measurements may lack: all but torch, timm, pytest, hypothesis and what those need.
ABSENT = (
    *("dataio", "deepspeed", "nvidia.dali", "pydantic", "webdataset", "fvcore", "skimage", "xdist", "pytest_timeout"),
    *("torchmetrics", "tensorboard", "psutil", "rich", "matplotlib", "fsspec.implementations.http", "aiohttp", "moto"),
)


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in ABSENT):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def become(words: list[str]) -> NoReturn:
    """Runs the command in this process, and ends it."""
    status = 1
    try:
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(words: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            become(words)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), output.read(), errors.read()


sys.path[0] = "."
sys.meta_path.insert(0, Refuse())
import timm  # noqa: E402, F401  (where little is installed)
import torch  # noqa: E402, F401

print(json.dumps([run(words) for words in json.loads(sys.argv[1])]))

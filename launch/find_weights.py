"""The weights file that a path on the command line means, for evaluation and export alike."""

import sys
from pathlib import Path

from launch.checkpoint import layout

WEIGHTS_PATH_HELP = (
    "a run's folder, one of its checkpoints (RUN/checkpoints/best, latest or step-…), an exported folder,"
    " a .safetensors file or an official .pth"
)


def find_weights(path: Path, kind: str) -> Path:
    """Return the weights file that `path` means: the file itself, a checkpoint's, or that of a run's newest checkpoint.

    kind: "ema" or "model", which of a checkpoint's two files. Prints the faults of newer, corrupt checkpoints of a run
    on standard error. Raises FileNotFoundError or ValueError if there is no such file or checkpoint, or it is corrupt.
    """
    if path.name in layout.POINTERS and path.is_file():
        path = layout.resolve_pointer(path)
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}; give {WEIGHTS_PATH_HELP}")
    if (path / "config.json").is_file() and (path / layout.MODEL_NAME).is_file():
        return path / layout.MODEL_NAME
    file = {"ema": layout.EMA_NAME, "model": layout.MODEL_NAME}[kind]
    return _choose(path, file) / file


def _choose(path: Path, file: str) -> Path:
    """Return the checkpoint that a folder is, or the newest in it whose `file` is intact."""
    if layout.is_checkpoint(path):
        fault = layout.find_corruption(path, needed=file)
        if fault is not None:
            raise ValueError(f"{fault}; give another checkpoint, or copy this one again")
        return path
    newest, faults = layout.find_newest(path if path.name == "checkpoints" else path / "checkpoints", file)
    if newest is None:
        raise FileNotFoundError(f"{path} is a folder without checkpoints; give {WEIGHTS_PATH_HELP}")
    for fault in faults:
        print(f"{fault}; taking {newest.name}", file=sys.stderr)
    return newest

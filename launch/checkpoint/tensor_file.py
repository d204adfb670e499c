"""A safetensors file that may be damaged or hostile: its header is checked before any tensor is made."""

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dataio.files import escape_unprintable

#: Names in PyTorch of the types that are read; others are named as in the file.
_TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


class TensorFile:
    """A safetensors file, opened for reading; the content of a tensor is read from disk when it is used.

    Attributes are `path` and `header`: name → type and shape, like "float32 [10, 3]".
    Raises ValueError that names the file if it is not a file, or its header is damaged; OSError if it is not there.
    """

    def __init__(self, path: Path) -> None:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise ValueError(f"{path} is not a file")
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
            parts = ((name, self._file.get_slice(name)) for name in self._file.keys())  # noqa: SIM118  (no mapping)
            self.header = {name: describe(part.get_dtype(), part.get_shape()) for name, part in parts}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({escape_unprintable(error)})") from error

    def read(self, name: str) -> Any:
        """Return a tensor, on the host. Raises ValueError if PyTorch has no such type or shape."""
        try:
            return self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:  # a size beyond 2**63 is a TypeError
            raise ValueError(
                f"{self.path} cannot be read ({escape_unprintable(name)} is {self.header[name]})"
            ) from error


def describe(dtype: str, shape: Sequence[int]) -> str:
    """Return type and shape of a tensor in words; dtype: as safetensors or PyTorch names it."""
    return f"{_TYPES.get(dtype, dtype)} {list(shape)}"

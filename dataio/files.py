"""Folders that are whole or absent, whatever ends the process that writes them, and files that are on disk."""

import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

_LOCK_NAME = "lock"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that becomes `target` when the block ends, and vanishes if it fails.

    A block that is killed leaves its folder behind; the next one for the same target removes it.
    Raises ValueError if `target` exists and is not empty.
    """
    target = target.resolve()
    _require_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{escape(target.name)}.*.partial"):
        with suppress(OSError), open(left / _LOCK_NAME, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the process that made it lives
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    folder.mkdir()
    try:
        with open(folder / _LOCK_NAME, "w") as lock:
            with suppress(OSError):  # some network file systems have no locks: then nothing is ever removed
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
            (folder / _LOCK_NAME).unlink()
            sync(folder)
            _require_free(target)  # another process may have been faster
            folder.rename(target)
            sync(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; delete it or name another folder")


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, and waits until its content is on disk; for its name, sync its folder."""
    path.write_bytes(content)
    sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """The hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

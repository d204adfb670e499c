"""Folders that are whole or absent, whatever ends the process that writes them, and files that are on disk."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

_LOCK_NAME, _CONTENT_NAME = "lock", "content"
_LOCK_SECONDS = 2.0  # for the last processes of a killed command to end


class FolderLockedError(RuntimeError):
    """Another process is writing the same folder."""


def user_path(text: str) -> Path:
    """The path that a command was given, with a `~` or `~user` at its beginning expanded as shells do."""
    return Path(os.path.expanduser(text))


def list_folder(path: str | os.PathLike) -> list[os.DirEntry[str]]:
    """What lies in a folder. Raises ValueError if this user may not look into it."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except PermissionError as error:
        raise ValueError(f"{os.fspath(path)} may not be read by this user; make it readable") from error


def printable(path: str) -> str:
    """The path with bytes that are no UTF-8, which Python keeps as lone surrogates, written as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


@contextmanager
def atomic_folder(target: Path, resume: bool = False) -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends, and vanishes if it fails.

    With `resume` it is not empty if an earlier block was killed or failed: it has what that one wrote. It lies in
    `staging_folder(target)`, where the block may keep files of its own beside it until then. A block that fails and
    leaves the folder empty leaves nothing.
    Raises ValueError if `target` exists and is not empty, FolderLockedError if another process is writing it.
    """
    target = target.resolve()
    partial = staging_folder(target)
    with _locked(target, partial):
        folder = partial / _CONTENT_NAME
        folder.mkdir(exist_ok=True)
        if not resume:
            clear_folder(folder)
        try:
            yield folder
            sync(folder)
            _require_free(target)  # a program without locks may have written it by now
            folder.rename(target)
            sync(target.parent)
        except BaseException:
            if not resume or not any(folder.iterdir()):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def staging_folder(target: Path) -> Path:
    """Where the work lies while `target` is not whole."""
    target = target.resolve()
    return target.with_name(f".{target.name}.partial")


@contextmanager
def _locked(target: Path, partial: Path) -> Iterator[None]:
    """Makes `partial` and holds its lock, as does every process that is forked meanwhile, until it ends."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while (lock := _try_lock(target, partial)) is None:
        if time.monotonic() > deadline:
            raise FolderLockedError(
                f"another process is writing {target}; wait until it has ended, or name another folder"
            )
        time.sleep(0.05)
    with lock:
        yield


def _try_lock(target: Path, partial: Path) -> TextIO | None:
    """The lock's open file, or None while another process has it."""
    _require_free(target)
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / _LOCK_NAME
    try:
        lock = open(path, "w")  # noqa: SIM115  (the caller closes it)
    except FileNotFoundError:  # its holder has just ended
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(lock.fileno()), path.stat())  # else its holder has ended meanwhile
    except (BlockingIOError, FileNotFoundError):
        held = False
    except OSError:  # some network file systems have no locks
        held = True
    if held:
        return lock
    lock.close()
    return None


def _require_free(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; delete it or name another folder")


def clear_folder(folder: Path) -> None:
    """Removes what lies in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, and waits until its content is on disk; for its name, sync its folder."""
    path.write_bytes(content)
    sync(path)


def atomic_write(path: Path, content: bytes) -> None:
    """Gives a file this content; until all of it is on disk, and if it cannot be written, the file is what it was."""
    aside = path.with_name(f".{path.name}")
    try:
        write_file(aside, content)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path.parent)


def sync(path: Path, keep_cached: bool = True) -> None:
    """Waits until a file, or a folder's list of names, is on disk, and may give the memory of its copy back."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if not keep_cached:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path | int) -> str:
    """The hexadecimal sha256 of a file, read in pieces. One that is given open, by its number, is closed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

"""Atomic writing of files and folders, which are complete or absent however the writing process ends; hashing."""

import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TextIO

_LOCK_NAME, _CONTENT_NAME = "lock", "content"
_CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029]")
_LOCK_SECONDS = 2.0  # time for the last worker processes of a killed command to end


class FolderLockedError(RuntimeError):
    """Another process is writing the same folder."""


def user_path(text: str) -> Path:
    """Return the path that a command was given, with a leading `~` or `~user` expanded as shells do."""
    return Path(os.path.expanduser(text))


def list_folder(path: str | Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder. Raises ValueError if this user has no permission to read it."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except PermissionError as error:
        raise ValueError(f"{os.fspath(path)} may not be read by this user; make it readable") from error


def refresh_folder(path: str | Path) -> None:
    """Let NFS notice files that other hosts have written to a folder: opening it is what asks the server."""
    os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY))


def printable(path: str) -> str:
    r"""Return a path with bytes that are not UTF-8, which Python keeps as lone surrogates, written as \xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def escape_unprintable(text: object, limit: int | None = 200) -> str:
    r"""Return a text of a file, as a message may show it: control characters escaped (\x1b), cut after `limit`."""
    shown = str(text)[:limit]
    end = "…" if len(shown) < len(str(text)) else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + end


def has_control_character(text: str) -> bool:
    """Tell whether a text has a character that breaks a line or commands a terminal."""
    return _CONTROL.search(text) is not None


def read_small_file(path: Path, max_bytes: int = 1 << 24) -> bytes:
    """Return the content of a file of at most `max_bytes`.

    Raises ValueError if it is larger or not a regular file: reading a pipe would wait for ever, and a device may have
    no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a file")
    with open(descriptor, "rb") as file:
        content = file.read(max_bytes + 1) or b""  # None where the kernel has nothing to say yet, as in /proc/kmsg
    if len(content) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes:,} bytes")
    return content


@contextmanager
def atomic_folder(target: Path, resume: bool = False) -> Iterator[Path]:
    """Give the block an empty folder, which becomes `target` when the block ends and is removed if it fails.

    With `resume` the folder is kept when the block fails or its process is killed, unless it is empty, and the next
    block finds in it what the last one wrote. The folder lies in `staging_folder(target)`, where the block may keep
    further files beside it until then.
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
            _require_free(target)  # a program that knows no locks may have written it meanwhile
            folder.rename(target)
            sync(target.parent)
        except BaseException:
            if not resume or not any(folder.iterdir()):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial, ignore_errors=True)


def staging_folder(target: Path) -> Path:
    """Return the hidden folder beside `target` in which it is written."""
    target = target.resolve()
    return target.with_name(f".{target.name}.partial")


@contextmanager
def _locked(target: Path, partial: Path) -> Iterator[None]:
    """Create `partial`, and hold its lock until this process and all that it forks meanwhile have ended."""
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
    """Return the lock's open file, or None while another process holds it."""
    _require_free(target)
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / _LOCK_NAME
    try:
        lock = open(path, "w")  # noqa: SIM115  (the caller closes it)
    except FileNotFoundError:  # the other process has just ended
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(lock.fileno()), path.stat())  # else the other process has ended meanwhile
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
    """Remove everything in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write a file and wait until its content is on disk. `sync` its folder to make the name durable as well."""
    path.write_bytes(content)
    sync(path)


def atomic_write(path: Path, content: bytes) -> None:
    """Replace a file's content, once all of it is on disk; the file stays as it was if writing fails."""
    aside = path.with_name(f".{path.name}")
    try:
        write_file(aside, content)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path.parent)


def append(file: FileIO, content: bytes) -> None:
    """Append all of the content to an unbuffered file, or nothing if that fails."""
    end = file.seek(0, os.SEEK_END)
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def sync(path: Path, keep_cached: bool = True) -> None:
    """Wait until a file, or a folder's list of names, is on disk; without `keep_cached`, drop it from memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if not keep_cached:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path | int) -> str:
    """Return the hexadecimal sha256 of a file, reading it in pieces. An open file descriptor is closed afterwards."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()

"""Folders that are complete or absent: after errors and kills, resumed, and with two processes at once."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataio import files
from dataio.files import (
    FolderLockedError,
    atomic_folder,
    escape_unprintable,
    read_small_file,
    sha256_of,
    staging_folder,
    write_file,
)

OTHER_PROCESS = """
import sys
from pathlib import Path
from dataio.files import atomic_folder

with atomic_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target"


@pytest.fixture
def other(target):
    """(a process in the block of atomic_folder(target) until its input ends, the folder that it was given)."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def make(target: Path, content: bytes = b"ours") -> None:
    with atomic_folder(target) as folder:
        write_file(folder / "file", content)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of each file below the folder by path; None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_target_appears_when_complete(target):
    target = target / "of" / "three"
    with atomic_folder(target) as folder:
        write_file(folder / "file", b"ours")
        assert not target.exists()
    assert contents(target) == {"file": b"ours"}
    assert [path.name for path in target.parent.iterdir()] == ["three"]


def test_empty_target_is_replaced(target, tmp_path):
    target.mkdir()
    make(target)
    assert contents(tmp_path) == {"target": None, "target/file": b"ours"}


def test_existing_target_is_an_error(target, tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{taken} exists already; delete it or name another folder"):
            make(taken)
    assert contents(tmp_path) == {"file": b"mine"}
    assert not staging_folder(tmp_path).exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failing_block_leaves_nothing(error, target, tmp_path):
    def write_half() -> None:
        with atomic_folder(target) as folder:
            write_file(folder / "file", b"ours")
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_half()
    assert contents(tmp_path) == {}


def test_next_process_clears_what_a_killed_one_left(other, target, tmp_path):
    process, left = other
    (left / "theirs").write_text("half")
    process.kill()
    process.wait()
    assert left.parent == staging_folder(target) == tmp_path / ".target.partial"
    make(target)
    assert contents(tmp_path) == {"target": None, "target/file": b"ours"}


def test_second_process_is_an_error(other, target, tmp_path, monkeypatch):
    process, theirs = other
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.1)
    (theirs / "theirs").write_text("half")
    message = f"another process is writing {target}; wait until it has ended, or name another folder"
    with pytest.raises(FolderLockedError, match=message):
        make(target)
    process.communicate()
    assert process.returncode == 0
    assert contents(tmp_path) == {"target": None, "target/theirs": b"half"}


def test_lock_of_a_folder_that_was_renamed_meanwhile(other, target, tmp_path, monkeypatch):
    """The waiting process locks a folder that is gone by then."""
    process, theirs = other
    (theirs / "theirs").write_text("half")
    try_lock = files._try_lock

    def try_and_let_it_end(*arguments: Path) -> object:
        lock = try_lock(*arguments)
        process.stdin.close()
        return lock

    monkeypatch.setattr(files, "_try_lock", try_and_let_it_end)
    monkeypatch.setattr(files, "_LOCK_SECONDS", 3600)
    with pytest.raises(ValueError, match=f"{target} exists already"):
        make(target)
    process.wait()
    assert contents(tmp_path) == {"target": None, "target/theirs": b"half"}


def test_target_that_appears_meanwhile_is_an_error(target, tmp_path):
    def write_both() -> None:
        with atomic_folder(target) as folder:
            write_file(folder / "file", b"ours")
            target.mkdir()
            write_file(target / "file", b"mine")

    with pytest.raises(ValueError, match=f"{target} exists already; delete it or name another folder"):
        write_both()
    assert contents(tmp_path) == {"target": None, "target/file": b"mine"}


# Going on


def test_resuming_finds_what_was_written(target, tmp_path):
    """After an error in the block, in the folder and beside it."""

    def write_half() -> None:
        with atomic_folder(target, resume=True) as folder:
            assert contents(folder) == {}
            write_file(folder / "first", b"1")
            write_file(folder.parent / "notes", b"one")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not target.exists()
    with atomic_folder(target, resume=True) as folder:
        assert contents(folder) == {"first": b"1"}
        assert (folder.parent / "notes").read_bytes() == b"one"
        write_file(folder / "second", b"2")
    assert contents(tmp_path) == {"target": None, "target/first": b"1", "target/second": b"2"}


def test_empty_folder_is_not_kept_for_resuming(target, tmp_path):
    def write_notes() -> None:
        with atomic_folder(target, resume=True) as folder:
            write_file(folder.parent / "notes", b"one")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_notes()
    assert contents(tmp_path) == {}


def test_files_are_synced_before_the_target_appears(target, tmp_path, monkeypatch):
    """The file first, then the folder that lists it, and after renaming the parent folder."""
    fsync, synced = os.fsync, []

    def observed_fsync(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", observed_fsync)
    with atomic_folder(target) as folder:
        write_file(folder / "file", b"ours")
    assert synced == [(f"{folder}/file", False), (f"{folder}", False), (f"{tmp_path}", True)]


def test_sha256_of_a_large_file(tmp_path):
    content = bytes(range(256)) * 10_000
    write_file(tmp_path / "file", content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_small_file_is_read_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert read_small_file(path, 8) == b"12345678"
    with pytest.raises(ValueError, match="file has more than 7 bytes"):
        read_small_file(path, 7)
    os.mkfifo(tmp_path / "pipe")
    opened = len(os.listdir("/proc/self/fd"))
    for other in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match=f"{other} is not a file"):
            read_small_file(other)
    assert len(os.listdir("/proc/self/fd")) == opened
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_small_file(tmp_path / "nothing")


def test_control_characters_are_shown_as_such():
    assert escape_unprintable("\x1b[2J\ud800 – é\n") == r"\x1b[2J\ud800 – é\n"
    assert escape_unprintable("x" * 300) == "x" * 200 + "…"
    assert escape_unprintable("x" * 300, None) == "x" * 300

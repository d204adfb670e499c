"""Folders that are whole or absent: after errors, after kills, and with two processes at once."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dataio.files import new_folder, sha256_of, write_file

DEADLINE_SECONDS = 60

OTHER_PROCESS = f"""
import signal, sys
from pathlib import Path
from dataio.files import new_folder

signal.alarm({DEADLINE_SECONDS})
with new_folder(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target"


@pytest.fixture
def other(target):
    """(a process that stays in the block of new_folder(target) until its input ends, its hidden folder)."""
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
    with new_folder(target) as folder:
        write_file(folder / "file", content)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Of each file below the folder its bytes, of each folder None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_folder_appears_when_it_is_complete(target):
    target = target / "of" / "three"
    with new_folder(target) as folder:
        write_file(folder / "file", b"ours")
        assert not target.exists()
    assert contents(target) == {"file": b"ours"}
    assert [path.name for path in target.parent.iterdir()] == ["three"]


def test_an_empty_target_is_free(target, tmp_path):
    target.mkdir()
    make(target)
    assert contents(tmp_path) == {"target": None, "target/file": b"ours"}


def test_target_that_exists(target, tmp_path):
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{taken} exists already; delete it or name another folder"):
            make(taken)
    assert contents(tmp_path) == {"file": b"mine"}
    assert [path.name for path in tmp_path.parent.glob(f".{tmp_path.name}*")] == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_nothing(error, target, tmp_path):
    def write_half() -> None:
        with new_folder(target) as folder:
            write_file(folder / "file", b"ours")
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        write_half()
    assert contents(tmp_path) == {}


def test_a_killed_process_does_not_disturb_the_next(other, target, tmp_path):
    process, left = other
    process.kill()
    process.wait(DEADLINE_SECONDS)
    assert left.is_dir()
    assert left.parent == tmp_path
    make(target)
    assert contents(tmp_path) == {"target": None, "target/file": b"ours"}


def test_a_running_process_is_left_alone_and_replaces_nothing(other, target, tmp_path):
    process, theirs = other
    make(target)
    assert theirs.is_dir()
    _, message = process.communicate(timeout=DEADLINE_SECONDS)
    assert message.endswith(f"ValueError: {target} exists already; delete it or name another folder\n")
    assert process.returncode == 1
    assert contents(tmp_path) == {"target": None, "target/file": b"ours"}


def test_what_appears_is_on_disk(target, tmp_path, monkeypatch):
    """The file first, then the folder with the file's name, at last the folder that has got the new name."""
    fsync, synced = os.fsync, []

    def observed_fsync(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", observed_fsync)
    with new_folder(target) as folder:
        write_file(folder / "file", b"ours")
    assert synced == [(f"{folder}/file", False), (f"{folder}", False), (f"{tmp_path}", True)]


def test_sha256_of_a_file_of_many_pieces(tmp_path):
    content = bytes(range(256)) * 10_000
    write_file(tmp_path / "file", content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()

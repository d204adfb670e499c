"""Packs that are killed, interrupted or damaged, and resumed."""

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dataio.files import staging_folder
from dataio.manifest import SkippedFile, load_manifest
from dataio.pack.__main__ import main
from dataio.pack.journal import _digest
from dataio.pack.packer import PackOptions, pack

MANY = 24  # times the photographs


LONG_PACK = ["--shard-mib", "2", "--workers", "2"]


@pytest.fixture(scope="module")
def many(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "many"
    for number in range(MANY):
        shutil.copytree(photos, folder / f"copy{number:02d}", copy_function=os.link)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(many, tmp_path_factory, contents) -> dict[str, bytes]:
    """Contents of `many`, packed without an interruption."""
    target = tmp_path_factory.mktemp("uninterrupted") / "target"
    assert main([str(many), str(target), *LONG_PACK]) == 0
    return contents(target)


# Prints when it begins to list images, and waits until its input ends once so many shards are finished. Its workers
# have written one more shard each by then.
WAITING = """
import os, sys
from dataio.pack import __main__ as command, packer as pack

def find_images(*arguments):
    print("listing", flush=True)
    return find(*arguments)

def write_shard(task):
    written = write(task)
    if int(task.path.stem.rpartition("-")[2]) >= finished:
        os.read(0, 1)
    return written

find, write, finished = pack.find_images, pack.write_shard, int(sys.argv[1])
pack.find_images, pack.write_shard = find_images, write_shard
sys.exit(command.main(sys.argv[2:]))
"""


def start_pack(many: Path, target: Path, *options: str, shards: int) -> subprocess.Popen:
    """Start a pack that will wait once so many shards are finished; it is listing images when this returns."""
    command = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(shards), many, target, *LONG_PACK, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert command.stdout.readline() == "listing\n", command.communicate()
    return command


def pack_until(shards: int, many: Path, target: Path, *options: str) -> subprocess.Popen:
    """Start a pack and wait until so many shards are finished; it waits, too."""
    command = start_pack(many, target, *options, shards=shards)
    while len(finished(target)) < shards:
        assert command.poll() is None, said(command)
        time.sleep(0.002)
    return command


def said(command: subprocess.Popen) -> tuple[str, str]:
    """Return what a command prints to standard output and standard error until it ends."""
    printed = command.stdout.read(), command.stderr.read()
    command.wait()
    return printed


def killed_pack(shards: int, many: Path, target: Path, *options: str) -> str:
    """Kill a pack when so many shards are finished; return what it printed to standard error."""
    command = pack_until(shards, many, target, *options)
    command.kill()
    return said(command)[1]


def finished(target: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of each shard that the journal of an unfinished pack lists."""
    partial = staging_folder(target)
    if not (partial / "journal").exists():
        return {}
    shards = sorted((partial / "content").glob("*.tar"))[: (partial / "journal").read_bytes().count(b"\n") - 1]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in shards}


@pytest.mark.slow
def test_killed_repeatedly(many, uninterrupted, tmp_path, contents):
    """SIGKILL after more and more shards: no shard is written twice, and the result is bit-identical."""
    target = tmp_path / "target"
    before: dict[str, tuple[int, int]] = {}
    for shards in (1, 3, 8, 14):
        message = killed_pack(shards, many, target)
        if before:
            assert re.fullmatch(rf"resuming: {len(before)} of \d+ shards are finished\n", message)
        after = finished(target)
        assert len(after) == shards
        assert after.items() >= before.items()
        assert not target.exists()
        before = after
    assert main([str(many), str(target), *LONG_PACK]) == 0
    assert contents(target) == uninterrupted
    assert {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.glob("*.tar")
    }.items() >= before.items()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.slow
def test_a_pack_that_an_earlier_version_began_is_continued(many, tmp_path, contents):
    """Its journal has the former names of two settings."""
    target, split = tmp_path / "target", ("--val-percent=40", "--split=train")
    killed_pack(2, many, target, *split)
    before = finished(target)
    journal = staging_folder(target) / "journal"
    settings, *records = journal.read_bytes().splitlines(keepends=True)
    assert b'"--val-percent"' in settings
    text = settings.split(b" ", 1)[1].rstrip()
    text = text.replace(b"--val-percent", b"--hold-out").replace(b'"--split": "train"', b'"--part": "kept"')
    assert b'"--part"' in text
    journal.write_bytes(b"%b %b\n" % (_digest(text), text) + b"".join(records))
    assert main([str(many), str(target), *LONG_PACK, *split]) == 0
    inodes = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.glob("*.tar")}
    assert len(before) == 2
    assert inodes.items() >= before.items()
    assert main([str(many), str(tmp_path / "expected"), *LONG_PACK, *split]) == 0
    assert contents(target) == contents(tmp_path / "expected")


def kill_at(event: int, source: Path, target: Path) -> None:
    """Pack, and kill this process before the n-th time that it opens, renames or removes a file."""
    seen = 0

    def count(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (name == "open" and "w" in str(arguments[1])):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    pack(source, target, PackOptions(shard_mib=1, workers=2))
    os._exit(0)


@pytest.mark.slow
def test_killed_at_every_step(photos, shards, tmp_path, contents):
    """Between any two changes to the disk, in a process of its own; then packed to the end."""
    expected = contents(shards)
    context = multiprocessing.get_context("fork")
    for event in itertools.count(1):
        target = tmp_path / f"{event}"
        process = context.Process(target=kill_at, args=(event, photos, target))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
        recorded = finished(target)
        if not target.exists():
            pack(photos, target, PackOptions(shard_mib=1))
            inodes = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.glob("*.tar")}
            assert inodes.items() >= recorded.items()
            assert not staging_folder(target).exists()
        assert contents(target) == expected
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert event > 15


def test_damaged_finished_shard_is_written_again(many, uninterrupted, tmp_path, contents):
    target = tmp_path / "target"
    killed_pack(6, many, target)
    content = staging_folder(target) / "content"
    with open(content / "shard-000004.tar", "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert main([str(many), str(target), *LONG_PACK]) == 0
    assert contents(target) == uninterrupted


@pytest.mark.parametrize("damage", [lambda line: line[:-30], lambda line: line.replace(b'"bytes"', b'"Bytes"')])
def test_damaged_journal(damage, many, uninterrupted, tmp_path, capsys, contents):
    target = tmp_path / "target"
    killed_pack(6, many, target)
    journal = staging_folder(target) / "journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[4] = damage(lines[4])
    journal.write_bytes(b"".join(lines))
    assert main([str(many), str(target), *LONG_PACK]) == 0
    assert capsys.readouterr().err.startswith("resuming: 3 of ")
    assert contents(target) == uninterrupted


def interrupted_pack(many: Path, target: Path, shards: int = 3) -> str:
    """Send Ctrl-C to all processes of a pack after some shards; return what it printed to standard error."""
    command = pack_until(shards, many, target)
    os.killpg(command.pid, signal.SIGINT)
    output, message = said(command)
    assert command.returncode == 130
    assert output == ""
    return message


def test_ctrl_c_keeps_finished_shards(many, uninterrupted, tmp_path, capsys, contents):
    target = tmp_path / "target"
    assert interrupted_pack(many, target) == (
        f"interrupted; {target} is not written; finished shards are kept in {staging_folder(target)}, and the same"
        f" command resumes from them\n"
    )
    assert main([str(many), str(target), *LONG_PACK, "--workers", "1"]) == 0
    assert capsys.readouterr().err.startswith("resuming: ")
    assert contents(target) == uninterrupted


@pytest.mark.parametrize("delay", [0, 0.01, 0.03, None])
def test_ctrl_c_before_the_first_shard(delay, many, tmp_path):
    """While images are listed, while workers are forked, while they write: one line, and nothing is left."""
    target = tmp_path / "target"
    command = start_pack(many, target, shards=0)
    if delay is None:
        while not any(staging_folder(target).glob("*.new")):
            assert command.poll() is None, said(command)
            time.sleep(0.002)
    else:
        time.sleep(delay)
    os.killpg(command.pid, signal.SIGINT)
    assert said(command) == ("", f"interrupted; {target} is not written\n")
    assert command.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--seed", "1"], "--seed"),
        (["--shard-mib", "3", "--resize", "1000"], "--shard-mib, --resize, --quality, version of Pillow"),
        (["--check", "none"], "--check"),
        (["--max-megapixels", "1"], "--max-megapixels"),
        (["--classes", "names"], "classes"),
        (["--val-percent", "50", "--split", "train"], "choice of images, --val-percent, --split"),
    ],
)
def test_other_options_discard_finished_shards(options, changed, many, tmp_path, capsys, monkeypatch, contents):
    target = tmp_path / "target"
    monkeypatch.chdir(tmp_path)
    Path("names").write_text("\n".join(sorted(os.listdir(many), reverse=True)))
    interrupted_pack(many, target)
    assert main([str(many), str(target), *LONG_PACK, *options]) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == f"starting over: the unfinished pack in {staging_folder(target)} had another {changed}"
    main([str(many), str(tmp_path / "expected"), *LONG_PACK, *options])
    assert contents(target) == contents(tmp_path / "expected")


def test_changed_source_discards_finished_shards(many, source, tmp_path, capsys, images_by_class, packed_images):
    target = tmp_path / "target"
    interrupted_pack(many, target)
    assert main([str(source), str(target)]) == 0
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == (
        f"starting over: the unfinished pack in {staging_folder(target)} had another source (its files, their sizes"
        " and times of change), classes, choice of images, --shard-mib"
    )
    assert packed_images(target) == images_by_class(source.glob("*/*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_skip_broken_resumes_after_a_broken_image(many, tmp_path, capsys, contents):
    """The shards before the broken image are kept, and used once it is to be skipped."""
    folder = shutil.copytree(many, tmp_path / "many", copy_function=os.link)
    for number in range(8):  # some shard other than the first ones has one of them first
        (folder / "copy00" / f"broken{number}.jpg").write_bytes(b"no image")
    target = tmp_path / "target"
    for seed in map(str, range(20)):
        shutil.rmtree(staging_folder(target), ignore_errors=True)
        assert main([str(folder), str(target), *LONG_PACK, "--seed", seed]) == 2
        error, *kept = capsys.readouterr().err.splitlines()
        if kept:
            break
    assert kept == [f"finished shards are kept in {staging_folder(target)}, and the same command resumes from them"]
    before = finished(target)
    assert len(before) >= 1
    assert main([str(folder), str(target), *LONG_PACK, "--seed", seed]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [error, *kept]

    assert main([str(folder), str(target), *LONG_PACK, "--seed", seed, "--skip-broken"]) == 0
    assert capsys.readouterr().err.startswith(f"resuming: {len(before)} of ")
    assert len(load_manifest(target).broken) == 8
    assert (target / "shard-000000.tar").stat().st_ino == before["shard-000000.tar"][0]
    assert main([str(folder), str(tmp_path / "expected"), *LONG_PACK, "--seed", seed, "--skip-broken"]) == 0
    assert contents(target) == contents(tmp_path / "expected")


def test_skipped_images_of_finished_shards_are_remembered(many, tmp_path, capsys):
    folder = shutil.copytree(many, tmp_path / "many", copy_function=os.link)
    for number in range(40):
        (folder / "copy00" / f"broken{number}.jpg").write_bytes(b"no image")
    target = tmp_path / "target"
    killed_pack(8, folder, target, "--skip-broken")
    assert main([str(folder), str(target), *LONG_PACK]) == 2
    resuming, error, _ = capsys.readouterr().err.splitlines()
    assert resuming.startswith("resuming: ")
    assert re.match(rf"error: broken image {folder}/copy00/broken\d+.jpg: it is no image", error)
    assert main([str(folder), str(target), *LONG_PACK, "--skip-broken"]) == 0
    broken = load_manifest(target).broken
    assert len(broken) == 40
    assert broken[0] == SkippedFile("copy00/broken0.jpg", "it is no image, or of an unknown format")
    assert len(load_manifest(target)) == 48 * MANY


@pytest.mark.slow
def test_second_pack_into_the_same_target_is_an_error(many, uninterrupted, tmp_path, capsys, contents):
    target = tmp_path / "target"
    command = pack_until(1, many, target)
    assert main([str(many), str(target), *LONG_PACK]) == 2
    assert capsys.readouterr().err == (  # not a word about the shards of the other
        f"error: another process is writing {target}; wait until it has ended, or name another folder\n"
    )
    command.communicate()
    assert command.returncode == 0
    assert contents(target) == uninterrupted


def test_a_killed_worker_is_an_error(many, tmp_path):
    target = tmp_path / "target"
    command = pack_until(3, many, target)
    psutil.Process(command.pid).children()[0].kill()
    _, message = said(command)
    assert command.returncode == 2
    assert message == (
        "error: a worker was killed, most often because memory ran out; free some, or use fewer workers\n"
        f"finished shards are kept in {staging_folder(target)}, and the same command resumes from them\n"
    )

"""Journal of the finished shards of an unfinished pack, from which the same command resumes after a kill.

A shard is written to a temporary file in the hidden folder, then renamed into the folder that becomes the target, then
recorded in the journal beside that folder: one line of JSON that begins with its own hash. packer.py decides what is
written.
"""

import base64
import hashlib
import json
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from dataio.files import sha256_of, sync
from dataio.manifest import SAMPLE_DTYPE, Shard, SkippedFile
from dataio.pack.shard_writer import WrittenShard

TEMP_SUFFIX = ".new"  # files that are being written end with it

_NAME = "journal"
_HASH_DIGITS = 16
_RENAMED_SETTINGS = {"--hold-out": "--val-percent", "--part": "--split"}
_RENAMED_SPLITS = {"kept": "train", "held-out": "val"}


@dataclass(frozen=True)
class FinishedShard:
    """What was written, and its entry of the manifest: None if all its images were broken, so that there is no file."""

    shard: Shard | None
    written: WrittenShard


class Journal:
    """Finished shards of a pack, in order; `folder` is the one that `atomic_folder` gives.

    settings: all that determines the bytes of the pack, as JSON types. Shards packed with other settings are removed,
    and so are the first shard whose bytes are not the recorded ones, and all after it.
    changed: the names of the settings that differ, if shards were removed for that.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], pool: Executor) -> None:
        self._folder, path = folder, folder.parent / _NAME
        self.shards: list[FinishedShard] = []
        self.changed: list[str] = []
        before, *records = _read(path) or [settings]
        before = _with_current_names(before)
        if before != settings:
            self.changed = [name for name in settings if before.get(name) != settings[name]] if records else []
            records = []
        records = _verified_records(folder, records, pool)
        self.shards = [_from_record(record) for record in records]
        self._remove_others()
        new = path.with_suffix(TEMP_SUFFIX)
        new.write_bytes(b"".join(map(_line, [settings, *records])))
        new.replace(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, path: Path, written: WrittenShard) -> None:
        """Give the shard that was written to `path` its name and its index, and record it."""
        if not len(written.rows):
            path.unlink()
            finished = FinishedShard(None, written)
        else:
            number = sum(1 for other in self.shards if other.shard)
            name = f"shard-{number:06d}.tar"
            idx_sha256 = hashlib.sha256(written.idx).hexdigest()
            shard = Shard(name, written.bytes, written.sha256, len(written.rows), idx_sha256)
            # Synced before it is recorded, so that recorded shards survive a crash of the machine; and dropped from
            # memory, where a large folder would push out all else, and new pages cost more than the copy itself.
            sync(path, keep_cached=False)
            path.rename(self._folder / shard.name)
            (self._folder / shard.idx_name).write_bytes(written.idx)
            finished = FinishedShard(shard, written)
        self.shards.append(finished)
        self._file.write(_line(_record(finished)))  # a single write, which a kill does not interrupt

    def _remove_others(self) -> None:
        known = {name for finished in self.shards if (shard := finished.shard) for name in (shard.name, shard.idx_name)}
        for path in [*self._folder.iterdir(), *self._folder.parent.glob(f"*{TEMP_SUFFIX}")]:
            if path.name not in known:
                path.unlink()


def _verified_records(folder: Path, records: list[dict[str, Any]], pool: Executor) -> list[dict[str, Any]]:
    """Return the records up to the first one whose files differ from it."""
    checks = pool.map(_is_intact, [folder] * len(records), [record["shard"] for record in records])
    return [record for record, _ in takewhile(lambda pair: pair[1], zip(records, checks, strict=True))]


def _is_intact(folder: Path, fields: dict[str, Any] | None) -> bool:
    if fields is None:
        return True
    shard = Shard(**fields)
    try:
        return sha256_of(folder / shard.name) == shard.sha256 and sha256_of(folder / shard.idx_name) == shard.idx_sha256
    except FileNotFoundError:
        return False


def _record(finished: FinishedShard) -> dict[str, Any]:
    written = asdict(finished.written)
    written["rows"] = base64.b64encode(finished.written.rows.tobytes()).decode()
    del written["idx"]  # is a file of its own
    return {"shard": finished.shard and asdict(finished.shard), "written": written}


def _from_record(record: dict[str, Any]) -> FinishedShard:
    fields = dict(record["written"], idx=b"")
    fields["rows"] = np.frombuffer(base64.b64decode(fields["rows"]), SAMPLE_DTYPE)
    fields["broken"] = [SkippedFile(**broken) for broken in fields["broken"]]
    return FinishedShard(record["shard"] and Shard(**record["shard"]), WrittenShard(**fields))


def _with_current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename the settings that earlier versions recorded by other names and values."""
    renamed = {_RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()}
    if renamed.get("--split") in _RENAMED_SPLITS:
        renamed["--split"] = _RENAMED_SPLITS[renamed["--split"]]
    return renamed


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the records up to the first line that is incomplete; none if there is no file."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        digest, _, text = line.partition(b" ")
        if digest != _digest(text):
            break
        records.append(json.loads(text))
    return records


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record).encode()
    return b"%b %b\n" % (_digest(text), text)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_HASH_DIGITS].encode()

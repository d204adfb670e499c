"""What is to be packed: the classes and images of a class folder, of a zip or tar of one, or of a WebDataset.

Names and sizes decide here what is an image at all (find_images); images.py looks into the bytes. archives.py
reads zip and tar. pack.py makes shards of it all.
"""

import hashlib
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from braceexpand import UnbalancedBracesError, braceexpand

from dataio.archives import Member, TarReader, ZipReader
from dataio.files import printable
from dataio.images import ENDINGS
from dataio.index import MANIFEST_NAME, Broken, read_manifest_file

LABEL_ENDING = "cls"

_LOOKED_AT = 100  # members of a tar file, to tell a WebDataset from a class folder
_MOST_CLASSES = 2**20  # without names
_NO_CLASS_FOLDER = "it lies in no class folder"
_OTHER_ENDING = f"its name ends with none of {' '.join(ENDINGS)}"
_UNREADABLE = "it is a link to nothing, or no regular file"


class Reader(Protocol):
    """Gets the bytes of images in a worker process, which it is sent to."""

    def read(self, size: int, place: tuple) -> bytes:
        """The bytes, another number than `size` if the file has changed. Raises OSError if they cannot be read."""


class ImageFile(NamedTuple):
    """One image of a source: its path in messages, its class's number, its size, and where its reader finds it."""

    path: str
    label: int
    bytes: int
    place: tuple


@dataclass(frozen=True)
class Source:
    """What there is to pack, in a fixed order. `broken` are the files that need not be opened to tell.

    stamp: a hash of all paths, sizes and times of change.
    """

    name: str  # as the command has it
    classes: tuple[str, ...]
    images: list[ImageFile]
    broken: list[Broken]
    stamp: str
    reader: Reader


@dataclass(frozen=True)
class FolderReader:
    """Reads the files of a folder. A place is (path inside it,)."""

    folder: str

    def read(self, size: int, place: tuple[str]) -> bytes:
        file = os.open(f"{self.folder}/{place[0]}", os.O_RDONLY)
        try:
            return os.read(file, size + 1)
        finally:
            os.close(file)


def find_images(source: str | Path, class_names: Path | None = None) -> Source:
    """The classes and images of `source`. Each format has its own:

    A class folder, or a zip or tar of one: a visible folder is a class, the files in and below it its images. Hidden
    files are ignored, and so are files beside the class folders unless they are images. A file inside a class whose
    name does not end like an image's is listed as broken.
    A WebDataset: a folder, brace pattern or file of tar shards, whose samples have an image and a class (.cls).
    `class_names` is for this alone: a file with a name in each line, or None where the shards say enough.
    Raises ValueError if there is no class, a class has no image, or a sample is not whole.
    """
    path = Path(source)
    shards = _shards_of(path)
    if not shards and class_names is not None:
        raise ValueError(f"--classes names the classes of a WebDataset; in {source} the folders name them")
    if shards:
        return _find_samples(path, shards, class_names)
    if path.is_dir():
        return _find_in_folder(path)
    return _find_in_archive(path)


# Class folders


def _find_in_folder(path: Path) -> Source:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    classes = [entry.name for entry in entries if entry.is_dir()]
    files = [Member(entry.name) for entry in entries if not entry.is_dir()]
    stamp = hashlib.sha256()
    for name in classes:
        for member, changed in sorted(_files_below(path, name)):
            stamp.update(b"%b\0%d\0%d\n" % (os.fsencode(member.name), member.bytes, changed))
            files.append(member)
    return _of_class_folder(path, classes, files, stamp.hexdigest(), FolderReader(str(path)))


def _files_below(top: Path, name: str) -> Iterator[tuple[Member, int]]:
    """(member, time of change in ns) of each visible file below a folder; links are followed."""
    waiting, seen = [name], set()
    while waiting:
        folder = waiting.pop()
        real = os.stat(top / folder)
        if (real.st_dev, real.st_ino) in seen:  # a link may lead back to a folder above it
            continue
        seen.add((real.st_dev, real.st_ino))
        with os.scandir(top / folder) as entries:
            for entry in entries:
                inside = f"{folder}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    waiting.append(inside)
                    continue
                try:
                    facts = entry.stat()
                except FileNotFoundError:
                    facts = None
                if facts is None or not stat.S_ISREG(facts.st_mode):
                    yield Member(inside, fault=_UNREADABLE), 0
                else:
                    yield Member(inside, facts.st_size, (inside,)), facts.st_mtime_ns


def _find_in_archive(path: Path) -> Source:
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; name a folder that holds a folder of images for each class, a zip or tar of one,"
            f" or the shards of a WebDataset"
        )
    zipped = zipfile.is_zipfile(path)
    reader = ZipReader(path) if zipped else TarReader((path,))
    members = list(reader.members() if zipped else reader.members(0))
    _require_unique(path, members)
    members = _from_the_classes_on([member for member in members if _is_visible(member.name)])
    classes = sorted({member.name.partition("/")[0] for member in members if "/" in member.name})
    files = sorted((member for member in members if not member.name.endswith("/")), key=_by_class)
    return _of_class_folder(path, classes, files, _stamp_of([path]), reader)


def _is_visible(name: str) -> bool:
    parts = name.removeprefix("./").split("/")
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _from_the_classes_on(members: list[Member]) -> list[Member]:
    """The members without the folders around all classes, with which many archives begin: each alone in its own."""
    while True:
        members = [member._replace(name=member.name.removeprefix("./")) for member in members]
        folders = {member.name.partition("/")[0] for member in members if "/" in member.name}
        inside = [member._replace(name=member.name.partition("/")[2]) for member in members if "/" in member.name]
        if len(folders) != 1 or not any("/" in member.name for member in inside):
            return [member for member in members if member.name]
        members = inside


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _by_class(member: Member) -> tuple[str, ...]:
    return member.name.partition("/")


def _of_class_folder(path: Path, classes: list[str], files: Iterable[Member], stamp: str, reader: Reader) -> Source:
    """The source of these files, in this order; those of a class are called CLASS/…"""
    if not classes:
        raise ValueError(
            f"{path} holds no class folders; put the images of each class into a folder of their own, like"
            f" {path / 'CLASS' / 'IMAGE'}"
        )
    for name in classes:
        if name != printable(name):
            raise ValueError(f'the name of class "{printable(name)}" in {path} is not UTF-8; rename the folder')
    labels = {name: label for label, name in enumerate(classes)}
    images, broken, others = [], [], [0] * len(classes)
    for file in files:
        name, slash, _ = file.name.partition("/")
        is_image = _is_image(file.name)
        if slash and is_image and file.fault is None:
            images.append(ImageFile(file.name, labels[name], file.bytes, file.place))
        elif slash:
            others[labels[name]] += 1
            broken.append(Broken(file.name, file.fault if is_image else _OTHER_ENDING))
        elif is_image:
            broken.append(Broken(file.name, _NO_CLASS_FOLDER))
    for label in sorted(set(range(len(classes))) - {image.label for image in images}):
        files = f" ({others[label]} files of other kinds)" if others[label] else ""
        raise ValueError(
            f'class "{classes[label]}" has no images{files}; add some to {path / classes[label]} or remove that folder'
        )
    return Source(str(path), tuple(classes), images, broken, stamp, reader)


# WebDatasets


def _shards_of(path: Path) -> list[Path]:
    """The tar files of a WebDataset; none if `path` is something else. Raises ValueError if one is missing."""
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        folders = any(entry.is_dir() and not entry.name.startswith(".") for entry in path.iterdir())
        return [] if folders else tars
    if path.is_file():
        return [path] if not zipfile.is_zipfile(path) and _has_labels(path) else []
    if "{" not in str(path):
        return []
    try:
        shards = [Path(shard) for shard in braceexpand(str(path))]
    except UnbalancedBracesError as error:
        raise ValueError(
            f"{path} is no brace pattern ({error}); write it like 'shard-{{000000..000041}}.tar'"
        ) from error
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard} is not there; correct the pattern {path} or copy that shard")
    return shards


def _has_labels(path: Path) -> bool:
    """Whether one of the first members is a sample's label."""
    members = islice(TarReader((path,)).members(0), _LOOKED_AT)
    return any(member.name.endswith(f".{LABEL_ENDING}") for member in members)


def _find_samples(path: Path, shards: list[Path], class_names: Path | None) -> Source:
    reader = TarReader(tuple(shards))
    images: list[Member] = []
    labels: list[str] = []
    for number, shard in enumerate(shards):
        for image, label in _samples(shard, list(reader.members(number))):
            images.append(image._replace(name=f"{shard.name}/{image.name}"))
            labels.append(reader.read(label.bytes, label.place).decode(errors="replace").strip())
            if not labels[-1]:
                raise ValueError(f"{shard}: {label.name} is empty; write the class's number or name into it")
    if not images:
        raise ValueError(f"{path} holds no samples: no member of its tar files ends with .{LABEL_ENDING}")
    classes, numbers = _classes(path, labels, class_names)
    files = [
        ImageFile(image.name, number, image.bytes, image.place) for image, number in zip(images, numbers, strict=True)
    ]
    return Source(str(path), tuple(classes), files, [], _stamp_of(shards), reader)


def _samples(shard: Path, members: list[Member]) -> Iterator[tuple[Member, Member]]:
    """(image, label) of each sample. A key is what stands before the first dot of a member's last name."""
    _require_unique(shard, members)
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        key, _, ending = name.partition(".")
        if key and ending:
            samples.setdefault(f"{folder}{slash}{key}", {})[ending] = member
    for key, fields in samples.items():
        label = fields.get(LABEL_ENDING)
        images = [member for ending, member in fields.items() if f".{ending.lower()}" in ENDINGS]
        if label is None and not images:
            continue
        if label is None or len(images) != 1:
            found = "no .cls" if label is None else f"{len(images)} images"
            raise ValueError(
                f"{shard}: sample {key} has {found}; a sample needs one image and its class, like {key}.jpg and"
                f" {key}.{LABEL_ENDING}"
            )
        if fault := images[0].fault or label.fault:
            raise ValueError(f"{shard}: sample {key}: {fault}; replace it by a regular file")
        yield images[0], label


def _classes(path: Path, labels: list[str], class_names: Path | None) -> tuple[list[str], list[int]]:
    """(the classes' names, the number of each sample's class)."""
    names = _names(path, class_names)
    if all(label.isascii() and label.isdigit() for label in labels):
        numbers = [int(label) for label in labels]
        highest = max(numbers)
        if names is None and highest < _MOST_CLASSES:
            names = [str(number) for number in range(highest + 1)]
        if names is None or highest >= len(names):
            raise ValueError(
                f"{path} has class {highest}, and names are known for {len(names or [])} from 0 on; give a file"
                f" with {highest + 1} lines to --classes"
            )
        return names, numbers
    known = {name: number for number, name in enumerate(names or sorted(set(labels)))}
    for label in labels:
        if label not in known:
            raise ValueError(f'{path} has class "{label}", which is none of the {len(known)} names; add it to these')
    return list(known), [known[label] for label in labels]


def _names(path: Path, class_names: Path | None) -> list[str] | None:
    """Of the file, or of the manifest that lies beside shards which dataio.pack wrote."""
    if class_names is None:
        return list(read_manifest_file(path)[0].classes) if (path / MANIFEST_NAME).is_file() else None
    names: dict[str, None] = {}
    for number, name in enumerate(class_names.read_text().splitlines(), 1):
        if not name.strip() or name in names:
            raise ValueError(f'{class_names}: line {number} is "{name}", empty or there twice; write a name a line')
        names[name] = None
    return list(names)


def _require_unique(path: Path, members: list[Member]) -> None:
    names = set()
    for member in members:
        if member.name in names and not member.name.endswith("/"):
            raise ValueError(f"{path} holds {member.name} twice; write that archive again with one of them")
        names.add(member.name)


def _stamp_of(files: list[Path]) -> str:
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()

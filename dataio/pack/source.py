"""Sources of a pack: the classes and images of a class folder, of a zip or tar file of one, or of a WebDataset.

Images are found by names and sizes alone (find_images); image_checks.py checks their bytes. layout.py finds the folder
that holds the classes, archives.py reads zip and tar files, packer.py writes the shards.
"""

import hashlib
import os
import re
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # its stubs lack the error

from dataio.files import escape_unprintable, has_control_character, list_folder, printable
from dataio.manifest import MANIFEST_NAME, SkippedFile, read_manifest_file
from dataio.pack.archives import Member, TarReader
from dataio.pack.image_checks import EXTENSIONS
from dataio.pack.layout import (
    archive_listings,
    find_classes,
    is_image,
    is_visible,
    open_archive,
    read_members,
    require_plain_name,
    split_archive,
)

LABEL_EXTENSION = "cls"

_MEMBERS_PROBED = 100  # first members of a tar file that tell a WebDataset from a class folder
_MAX_CLASSES = 2**20  # limit for a WebDataset whose classes have no names
_NO_CLASS_FOLDER = "it lies in no class folder"
_OTHER_EXTENSION = f"its name ends with none of {' '.join(EXTENSIONS)}"
#: Extensions of image formats that DALI does not decode.
_UNSUPPORTED = (".avif", ".gif", ".heic", ".heif", ".ico", ".jxl", ".psd", ".svg", ".tga")
#: Extensions of files that often lie beside images: annotations, tables, texts.
_SIDECAR_EXTENSIONS = (
    *(".aae", ".csv", ".html", ".ini", ".json", ".md", ".tsv"),
    *(".txt", ".url", ".xml", ".xmp", ".yaml", ".yml"),
)
_UNREADABLE = "it is a link to nothing, or no regular file"


class Reader(Protocol):
    """Reader of a source's images, which is sent to the worker processes."""

    def read(self, size: int, locator: tuple[Any, ...]) -> bytes:
        """Return the bytes of an image; their number differs from `size` if the file has changed.

        Raises OSError if they cannot be read.
        """


class ImageFile(NamedTuple):
    """An image of a source: its path for messages, its label, its size, and the locator that its reader takes."""

    path: str
    label: int
    bytes: int
    locator: tuple[Any, ...]


@dataclass(frozen=True)
class Source:
    """Images and classes to pack, in a fixed order. `broken` are the files whose names tell that they cannot be packed.

    fingerprint: a hash of all paths, sizes and modification times. ignored: number of text files and tables among the
    images. natural_order: whether the classes are in natural order, because nothing determines another one.
    """

    name: str  # the path that was given, or the folder below it that holds the classes
    classes: tuple[str, ...]
    images: list[ImageFile]
    broken: list[SkippedFile]
    fingerprint: str
    reader: Reader
    ignored: int = 0
    natural_order: bool = False


@dataclass(frozen=True)
class FolderReader:
    """Reader of the files of a folder. A locator is (path inside the folder,)."""

    folder: str

    def read(self, size: int, locator: tuple[Any, ...]) -> bytes:
        """Return the bytes of a file, at most `size` + 1, so that a file that has grown is noticed."""
        file = os.open(f"{self.folder}/{locator[0]}", os.O_RDONLY)
        try:
            return os.read(file, size + 1)
        finally:
            os.close(file)


def find_images(source: str | Path, class_names: Sequence[str] | None = None) -> Source:
    """Find the classes and images of `source`, which is of one of these formats.

    A class folder, or a zip or tar file of one: a visible folder is a class, the files in and below it are its images.
    Folders that hold nothing but the folder of all classes are passed through. Hidden files, those of operating
    systems, and files other than images beside the class folders are ignored. In a class, text files and tables are
    counted as ignored; any other file whose name does not end like an image's is listed as broken.
    A WebDataset: a folder, brace pattern or file of tar shards, whose samples have an image and a class (.cls).

    class_names: all classes in their order; some may have no images. None: the classes are in natural order (2 before
    10), or as the numbers or the manifest of a WebDataset say.
    Raises ValueError if there is no class, `class_names` lacks one, one has no images and they are None, the folders
    are splits of a data set (train, val), a sample is incomplete, or the name of a class has control characters.
    """
    path = Path(source)
    archive, inside = split_archive(path)
    if archive is None and path.is_dir():
        path = find_classes(path)
        archive, inside = split_archive(path)
    if archive is not None and (inside or zipfile.is_zipfile(archive) or not _has_labels(archive)):
        return _find_in_archive(archive, inside, class_names)
    shards = _shards_of(path)
    if shards:
        return _find_samples(path, shards, class_names)
    if path.is_dir():
        return _find_in_folder(path, class_names)
    raise ValueError(
        f"{path} is not there; name a folder that holds a folder of images for each class, a zip or tar of one,"
        f" or the shards of a WebDataset"
    )


def read_names(file: Path) -> list[str]:
    """Read the names of classes from a file, one a line. Raises ValueError if one is empty or occurs twice."""
    names: dict[str, None] = {}
    for number, line in enumerate(file.read_text("utf-8-sig").rstrip("\n").split("\n"), 1):
        name = unicodedata.normalize("NFC", line)
        if not name.strip() or name in names or has_control_character(name):
            raise ValueError(
                f'{file}: line {number} is "{escape_unprintable(name)}", empty, there twice or with control characters;'
                " write a name a line"
            )
        names[name] = None
    return list(names)


# Class folders


def _find_in_folder(path: Path, class_names: Sequence[str] | None) -> Source:
    entries = sorted(entry for entry in path.iterdir() if is_visible(entry.name))
    classes = [entry.name for entry in entries if entry.is_dir()]
    files = [
        Member(entry.name, fault=None if entry.exists() else _UNREADABLE) for entry in entries if not entry.is_dir()
    ]
    fingerprint = hashlib.sha256()
    for name in classes:
        for member, changed in sorted(_files_below(path, name)):
            fingerprint.update(b"%b\0%d\0%d\n" % (os.fsencode(member.name), member.bytes, changed))
            files.append(member)
    return _of_class_folder(path, classes, files, class_names, fingerprint.hexdigest(), FolderReader(str(path)))


def _files_below(top: Path, name: str) -> Iterator[tuple[Member, int]]:
    """Yield (member, modification time in ns) of each visible file below a folder, following links."""
    waiting, seen = [name], set()
    while waiting:
        folder = waiting.pop()
        real = os.stat(top / folder)
        if (real.st_dev, real.st_ino) in seen:  # a link may lead back to a folder above it
            continue
        seen.add((real.st_dev, real.st_ino))
        for entry in list_folder(top / folder):
            inside = f"{folder}/{entry.name}"
            if not is_visible(entry.name):
                continue
            try:
                facts = entry.stat()
            except OSError:  # a link to nothing, or to itself
                facts = None
            if facts is not None and stat.S_ISDIR(facts.st_mode):
                waiting.append(inside)
            elif facts is None or not stat.S_ISREG(facts.st_mode):
                yield Member(inside, fault=_UNREADABLE), 0
            else:
                yield Member(inside, facts.st_size, (inside,)), facts.st_mtime_ns


def _find_in_archive(archive: Path, inside: str, class_names: Sequence[str] | None) -> Source:
    reader = open_archive(archive)
    members = read_members(archive, reader)
    _require_unique(archive, members)
    listings = archive_listings(members)
    if inside not in listings:
        raise ValueError(f"{archive} holds no folder {inside}; name one that it holds, or the archive alone")
    path = find_classes(archive / inside, lambda locator: listings[split_archive(locator)[1]])
    top = "".join(f"{folder}/" for folder in path.relative_to(archive).parts)
    members = [
        member._replace(name=member.name.removeprefix(top))
        for member in members
        if member.name.startswith(top) and member.name != top and is_visible(member.name)
    ]
    classes = sorted({member.name.partition("/")[0] for member in members if "/" in member.name})
    files = sorted((member for member in members if not member.name.endswith("/")), key=_by_class)
    return _of_class_folder(path, classes, files, class_names, _fingerprint_of([archive]), reader)


def _by_class(member: Member) -> tuple[str, ...]:
    return member.name.partition("/")


def _of_class_folder(
    path: Path,
    folders: list[str],
    files: Iterable[Member],
    class_names: Sequence[str] | None,
    fingerprint: str,
    reader: Reader,
) -> Source:
    """Make the source of these files, in this order; the path of a file in a class begins with the class's folder."""
    classes, labels = _label_folders(path, folders, class_names)
    images: list[ImageFile] = []
    broken: list[SkippedFile] = []
    others, ignored = Counter[str](), 0  # files that are no images, by folder
    for file in files:
        folder, slash, _ = file.name.partition("/")
        fault = file.fault or _fault_of_name(file.name)
        if not slash:
            if file.fault or is_image(file.name):
                broken.append(SkippedFile(file.name, file.fault or _NO_CLASS_FOLDER))
        elif fault is None:
            images.append(ImageFile(file.name, labels[folder], file.bytes, file.locator))
        else:
            others[folder] += 1
            if file.name.lower().endswith(_SIDECAR_EXTENSIONS):
                ignored += 1
            else:
                broken.append(SkippedFile(file.name, fault))
    used = {image.label for image in images}
    for folder in folders if class_names is None or not images else ():
        if labels[folder] not in used:
            kinds = f" ({others[folder]} files of other kinds)" if others[folder] else ""
            raise ValueError(
                f'class "{folder}" has no images{kinds}; add some to {path / folder}, remove that folder, or name all'
                f" classes in a file for --classes"
            )
    return Source(
        str(path), tuple(classes), images, broken, fingerprint, reader, ignored, natural_order=class_names is None
    )


def _label_folders(
    path: Path, folders: list[str], class_names: Sequence[str] | None
) -> tuple[list[str], dict[str, int]]:
    """Return (names of the classes, the label of each folder)."""
    if not folders:
        raise ValueError(
            f"{path} holds no class folders; put the images of each class into a folder of their own, like"
            f" {path / 'CLASS' / 'IMAGE'}"
        )
    names: dict[str, str] = {}
    for folder in folders:
        if folder != printable(folder):
            raise ValueError(f'the name of class "{printable(folder)}" in {path} is not UTF-8; rename the folder')
        name = unicodedata.normalize("NFC", folder)  # macOS decomposes accents, and other systems do not
        if name in names:
            raise ValueError(f"{path} holds two folders {name}, written with other Unicode characters; rename one")
        names[name] = folder
    classes = sorted(names, key=natural_key) if class_names is None else list(class_names)
    numbers = {name: number for number, name in enumerate(classes)}
    for name in names:
        if name not in numbers:
            raise ValueError(
                f'none of the {len(classes)} names of classes is "{name}", a folder in {path}; add it to the file for'
                f" --classes, or remove the folder"
            )
    return classes, {folder: numbers[name] for name, folder in names.items()}


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Make a sort key for natural order, that of timm's reader of class folders: numbers by value, case ignored."""
    pieces = re.split(r"(\d+)", name.lower())
    return [int(piece) if index % 2 else piece for index, piece in enumerate(pieces)], name


def _fault_of_name(name: str) -> str | None:
    if is_image(name):
        return None
    extension = os.path.splitext(name)[1].lower()
    return (
        f"DALI does not decode {extension} files; convert it to JPEG or PNG"
        if extension in _UNSUPPORTED
        else _OTHER_EXTENSION
    )


# WebDatasets


def _shards_of(path: Path) -> list[Path]:
    """List the tar files of a WebDataset; none if `path` is something else. Raises ValueError if one is missing."""
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        for tar in tars:
            require_plain_name(path, tar.name)
        folders = any(entry.is_dir() and is_visible(entry.name) for entry in path.iterdir())
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
    """Tell whether one of the first members is a sample's label."""
    members = islice(TarReader((path,)).members(0), _MEMBERS_PROBED)
    return any(member.name.endswith(f".{LABEL_EXTENSION}") for member in members)


def _find_samples(path: Path, shards: list[Path], class_names: Sequence[str] | None) -> Source:
    reader = TarReader(tuple(shards))
    images: list[Member] = []
    labels: list[str] = []
    for number, shard in enumerate(shards):
        for image, label in _samples(shard, list(reader.members(number))):
            images.append(image._replace(name=f"{shard.name}/{image.name}"))
            text = reader.read(label.bytes, label.locator).decode(errors="replace").strip()
            labels.append(unicodedata.normalize("NFC", text))
            if not labels[-1] or has_control_character(labels[-1]):
                raise ValueError(
                    f"{shard}: {escape_unprintable(label.name)} is empty or has control characters; write the class's"
                    " number or name into it"
                )
    if not images:
        raise ValueError(f"{path} holds no samples: no member of its tar files ends with .{LABEL_EXTENSION}")
    classes, numbers, natural = _classes(path, labels, class_names)
    files = [
        ImageFile(image.name, number, image.bytes, image.locator) for image, number in zip(images, numbers, strict=True)
    ]
    return Source(str(path), tuple(classes), files, [], _fingerprint_of(shards), reader, natural_order=natural)


def _samples(shard: Path, members: list[Member]) -> Iterator[tuple[Member, Member]]:
    """Yield (image, label) of each sample. A key ends at the first dot of the last component of a member's name.

    If a label exists for it, the key ends at the last dot instead: webdataset would read neither 2.5.jpg nor 2.5.cls.
    """
    _require_unique(shard, members)
    labelled = {member.name.removesuffix(f".{LABEL_EXTENSION}") for member in members}
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if member.name.rpartition(".")[0] in labelled:
            key, _, extension = name.rpartition(".")
        if key and extension:
            samples.setdefault(f"{folder}{slash}{key}", {})[extension] = member
    for key, fields in samples.items():
        label, key = fields.get(LABEL_EXTENSION), escape_unprintable(key)
        images = [member for extension, member in fields.items() if f".{extension.lower()}" in EXTENSIONS]
        if label is None and not images:
            continue
        if label is None or len(images) != 1:
            found = "no .cls" if label is None else f"{len(images)} images"
            raise ValueError(
                f"{shard}: sample {key} has {found}; a sample needs one image and its class, like {key}.jpg and"
                f" {key}.{LABEL_EXTENSION}"
            )
        if fault := images[0].fault or label.fault:
            raise ValueError(f"{shard}: sample {key}: {fault}; replace it by a regular file")
        yield images[0], label


def _classes(path: Path, labels: list[str], class_names: Sequence[str] | None) -> tuple[list[str], list[int], bool]:
    """Return (names of the classes, each sample's label, whether the names are in natural order)."""
    names = None if class_names is None else list(class_names)
    if names is None and (path / MANIFEST_NAME).is_file():  # dataio.pack wrote the shards
        names = list(read_manifest_file(path)[0].classes)
    if all(label.isascii() and label.isdigit() for label in labels):
        numbers = [int(label) for label in labels]
        highest = max(numbers)
        if names is None and highest < _MAX_CLASSES:
            names = [str(number) for number in range(highest + 1)]
        if names is None or highest >= len(names):
            raise ValueError(
                f"{path} has class {highest}, and names are known for {len(names or [])} from 0 on; give a file"
                f" with {highest + 1} lines to --classes"
            )
        return names, numbers, False
    known = {name: number for number, name in enumerate(names or sorted(set(labels), key=natural_key))}
    for label in labels:
        if label not in known:
            raise ValueError(f'{path} has class "{label}", which is none of the {len(known)} names; add it to these')
    return list(known), [known[label] for label in labels], names is None


def _require_unique(path: Path, members: list[Member]) -> None:
    names = set()
    for member in members:
        if member.name in names and not member.name.endswith("/"):
            raise ValueError(
                f"{path} holds {escape_unprintable(member.name)} twice; write that archive again with one of them"
            )
        names.add(member.name)


def _fingerprint_of(files: list[Path]) -> str:
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()

"""Layout of a data set of class folders: which folders are its splits, and which its classes.

    photos/cat                                 classes; validation images are held out of them
    photos/train/cat, photos/val/cat           splits, by any of the usual names, in upper or lower case
    photos/train/cat                           a training split alone
    download/photos/train/cat                  any of these below folders that hold nothing else

The same inside a zip or tar file, and a split may be one: photos/train.zip. `archive/folder` is the path of a folder in
an archive. source.py lists the images of one split; launch/quickstart.py packs all splits.
"""

import os
import shlex
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from dataio.files import escape_unprintable, has_control_character, list_folder
from dataio.pack.archives import Member, TarReader, ZipReader
from dataio.pack.image_checks import EXTENSIONS

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")  # the first that exists is the validation split

#: Files and folders that operating systems, viewers and file servers leave among images, in lower case.
_SYSTEM_FILES = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini", "zbthumbnail.info"),
    *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found"),
}
_ARCHIVES = (".zip", ".tar")


def is_visible(path: str) -> bool:
    """Tell whether no component of a path is hidden, or left there by an operating system or a viewer."""
    return not any(name.startswith(".") or name.lower() in _SYSTEM_FILES for name in path.split("/"))


def is_image(name: str) -> bool:
    """Tell whether a file's name ends like that of an image that can be packed."""
    return name.lower().endswith(EXTENSIONS)


class FolderListing(NamedTuple):
    """Direct contents of a folder: the names of its visible subfolders, and whether it has an image."""

    folders: list[str]
    images: bool


#: Lists a folder.
FolderLister = Callable[[Path], FolderListing]


@dataclass(frozen=True)
class Layout:
    """Folders of a data set's splits. val: None where validation images must be held out of `train`.

    unused: other folders beside the two.
    """

    train: Path
    val: Path | None = None
    unused: tuple[Path, ...] = ()


def inspect_folder(path: Path) -> FolderListing:
    """List a folder on disk or in an archive. In a folder without subfolders, archives count as such."""
    archive, inside = split_archive(path)
    if archive is not None:
        facts = archive.stat()
        listings = _read_archive_listings(archive, facts.st_mtime_ns, facts.st_size)
        return listings.get(inside, FolderListing([], images=False))
    entries = [entry for entry in list_folder(path) if is_visible(entry.name)]
    folders = [entry.name for entry in entries if entry.is_dir()] or [
        entry.name for entry in entries if entry.name.lower().endswith(".zip") or _split_name(entry.name) != entry.name
    ]
    return FolderListing(sorted(folders), any(is_image(entry.name) for entry in entries))


def find_layout(path: Path, inspect_folder: FolderLister = inspect_folder) -> Layout:
    """Find the splits of the data set at `path`; where there are none, `train` is the folder that holds the classes.

    Raises ValueError if two folders are the same split, or there are several and none is for training.
    """
    while True:
        layout = _find_splits(path, inspect_folder)
        if layout is not None:
            return layout
        listing = inspect_folder(path)
        if len(listing.folders) != 1 or listing.images:
            return Layout(path)
        inner = path / listing.folders[0]
        if not inspect_folder(inner).folders:
            return Layout(path)
        path = inner


def find_classes(path: Path, inspect_folder: FolderLister = inspect_folder) -> Path:
    """Find the folder that holds the classes. Raises ValueError if there is one for training and one for validation."""
    while (layout := find_layout(path, inspect_folder)).train != path:
        if layout.val is not None:
            commands = " and ".join(
                f"python -m dataio.pack {shlex.quote(str(folder))} TARGET/{name}"
                for name, folder in (("train", layout.train), ("val", layout.val))
            )
            raise ValueError(
                f"{path} holds {layout.train.name} and {layout.val.name}, which are splits of a data set and no"
                f" classes; pack each by itself: {commands}"
            )
        path = layout.train
    return path


def _find_splits(path: Path, inspect_folder: FolderLister) -> Layout | None:
    """Find the splits directly below one folder; None if the folders there are not splits."""
    folders = inspect_folder(path).folders
    known: dict[str, str] = {}
    for folder in folders:
        require_plain_name(path, folder)
        name = _split_name(folder)
        if name in known:
            raise ValueError(f"{path} holds {known[name]} and {folder}; rename one of them")
        if name in TRAIN_NAMES + VAL_NAMES:
            known[name] = folder
    trains, vals = ([path / known[name] for name in names if name in known] for names in (TRAIN_NAMES, VAL_NAMES))
    others = [path / folder for folder in folders if folder not in known.values()]
    are_classes = any(_holds_images(folder, inspect_folder) for folder in others)
    if not trains:
        if len(vals) > 1 and not are_classes:
            names = ", ".join(folder.name for folder in vals)
            raise ValueError(f"{path} holds {names} and nothing to train on; call that split train")
        return None
    if are_classes and (not vals or inspect_folder(trains[0]).images):  # one of the classes is called train
        return None
    return Layout(trains[0], vals[0] if vals else None, (*trains[1:], *vals[1:], *others))


def require_plain_name(path: Path, name: str) -> None:
    """Raise ValueError if the name of a folder or file below `path` would break lines, or command a terminal."""
    if has_control_character(name):
        raise ValueError(f"{path} holds {escape_unprintable(name)}, a name with control characters; rename it")


def _split_name(folder: str) -> str:
    """Return the lower-case name of a split's folder or archive; other names stay as they are."""
    stem, extension = os.path.splitext(folder.lower())
    name = stem if extension in _ARCHIVES else folder.lower()
    return name if name in TRAIN_NAMES + VAL_NAMES else folder


def _holds_images(path: Path, inspect_folder: FolderLister, above: frozenset[str] = frozenset()) -> bool:
    """Tell whether there is an image in a folder or anywhere below it, ignoring links back to a folder `above`."""
    real = os.path.realpath(path)
    if real in above:
        return False
    listing = inspect_folder(path)
    return listing.images or any(
        _holds_images(path / folder, inspect_folder, above | {real}) for folder in listing.folders
    )


def split_archive(path: Path) -> tuple[Path | None, str]:
    """Split a path into (archive, folder inside it, "" being its root); None for paths that are on disk."""
    for parent in (path, *path.parents):
        if parent.exists():
            return (parent, "/".join(path.relative_to(parent).parts)) if parent.is_file() else (None, "")
    return None, ""


def read_members(archive: Path, reader: ZipReader | TarReader) -> list[Member]:
    """List all members of an archive, by their paths below its root: ./a//b and /a/b are a/b, and the root is "".

    Raises ValueError if it is damaged, or a name has a component `..`.
    """
    members = reader.members() if isinstance(reader, ZipReader) else reader.members(0)
    return [member._replace(name=_path_inside(archive, member.name)) for member in members]


def _path_inside(archive: Path, name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(
            f"{archive} holds {escape_unprintable(name)}, a name that may lead out of the archive; write the archive"
            " again without .. in names"
        )
    return "/".join(parts) + "/" * (name.endswith("/") and bool(parts))


def open_archive(archive: Path) -> ZipReader | TarReader:
    """Make the reader of a zip or tar file."""
    return ZipReader(archive) if zipfile.is_zipfile(archive) else TarReader((archive,))


def archive_listings(members: Iterable[Member]) -> dict[str, FolderListing]:
    """List each folder of an archive, by its path in it."""
    folders, with_images = {""}, set[str]()
    for member in members:
        if not is_visible(member.name):
            continue
        folder, _, name = member.name.rpartition("/")
        if is_image(name):
            with_images.add(folder)
        while folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    inside: dict[str, list[str]] = {folder: [] for folder in folders}
    for folder in sorted(folders - {""}):
        above, _, name = folder.rpartition("/")
        inside[above].append(name)
    return {folder: FolderListing(names, folder in with_images) for folder, names in inside.items()}


@lru_cache(maxsize=8)
def _read_archive_listings(archive: Path, changed_ns: int, size: int) -> dict[str, FolderListing]:
    return archive_listings(read_members(archive, open_archive(archive)))

"""Archives and names that would leave the folder, fill memory or disk, loop for ever, or command the terminal."""

import io
import os
import re
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from PIL import Image

from dataio.manifest import load_manifest
from dataio.pack.__main__ import main
from dataio.pack.archives import TarReader, ZipReader
from dataio.pack.source import find_images, read_names

NO_FILE = "it is a link or no regular file, which cannot be read inside an archive"


@pytest.fixture
def jpeg(photos) -> bytes:
    return (photos / "cat" / "00.jpg").read_bytes()


@pytest.fixture
def below(tmp_path, monkeypatch) -> Path:
    """The working folder, three folders below tmp_path, so that ../ leads to folders that the test sees."""
    folder = tmp_path / "one" / "two"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def outcome(tmp_path, below, capsys, packed_images) -> Callable[[Path], tuple[str, Counter]]:
    """Returns a function: archive → the lines on standard error, and what is packed, skipping broken files.

    It checks that packing has created nothing but the target, or nothing at all.
    """

    def pack(archive: Path) -> tuple[str, Counter]:
        before, target = set(tmp_path.rglob("*")), below / "target"
        status = main([str(archive), str(target), "--skip-broken", "--workers=1"])
        created = {path for path in tmp_path.rglob("*") if path not in before}
        files = {target, *target.iterdir()} if status == 0 else set()
        assert created == files
        names = {"manifest.json", "report.json", "samples.npy", "shard-000000.tar", "shard-000000.idx"}
        assert {path.name for path in files - {target}} <= names
        return capsys.readouterr().err, packed_images(target) if files else Counter()

    return pack


def write_zip(path: Path, images: dict[str, bytes], *others: tuple[zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in images.items():
            archive.writestr(name, content)
        for info, content in others:
            archive.writestr(info, content)
    return path


def write_tar(path: Path, images: dict[str, bytes], *others: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in images.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in others:
            archive.addfile(info)
    return path


WRITERS = {"zip": write_zip, "tar": write_tar}


FORGED = "b\x1b]0;pwned\x07\nerror: fake"  # sets a terminal's title, and adds a line
ESCAPED = r"b\x1b]0;pwned\x07\nerror: fake"


def with_forged_names(jpeg: bytes) -> dict[str, tuple[dict[str, bytes], str]]:
    """The members of archives, and what packing says about them."""
    cmyk = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(cmyk, "JPEG")
    images = {"cat/a.jpg": jpeg, "dog/a.jpg": jpeg}
    return {
        "image": (images | {f"dog/{FORGED}.jpg": b"no image"}, f"skipped dog/{ESCAPED}.jpg: it is no image"),
        "quoted": (images | {"dog/b.jpg": b"P6\n\x1b[2J1234567"}, "skipped dog/b.jpg: it cannot be decoded"),
        "other file": (images | {f"dog/{FORGED}": b""}, f"skipped dog/{ESCAPED}: its name ends with none"),
        "CMYK": (images | {f"dog/{FORGED}.jpg": cmyk.getvalue()}, f"as RGB: 1 (dog/{ESCAPED}.jpg)"),
        "class": (images | {f"{FORGED}/a.jpg": jpeg}, f"holds {ESCAPED}, a name with control characters; rename it"),
        "twice": (images | {f"dog/{FORGED}.jpg": jpeg, f"./dog/{FORGED}.jpg": jpeg}, f"holds dog/{ESCAPED}.jpg twice"),
        "key": ({f"{FORGED}.jpg": jpeg, "1.cls": b"1"}, f"sample {ESCAPED} has no .cls"),
        "empty label": ({f"{FORGED}.jpg": jpeg, f"{FORGED}.cls": b""}, f"{ESCAPED}.cls is empty or has control"),
        "label": ({"1.jpg": jpeg, "1.cls": FORGED.encode()}, "1.cls is empty or has control characters; write"),
    }


@pytest.mark.parametrize("case", with_forged_names(b""))
def test_names_in_an_archive_neither_forge_lines_nor_command_a_terminal(case, jpeg, below, capsys):
    members, message = with_forged_names(jpeg)[case]
    archive = write_tar(below / "a.tar", members)
    assert main([str(archive), str(below / "skipped"), "--skip-broken", "--workers=1"]) in (0, 2)
    said = capsys.readouterr().err
    main([str(archive), str(below / "packed"), "--workers=1"])
    assert message in said
    assert all(line.isprintable() and not line.startswith("error: fake") for line in said.splitlines())
    said = capsys.readouterr().err
    assert message.removeprefix("skipped ").partition(":")[0] in said
    assert all(line.isprintable() and not line.startswith("error: fake") for line in said.splitlines())


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\x1b", "\x9b", "\u2028"])
def test_class_name_with_a_control_character(character, source, tmp_path):
    (source / "cat").rename(source / f"c{character}at")
    shown = re.escape(f"c{character.encode('unicode_escape').decode()}at")
    with pytest.raises(ValueError, match=rf"source holds {shown}, a name with control characters; rename it"):
        find_images(source)
    (tmp_path / "names").write_text(f"c{character}at\ncoffee", newline="")
    if character not in "\r\n":
        with pytest.raises(ValueError, match=f'names: line 1 is "{shown}", empty, there twice or with control'):
            read_names(tmp_path / "names")


def test_class_name_with_joiners(source):
    """Characters without a glyph that Persian and emoji need."""
    (source / "cat").rename(source / "\u0645\u06cc\u200c\u0634\u0648\u062f")
    assert find_images(source).classes[-1] == "\u0645\u06cc\u200c\u0634\u0648\u062f"


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "name", ["../evil.jpg", "cat/../../evil.jpg", "./../cat/evil.jpg", "cat/../dog/b.jpg", "/../b.jpg"]
)
def test_names_that_lead_upwards_are_errors(kind, name, jpeg, below, outcome):
    archive = WRITERS[kind](below / f"a.{kind}", {"cat/a.jpg": jpeg, "dog/a.jpg": jpeg, name: jpeg})
    error = f"error: {archive} holds {name}, a name that may lead out of the archive; write the archive again"
    assert outcome(archive) == (f"{error} without .. in names\n", Counter())


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("prefix", ["/", "//", "./", "././", "/photos/", "photos//./"])
def test_absolute_names_are_taken_below_the_root(kind, prefix, jpeg, below, outcome):
    archive = WRITERS[kind](below / f"a.{kind}", {f"{prefix}{name}/a.jpg": jpeg for name in ("cat", "dog")})
    assert outcome(archive) == ("", Counter({("cat", jpeg): 1, ("dog", jpeg): 1}))
    assert load_manifest(below / "target").classes == ("cat", "dog")


@pytest.mark.parametrize("kind", WRITERS)
def test_an_absolute_name_of_an_existing_file(kind, jpeg, photos, below, outcome):
    """The bytes come from the archive, never from the disk."""
    other = photos / "rocket" / "00.jpg"
    archive = WRITERS[kind](below / f"a.{kind}", {str(other): jpeg, str(photos / "cat" / "00.jpg"): jpeg})
    assert outcome(archive) == ("", Counter({("cat", jpeg): 1, ("rocket", jpeg): 1}))


def link(kind: bytes, target: Path) -> tarfile.TarInfo:
    info = tarfile.TarInfo("cat/evil.jpg")
    info.type, info.linkname, info.devmajor, info.devminor = kind, str(target), 1, 5  # /dev/zero
    return info


@pytest.mark.parametrize("target", ["/photograph", "../photograph", "../../one/two/photograph"])
@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE"])
def test_links_and_devices_in_a_tar_file_are_skipped_by_name(kind, target, jpeg, photos, below, outcome):
    os.link(photos / "rocket" / "00.jpg", below / "photograph")
    target = below / "photograph" if target.startswith("/") else target
    images = {"cat/a.jpg": jpeg, "dog/a.jpg": jpeg}
    errors, packed = outcome(write_tar(below / "a.tar", images, link(getattr(tarfile, kind), target)))
    assert errors.splitlines()[0] == f"skipped cat/evil.jpg: {NO_FILE}"
    assert packed == Counter({("cat", jpeg): 1, ("dog", jpeg): 1})


def test_files_below_a_link_of_the_archive(jpeg, below, tmp_path, outcome):
    """An unpacker would follow the link cat → tmp_path, and write a.jpg there."""
    archive = below / "a.tar"
    with tarfile.open(archive, "w") as tar:
        info = link(tarfile.SYMTYPE, tmp_path)
        info.name = "cat"
        tar.addfile(info)
    images = write_tar(below / "images.tar", {"cat/a.jpg": jpeg, "dog/a.jpg": jpeg})
    archive.write_bytes(archive.read_bytes()[: tarfile.BLOCKSIZE] + images.read_bytes())
    errors, packed = outcome(archive)
    assert errors.splitlines()[0] == f"skipped cat: {NO_FILE}"
    assert packed == Counter({("cat", jpeg): 1, ("dog", jpeg): 1})


def test_a_link_in_a_zip_file_is_skipped_by_name(jpeg, photos, below, outcome):
    info = zipfile.ZipInfo("cat/evil.jpg")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16  # as zip --symlinks on Unix
    target = str(photos / "rocket" / "00.jpg").encode()
    errors, packed = outcome(write_zip(below / "a.zip", {"cat/a.jpg": jpeg, "dog/a.jpg": jpeg}, (info, target)))
    assert errors.splitlines()[0] == f"skipped cat/evil.jpg: {NO_FILE}"
    assert packed == Counter({("cat", jpeg): 1, ("dog", jpeg): 1})


@pytest.mark.parametrize("claim", [2**31 - 2**14, 2**40, 2**62])
def test_a_size_that_a_zip_member_cannot_have_is_skipped_by_name(claim, jpeg, below, outcome):
    """It counts neither as memory nor as disk space that the shards need."""
    with zipfile.ZipFile(below / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("cat/a.jpg", "dog/a.jpg", "cat/bomb.jpg"):
            archive.writestr(name, jpeg)
        archive.filelist[-1].file_size = claim
        stored = archive.filelist[-1].compress_size
    errors, packed = outcome(below / "a.zip")
    reason = f"it cannot have the {claim} bytes that the archive claims, of {stored} stored"
    assert errors.splitlines()[0] == f"skipped cat/bomb.jpg: {reason}"
    assert packed == Counter({("cat", jpeg): 1, ("dog", jpeg): 1})


def test_the_largest_factor_of_deflate_is_no_fault(jpeg, below, outcome):
    """Zeros are deflated by it: up to 64 MiB are unpacked, and are no image."""
    images = {"cat/a.jpg": jpeg, "dog/a.jpg": jpeg, "dog/zeros.jpg": bytes(2**26)}
    errors, _ = outcome(write_zip(below / "a.zip", images))
    assert errors.splitlines()[0] == "skipped dog/zeros.jpg: it is no image, or of an unknown format"


def test_a_member_that_unpacks_to_far_more_than_images_do_is_never_unpacked(jpeg, below, outcome):
    images = {"cat/a.jpg": jpeg, "dog/a.jpg": jpeg, "dog/bomb.jpg": jpeg + bytes(2**26)}
    archive = write_zip(below / "a.zip", images)
    (bomb,) = (member for member in ZipReader(archive).members() if member.fault)
    errors, packed = outcome(archive)
    assert errors.splitlines()[0] == f"skipped dog/bomb.jpg: {bomb.fault}"
    assert re.fullmatch(
        f"its \\d{{5}} bytes unpack to {len(jpeg) + 2**26}, as no usual image's do; if it is one, convert it to JPEG or"
        " PNG",
        bomb.fault,
    )
    assert packed == Counter({("cat", jpeg): 1, ("dog", jpeg): 1})


def negative_size(size: int) -> bytes:
    info = tarfile.TarInfo("cat/bomb.jpg")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def sparse(stored: int, size: int) -> bytes:
    """The header of a file with holes, which has a size in the archive and another one when it is unpacked."""
    header = bytearray(negative_size(stored))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def extended(size: int) -> bytes:
    info = tarfile.TarInfo("cat/bomb.jpg")
    info.pax_headers = {"size": str(size)}
    return info.tobuf(tarfile.PAX_FORMAT)


NEGATIVE_SIZES = {
    **{str(size): negative_size(size) for size in (-1, -512, -1024, -(2**40))},
    "sparse": sparse(-512, 5),
    "extended": extended(-512),
}


@pytest.mark.parametrize("names", [["cat/a.jpg", "dog/a.jpg"], ["1.jpg", "1.cls"]], ids=["folders", "samples"])
@pytest.mark.parametrize("header", NEGATIVE_SIZES.values(), ids=NEGATIVE_SIZES)
def test_negative_sizes_in_a_tar_file_are_errors(header, names, jpeg, below, outcome):
    """tarfile would read the same headers for ever."""
    archive = write_tar(below / "a.tar", dict.fromkeys(names, jpeg))
    with tarfile.open(archive, "a") as tar:
        tar.fileobj.write(header)
    error = f"{archive} is not a complete tar file (cat/bomb.jpg has a negative size); copy it again"
    with pytest.raises(ValueError, match=re.escape(error)):
        list(islice(TarReader((archive,)).members(0), 10))
    assert outcome(archive) == (f"error: {error}\n", Counter())


@pytest.mark.parametrize("claim", [2**31, 2**40, 2**62])
def test_a_size_larger_than_its_tar_file_is_an_error(claim, jpeg, below, outcome):
    archive = write_tar(below / "a.tar", {"cat/a.jpg": jpeg, "dog/a.jpg": jpeg})
    info = tarfile.TarInfo("cat/bomb.jpg")
    info.size = claim
    with tarfile.open(archive, "a") as tar:
        tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    errors, packed = outcome(archive)
    assert errors == f"error: {archive} is not a complete tar file (it ends inside cat/bomb.jpg); copy it again\n"
    assert not packed

"""verify on damaged shards: each fault is found and named, with its remedy."""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from dataio.files import sha256_of
from dataio.manifest import MANIFEST_NAME, SAMPLES_NAME, load_manifest
from dataio.pack.archives import TarReader
from dataio.pack.packer import PackOptions, pack
from dataio.verify import _members, main, verify

REMEDY = "copy it again, or pack the folder again"


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def write_at(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def change_manifest(folder, change):
    path = folder / MANIFEST_NAME
    fields = json.loads(path.read_text())
    change(fields)
    fields["sha256"] = ""  # its own hash would tell at once
    path.write_text(json.dumps(fields))


def accept(folder, name):
    """Record a changed file's hash in the manifest, so that only the content of the file is at fault."""

    def change(fields):
        if name == SAMPLES_NAME:
            fields["samples_sha256"] = sha256_of(folder / name)
        for shard in fields["shards"]:
            if shard["name"] == name:
                shard["sha256"] = sha256_of(folder / name)

    change_manifest(folder, change)


def test_intact_folders_have_no_faults(shards, fashion_shards):
    assert verify(shards) == []
    assert verify(fashion_shards / "train") == []


def test_command_summary(shards, copy):
    def run(folder):
        return subprocess.run([sys.executable, "-m", "dataio.verify", folder], capture_output=True, text=True)

    whole = run(shards)
    assert (whole.returncode, whole.stderr) == (0, "")
    count = len(list(shards.glob("*.tar")))
    assert whole.stdout.startswith(f"{shards} is intact: samples 48, classes 4, shards {count}, manifest ")
    assert whole.stdout.count("\n") == 1

    (copy / "shard-000000.tar").unlink()
    (copy / "shard-000001.idx").unlink()
    damaged = run(copy)
    assert (damaged.returncode, damaged.stderr) == (1, "")
    assert damaged.stdout.splitlines() == [
        f"shard-000000.tar: missing; {REMEDY}",
        f"shard-000001.idx: missing; {REMEDY}",
        f"faults in {copy}: 2",
    ]


def test_no_manifest(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == (
        f"no manifest.json in {tmp_path}; write shards there with: python -m dataio.pack SOURCE {tmp_path}\n"
        f"faults in {tmp_path}: 1\n"
    )


def test_not_a_manifest(copy):
    (copy / MANIFEST_NAME).write_text("{")
    (fault,) = verify(copy)
    assert fault.startswith(f"{copy / MANIFEST_NAME} is not a manifest (")


def test_truncated_shard(copy):
    path = copy / "shard-000001.tar"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size // 2)
    assert verify(copy) == [f"shard-000001.tar: {size // 2} bytes where the manifest says {size}; {REMEDY}"]


def test_flipped_byte_in_an_image(copy):
    offset = int(np.load(copy / SAMPLES_NAME)["offset"][3]) + 100
    path = copy / "shard-000000.tar"
    write_at(path, offset, bytes([path.read_bytes()[offset] ^ 1]))
    assert verify(copy) == [f"shard-000000.tar: its bytes changed (the manifest has another sha256); {REMEDY}"]


def test_flipped_byte_in_a_tar_header(copy):
    write_at(copy / "shard-000000.tar", 3, b"x")  # a key
    changed, unreadable = verify(copy)
    assert changed == f"shard-000000.tar: its bytes changed (the manifest has another sha256); {REMEDY}"
    assert unreadable.startswith("shard-000000.tar: not a tar file of images and labels (")


def test_missing_label_in_a_shard(copy):
    """A valid tar file that webdataset could read, but whose first image has no label."""
    path = copy / "shard-000000.tar"
    row = np.load(copy / SAMPLES_NAME)[0]
    label_header = int(row["offset"]) + -(-int(row["bytes"]) // 512) * 512
    content = path.read_bytes()
    path.write_bytes(content[:label_header] + content[label_header + 1024 :] + bytes(1024))
    accept(copy, path.name)
    (fault,) = verify(copy)
    assert fault == (
        f"shard-000000.tar: not a tar file of images and labels (00000000.{ending_of(copy)} is not followed by"
        f" 00000000.cls); {REMEDY}"
    )


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_label_that_is_not_a_file(copy, kind):
    path = copy / "shard-000000.tar"
    row = np.load(copy / SAMPLES_NAME)[0]
    label = tarfile.TarInfo("00000000.cls")
    label.type, label.linkname, label.size = kind, "nowhere", 0
    write_at(path, int(row["offset"]) + -(-int(row["bytes"]) // 512) * 512, label.tobuf(tarfile.USTAR_FORMAT))
    accept(copy, path.name)
    (fault,) = verify(copy)
    assert "not a tar file of images and labels (00000000." in fault
    assert "or 00000000.cls is no regular file" in fault


@pytest.mark.parametrize("label", [b"9" * 30, b"1e5", b"-1", b"0_0", b"9" * 500])
def test_label_that_is_not_a_class_number(copy, label):
    path = copy / "shard-000000.tar"
    row = np.load(copy / SAMPLES_NAME)[0]
    member = tarfile.TarInfo("00000000.cls")
    member.size = len(label)
    header = int(row["offset"]) + -(-int(row["bytes"]) // 512) * 512
    write_at(path, header, member.tobuf(tarfile.USTAR_FORMAT) + label.ljust(512, b"\0"))
    accept(copy, path.name)
    (fault,) = verify(copy)
    assert "not a tar file of images and labels (00000000.cls holds " in fault
    assert f"which is no number of a class); {REMEDY}" in fault


def test_deeply_nested_headers(copy):
    path = copy / "shard-000000.tar"
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 4
    header = long_name.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0")
    many = header * 3000  # more than Python's calls may go down
    path.write_bytes(many)

    def change(fields):
        fields["shards"][0] |= {"bytes": len(many), "sha256": sha256_of(path)}

    change_manifest(copy, change)
    fault = next(fault for fault in verify(copy) if fault.startswith("shard-000000.tar"))
    assert "not a tar file of images and labels (maximum recursion depth exceeded" in fault
    with pytest.raises(
        ValueError, match=r"shard-000000.tar is not a complete tar file \(maximum recursion depth exceeded"
    ):
        list(TarReader((path,)).members(0))


def test_negative_size_in_a_tar_header(copy):
    """tarfile would step back from the label to the image, for ever."""
    path = copy / "shard-000000.tar"
    image, label = tarfile.TarInfo("0.jpg"), tarfile.TarInfo("0.cls")
    label.size = -1024
    content = image.tobuf(tarfile.GNU_FORMAT) + label.tobuf(tarfile.GNU_FORMAT) + b"7".ljust(512)
    path.write_bytes(content.ljust(path.stat().st_size, b"\0"))
    with pytest.raises(tarfile.ReadError, match="0.cls has a negative size"):
        list(islice(_members(path), 10))
    _, fault, *_ = verify(copy)
    assert fault == f"shard-000000.tar: not a tar file of images and labels (0.cls has a negative size); {REMEDY}"


def test_names_in_a_shard_do_not_reach_the_terminal_as_they_are(copy, capsys):
    path = copy / "shard-000000.tar"
    header = tarfile.TarInfo("0\x1b[2J\nforged.jpg").tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(header.ljust(path.stat().st_size, b"\0"))
    assert main([str(copy)]) == 1
    said = capsys.readouterr().out
    assert r"(0\x1b[2J\nforged.jpg is not followed by 0\x1b[2J\nforged.cls)" in said
    assert all(line.isprintable() for line in said.splitlines())


def ending_of(folder):
    """Return the extension of the first image, by the index."""
    return (folder / "shard-000000.idx").read_text().splitlines()[1].split()[0]


def test_missing_shard(copy):
    (copy / "shard-000001.tar").unlink()
    assert verify(copy) == [f"shard-000001.tar: missing; {REMEDY}"]


def test_shard_missing_from_the_manifest(copy):
    shutil.copy(copy / "shard-000001.tar", copy / "shard-000099.tar")
    assert verify(copy) == ["shard-000099.tar: the manifest does not name it; remove it"]


def test_index_with_a_wrong_offset(copy):
    path = copy / "shard-000000.idx"
    lines = path.read_text().splitlines()
    right = lines[2]
    ending, offset, *rest = right.split()
    lines[2] = " ".join([ending, str(int(offset) + 512), *rest])
    path.write_text("\n".join(lines) + "\n")
    assert verify(copy) == [
        f'shard-000000.idx: line 3 is "{lines[2]}" where shard-000000.tar needs "{right}"; {REMEDY}'
    ]


def test_index_of_another_shard(copy):
    shutil.copy(copy / "shard-000001.idx", copy / "shard-000000.idx")
    (fault,) = verify(copy)
    assert fault.startswith('shard-000000.idx: line 1 is "v1.2 ')


def test_truncated_index(copy):
    path = copy / "shard-000000.idx"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert verify(copy) == [
        f'shard-000000.idx: line {len(lines)} is missing where shard-000000.tar needs "{lines[-1]}"; {REMEDY}'
    ]


def test_index_with_other_line_endings(copy):
    path = copy / "shard-000000.idx"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert verify(copy) == [f"shard-000000.idx: its bytes changed (the manifest has another sha256); {REMEDY}"]


@pytest.mark.parametrize(("field", "place"), [("shard", 0), ("label", 1), ("offset", 2), ("bytes", 3)])
def test_wrong_row_in_the_sample_table(copy, field, place):
    rows = np.load(copy / SAMPLES_NAME)
    right = [int(rows[name][7]) for name in ("shard", "label", "offset", "bytes")]
    in_first = np.count_nonzero(rows["shard"] == 0)
    rows[field][7] += 1
    np.save(copy / SAMPLES_NAME, rows)
    wrong = [value + (number == place) for number, value in enumerate(right)]
    expected = (
        f"samples.npy: 1 wrong of {in_first} rows for shard-000000.tar; number 7 says shard, label, offset, bytes"
        f" {wrong}, the shard {right}; {REMEDY}"
    )
    assert verify(copy) == [
        f"samples.npy: its bytes changed (the manifest has another sha256); {REMEDY}",
        expected,
    ]
    accept(copy, SAMPLES_NAME)
    assert verify(copy) == [expected]


def test_sample_table_that_is_not_a_table(copy):
    (copy / SAMPLES_NAME).write_bytes(b"not an array")
    (fault,) = verify(copy)
    assert fault.startswith(f"{copy / SAMPLES_NAME} cannot be read (")


def test_counts_that_do_not_add_up(copy):
    change_manifest(copy, lambda fields: fields.update(samples=47))
    assert verify(copy) == ["manifest.json: it says 47 samples, but 48 over its shards; pack the folder again"]


def test_labels_beyond_the_classes(copy):
    change_manifest(copy, lambda fields: fields.update(classes=["astronaut", "cat"]))
    assert "shard-000000.tar: it has label 3, the manifest 2 classes; pack the folder again" in verify(copy)


# Images


@pytest.fixture
def unchecked(source, tmp_path):
    """Packed folder with undecodable photographs, which were not checked, in shards of 1 MiB."""
    for name in ("cat/03", "cat/05", "rocket/07"):
        path = source / f"{name}.jpg"
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[: len(data) // 2])
    pack(source, tmp_path / "unchecked", PackOptions(shard_mib=1, check="none"))
    return tmp_path / "unchecked"


@pytest.mark.parametrize("workers", [1, 3])
def test_decoding_finds_what_was_packed_unchecked(unchecked, workers):
    assert verify(unchecked, workers=workers) == []
    faults = verify(unchecked, decode=True, workers=workers)
    assert len(faults) == 3
    manifest = load_manifest(unchecked)
    for fault in faults:
        name, key = re.fullmatch(
            r"(shard-\d{6}.tar): (\d{8}).jpg: it cannot be decoded: image file is truncated .*; copy it again, or pack"
            r" the folder again with --skip-broken",
            fault,
        ).groups()
        row = manifest.samples[int(key)]
        assert manifest.shards[row["shard"]].name == name
        with open(unchecked / name, "rb") as file:
            file.seek(row["offset"])
            data = file.read(row["bytes"])
        with pytest.raises(OSError, match="truncated"):
            Image.open(io.BytesIO(data)).load()


def test_decoding_names_the_damaged_image(copy):
    row = np.load(copy / SAMPLES_NAME)[3]
    write_at(copy / "shard-000000.tar", int(row["offset"]), b"no image at all")
    changed, image = verify(copy, decode=True)
    assert changed == f"shard-000000.tar: its bytes changed (the manifest has another sha256); {REMEDY}"
    assert re.fullmatch(
        r"shard-000000.tar: 00000003.\w+: it is no image, or of an unknown format; copy it again, .*", image
    )


def test_decoding_compares_sizes(copy):
    rows = np.load(copy / SAMPLES_NAME)
    width, height = (int(rows[field][7]) for field in ("width", "height"))
    rows["width"][7] += 1
    np.save(copy / SAMPLES_NAME, rows)
    accept(copy, SAMPLES_NAME)
    assert verify(copy) == []
    (fault,) = verify(copy, decode=True)
    assert fault == (
        f"shard-000000.tar: 00000007.jpg has {width}×{height} pixels where samples.npy says {width + 1}×{height};"
        f" {REMEDY}"
    )


def test_many_broken_images_of_a_shard_are_counted(source, tmp_path):
    for path in sorted(source.glob("cat/*.jpg")):  # 11
        for number in range(3):
            path.with_name(f"{number}-{path.name}").write_bytes(path.read_bytes()[:-100])
    pack(source, tmp_path / "packed", PackOptions(check="none"))
    faults = verify(tmp_path / "packed", decode=True)
    assert len(faults) == 21
    assert faults[-1] == "shard-000000.tar: 13 more images with faults"


def test_the_command_decodes(shards, unchecked, capsys):
    assert main([str(shards), "--decode", "--workers", "2"]) == 0
    assert " is intact: samples 48, classes 4, " in capsys.readouterr().out
    assert main([str(unchecked), "--decode"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"faults in {unchecked}: 3"
    with pytest.raises(SystemExit, match="2"):
        main([str(shards), "--workers", "-1"])
    assert "--workers is -1; use 1 or more, or 0 for one per core" in capsys.readouterr().err


def test_all_faults_are_listed(copy):
    (copy / "shard-000000.tar").unlink()
    write_at(copy / "shard-000001.tar", 600, b"damage")
    (copy / "shard-000002.idx").unlink()
    assert verify(copy) == [
        f"shard-000000.tar: missing; {REMEDY}",
        f"shard-000001.tar: its bytes changed (the manifest has another sha256); {REMEDY}",
        f"shard-000002.idx: missing; {REMEDY}",
    ]


def test_url_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["https://ann:hush@host/set"])
    message = (
        "error: https://…@host/set is remote, and only local folders are checked; name the one it was copied from, or a"
    )
    assert message in capsys.readouterr().err

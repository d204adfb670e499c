"""Checkpoints that were damaged, or made by somebody hostile: each is named, nothing is loaded, executed or waited for.

Where a damage is *consistent*, the manifest is made to match it. What such a hand can change unseen is not here:
numbers of a tensor, or whole files for those of another checkpoint of the same model.
"""

import faulthandler
import json
import os
import pickle
import random
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save

from launch.checkpoint import layout
from launch.checkpoint.__main__ import main
from launch.checkpoint.layout import EMA_NAME, MANIFEST_NAME, MODEL_NAME, MOMENT_NAMES, STATE_NAME
from launch.checkpoint.tensors import load
from launch.distributed import RunError

TENSOR_FILES = (MODEL_NAME, EMA_NAME, *MOMENT_NAMES.values())
FILES = (*TENSOR_FILES, STATE_NAME, MANIFEST_NAME)
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
#: A name that no message may print as it is: it clears a terminal, and is not UTF-8.
HOSTILE_NAME = "\x1b[2J\ud800"


class Checkpoint(NamedTuple):
    """A checkpoint of hard links, whose files are replaced and never written to."""

    path: Path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def replace(self, name: str, content: bytes, consistent: bool = True) -> None:
        (self.path / name).unlink()
        (self.path / name).write_bytes(content)
        if consistent and name != MANIFEST_NAME:
            self.edit_manifest({name: layout.describe_file(self.path / name)})

    def edit_manifest(self, entries: dict) -> None:
        """Replaces these entries, and removes those of None."""
        files = json.loads(self.read(MANIFEST_NAME)) | entries
        kept = {name: entry for name, entry in files.items() if entry is not None}
        self.replace(MANIFEST_NAME, json.dumps(kept).encode())

    def edit_header(self, name: str, change: Callable[[dict], object]) -> None:
        """Changes the header of a file of tensors, or replaces it by the bytes that `change` returns."""
        content = self.read(name)
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        self.replace(name, struct.pack("<Q", len(text)) + text + content[8 + length :])


#: What it is, the file that a message must name, and what does it.
Damage = tuple[str, str, Callable[[Checkpoint], object]]


def truncated(rng: random.Random) -> Iterator[Damage]:
    for name in FILES:
        for consistent in (False, False, True, True):
            share = rng.random()
            yield (
                f"{share:.3f} of it, consistent: {consistent}",
                name,
                lambda c, name=name, share=share, consistent=consistent: c.replace(
                    name, c.read(name)[: int(share * len(c.read(name)))], consistent
                ),
            )


def flip(content: bytes, place: float) -> bytes:
    """The content with one bit changed."""
    index, bit = divmod(int(place * 8 * len(content)), 8)
    return content[:index] + bytes([content[index] ^ 1 << bit]) + content[index + 1 :]


def with_flipped_bits(rng: random.Random) -> Iterator[Damage]:
    for _ in range(8):
        for name in FILES:
            place = rng.random()
            damage = lambda c, name=name, place=place: c.replace(name, flip(c.read(name), place), False)  # noqa: E731
            yield f"bit at {place:.6f}", "" if name == MANIFEST_NAME else name, damage


def with_flipped_bits_in_headers(rng: random.Random) -> Iterator[Damage]:
    """Consistent ones; without those of metadata, which may hold any text."""

    def damage(checkpoint: Checkpoint, name: str, place: float) -> None:
        content = checkpoint.read(name)
        end = 8 + struct.unpack("<Q", content[:8])[0]
        checkpoint.replace(name, flip(content[:end], place) + content[end:])

    for _ in range(10):
        for name in MOMENT_NAMES.values():
            place = rng.random()
            yield f"bit at {place:.6f}", name, lambda c, name=name, place=place: damage(c, name, place)


def with_moved_files(rng: random.Random) -> Iterator[Damage]:
    for name in FILES:
        yield "removed", name, lambda c, name=name: (c.path / name).unlink()
        yield "renamed", name, lambda c, name=name: (c.path / name).rename(c.path / f"{name}.bak")
        other = rng.choice([other for other in FILES if other != name])

        def swap(checkpoint: Checkpoint, name: str = name, other: str = other) -> None:
            aside = checkpoint.path / "aside"
            (checkpoint.path / name).rename(aside)
            (checkpoint.path / other).rename(checkpoint.path / name)
            aside.rename(checkpoint.path / other)

        yield f"swapped with {other}", "", swap
    for name in TENSOR_FILES:
        for other in (
            STATE_NAME,
            *(other for other in TENSOR_FILES if (other in MOMENT_NAMES.values()) != (name in MOMENT_NAMES.values())),
        ):
            yield f"consistently {other}", name, lambda c, name=name, other=other: c.replace(name, c.read(other))


class Payload:
    """Executes a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def of_other_content(rng: random.Random) -> Iterator[Damage]:
    """Consistent ones."""
    contents = {
        "nothing": b"",
        "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "a pickle": pickle.dumps(Payload()),
        "a pickle of PyTorch": b"PK\x03\x04" + pickle.dumps({"state": Payload()}),
        "random bytes": rng.randbytes(4096),
        "zeros": bytes(4096),
        "no tensors": save({}),
        "other tensors": save({"head.bias": torch.zeros(10)}),
        "text": "{}".encode("utf-16"),
    }
    for what, content in contents.items():
        for name in FILES[:-1]:
            yield what, name, lambda c, name=name, content=content: c.replace(name, content)


def of_no_file(_: random.Random) -> Iterator[Damage]:
    """Pipes, devices, folders and links instead of files; all but the manifest with its entry made consistent."""

    def listen(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket has at most 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)

    kinds = {
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a socket": listen,
        "a dangling link": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        **{f"a link to {target}": lambda path, target=target: path.symlink_to(target) for target in
           ("/dev/zero", "/dev/null", "/dev/tty", "/proc/kmsg")},
    }  # fmt: skip

    def damage(checkpoint: Checkpoint, name: str, make: Callable[[Path], object]) -> None:
        (checkpoint.path / name).unlink()
        make(checkpoint.path / name)
        if name != MANIFEST_NAME:
            checkpoint.edit_manifest({name: {"bytes": 0, "sha256": EMPTY_SHA256}})

    for what, make in kinds.items():
        for name in FILES:
            yield what, name, lambda c, name=name, make=make: damage(c, name, make)


def with_other_manifests(rng: random.Random) -> Iterator[Damage]:
    texts = (b"", b"null", b"[]", b"3", b'"' + MODEL_NAME.encode() + b'"', b"{}", b"{" * 9, b"[" * 100_000, b"\xff\xfe")
    for text in (*texts, b'{"a":' * 100_000, b" " * (1 << 24) + b"{}", b'{"a": {"bytes": 1e999, "sha256": ""}}'):
        yield f"{text[:20]!r}", MANIFEST_NAME, lambda c, text=text: c.replace(MANIFEST_NAME, text)
    for value in (None, [], 7, "x", {}, {"bytes": 1}, {"sha256": ""}):
        wrong = {rng.choice(FILES[:-1]): value}
        text = lambda c, wrong=wrong: json.dumps(json.loads(c.read(MANIFEST_NAME)) | wrong).encode()  # noqa: E731
        yield f"entry {value}", MANIFEST_NAME, lambda c, text=text: c.replace(MANIFEST_NAME, text(c))
    for key, values in {"bytes": (None, "1", -1, 1.5, True, 10**30), "sha256": (None, "", 7, ["x"], "A" * 64)}.items():
        for value in values:
            name = rng.choice(FILES[:-1])

            def damage(checkpoint: Checkpoint, name: str = name, changed: dict = {key: value}) -> None:  # noqa: B006
                checkpoint.edit_manifest({name: json.loads(checkpoint.read(MANIFEST_NAME))[name] | changed})

            yield f"{key} {value}", "", damage
    entry = {"bytes": 1, "sha256": EMPTY_SHA256}
    for name in ("/dev/zero", "../x", "a/../../x", ".", "", "a\0b", HOSTILE_NAME, "x" * 10_000, "a//b", "nothing"):
        yield f"names {name[:20]!r}", "", lambda c, name=name: c.edit_manifest({name: entry})
    old = dict.fromkeys(MOMENT_NAMES.values()) | {"engine/x": entry}
    yield "of version 0.1.0", "engine/x", lambda c: c.edit_manifest(old)


def with_other_states(_: random.Random) -> Iterator[Damage]:
    """Consistent ones."""
    inf, nan = float("inf"), float("nan")
    never = (None, [], {}, "x\x1b", nan, -1, 1.5, -(10**30), "12")
    values: dict[str, tuple] = {
        **dict.fromkeys(("step", "world_size", "num_classes", "norm_group"), never),
        **dict.fromkeys(("loader.samples_seen", "loader.global_batch"), (None, [], "12", nan, -1, 10**30, 0)),
        "zero_stage": (4, "1", None),
        "loader.seed": (None, "0", 0.5),
        **dict.fromkeys(("model", "version", "loader.order", "loader.manifest_hash"), (None, 3, ["x"], {})),
        "best_top1": (None, "1", nan, inf, -0.5, 100.5, []),
        "epoch": (None, "1", nan, inf, -1),
        "loader": (None, [], {}, "x"),
        "guard": (None, [], {}, "x", {"losses": [nan], "in_a_row": []}, {"losses": [], "in_a_row": [-1]}),
        "surprise": (1,),
        HOSTILE_NAME: (1,),
    }

    def damage(checkpoint: Checkpoint, name: str, value: object) -> None:
        state = json.loads(checkpoint.read(STATE_NAME))
        inner = state["loader"] if "." in name else state
        inner[name.rpartition(".")[2]] = value
        checkpoint.replace(STATE_NAME, json.dumps(state).encode())

    for name, wrong in values.items():
        for value in wrong:
            yield f"{name!a} {value}", STATE_NAME, lambda c, name=name, value=value: damage(c, name, value)
    yield "another step", STATE_NAME, lambda c: damage(c, "step", 38)


def with_other_headers(rng: random.Random) -> Iterator[Damage]:
    """Consistent ones."""
    for name in TENSOR_FILES:
        for length in (0, 1, 2**24, 2**40, 2**63, 2**64 - 1):
            yield (
                f"length {length}",
                name,
                lambda c, name=name, length=length: c.replace(name, struct.pack("<Q", length) + c.read(name)[8:]),
            )
        yield "more bytes", name, lambda c, name=name: c.replace(name, c.read(name) + b"\0" * 8)
    first = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    texts = (b"", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"{}")
    changes: dict[str, Callable[[dict], object]] = {
        **{f"{text[:20]!r}": lambda _, text=text: text for text in texts},
        "NaN metadata": lambda h: json.dumps(h | {"__metadata__": {"a": float("nan")}}).encode(),
        "metadata of numbers": lambda h: h.update(__metadata__={"a": 1}),
        "a name twice": lambda h: json.dumps(h).encode()[:-1] + b', "head.bias": ' + json.dumps(first).encode() + b"}",
        "no such type": lambda h: h["head.bias"].update(dtype="\x1b[31mF33"),
        "another type of this size": lambda h: h["head.bias"].update(dtype="I32"),
        "a smaller type": lambda h: h["head.bias"].update(dtype="F16", shape=[20]),
        "a type that PyTorch lacks": lambda h: h["head.bias"].update(dtype="F6_E2M3", shape=[52]),
        "a type of 4 bits": lambda h: h["head.bias"].update(dtype="F4", shape=[80]),
        "another shape": lambda h: h["head.bias"].update(shape=[2, 5]),
        "a negative shape": lambda h: h["head.bias"].update(shape=[-10]),
        "a shape beyond 64 bits": lambda h: h["head.bias"].update(shape=[2**64]),
        "a shape whose product overflows": lambda h: h["head.bias"].update(shape=[2**33, 2**33]),
        "no shape": lambda h: h["head.bias"].pop("shape"),
        "an empty tensor of any shape": lambda h: h.update(
            x={"dtype": "F32", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}
        ),
        "offsets out of the file": lambda h: h["head.bias"].update(data_offsets=[2**40, 2**40 + 40]),
        "offsets beyond 64 bits": lambda h: h["head.bias"].update(data_offsets=[2**64, 2**64 + 40]),
        "reversed offsets": lambda h: h["head.bias"]["data_offsets"].reverse(),
        "overlapping offsets": lambda h: h["head.bias"].update(data_offsets=h["head.weight"]["data_offsets"]),
        "a hole": lambda h: h.pop("head.bias"),
        "a hostile name": lambda h: h.update({"\x1b[2J": h.pop("head.bias")}),
        "a hostile name in front": lambda h: h.update({"\0\x1b[2J": h["head.bias"]}),
    }
    for what, change in changes.items():
        for name in rng.sample(TENSOR_FILES, 2):
            yield what, name, lambda c, name=name, change=change: c.edit_header(name, change)


KINDS = (
    *(truncated, with_flipped_bits, with_flipped_bits_in_headers, with_moved_files, of_other_content, of_no_file),
    *(with_other_manifests, with_other_states, with_other_headers),
)


@pytest.fixture(autouse=True)
def no_endless_wait() -> Iterator[None]:
    """Ends the tests, with a traceback, if one of them waits for a pipe or reads a device without an end."""
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def copy_as_links(checkpoint: Path, folder: Path) -> Checkpoint:
    target = folder / checkpoint.name
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        os.link(path, target / path.name)
    return Checkpoint(target)


def test_there_are_hundreds_of_damages():
    assert sum(len(list(kind(random.Random(0)))) for kind in KINDS) > 300


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_named_and_nothing_of_it_is_loaded(begin, trained_run, tmp_path, monkeypatch, kind):
    """What a resumed run does with it: find the newest intact checkpoint, read its state, load its tensors."""
    newest, _ = layout.find_newest(trained_run / "checkpoints")
    monkeypatch.chdir(tmp_path)  # where a payload would leave its file
    started, wrong = begin(), []
    modules = started.engine.module, started.ema.module
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    for number, (what, named, damage) in enumerate(kind(random.Random(kind.__name__))):
        checkpoint = copy_as_links(newest, tmp_path / str(number))
        damage(checkpoint)
        fault = f"{number}, {named}: {what}"
        assert main([str(checkpoint.path.parent)]) in (0, 1), "python -m launch.checkpoint lists it"
        try:
            found, _ = layout.find_newest(checkpoint.path.parent)
            layout.read_state(found)
            load(found, started.engine, started.ema)
        except (ValueError, RunError) as error:
            text = str(error)
            if str(checkpoint.path / named) not in text or not text.isprintable() or len(text) > 2000:
                wrong.append(f"{fault}: {text!r}")
        except Exception as error:  # any other type is a fault itself
            wrong.append(f"{fault}: {type(error)} {error!r}")
        else:
            wrong.append(f"{fault}: loaded")
        shutil.rmtree(checkpoint.path)
    assert wrong == []
    assert not list(tmp_path.rglob("executed"))
    for module, expected in zip(modules, before, strict=True):
        assert all(value.equal(expected[key]) for key, value in module.state_dict().items())
    assert not started.engine.optimizer.optimizer.state

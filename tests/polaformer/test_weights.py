"""Strict loading and saving of official checkpoints and safetensors; errors for other files."""

import argparse
import collections
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from yacs.config import CfgNode

from polaformer.weights import load_weights, official_name, save_weights


@pytest.fixture(scope="module")
def official(official_state):
    return official_state("b0")


def assert_holds(model, official):
    for name, value in model.state_dict().items():
        expected = official[official_name(name)]
        torch.testing.assert_close(value.flatten(), expected.flatten().to(value.dtype))


@pytest.mark.parametrize("wrap", [dict, lambda x: {"model": x}, lambda x: {"state_dict_ema": x, "model": {}}])
def test_checkpoint_path(official, tmp_path, wrap):
    torch.save(wrap(official), tmp_path / "official.pth")
    model = timm.create_model("polaformerpp_b0", checkpoint_path=tmp_path / "official.pth")
    assert_holds(model, official)


def test_safetensors_round_trip(official, tmp_path):
    model = timm.create_model("polaformerpp_b0")
    model.load_state_dict(official)
    save_weights(model.state_dict(), tmp_path / "ours.safetensors", {"model": "polaformerpp_b0"})
    again = timm.create_model("polaformerpp_b0", checkpoint_path=tmp_path / "ours.safetensors")
    assert_holds(again, official)


def test_a_missing_and_an_unexpected_key_are_named(official):
    state = {name: value for name, value in official.items() if name != "layers.1.blocks.0.attn.s2"}
    state["layers.9.surprise"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"missing layers\.1\.blocks\.0\.attn\.s2; unexpected layers\.9\.surprise"):
        timm.create_model("polaformerpp_b0").load_state_dict(state)


def test_our_own_names_are_strict_too():
    state = timm.create_model("polaformerpp_b0").state_dict()
    del state["stages.0.blocks.1.norm1.weight"]
    with pytest.raises(RuntimeError, match=r"stages\.0\.blocks\.1\.norm1\.weight"):
        timm.create_model("polaformerpp_b0").load_state_dict(state)


def test_another_preset_is_refused(official):
    with pytest.raises(
        RuntimeError, match=r"layers\.2\.blocks\.0\.pos\.weight is \(128, 1, 3, 3\), .* \(192, 1, 3, 3\)"
    ):
        timm.create_model("polaformerpp_b1").load_state_dict(official)


def test_other_angles_are_refused(official):
    state = official | {"layers.0.RoPE_linear.angle": torch.ones(32)}
    with pytest.raises(RuntimeError, match=r"layers\.0\.RoPE_linear\.angle holds other angles"):
        timm.create_model("polaformerpp_b0").load_state_dict(state)


def test_new_head(official, tmp_path):
    torch.save(official, tmp_path / "official.pth")
    model = timm.create_model("polaformerpp_b0", num_classes=3)
    with pytest.raises(RuntimeError, match=r"head\.weight is \(1000, 2048, 1, 1\), the model needs \(3, 2048\)"):
        load_weights(model, tmp_path / "official.pth")
    drawn = model.head.weight.clone()
    load_weights(model, tmp_path / "official.pth", new_head=True)
    assert torch.equal(model.head.weight, drawn)
    assert torch.equal(model.proj.bias.double(), official["proj.bias"].float().double())


@pytest.mark.parametrize("feature_cls", ["getter", "fx", "hook"])
def test_feature_wrappers_load_strictly(official, tmp_path, feature_cls):
    state = {name: value for name, value in official.items() if name != "layers.0.blocks.1.ffn.fc1.bias"}
    torch.save(state | {"layers.0.surprise": torch.zeros(1), "surprise": torch.zeros(1)}, tmp_path / "wrong.pth")
    faults = r"missing layers\.0\.blocks\.1\.ffn\.fc1\.bias; unexpected layers\.0\.surprise; unexpected surprise"
    options = {"features_only": True, "out_indices": (0,), "feature_cls": feature_cls}
    with pytest.raises(RuntimeError, match=faults):
        timm.create_model("polaformerpp_b0", checkpoint_path=tmp_path / "wrong.pth", **options)


@pytest.fixture(scope="module")
def official_file(official, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "official.pth"
    torch.save({"model": official}, path)
    return path


def create(path: Path, **options) -> torch.nn.Module:
    overlay = {"file": str(path)} | options.pop("overlay", {})
    return timm.create_model("polaformerpp_b0", pretrained=True, pretrained_cfg_overlay=overlay, **options)


def test_pretrained(official_file, official):
    assert_holds(create(official_file), official)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_pretrained_with_other_classes(official_file, official, num_classes):
    model = create(official_file, num_classes=num_classes)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, num_classes or 2048)
    torch.testing.assert_close(model.proj.bias, official["proj.bias"].float())


def test_pretrained_with_other_channels(official_file, official):
    model = create(official_file, num_classes=7, in_chans=1)
    expected = official["patch_embed.proj.0.weight"].float().sum(1, keepdim=True)
    torch.testing.assert_close(model.stem[0].weight, expected)


def test_pretrained_of_three_classes(official, tmp_path):
    head = {name: official[name][:3] for name in ("head.weight", "head.bias")}
    torch.save(official | head, tmp_path / "three.pth")
    model = create(tmp_path / "three.pth", overlay={"num_classes": 3})
    assert model.num_classes == 3
    torch.testing.assert_close(model.head.bias, head["head.bias"].float())
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight: .*\[3, 2048\].*\[1000, 2048\]"):
        create(tmp_path / "three.pth")


@pytest.mark.parametrize("naming", ["official", "ours"])
@pytest.mark.parametrize("num_classes", [1000, 7])  # with 7, timm itself is not strict
def test_pretrained_is_strict(official, tmp_path, naming, num_classes):
    state = dict(official) if naming == "official" else timm.create_model("polaformerpp_b0").state_dict()
    del state["norm.bias"]
    torch.save(state | {"surprise": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(RuntimeError, match="missing norm.bias; unexpected surprise"):
        create(tmp_path / "wrong.pth", num_classes=num_classes)


def foreign_object(folder: Path) -> object:
    """Object of a class whose module no longer exists when the file is read."""
    (folder / "vanished.py").write_text("class Config:\n    def __init__(self):\n        self.depth = 3\n")
    sys.path.insert(0, str(folder))
    try:
        return __import__("vanished").Config()
    finally:
        sys.path.remove(str(folder))


class RunsCommand:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Evaluates(RunsCommand):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w')",)


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_beside_the_weights_are_left_out(official, tmp_path, zipped):
    beside = {
        "args": argparse.Namespace(lr=1.0, folder=Path("runs")),
        "config": CfgNode({"MODEL": {"DEPTHS": (2, 2), "NAME": "b0"}}),
        "max_accuracy": np.float64(76.9),
        "history": np.arange(3),
        "vanished": foreign_object(tmp_path),
        "scores": collections.defaultdict(list, top1=[1.0]),
        "evaluated": Evaluates(tmp_path / "ran"),
    }
    torch.save({"model": official} | beside, tmp_path / "rich.pth", _use_new_zipfile_serialization=zipped)
    del sys.modules["vanished"]
    model = timm.create_model("polaformerpp_b0")
    load_weights(model, tmp_path / "rich.pth")
    assert_holds(model, official)
    assert "vanished" not in sys.modules
    assert not (tmp_path / "ran").exists()


def test_objects_that_cannot_be_left_out(official, tmp_path):
    model, path = timm.create_model("polaformerpp_b0"), tmp_path / "objects.pth"

    def refuse(content: object, message: str) -> None:
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights(model, path)

    refuse({"model": official, "x": RunsCommand(tmp_path / "ran")}, "objects of posix.system, which cannot be left out")
    assert not (tmp_path / "ran").exists()
    refuse({"model": official, "x": collections.deque([1])}, "objects of collections.deque, which cannot be left out")
    refuse(official | {"epoch": 3}, "objects.pth holds no tensor under epoch, but int; save the model's state_dict")
    refuse([official], "objects.pth holds no state dict; save the model's state_dict")
    refuse(
        model, r"holds no state dict but objects of polaformer\.attention\.\w+, .* more; save the model's state_dict"
    )


def test_files_that_are_not_checkpoints(official, tmp_path):
    model, path = timm.create_model("polaformerpp_b0"), tmp_path / "file.pth"

    def refuse(content: bytes, message: str, path: Path = path) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_weights(model, path)

    refuse(
        b"<!DOCTYPE html><p>Sign in", "file.pth is not a checkpoint: it begins with '<!DOCTYPE html>.*; download the"
    )
    refuse(b"", "file.pth is empty; copy or download it again")
    for zipped, message in (
        (True, r"file.pth is truncated after [\d,]+ bytes"),
        (False, "file.pth is truncated, or no"),
    ):
        torch.save(official, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        refuse(whole[: len(whole) // 2], f"{message}.*; copy or download it again")
    np.savez(tmp_path / "file.npz", x=np.zeros(3))
    refuse((tmp_path / "file.npz").read_bytes(), "is truncated, or no checkpoint of torch.save .*not in a subdirectory")
    safetensors = tmp_path / "page.safetensors"
    refuse(
        b"<!DOCTYPE html><p>Sign in", "page.safetensors is not a safetensors file .*; copy or export it", safetensors
    )
    header = b'{"x": {"dtype": "F32", "shape": [0, 18446744073709551615], "data_offsets": [0, 0]}}'
    whole = len(header).to_bytes(8, "little") + header
    refuse(whole, r"page.safetensors is not a safetensors file \(.*shape.*\); copy or export it", safetensors)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.pth"):
        load_weights(timm.create_model("polaformerpp_b0"), tmp_path / "nothing.pth")

"""Model metadata: to a safetensors file and back, and as timm reads it."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file

from dataio.augment.params import ImageOptions
from launch.model_metadata import make_model_metadata, read_model_metadata
from polaformer.weights import save_weights

IMAGES = ImageOptions(image_size=96, interpolation="bilinear", crop_mode="center", crop_pct=0.9, mean=(0.1, 0.2, 0.3))
METADATA = make_model_metadata("polaformerpp_b1", ("T-shirt_top", "größer", 'a "quoted" one'), IMAGES)


def test_metadata_is_read_back_from_a_file(tmp_path):
    state = {"head.bias": torch.arange(3.0)}
    save_weights(state, tmp_path / "model.safetensors", METADATA.safetensors_metadata())
    assert read_model_metadata(tmp_path / "model.safetensors") == METADATA
    assert torch.equal(load_file(tmp_path / "model.safetensors")["head.bias"], state["head.bias"])


def test_files_of_the_first_version(tmp_path):
    """Their keys and values are those that are written today."""
    on_disk = {"model": "polaformerpp_b1", "classes": ["a", "b"], "image_size": 96, "mean": [0.1, 0.2, 0.3]}
    on_disk |= {"std": [0.2, 0.2, 0.2], "interpolation": "bilinear", "eval_resize": "short", "eval_crop_fraction": 0.9}
    save_weights({"x": torch.zeros(1)}, tmp_path / "old.safetensors", {"polaformer": json.dumps(on_disk)})
    metadata = read_model_metadata(tmp_path / "old.safetensors")
    assert (metadata.crop_mode, metadata.crop_pct) == ("center", 0.9)
    assert json.loads(metadata.safetensors_metadata()["polaformer"]) == on_disk


def test_metadata_as_image_options():
    restored = METADATA.image_options(threads=7)
    assert restored == ImageOptions(
        image_size=96,
        interpolation="bilinear",
        crop_mode="center",
        crop_pct=0.9,
        mean=(0.1, 0.2, 0.3),
        threads=7,
    )


@pytest.mark.parametrize("crop_mode", ["squash", "center"])
def test_timm_reads_the_config(crop_mode):
    metadata = make_model_metadata(
        "polaformerpp_b0", ("a", "b"), ImageOptions(image_size=64, crop_mode=crop_mode, crop_pct=0.75)
    )
    written = metadata.timm_config()
    assert (written["architecture"], written["num_classes"], written["label_names"]) == (
        "polaformerpp_b0",
        2,
        ["a", "b"],
    )
    model = timm.create_model("polaformerpp_b0", num_classes=2, pretrained_cfg=written["pretrained_cfg"])
    assert model.eval().forward_features(torch.zeros(1, 3, 64, 64)).shape[2:] == (2, 2)
    assert written["pretrained_cfg"]["pool_size"] == [2, 2]
    assert {"stem.0.weight", "head.weight"} < model.state_dict().keys()
    assert [written["pretrained_cfg"][key] for key in ("first_conv", "classifier")] == ["stem.0", "head"]
    resolved = timm.data.resolve_model_data_config(model)
    assert resolved == {
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "crop_pct": 0.75,
        "crop_mode": crop_mode,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }


def test_files_of_other_origin_have_no_metadata(tmp_path):
    torch.save({}, tmp_path / "official.pth")
    save_weights({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors", {"format": "pt"})
    assert read_model_metadata(tmp_path / "official.pth") is None
    assert read_model_metadata(tmp_path / "foreign.safetensors") is None


def test_a_malformed_file_is_an_error(tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="broken.safetensors is not a safetensors file .*; copy or export it again"):
        read_model_metadata(path)


def test_class_names_with_control_characters_are_an_error(tmp_path):
    path = tmp_path / "hostile.safetensors"
    save_weights({"x": torch.zeros(1)}, path, replace(METADATA, classes=("cat", "\x1bc")).safetensors_metadata())
    with pytest.raises(ValueError, match="has damaged metadata .a class has control characters in its name.; copy"):
        read_model_metadata(path)


def test_metadata_that_lack_something(tmp_path):
    save_weights({"x": torch.zeros(1)}, tmp_path / "later.safetensors", {"polaformer": '{"model": "polaformerpp_b1"}'})
    with pytest.raises(ValueError, match="later.safetensors has metadata of another version, without 'classes'"):
        read_model_metadata(tmp_path / "later.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, '{"model": NaN'])
def test_damaged_metadata_are_an_error(tmp_path, text):
    save_weights({"x": torch.zeros(1)}, tmp_path / "damaged.safetensors", {"polaformer": text})
    with pytest.raises(ValueError, match="damaged.safetensors has damaged metadata .*; copy or export it again"):
        read_model_metadata(tmp_path / "damaged.safetensors")

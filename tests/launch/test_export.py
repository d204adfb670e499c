"""The exported weights of a real run, as timm loads them from a file and from a folder."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from launch.checkpoint import layout
from launch.export import default_target, export, main
from launch.find_weights import WEIGHTS_PATH_HELP
from launch.model_metadata import read_model_metadata


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("exports") / "deep" / "b0"
    assert export(trained_run, target, "ema") == target / "model.safetensors"
    return target


def test_timm_loads_the_file_and_the_folder(exported, trained_run):
    newest, _ = layout.find_newest(trained_run / "checkpoints")
    trained = timm.create_model("polaformerpp_b0", num_classes=10)
    trained.load_state_dict(load_file(newest / layout.EMA_NAME))
    by_path = timm.create_model("polaformerpp_b0", num_classes=10, checkpoint_path=str(exported / "model.safetensors"))
    by_folder = timm.create_model(f"local-dir:{exported}", pretrained=True)
    assert torch.equal(logits(by_path), logits(trained))
    assert torch.equal(logits(by_folder), logits(trained))
    assert by_folder.num_classes == 10


def test_timm_adapts_the_folder_to_other_classes_and_channels(exported):
    trained = load_file(exported / "model.safetensors")

    def load(**options) -> dict[str, torch.Tensor]:
        model = timm.create_model(f"local-dir:{exported}", pretrained=True, **options)
        return getattr(model, "model", model).state_dict()

    for options in ({"num_classes": 7}, {"num_classes": 0}, {"features_only": True}):
        state = load(**options)
        assert not any(torch.equal(state[name], trained[name]) for name in state if name.startswith("head."))
        assert all(torch.equal(state[name], trained[name]) for name in state if not name.startswith("head."))
    summed = trained["stem.0.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(load(in_chans=1)["stem.0.weight"], summed)
    overlaid = timm.create_model(
        f"local-dir:{exported}", pretrained=True, pretrained_cfg_overlay={"crop_pct": 0.5}, global_pool=""
    )
    assert timm.data.resolve_model_data_config(overlaid)["crop_pct"] == 0.5
    assert torch.equal(overlaid.head.weight, trained["head.weight"])


def test_timm_prepares_images_alike(exported, fashion):
    model = timm.create_model(f"local-dir:{exported}", pretrained=True)
    resolved = timm.data.resolve_model_data_config(model)
    assert resolved == {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": [0.286, 0.286, 0.286],
        "std": [0.353, 0.353, 0.353],
    }
    assert model.pretrained_cfg["label_names"] == sorted(folder.name for folder in fashion.iterdir())
    with Image.open(next(fashion.glob("Bag/*.png"))) as image:
        assert timm.data.create_transform(**resolved)(image.convert("RGB")).shape == (3, 32, 32)


def test_both_kinds_of_weights(trained_run, tmp_path):
    newest, _ = layout.find_newest(trained_run / "checkpoints")
    for kind, name in (("model", layout.MODEL_NAME), ("ema", layout.EMA_NAME)):
        assert export(trained_run, tmp_path / kind, kind).read_bytes() == (newest / name).read_bytes()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != (newest / layout.EMA_NAME).read_bytes()


def test_an_export_replaces_the_last_one(trained_run, tmp_path):
    export(trained_run, tmp_path, "model")
    weights = export(trained_run, tmp_path, "ema")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "config.json").read_text()) == read_model_metadata(weights).timm_config()


def test_the_command_writes_beside_the_checkpoints(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'export' / 'model.safetensors'}\n"
    assert {path.name for path in (run / "export").iterdir()} == {"config.json", "model.safetensors"}


def test_the_newest_intact_checkpoint_is_exported(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    newest, _ = layout.find_newest(run / "checkpoints")
    with open(newest / layout.EMA_NAME, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    older, faults = layout.find_newest(run / "checkpoints")
    assert older < newest
    assert len(faults) == 1
    assert export(run, tmp_path / "out", "ema").read_bytes() == (older / layout.EMA_NAME).read_bytes()


@pytest.mark.parametrize("named", ["best", "latest", "step-00000038", "step-00000075/ema.safetensors"])
def test_the_command_takes_a_checkpoint(trained_run, tmp_path, capsys, named):
    """The export lies beside the run's checkpoints, as if the run was named."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    assert main([str(run / "checkpoints" / named)]) == 0
    assert capsys.readouterr().out == f"{run / 'export' / 'model.safetensors'}\n"
    assert {path.name for path in run.iterdir()} == {path.name for path in trained_run.iterdir()} | {"export"}


def test_a_file_elsewhere_is_exported_beside_it(trained_run, tmp_path, capsys):
    weights = shutil.copy(trained_run / "checkpoints" / "step-00000075" / "ema.safetensors", tmp_path)
    assert main([weights]) == 0
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == Path(weights).read_bytes()


def test_on_a_full_disk_the_last_export_stays(trained_run, tmp_path, capsys, no_file_larger_than):
    before = export(trained_run, tmp_path / "export", "model").read_bytes()
    with no_file_larger_than(2**20):
        message = error_of(capsys, trained_run, "--to", tmp_path / "export")
    assert message.startswith("error: [Errno 27] File too large")
    assert message.count("\n") == 1
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("named", "target"),
    [
        ("models/checkpoints/b4", "models/checkpoints/b4/export"),  # another's folder of that name
        ("runs/b4", "runs/b4/export"),
        ("runs/b4/checkpoints", "runs/b4/export"),
        ("models/checkpoints/b5/model.safetensors", "models/checkpoints/b5/export"),
    ],
)
def test_runs_do_not_share_an_export(tmp_path, monkeypatch, named, target):
    monkeypatch.chdir(tmp_path)
    Path("models/checkpoints/b5").mkdir(parents=True)
    Path("models/checkpoints/b5/model.safetensors").touch()
    assert default_target(Path(named)) == Path(target)


def error_of(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_other_folders_are_errors(trained_run, tmp_path, capsys):
    assert error_of(capsys, tmp_path) == (
        f"error: {tmp_path} is a folder without checkpoints; give {WEIGHTS_PATH_HELP}\n"
    )
    assert error_of(capsys, tmp_path / "nowhere").startswith(f"error: no weights at {tmp_path / 'nowhere'}; give a run")
    torch.save({}, tmp_path / "official.pth")
    assert error_of(capsys, tmp_path / "official.pth").endswith(
        "is not of a run of ours; give a run's folder or one of its checkpoints\n"
    )
    assert not (tmp_path / "export").exists()


def test_corrupt_checkpoints_are_errors(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert error_of(capsys, run).startswith(f"error: no checkpoint in {run / 'checkpoints'} is intact: ")
    assert not (run / "export").exists()

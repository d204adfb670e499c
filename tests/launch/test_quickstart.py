"""The quickstart after its set-up, on a small class folder, in a copy of the project's folder."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import timm
import torch
from rich.console import Console

from dataio.manifest import load_manifest
from dataio.pack.options import PackOptions
from dataio.pack.packer import read_report
from launch.checkpoint import layout
from launch.custom_dataset import inspect_dataset
from launch.find_weights import find_weights
from launch.interrupt import EXIT_RESUME
from launch.quickstart import SUMMARY_NAME, main, pack_commands, read_top1, show

ROOT = Path(__file__).parents[2]
SHORT = ["optimizer.epochs=0.2", "optimizer.warmup_epochs=0.1", "optimizer.global_batch_size=32", "data.image_size=32"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project folder with writable data/ and runs/."""
    root = tmp_path_factory.mktemp("project")
    for name in ("launch", "dataio", "polaformer", "configs"):
        (root / name).symlink_to(ROOT / name)
    return root


@pytest.fixture
def environ(project, no_launcher, monkeypatch) -> None:
    """The project's folder as working folder, and the environment of a machine without a GPU."""
    monkeypatch.chdir(project)
    for name, value in {"PYTHONPATH": str(project), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "400"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def commands(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def odd(fashion, hostile, tmp_path_factory) -> Path:
    """`fashion` in a folder with special characters, in two splits; validation lacks one class."""
    root = tmp_path_factory.mktemp("odd") / f"-it's: [bold]~ #1 :smile: é\n{hostile}"
    for folder in fashion.iterdir():
        for number, file in enumerate(sorted(folder.iterdir())):
            target = root / ("Valid" if number % 4 == 0 else "Train") / folder.name
            target.mkdir(parents=True, exist_ok=True)
            os.link(file, target / file.name)
    for file in (root / "Valid" / "Bag").iterdir():
        file.unlink()
    (root / "Train" / "Coat" / "Thumbs.db").write_bytes(b"of Windows")
    (root / "Train" / "Coat" / "film.mp4").write_bytes(b"no image")
    return root


@pytest.mark.slow
def test_a_class_folder_becomes_a_model_and_is_reused(project, environ, odd, capfd):
    with pytest.raises(SystemExit, match="2"):  # the status of a packing command
        main([f"--data={odd}", *SHORT])
    assert "film.mp4: its name ends with none of" in capfd.readouterr().err
    assert main([f"--data={odd}", "--skip-broken", *SHORT, "--resize=24"]) == 0  # options anywhere
    finished = capfd.readouterr().out
    (run,) = (project / "runs").glob("quickstart-it-s*")
    (shards,) = (target for target in (project / "data" / "shards").glob("it-s*") if (target / "train").exists())
    assert not [path for folder in (project, odd.parent) for path in folder.rglob("created")]
    assert run.name == f"quickstart-{shards.name}"
    assert re.fullmatch(r"it-s-bold-1-smile-é-touch-created-[a-z-]*-[0-9a-f]{8}", shards.name)
    for line in ("top-1 of the weights", "top-1 of the EMA", "total", f"tensorboard --logdir 'runs/{run.name}'"):
        assert line in finished
    assert [read_report(shards / split).resize for split in ("train", "val")] == [24, 24]
    summary = json.loads((run / SUMMARY_NAME).read_text())
    better = max(summary["top1"].values())
    assert summary["top1"][summary["exported"]] == better
    assert re.search(rf"exported, the better: {summary['exported']}", finished)
    assert re.search(rf"top-1 of the weights +│ {summary['top1']['weights']:.2f} %", finished)
    assert f"cores: {summary['cores']}" in finished
    assert "of which steps" in finished
    assert 0 < summary["speed"]["seconds"] < summary["seconds"]["training"]
    kept = [run / "checkpoints" / "latest", run / SUMMARY_NAME]
    weights = run / "export" / "model.safetensors"
    exported = find_weights(run, {"weights": "model", "EMA": "ema"}[summary["exported"]])
    assert weights.read_bytes() == exported.read_bytes()
    model = timm.create_model("polaformerpp_b0", num_classes=10, checkpoint_path=weights).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)

    before = [path.stat().st_mtime_ns for path in kept]
    assert main([f"--data={odd}", *SHORT, "--resize=24", "--skip-broken"]) == 0
    again = capfd.readouterr().out
    assert "step 1" not in again
    assert len(commands(finished)) == 6
    stages = [re.search(r"train\.py|launch\.\w+", command)[0] for command in commands(again)]
    assert stages == ["train.py", "launch.export"]
    assert len(re.findall("(packing|evaluation of the (weights|EMA)) +│ already done", again)) == 3
    assert json.loads((run / SUMMARY_NAME).read_text()) == summary
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert "of which steps" not in again


@pytest.mark.slow
def test_ctrl_c_while_training_leaves_a_checkpoint_and_no_process(project, environ, fashion):
    command = [sys.executable, "-m", "launch.quickstart", f"--data={fashion}", *SHORT, "log.every_steps=1"]
    process = subprocess.Popen(
        [*command, "optimizer.epochs=1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    training = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, errors = process.communicate()
    assert process.returncode == EXIT_RESUME, errors
    assert errors.endswith("interrupted; the same command resumes\n")
    assert "Traceback" not in output + errors
    assert training
    assert not any(process.is_running() for process in training)
    (stopped,) = re.findall(r"stopped by SIGINT after step (\d+)/", output)
    (run,) = (project / "runs").glob(f"quickstart-{fashion.name}*")
    assert layout.find_newest(run / "checkpoints")[0].name == f"step-{int(stopped):08d}"


def test_the_tensorboard_command_keeps_the_path_and_listens_to_this_machine_only(tmp_path):
    run = tmp_path / "a run's $(touch created)"
    run.mkdir()
    summary = {"device": {"name": "CPU"}, "gpus": 0, "cores": 2, "speed": None, "top1": {}, "seconds": {"set-up": 1.0}}
    console = Console(file=io.StringIO(), width=1000, markup=False)
    show(console, summary, {"run": run})
    [row] = [line for line in console.file.getvalue().splitlines() if "TensorBoard" in line]
    words = shlex.split(row.split("│")[2])
    assert words == [".venv/bin/tensorboard", "--logdir", str(run)]
    words = [sys.executable, "-m", "tensorboard.main", *words[1:], "--port=0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert any(line.startswith("TensorBoard ") for line in process.stderr)  # it is listening
        server = psutil.Process(process.pid)
        sockets = [each for part in (server, *server.children(recursive=True)) for each in part.net_connections()]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    addresses = {each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN}
    assert addresses
    assert addresses <= {"127.0.0.1", "::1"}


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """The working folder, in which the quickstart may write."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def error_of(capsys, *arguments: object) -> str:
    """The error with which the quickstart ends before anything is packed."""
    assert main(list(map(str, arguments))) == 2
    assert not Path("data").exists()
    return capsys.readouterr().err


def test_unusable_images_are_errors(workdir, photos, capsys):
    assert error_of(capsys, "--data=nowhere").startswith("error: --data nowhere is not there; name a folder, zip or")
    shutil.copytree(photos / "cat", workdir / "one" / "cat")
    assert "one has a single class, cat, and there is nothing to tell apart" in error_of(capsys, "--data=one")
    shutil.copytree(photos / "cat", workdir / "one" / "valid" / "lynx")
    (workdir / "one" / "cat").rename(workdir / "cat")
    for name in ("cat", "dog"):
        shutil.copytree(workdir / "cat", workdir / "one" / "train" / name)
    error = error_of(capsys, "--data=one")
    assert 'none of the 2 names of classes is "lynx", a folder in one/valid; add it to the file for --classes' in error
    assert "--val-percent is for images without a validation split, and photos/val is one; leave it out" in error_of(
        capsys, "--data", two_splits(workdir, photos), "--val-percent=20"
    )


def two_splits(workdir: Path, photos: Path) -> Path:
    for split in ("train", "val"):
        shutil.copytree(photos, workdir / "photos" / split)
    return Path("photos")


def test_invalid_options_are_errors(workdir, photos, capsys):
    assert error_of(capsys, "--skip-broken").startswith("error: options of packing are for images of your own; name")
    assert error_of(capsys, "--data", photos, "--resize=0").startswith("error: --resize is 0; use the pixels that")
    assert error_of(capsys, "--data", photos, "--val-percent=100").startswith(
        "error: --val-percent is 100.0; use a perc"
    )
    assert "unknown key optimizer.epoch; did you mean epochs?" in error_of(capsys, "optimizer.epoch=3")


def test_the_packing_commands(photos, tmp_path):
    """They hold out validation images and pass the packing options on, which also decide the folder's name."""
    dataset = inspect_dataset(photos, PackOptions(), None)
    options = PackOptions(val_percent=10, split="train", resize=64, shard_mib=32)
    train, val = pack_commands(dataset, tmp_path, options)
    assert train[2:] == ["dataio.pack", str(photos), str(tmp_path / "train"), *options.flags()]
    assert val[2:] == ["dataio.pack", str(photos), str(tmp_path / "val"), *replace(options, split="val").flags()]
    assert set(options.flags()) == {"--shard-mib=32", "--resize=64", "--val-percent=10", "--split=train"}
    assert dataset.remarks == [f"training images: 44 of 4 classes in {photos}", "validation images: 4, held out"]
    names = {inspect_dataset(photos, *given).name for given in ((PackOptions(resize=64), None), (PackOptions(), 20))}
    assert len({dataset.name, *names}) == 3
    assert inspect_dataset(photos, PackOptions(workers=2, skip_broken=True), 10).name == dataset.name


def test_only_complete_reports_of_the_newest_weights_are_reused(tmp_path):
    report, weights, images = (tmp_path / name for name in ("report", "weights", "images"))
    assert read_top1(report, weights, images) is None
    for number, path in enumerate((weights, images, report)):
        path.write_text('{"top1": 50.0}')
        os.utime(path, ns=(0, number))
    assert read_top1(report, weights, images) == 50.0
    os.utime(weights, ns=(0, 3))
    assert read_top1(report, weights, images) is None
    report.write_text('{"top1": 5')
    assert read_top1(report, images) is None


def test_splits_and_archives(workdir, photos):
    root = two_splits(workdir, photos).absolute()
    shutil.copytree(photos, root / "test")
    shutil.rmtree(root / "val" / "cat")
    archive = Path(shutil.make_archive(str(workdir / "my photos"), "zip", workdir, "photos"))
    for path, inside in ((root, root), (archive, archive / "photos")):
        dataset = inspect_dataset(path, PackOptions(), None)
        assert (dataset.train, dataset.val, dataset.classes) == (
            inside / "train",
            inside / "val",
            ("astronaut", "cat", "coffee", "rocket"),
        )
        assert dataset.remarks[-1] == f"left alone: {inside}/test"
        assert dataset.name.startswith(("photos-", "my-photos-"))
        _, val = pack_commands(dataset, workdir / "shards", PackOptions())
        assert val[-1] == f"--classes={workdir}/shards/classes.txt"
        assert subprocess.run([*val[:3], *val[3:]], cwd=ROOT).returncode == 0
        assert load_manifest(workdir / "shards" / "val").classes == dataset.classes
        shutil.rmtree(workdir / "shards")

"""All files that commands create, from packing to export: below their output, with the modes that the umask leaves."""

import getpass
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What libraries create elsewhere when they are imported: caches of the user, without anything of the run.
CACHES = (
    "home/.cache/matplotlib",  # a list of fonts; torchmetrics imports Matplotlib
    "home/.config/matplotlib",  # empty
    f"tmp/torchinductor_{getpass.getuser()}",  # empty: torch.compile would keep its kernels there
)
COMMANDS = """
import sys
from dataio.pack import __main__ as pack
from launch import evaluate, export, plan, train

config, images, output = sys.argv[1:]
train_shards, val_shards, run = f"{output}/train", f"{output}/val", f"{output}/run"
settings = ["data.threads=1", "optimizer.global_batch_size=8", "optimizer.epochs=1", "optimizer.warmup_epochs=0"]
words = [f"--config={config}", f"data.train={train_shards}", f"data.val={val_shards}", f"output={run}", *settings]
sys.exit(
    pack.main([images, train_shards, "--val-percent=25", "--split=train", "--resize=40"])
    or pack.main([images, val_shards, "--val-percent=25", "--split=val", "--resize=40"])
    or plan.main(words)
    or train.main([*words, "checkpoint.every_epochs=0.5", "log.every_steps=1"])
    or evaluate.main([f"--weights={run}", f"--data={val_shards}", f"--out={run}/evaluation.json"])
    or export.main([run])
)
"""


def is_cache(path: Path) -> bool:
    """Tells whether a path, relative to the test's folder, is one of CACHES, or above or below one."""
    return any(Path(cache).is_relative_to(path) or path.is_relative_to(cache) for cache in CACHES)


@pytest.mark.slow
def test_files_are_created_below_the_output_alone_with_the_modes_of_the_umask(environ, photos, tmp_path):
    here, home, temporary, output = (tmp_path / name for name in ("here", "home", "tmp", "output"))
    for folder in (here, home, temporary):
        folder.mkdir()
    umask = 0o027  # modes that a program chooses are others: 0600, 0644, 0664, 0666
    words = [sys.executable, "-c", COMMANDS, ROOT / "configs" / "quickstart.yaml", photos, output]
    variables = environ | {"HOME": str(home), "TMPDIR": str(temporary), "DS_ACCELERATOR": "cpu"}
    variables = {name: value for name, value in variables.items() if not name.startswith(("XDG_", "MPLCONFIG"))}
    done = subprocess.run(words, cwd=here, env=variables, umask=umask, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    elsewhere = [path.relative_to(tmp_path) for folder in (here, home, temporary) for path in folder.rglob("*")]
    assert [path for path in elsewhere if not is_cache(path)] == []
    created = [output, *output.rglob("*")]
    modes = {path: path.stat().st_mode & 0o777 for path in created}
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in created}
    of_run = {
        "config.yaml",
        "metrics.jsonl",
        "evaluation.json",
        "checkpoints",
        "heartbeats",
        "goodput.json",
        "tensorboard",
        "export",
    }
    assert {path.name for path in (output / "run").iterdir()} == of_run
    assert {path.name for path in output.iterdir()} == {"train", "val", "run"}
    assert any(path.name.startswith("events.out") for path in created)

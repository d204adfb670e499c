"""Export the weights of a run as a folder that timm loads: model.safetensors and config.json.

python -m launch.export runs/b5
python -m launch.export runs/b5/checkpoints/best --to best
timm.create_model("polaformerpp_b5", checkpoint_path="runs/b5/export/model.safetensors")
timm.create_model("local-dir:runs/b5/export", pretrained=True)
"""

from launch.interrupt import exit_on_interrupt, exit_process

if __name__ == "__main__":
    exit_on_interrupt()

import json
import shutil
import sys
from pathlib import Path

import timm

from dataio.files import atomic_write, user_path
from launch.checkpoint.layout import is_checkpoint
from launch.command_line import make_parser
from launch.find_weights import WEIGHTS_PATH_HELP, find_weights
from launch.model_metadata import read_model_metadata
from polaformer.weights import load_weights


def export(run: Path, target: Path, kind: str) -> Path:
    """Write the weights of `run` to the folder `target`, after a test that they load. Return their file.

    run: whatever `find_weights` takes. kind: "ema" or "model".
    Raises FileNotFoundError or ValueError if there is no intact checkpoint, RuntimeError if it does not load, OSError
    if the folder cannot be written to; an earlier export in it stays then.
    """
    source = find_weights(run, kind)
    metadata = read_model_metadata(source)
    if metadata is None:
        raise ValueError(f"{source} is not of a run of ours; give a run's folder or one of its checkpoints")
    load_weights(timm.create_model(metadata.model, num_classes=len(metadata.classes)), source)
    target.mkdir(parents=True, exist_ok=True)
    config = json.dumps(metadata.timm_config(), indent=1, ensure_ascii=False) + "\n"
    weights = target / "model.safetensors"
    part = weights.with_suffix(".part")
    try:
        shutil.copyfile(source, part)
        atomic_write(target / "config.json", config.encode())
        return part.rename(weights)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def default_target(run: Path) -> Path:
    """Return the folder `export` of the run that a checkpoint or file belongs to, else of the file's own folder."""
    folder = run.parent if run.is_file() else run
    for checkpoints in (folder, folder.parent):
        if checkpoints.name == "checkpoints" and (checkpoints == folder or is_checkpoint(folder)):
            return checkpoints.parent / "export"
    return folder / "export"


def main(argv: list[str] | None = None) -> int:
    """Export weights as the command line says; return the exit status."""
    parser = make_parser("python -m launch.export", __doc__)
    parser.add_argument("run", type=user_path, help=WEIGHTS_PATH_HELP)
    parser.add_argument("--to", type=user_path, help="where to write (default RUN/export, or beside a file)")
    parser.add_argument("--kind", choices=("ema", "model"), default="ema", help="which weights (default ema)")
    arguments = parser.parse_args(argv)
    try:
        print(export(arguments.run, arguments.to or default_target(arguments.run), arguments.kind))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    exit_process(main())

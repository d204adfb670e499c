"""What must be known besides the tensors to use weights: the model they fit, and how its images are prepared.

This metadata travels inside every safetensors file that a run writes, and beside an exported one in timm's own format.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import get_pretrained_cfg

from dataio.augment.params import ImageOptions
from dataio.options import parse_options
from polaformer.model import TOTAL_STRIDE

_KEY = "polaformer"
#: Names in the files: those of the first version, so that files of all versions are alike.
_ON_DISK = {"crop_mode": "eval_resize", "crop_pct": "eval_crop_fraction"}
_CROP_MODES_ON_DISK = {"squash": "squash", "center": "short"}


@dataclass(frozen=True)
class ModelMetadata:
    """classes: their names, in the order of the outputs. The rest is as ImageOptions has it."""

    model: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_mode: str
    crop_pct: float

    def safetensors_metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        on_disk = {_ON_DISK.get(name, name): value for name, value in asdict(self).items()}
        on_disk["eval_resize"] = _CROP_MODES_ON_DISK[self.crop_mode]
        return {_KEY: json.dumps(on_disk, ensure_ascii=False)}

    def image_options(self, threads: int) -> ImageOptions:
        """How images are evaluated."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("model", "classes")}
        return parse_options(ImageOptions, **fields, threads=threads)

    def timm_config(self) -> dict[str, Any]:
        """The config.json that makes a folder loadable as timm's `local-dir:FOLDER`, for other classes too."""
        registered = get_pretrained_cfg(self.model)
        return {
            "architecture": self.model,
            "num_classes": len(self.classes),
            "global_pool": "avg",
            "label_names": list(self.classes),
            "pretrained_cfg": {
                "num_classes": len(self.classes),
                "input_size": [3, self.image_size, self.image_size],
                "interpolation": self.interpolation,
                "crop_pct": self.crop_pct,
                "crop_mode": self.crop_mode,
                "mean": list(self.mean),
                "std": list(self.std),
                "fixed_input_size": False,
                "pool_size": [self.image_size // TOTAL_STRIDE] * 2,
                "first_conv": registered.first_conv,  # what timm adapts to other channels
                "classifier": registered.classifier,  # what timm drops for other classes
            },
        }


def make_model_metadata(model: str, classes: tuple[str, ...], images: ImageOptions) -> ModelMetadata:
    """The metadata of a model with these classes, evaluated on images prepared so."""
    return ModelMetadata(
        model,
        classes,
        images.image_size,
        images.mean,
        images.std,
        images.interpolation,
        images.crop_mode,
        images.crop_pct,
    )


def read_model_metadata(path: Path) -> ModelMetadata | None:
    """The metadata inside a safetensors file, or None where there is none (an official .pth, another's safetensors).

    Raises ValueError if the file is not what its name says.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}); copy or export it again") from error
    if _KEY not in metadata:
        return None
    on_disk = json.loads(metadata[_KEY])
    fields = {name: on_disk.pop(_ON_DISK.get(name, name)) for name in ModelMetadata.__dataclass_fields__}
    fields["crop_mode"] = {short: name for name, short in _CROP_MODES_ON_DISK.items()}[fields["crop_mode"]]
    return ModelMetadata(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

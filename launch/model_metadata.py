"""Metadata that weights need besides their tensors: the model, its classes, and how its images are prepared.

It is in the header of every safetensors file that a run writes, and beside an exported one in timm's format.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import get_pretrained_cfg

from dataio.augment.params import ImageOptions
from dataio.files import has_control_character
from dataio.options import parse_options
from polaformer.model import TOTAL_STRIDE

_KEY = "polaformer"
#: Attributes → their keys in files, and crop modes → their values there. All are those of the first version.
_KEYS_ON_DISK = {"crop_mode": "eval_resize", "crop_pct": "eval_crop_fraction"}
_CROP_MODES_ON_DISK = {"squash": "squash", "center": "short"}


@dataclass(frozen=True)
class ModelMetadata:
    """The model that weights fit, and its preprocessing, with the fields of ImageOptions.

    classes: their names, in the order of the model's outputs.
    """

    model: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_mode: str
    crop_pct: float

    def safetensors_metadata(self) -> dict[str, str]:
        """Return the header of a safetensors file: one key, with JSON as its value."""
        on_disk = {_KEYS_ON_DISK.get(name, name): value for name, value in asdict(self).items()}
        on_disk["eval_resize"] = _CROP_MODES_ON_DISK[self.crop_mode]
        return {_KEY: json.dumps(on_disk, ensure_ascii=False)}

    def image_options(self, threads: int) -> ImageOptions:
        """Return how images are prepared for evaluation."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("model", "classes")}
        return parse_options(ImageOptions, **fields, threads=threads)

    def timm_config(self) -> dict[str, Any]:
        """Return the config.json with which timm loads a folder as `local-dir:FOLDER`, for other classes too."""
        registered = get_pretrained_cfg(self.model)
        assert registered is not None  # polaformer registers all of its models
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
                "first_conv": registered.first_conv,  # timm adapts it to other numbers of channels
                "classifier": registered.classifier,  # timm drops it for other classes
            },
        }


def make_model_metadata(model: str, classes: tuple[str, ...], images: ImageOptions) -> ModelMetadata:
    """Return the metadata of a model with these classes and this preprocessing."""
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
    """Return the metadata in a safetensors file, or None if there is none (an official .pth, a file of other origin).

    Raises ValueError if the file is not a safetensors file although its name says so, or its metadata lack something.
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
    try:
        on_disk = json.loads(metadata[_KEY])
        fields: dict[str, Any] = {
            name: on_disk[_KEYS_ON_DISK.get(name, name)] for name in ModelMetadata.__dataclass_fields__
        }
        fields["crop_mode"] = {value: name for name, value in _CROP_MODES_ON_DISK.items()}[fields["crop_mode"]]
        fields |= {name: tuple(fields[name]) for name in ("classes", "mean", "std")}
        if any(map(has_control_character, fields["classes"])):
            raise ValueError("a class has control characters in its name")
    except KeyError as error:
        raise ValueError(f"{path} has metadata of another version, without {error}; export it again") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has damaged metadata ({error}); copy or export it again") from error
    return ModelMetadata(**fields)

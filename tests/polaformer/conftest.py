"""Golden vectors of the official implementation, and its parameters redrawn from seeds that are their names."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import polaformer
from polaformer.weights import official_name

GOLDEN = Path(__file__).parent / "golden"


def draw_normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = zlib.crc32(f"public:{name}".encode()) & 0xFFFFFFFF
    return np.random.RandomState(seed).standard_normal(shape)


def official_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    z, last = draw_normal(name, shape), name.rsplit(".", 1)[-1]
    if last in ("s1", "s2"):
        return z
    if last in ("gamma_1", "gamma_2"):
        return 0.5 + 0.1 * z
    if last in ("bias", "running_mean"):
        return 0.1 * z
    if last == "running_var":
        return np.exp(0.2 * z)
    return 1 + 0.1 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:]))


def official_shape(name: str, shape: torch.Size) -> tuple[int, ...]:
    last = name.rsplit(".", 1)[-1]
    if last in ("s1", "s2"):
        return (1, shape[0], 1, shape[1])
    if last.startswith("gamma"):
        return (1, shape[-1], 1, 1)
    return (*shape, 1, 1) if name == "head.weight" else tuple(shape)


def rotary_features(preset: str) -> list[int]:
    sizes = polaformer.PRESETS[f"polaformerpp_{preset}"]
    head_dims = [channels // heads for channels, heads in zip(sizes.channels, sizes.heads, strict=True)]
    return [2 * head_dims[0], 2 * head_dims[1], head_dims[2], head_dims[3]]


@pytest.fixture(scope="session")
def draw():
    """Function (name, shape) → standard normal array, seeded by the name."""
    return draw_normal


@pytest.fixture(scope="session")
def official_state():
    """Function preset → state dict in the format of an official checkpoint, in float64."""

    def build(preset: str) -> dict[str, torch.Tensor]:
        state = {}
        for ours, value in timm.create_model(f"polaformerpp_{preset}").state_dict().items():
            name = official_name(ours)
            if name.endswith("num_batches_tracked"):
                state[name] = value
            else:
                state[name] = torch.from_numpy(official_value(name, official_shape(name, value.shape)))
        for stage, features in enumerate(rotary_features(preset)):
            angles = (1 / 10000 ** torch.linspace(0, 1, features // 4)).repeat_interleave(2)
            state[f"layers.{stage}.RoPE{'_linear' if stage < 2 else ''}.angle"] = angles
        return state

    return build


@pytest.fixture(scope="session")
def golden():
    """Function name → arrays of that golden file."""
    return lambda name: dict(np.load(GOLDEN / f"{name}.npz"))


@pytest.fixture(scope="session")
def relative_error():
    """Function (actual, expected) → ‖actual − expected‖ / ‖expected‖, computed in float64."""

    def error(actual, expected) -> float:
        actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
        return float((actual - expected).norm() / expected.norm())

    return error

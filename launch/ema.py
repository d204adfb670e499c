"""Exponential moving average of the weights, updated once per optimizer step.

All ranks hold the same weights and BatchNorm statistics at every step boundary, and so the same average of them:
evaluations and checkpoints need no preparation.
"""

from timm.utils import ModelEmaV3
from torch import nn

from launch.engine import gathered_parameters


class ModelEma:
    """An exponential moving average of parameters and buffers, whole on every rank for any ZeRO stage.

    `module` is a model of its own, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ema = ModelEmaV3(model)

    @property
    def module(self) -> nn.Module:
        return self._ema.module

    def update(self, engine, decay: float) -> None:
        """Keeps `decay` of what it is, and takes the rest from the engine's model. Every rank calls it."""
        self._ema.decay = decay
        with gathered_parameters(engine):
            self._ema.update(engine.module)

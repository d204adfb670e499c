"""Exponential moving average (EMA) of the weights, updated once per optimizer step.

All ranks hold the same weights and BatchNorm statistics at every step boundary, and therefore the same EMA:
evaluations and checkpoints use it without communication.
"""

from timm.utils import ModelEmaV3
from torch import nn

from launch.engine import Engine, gathered_parameters


class ModelEma:
    """An exponential moving average of parameters and buffers, unsharded on every rank at any ZeRO stage."""

    def __init__(self, model: nn.Module) -> None:
        self._ema = ModelEmaV3(model)

    @property
    def module(self) -> nn.Module:
        """A model of its own with the averaged weights, in evaluation mode."""
        return self._ema.module

    def update(self, engine: Engine, decay: float) -> None:
        """Set ema = decay · ema + (1 - decay) · weights, with the engine's weights. Every rank calls it."""
        self._ema.decay = decay
        with gathered_parameters(engine):
            self._ema.update(engine.module)

"""What is averaged besides gradients: BatchNorm statistics over the ranks, weights over the steps.

Both happen once per optimizer step, so that evaluations and checkpoints need no preparation: at every step boundary
all ranks hold the same statistics, and so the same moving average of them.
"""

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from launch.engine import gathered_parameters


@torch.no_grad()
def sync_batchnorm_buffers(model: nn.Module) -> None:
    """Replaces every floating buffer by its mean over the ranks, in one all-reduce (b5: 8,160 numbers)."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if dist.get_world_size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


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

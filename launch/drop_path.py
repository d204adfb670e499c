"""Stochastic depth drawn from the seed and the position of each sample in the run, on any number of ranks.

timm's DropPath draws from torch's global generator, in the order in which a rank computes. Here the host draws, before
each micro-step, which samples every module keeps; so a resumed run and recomputed activations see the same ones.

B: samples of a micro-batch.
"""

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from dataio.sampler import draws_at


class PositionalDropPath(DropPath):
    """DropPath of the samples that `draw_drop_paths` chose; the identity in evaluation mode, as timm's.

    scales: (modules, B) float32, shared by all modules of a model: 0 drops a sample's branch, 1 / (1 - drop_prob) keeps
    it. row: that of this module. A plain attribute: a buffer would be copied by the EMA and moved away from the others.
    """

    def __init__(self, drop_prob: float, scales: Tensor, row: int) -> None:
        super().__init__(drop_prob)
        self.scales, self.row = scales, row

    def forward(self, x: Tensor) -> Tensor:
        """Scale the samples of a branch: (B, …) → the same shape."""
        if not self.training:
            return x
        return x * self.scales[self.row].to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def convert_drop_path(model: nn.Module, micro_batch_size: int) -> None:
    """Replace every DropPath of the model that drops anything by a PositionalDropPath, in place.

    State dicts stay as they are. All samples are kept until the first `draw_drop_paths`.
    """
    found = [
        (parent, name, child.drop_prob)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is DropPath and child.drop_prob
    ]
    scales = torch.ones(len(found), micro_batch_size, device=next(model.parameters()).device)
    for row, (parent, name, drop_prob) in enumerate(found):
        setattr(parent, name, PositionalDropPath(drop_prob, scales, row).train(parent.training))


def draw_drop_paths(model: nn.Module, seed: int, first: int) -> None:
    """Draw the samples that a converted model keeps in the micro-batch from position `first` on.

    Copies once to the device, without synchronising with it.
    """
    modules = [module for module in model.modules() if isinstance(module, PositionalDropPath)]
    if not modules:
        return
    scales = modules[0].scales
    rates = np.array([module.drop_prob for module in modules])
    own_seed = int(np.random.SeedSequence((seed, 2)).generate_state(1)[0])  # `seed` draws crops, (seed, 1) erasing
    draws = draws_at(own_seed, first, scales.shape[1], -(-len(modules) // 4) * 4)[:, : len(modules)]
    kept = (draws >= rates) / np.where(rates < 1, 1 - rates, 1)
    values = torch.from_numpy(np.ascontiguousarray(kept.T, dtype=np.float32))
    # torch keeps pinned memory from being reused until the copy has ended
    scales.copy_(values.pin_memory() if scales.is_cuda else values, non_blocking=True)

"""Trains a few steps with plain PyTorch and with every ZeRO stage; rank 0 prints losses and gradient norms as JSON.

torchrun --nproc-per-node 2 zero_losses.py CONFIG [key=value …]
"""

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_weight_decay
from torch import nn

from dataio.augment.mixing import Augment
from dataio.loader import TrainLoader
from launch.config import load_config
from launch.distributed import placement, start, stop
from launch.engine import build_model, seed_step, set_lr, start_engine
from launch.plan import make_plan
from launch.schedule import lr_at

STEPS = 5


class PlainEngine:
    """What DeepSpeed does, in the plainest way: average over ranks at the boundary, clip, step."""

    def __init__(self, config, model: nn.Module) -> None:
        self.module, self._accumulation, self._clip = model, config.optimizer.accumulation, config.optimizer.clip
        self.optimizer = torch.optim.AdamW(
            param_groups_weight_decay(model, config.optimizer.weight_decay),
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
        )
        self._micro_steps, self._norm = 0, None

    def __call__(self, images):
        return self.module(images)

    def backward(self, loss):
        (loss / self._accumulation).backward()

    def step(self):
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            return
        for parameter in self.module.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        self._norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return self._norm


def trace(config, plan, engine, device) -> dict[str, list[float]]:
    """Mean loss over ranks and micro-steps of each step, and the gradient norm before clipping."""
    loader = TrainLoader(plan.train, plan.images, plan.batches, device)
    augment = Augment(plan.mixing, plan.classes, config.seed, plan.batches.batch, device)
    loss_of = SoftTargetCrossEntropy()
    losses, norms = [], []
    for step in range(STEPS):
        seed_step(config.seed, step, plan.batches.rank)
        set_lr(engine, lr_at(step, plan.schedule))
        total = torch.zeros(())
        for _ in range(config.optimizer.accumulation):
            images, targets = augment(next(loader))
            loss = loss_of(engine(images).float(), targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / config.optimizer.accumulation
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    return {"losses": losses, "norms": norms}


def main() -> None:
    place = placement(os.environ)
    device = start(place, "cpu", timedelta(hours=1))
    traces = {}
    for stage in ("plain", "0", "1", "2", "3"):
        overrides = [] if stage == "plain" else [f"engine.zero_stage={stage}"]
        config = load_config(sys.argv[1], sys.argv[2:] + overrides)
        plan = make_plan(config, place.rank, place.ranks)
        model = build_model(config, plan, device)
        engine = PlainEngine(config, model) if stage == "plain" else start_engine(config, plan, model)
        traces[stage] = trace(config, plan, engine, device)
    if place.rank == 0:
        print(json.dumps(traces))
    stop()


if __name__ == "__main__":
    main()

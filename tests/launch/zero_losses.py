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

from dataio.augment.batch_augment import BatchAugment
from dataio.loader import TrainLoader
from launch.batchnorm import convert_batchnorm, sync_batchnorm_buffers
from launch.config import load_config
from launch.distributed import destroy_process_group, init_distributed, read_rank_info
from launch.drop_path import convert_drop_path, draw_drop_paths
from launch.engine import build_model, set_lr, start_engine
from launch.plan import make_plan
from launch.schedule import lr_at

STEPS = 5


class PlainEngine:
    """The same as DeepSpeed's engine in plain PyTorch: average over ranks in the last micro-step, clip, step."""

    def __init__(self, config, plan, model: nn.Module) -> None:
        self.module, self._accumulation, self._clip = (
            model,
            config.optimizer.gradient_accumulation_steps,
            config.optimizer.max_grad_norm,
        )
        self.optimizer = torch.optim.AdamW(
            param_groups_weight_decay(model, config.optimizer.weight_decay),
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
        )
        self._micro_steps, self._norm = 0, None
        convert_batchnorm(model, plan.norm_group)
        convert_drop_path(model, plan.loader_options.micro_batch_size)

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
    """Losses of each step, over ranks and micro-steps; gradient norms before clipping; BatchNorm's last variances."""
    loader = TrainLoader(plan.train, config.data, plan.loader_options, device)
    augment = BatchAugment(
        plan.batch_augment, plan.num_classes, config.seed, plan.loader_options.micro_batch_size, device
    )
    loss_fn = SoftTargetCrossEntropy()
    losses, norms = [], []
    for step in range(STEPS):
        set_lr(engine, lr_at(step, plan.schedule))
        total = torch.zeros(())
        for _ in range(config.optimizer.gradient_accumulation_steps):
            batch = next(loader)
            draw_drop_paths(engine.module, config.seed, batch.position)
            images, targets = augment(batch)
            loss = loss_fn(engine(images).float(), targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / config.optimizer.gradient_accumulation_steps
        sync_batchnorm_buffers(engine.module, torch.zeros(1))
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        norms.append(float(engine.get_global_grad_norm()))
    return {"losses": losses, "norms": norms, "running_vars": engine.module.norm.running_var.tolist()}


def main() -> None:
    rank_info = read_rank_info(os.environ)
    device = init_distributed(rank_info, "cpu", timedelta(hours=1))
    traces = {}
    for stage in ("plain", "0", "1", "2", "3"):
        overrides = [] if stage == "plain" else [f"engine.zero_stage={stage}"]
        config = load_config(sys.argv[1], sys.argv[2:] + overrides)
        plan = make_plan(config, rank_info.rank, rank_info.world_size)
        model = build_model(config, plan, device)
        engine = PlainEngine(config, plan, model) if stage == "plain" else start_engine(config, plan, model)
        traces[stage] = trace(config, plan, engine, device)
    if rank_info.rank == 0:
        print(json.dumps(traces))
    destroy_process_group()


if __name__ == "__main__":
    main()

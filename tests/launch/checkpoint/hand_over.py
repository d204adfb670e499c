"""Loads a checkpoint if there is one, makes some steps, and saves: hand_over.py STEPS LOADED|- SAVED [key=value …].

Images are drawn from the step alone, the same on any number of ranks, of which each takes its share.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch.batchnorm import sync_batchnorm_buffers
from launch.checkpoint import layout
from launch.checkpoint.layout import RunState
from launch.checkpoint.tensors import load
from launch.checkpoint.writer import CheckpointWriter, Retention
from launch.config import load_config
from launch.distributed import destroy_process_group, init_distributed, read_rank_info
from launch.ema import ModelEma
from launch.engine import build_model, set_lr, start_engine
from launch.plan import make_plan

steps, loaded, saved = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
rank_info = read_rank_info(os.environ)
device = init_distributed(rank_info, "cpu", timedelta(minutes=10))
config = load_config(sys.argv[4], sys.argv[5:])
plan = make_plan(config, rank_info.rank, rank_info.world_size)
model = build_model(config, plan, device)
ema = ModelEma(model)
engine = start_engine(config, plan, model)
first = 0
if loaded != "-":
    load(Path(loaded), engine, ema)
    first = layout.read_state(Path(loaded)).step
set_lr(engine, 1e-4)
batch = config.optimizer.global_batch_size
micro_steps, micro_batch = config.optimizer.gradient_accumulation_steps, plan.loader_options.micro_batch_size
for step in range(first, first + steps):
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    for micro_step in range(micro_steps):
        part = (micro_step * rank_info.world_size + rank_info.rank) * micro_batch
        engine.backward(engine(images[part : part + micro_batch]).square().mean())
        engine.step()
    sync_batchnorm_buffers(engine.module, torch.zeros(1))
    ema.update(engine, 0.5)
loader = {"seed": 0, "samples_seen": batch * (first + steps), "global_batch": batch}
loader |= {"manifest_hash": "", "order": "full"}
stage = config.engine.zero_stage
state = RunState(first + steps, config.model.name, 10, dist.get_world_size(), stage, loader, 0.0, plan.norm_group)
writer = CheckpointWriter(saved, engine, ema, state, {}, Retention(9))
writer.save(state)
writer.wait()
writer.close()
destroy_process_group()

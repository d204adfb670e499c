"""Fixture: an engine of the small run, with what a checkpoint of it needs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from launch.checkpoint.layout import RunState
from launch.checkpoint.writer import CheckpointWriter, Retention
from launch.ema import ModelEma
from launch.engine import Engine, build_model, start_engine
from launch.plan import make_plan


class Started(NamedTuple):
    """An engine, its EMA, and the state of a run before its first step."""

    engine: Engine
    ema: ModelEma
    state: RunState

    def writer(self, folder: Path, *more, keep: int = 3) -> CheckpointWriter:
        return CheckpointWriter(folder, *self, {"model": "b0"}, Retention(keep), *more)

    def state_at(self, step: int) -> RunState:
        """The state after this many steps."""
        loader = self.state.loader | {"samples_seen": step * self.state.loader["global_batch"]}
        return replace(self.state, step=step, loader=loader)

    def step(self) -> None:
        """Make one optimizer step on random images."""
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            self.engine.backward(self.engine(images).square().mean())
            self.engine.step()


@pytest.fixture
def begin(alone, configure) -> Callable[..., Started]:
    """Returns a function: overrides → a started engine on one rank."""

    def start(*overrides: str) -> Started:
        config = configure("optimizer.gradient_accumulation_steps=2", *overrides)
        plan = make_plan(config, 0, 1)
        model = build_model(config, plan, alone)
        ema = ModelEma(model)
        loader = {"seed": 0, "samples_seen": 0, "manifest_hash": "", "global_batch": 16, "order": "full"}
        state = RunState(0, "polaformerpp_b0", 10, 1, config.engine.zero_stage, loader, 0.0, plan.norm_group)
        return Started(start_engine(config, plan, model), ema, state)

    return start

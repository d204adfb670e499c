"""The model on its device, and DeepSpeed around it.

DeepSpeed's configuration is derived from ours by a pure function, so that a test can say what it is.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from pydantic import ValidationError
from timm.optim import param_groups_weight_decay
from torch import nn

from launch.config import Config
from launch.model_metadata import read_model_metadata
from launch.plan import Plan
from polaformer import ops
from polaformer.weights import load_weights


def build_model(config: Config, plan: Plan, device: torch.device) -> nn.Module:
    """The configured model on its device, the same on every rank, with its starting weights.

    Raises RuntimeError if compiled kernels were required and are missing, or the weights do not fit; ValueError if
    those are of other classes, or of the same in another order.
    """
    if config.model.kernels == "required" and not ops.has_compiled_kernels(device.type):
        raise RuntimeError(
            f"model.kernels=required, but there are {ops.kernels_unavailable_reason(device.type)},"
            " or set model.kernels=auto for the reference in PyTorch"
        )
    torch.manual_seed(config.seed)
    model = timm.create_model(
        config.model.name, num_classes=plan.num_classes, drop_path_rate=config.model.drop_path_rate
    )
    if config.model.weights is not None:
        if not config.model.new_head:
            _require_same_classes(config.model.weights, plan)
        load_weights(model, config.model.weights, config.model.new_head)
    model.set_grad_checkpointing(config.model.grad_checkpointing)
    return model.to(device)


def _require_same_classes(weights: Path, plan: Plan) -> None:
    metadata = read_model_metadata(weights)
    for label, names in enumerate(zip(metadata.classes, plan.class_names, strict=False) if metadata else ()):
        if names[0] != names[1]:
            raise ValueError(
                f'class {label} is "{names[0]}" in {weights} and "{names[1]}" in the training data; pack that anew with'
                " dataio.pack --classes FILE in the weights' order, or set model.new_head=true for a fresh classifier"
            )


def deepspeed_config(config: Config, plan: Plan) -> dict[str, Any]:
    """DeepSpeed's configuration: every default that has changed between versions is stated."""
    engine, optimizer = config.engine, config.optimizer
    derived = {
        "train_batch_size": optimizer.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.loader_options.micro_batch_size,
        "gradient_accumulation_steps": optimizer.gradient_accumulation_steps,
        "gradient_clipping": optimizer.max_grad_norm or 0.0,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": engine.bucket_numel,
            "allgather_bucket_size": engine.bucket_numel,
            "overlap_comm": False,  # has a history of silent corruption
            "contiguous_gradients": True,
            # true would all-reduce where a reduce-scatter's worth of traffic does: 3 instead of 2 parameters' bytes
            "use_multi_rank_bucket_allreduce": False,
            "stage3_prefetch_bucket_size": engine.bucket_numel,
        },
        # Autocast rather than bf16.enabled, which would turn the parameters but not BatchNorm's buffers to bf16. With
        # no module named as safe for low precision, gradients are reduced in float32.
        "torch_autocast": {
            "enabled": engine.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # true waits for the device in every micro-step
    }
    return _merge(derived, config.deepspeed)


def check_engine(config: Config, plan: Plan) -> None:
    """Raises ValueError if DeepSpeed does not accept its configuration. Nothing is allocated, on no rank."""
    from deepspeed.runtime.config import DeepSpeedConfig  # see start_engine

    for section, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        enabled = _merge({section: {"enabled": False}}, config.deepspeed)[section]["enabled"]
        if enabled and importlib.util.find_spec(package) is None:
            raise ValueError(f"deepspeed.{section} needs the package {package}; install it, or leave the section out")
    try:
        DeepSpeedConfig(deepspeed_config(config, plan))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"in the deepspeed section, {where} is {first['input']!r}: {first['msg']}") from error
    except Exception as error:  # of any kind: DeepSpeed takes the values as they come
        raise ValueError(f"DeepSpeed does not accept the deepspeed section ({error}); correct it") from error


def start_engine(config: Config, plan: Plan, model: nn.Module):
    """A DeepSpeed engine around the model, which every rank gets from rank 0, with AdamW."""
    import deepspeed  # settles on an accelerator when imported, which launch.distributed chooses

    groups = param_groups_weight_decay(model, config.optimizer.weight_decay)
    optimizer = torch.optim.AdamW(
        groups, lr=plan.schedule.warmup_lr, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, plan))
    if config.engine.compile:
        engine.compile()
    return engine


def set_lr(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


@contextlib.contextmanager
def preserved_hyperparameters(engine) -> Iterator[None]:
    """What the configuration says of clipping, decay and Adam stays, whatever is loaded into the optimizer inside."""
    optimizer = engine.optimizer
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    clip = getattr(optimizer, "clip_grad", None)  # ZeRO's; without ZeRO the engine clips, and nothing is loaded
    yield
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    if clip is not None:
        optimizer.clip_grad = clip


def gathered_parameters(engine) -> contextlib.AbstractContextManager:
    """Inside, `engine.module` holds whole parameters, to be read only. All ranks enter; ZeRO-3 gathers for it."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()))


def unwrapped_model(engine, like: nn.Module) -> nn.Module:
    """The engine's model with whole parameters, to be evaluated only. All ranks call it.

    like: a model of the same kind, for ZeRO-3, under which the engine's own cannot run on one rank alone.
    """
    if engine.zero_optimization_stage() < 3:
        return engine.module
    model = copy.deepcopy(like)
    with gathered_parameters(engine):
        model.load_state_dict(engine.module.state_dict())
    return model


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes what a step draws (stochastic depth, dropout) depend on nothing but these, as after a resume."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


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

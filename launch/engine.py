"""The model on its device and the DeepSpeed engine around it.

A pure function derives DeepSpeed's configuration from ours.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import timm
import torch
import torch.distributed as dist
from pydantic import ValidationError
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from launch.batchnorm import convert_batchnorm
from launch.config import Config
from launch.drop_path import convert_drop_path
from launch.model_metadata import read_model_metadata
from launch.plan import Plan
from polaformer import ops
from polaformer.weights import load_weights


class Engine(Protocol):
    """The part of DeepSpeed's engine that a run uses."""

    module: nn.Module
    optimizer: torch.optim.Optimizer  # with ZeRO, DeepSpeed's own, which has param_groups as well

    def __call__(self, images: Tensor) -> Tensor:
        """Return the model's logits."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-step's loss."""

    def step(self) -> None:
        """End a micro-step; the last one of a step updates the weights."""

    def was_step_applied(self) -> bool:
        """Return whether the last step updated the weights: not if its gradient norm was not finite."""

    def get_global_grad_norm(self) -> Tensor | float:
        """Return the gradient norm of the last step over all ranks, before clipping."""

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage."""

    def compile(self) -> None:
        """Compile the model with torch.compile."""


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips the gradient, and skips a step in which its norm is not finite, as ZeRO's optimizers do.

    For ZeRO stage 0, where DeepSpeed would not skip the step; it reads the two attributes.
    max_grad_norm: largest norm over all parameters; None for no clipping.
    """

    overflow = False  # whether the last step was skipped
    _global_grad_norm: Tensor  # of the last step, before clipping

    def __init__(self, groups: list[dict[str, Any]], max_grad_norm: float | None, **options: Any) -> None:
        super().__init__(groups, **options)
        self._max_grad_norm = max_grad_norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip and update, or skip. Waits for the device, as ZeRO's optimizers do."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients) / dist.get_world_size()
        dist.all_reduce(norm)  # so that all ranks decide alike, as in DeepSpeed's own clipping
        self._global_grad_norm = norm
        self.overflow = not self._global_grad_norm.isfinite()
        if self.overflow:
            return
        if self._max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, self._global_grad_norm)
        super().step()


def build_model(config: Config, plan: Plan, device: torch.device) -> nn.Module:
    """Return the configured model on its device with its initial weights, the same on every rank.

    Raises RuntimeError if compiled kernels are required and missing, or the weights do not fit; ValueError if the
    weights were trained on other classes, or on the same in another order.
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
    model.set_grad_checkpointing(config.model.grad_checkpointing)  # type: ignore[operator]
    return model.to(device)


def _require_same_classes(weights: Path, plan: Plan) -> None:
    """Raise ValueError if a .safetensors file of ours names other classes than the training data."""
    metadata = read_model_metadata(weights)
    for label, names in enumerate(zip(metadata.classes, plan.class_names, strict=False) if metadata else ()):
        if names[0] != names[1]:
            raise ValueError(
                f'class {label} is "{names[0]}" in {weights} and "{names[1]}" in the training data; pack it again with'
                " dataio.pack --classes FILE in the weights' order, or set model.new_head=true for a fresh classifier"
            )


def deepspeed_config(config: Config, plan: Plan) -> dict[str, Any]:
    """Return DeepSpeed's configuration. It states every default that has changed between versions of DeepSpeed."""
    engine, optimizer = config.engine, config.optimizer
    derived = {
        "train_batch_size": optimizer.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.loader_options.micro_batch_size,
        "gradient_accumulation_steps": optimizer.gradient_accumulation_steps,
        # at stage 0 ClippedAdamW clips
        "gradient_clipping": optimizer.max_grad_norm or 0.0 if engine.zero_stage > 0 else 0.0,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": engine.bucket_numel,
            "allgather_bucket_size": engine.bucket_numel,
            "overlap_comm": False,  # has a history of silent corruption
            "contiguous_gradients": True,
            # true replaces reduce-scatter by all-reduce: traffic of 3 instead of 2 times the parameters' bytes
            "use_multi_rank_bucket_allreduce": False,
            "stage3_prefetch_bucket_size": engine.bucket_numel,
        },
        # Autocast instead of bf16.enabled, which would convert the parameters but not BatchNorm's buffers to bf16.
        # With no module listed as safe for low precision, gradients are reduced in float32.
        "torch_autocast": {
            "enabled": engine.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # true synchronises with the device in every micro-step
    }
    return _merge(derived, config.deepspeed)


def check_engine(config: Config, plan: Plan) -> None:
    """Raise ValueError if DeepSpeed does not accept its configuration. Allocates nothing."""
    from deepspeed.runtime.config import DeepSpeedConfig  # imported late, as in start_engine

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
    except Exception as error:  # any type: DeepSpeed uses most values unchecked
        raise ValueError(f"DeepSpeed does not accept the deepspeed section ({error}); correct it") from error


def start_engine(config: Config, plan: Plan, model: nn.Module) -> Engine:
    """Return a DeepSpeed engine with AdamW around the model. Every rank starts from rank 0's weights.

    BatchNorm and stochastic depth of the model are replaced in place by those of launch/batchnorm.py and drop_path.py.
    """
    import deepspeed  # selects its accelerator when imported, after launch.distributed has set DS_ACCELERATOR

    convert_batchnorm(model, plan.norm_group)
    convert_drop_path(model, plan.loader_options.micro_batch_size)
    groups = param_groups_weight_decay(model, config.optimizer.weight_decay)
    adamw = torch.optim.AdamW
    if config.engine.zero_stage == 0:
        adamw = partial(ClippedAdamW, max_grad_norm=config.optimizer.max_grad_norm)  # type: ignore[assignment]
    optimizer = adamw(
        groups, lr=plan.schedule.warmup_lr, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, plan))
    if config.engine.compile:
        engine.compile()
    return engine


def set_lr(engine: Engine, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def gathered_parameters(engine: Engine) -> contextlib.AbstractContextManager:
    """Return a context in which `engine.module` holds unsharded parameters, read-only. All ranks enter it."""
    if engine.zero_optimization_stage() < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(engine.module.parameters()))


def unwrapped_model(engine: Engine, like: nn.Module) -> nn.Module:
    """Return the engine's model with unsharded parameters, for evaluation only. All ranks call it.

    like: a model of the same architecture, copied for ZeRO-3, whose own model needs all ranks in every forward.
    """
    if engine.zero_optimization_stage() < 3:
        return engine.module
    model = copy.deepcopy(like)
    with gathered_parameters(engine):
        model.load_state_dict(engine.module.state_dict())
    return model


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, nested mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged

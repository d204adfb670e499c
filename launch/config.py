"""The configuration of a run: one validated schema, filled from a YAML file and then from `key=value` overrides.

Rejects everything that is wrong whatever the data and devices are. The comment beside a field is its reference. Fields
of images, RandAugment and batch augmentation are declared in dataio/augment (params.py, policies.py, batch_augment.py),
from which DataSection inherits them. Names and paths are taken as written, except that a leading `~` is expanded;
typed_yaml.py reads all other values.
"""

import copy
import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from dataio.augment.batch_augment import BatchAugmentOptions
from dataio.augment.params import ImageOptions
from dataio.options import Count, Fraction, NonNegative, Options, Positive, describe_fault
from launch.typed_yaml import field_type, read_value, read_yaml
from launch.watchdog import seconds_until_end
from polaformer import PRESETS
from polaformer.model import TOTAL_STRIDE


def _expand(path: str | Path) -> str | Path:
    """Return the path or URL with a leading `~` expanded."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("utf8", "not UTF-8; rename the folder") from error
    return type(path)(os.path.expanduser(path))


BelowOne = Annotated[float, Field(ge=0, lt=1)]
UserPath = Annotated[Path, AfterValidator(_expand)]
PathOrUrl = Annotated[str, Field(min_length=1), AfterValidator(_expand)]
LR_REFERENCE_BATCH_SIZE = 512  # the official recipe states its learning rates for this global batch

#: Keys of earlier versions → their names now. An old key in a file or override is an error; saved ones are translated.
RENAMED_KEYS = {
    "data.order": "data.shuffle",
    "data.window_shards": "data.shuffle_window_shards",
    "data.max_broken": "data.max_bad_samples",
    "data.flip_probability": "data.hflip",
    "data.recipe": "data.augmentation",
    "data.rand_augment.spread": "data.rand_augment.magnitude_std",
    "data.rand_augment.layers": "data.rand_augment.num_layers",
    "data.rand_augment.probability": "data.rand_augment.prob",
    "data.eval_resize": "data.crop_mode",
    "data.eval_crop_fraction": "data.crop_pct",
    "data.mix_group": "data.mixup_group_size",
    "data.mix_probability": "data.mixup_prob",
    "data.switch_probability": "data.mixup_switch_prob",
    "data.erase_probability": "data.reprob",
    "optimizer.global_batch": "optimizer.global_batch_size",
    "optimizer.accumulation": "optimizer.gradient_accumulation_steps",
    "optimizer.clip": "optimizer.max_grad_norm",
    "engine.bucket_elements": "engine.bucket_numel",
}
#: Values of renamed keys that were renamed as well: old key → old value → new value.
_RENAMED_VALUES = {"data.eval_resize": {"short": "center"}}

#: DeepSpeed keys that our schema derives → the key or section that sets them.
_DERIVED = {
    "train_batch_size": "optimizer.global_batch_size",
    "train_micro_batch_size_per_gpu": "optimizer.global_batch_size",
    "gradient_accumulation_steps": "optimizer.gradient_accumulation_steps",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "the optimizer section",
    "scheduler": "the optimizer section",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast.enabled": "engine.precision",
    "torch_autocast.dtype": "engine.precision",
    "zero_optimization.stage": "engine.zero_stage",
}
#: DeepSpeed keys that our loop, optimizer or checkpoints rule out, and why. DeepSpeed itself would fail late or never.
_EXCLUDED = {
    "managed_gradient_accumulation": "micro-steps are counted by DeepSpeed here",
    "checkpoint.load_universal": "checkpoints are not universal ones",
    "zero_optimization.elastic_checkpoint": "checkpoints fit any number of ranks as they are",
    "zero_optimization.round_robin_gradients": "checkpoints need the parameters of a group in their own order",
    "zero_optimization.compute_grad_norm": "steps are skipped by the gradient norm",
    "zero_optimization.cpu_offload": "it is deepspeed.zero_optimization.offload_optimizer now",
    "zero_optimization.zenflow": "it needs DeepSpeed's own optimizer, and this is PyTorch's AdamW",
}
#: All other DeepSpeed keys that have an effect here. DeepSpeed silently ignores keys that it does not know.
_USABLE = (
    *("zero_optimization", "torch_autocast", "zero_force_ds_cpu_optimizer", "communication_data_type", "data_types"),
    *("prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather", "checkpoint"),
    *("aio", "activation_checkpointing", "compile", "flops_profiler", "wall_clock_breakdown", "memory_breakdown"),
    *("comms_logger", "timers", "tensorboard", "csv_monitor", "wandb", "comet", "dump_state"),
    *("disable_python_gc", "zero_allow_untested_optimizer"),
)


class ModelSection(Options):
    """The model, its classes and the weights it starts from."""

    name: str = "polaformerpp_b4"
    num_classes: Count | None = None  # null: as many as the training shards name
    drop_path_rate: Fraction | None = None  # null: the preset's
    # samples over which BatchNorm takes its statistics; null: 128 where the micro-batch is a multiple of it, else the
    # micro-batch
    norm_group: Count | None = None
    weights: UserPath | None = None  # initial weights: an official .pth or a .safetensors of ours
    new_head: bool = False  # keep a freshly initialized classifier, for weights of other classes
    grad_checkpointing: bool = False  # recompute activations in backward: less memory, about 1.3× the time
    kernels: Literal["auto", "required"] = "auto"  # required: end the run if there are no compiled kernels

    @model_validator(mode="after")
    def check(self) -> "ModelSection":
        """Raise ValueError for an unknown model, or new_head without weights."""
        if self.name not in PRESETS:
            raise ValueError(f"model.name {self.name} is unknown; use one of {', '.join(PRESETS)}")
        if self.new_head and self.weights is None:
            raise ValueError("model.new_head is for starting from weights; set model.weights or leave it out")
        return self


class DataSource(Options):
    """Which images, in which order."""

    train: PathOrUrl  # folder that `python -m dataio.pack` wrote, or the URL of a copy: s3://, gs://, https://, file://
    val: PathOrUrl  # the same, for evaluation
    shuffle: Literal["auto", "full", "windowed"] = "auto"  # training order; auto: windowed for a URL, else full
    shuffle_window_shards: Count = 16  # windowed: samples are mixed over so many shards at a time
    cache: UserPath | None = None  # folder for remote shards; null: one of the user's own, see dataio/README.md
    cache_gib: Positive = 64  # size that it may reach; all processes of a machine share it
    max_bad_samples: Annotated[int, Field(ge=0)] = 10  # substituted samples an epoch may have; one more ends the run


class DataSection(BatchAugmentOptions, ImageOptions, DataSource):
    """The images of a run; how they are augmented is declared where it is done, in dataio/augment."""

    image_size: Annotated[int, Field(ge=TOTAL_STRIDE, multiple_of=TOTAL_STRIDE)] = 224  # pixels, height and width


class OptimizerSection(Options):
    """AdamW, the batch, the learning-rate schedule, gradient clipping and the EMA."""

    epochs: Positive = 300
    global_batch_size: Count = 1024  # samples in one step, over all ranks and micro-steps
    gradient_accumulation_steps: Count = 1  # micro-steps in a step
    lr: Positive = 5e-4  # peak, for a global batch of 512; the three learning rates scale with the batch
    warmup_lr: NonNegative = 1e-7
    min_lr: NonNegative = 1e-5
    warmup_epochs: NonNegative = 5
    weight_decay: NonNegative = 0.05  # for all parameters but biases and one-dimensional ones
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: Positive = 1e-8
    max_grad_norm: Positive | None = 1.0  # largest gradient norm; null: no clipping
    ema_decay: BelowOne = 0.99982
    ema_warmup: bool = True  # a smaller decay in the first steps: see launch/schedule.py

    @model_validator(mode="after")
    def check(self) -> "OptimizerSection":
        """Raise ValueError if warm-up takes all epochs, or the smallest learning rate is above the largest."""
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs {self.warmup_epochs:g} leaves nothing of {self.epochs:g} epochs;"
                f" use fewer, for example {self.epochs / 20:g}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"optimizer.min_lr {self.min_lr:g} is above optimizer.lr {self.lr:g}; lower it")
        return self


class EngineSection(Options):
    """How DeepSpeed shards and computes."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["bf16", "fp32"] = "bf16"  # bf16: torch autocast; parameters stay float32
    bucket_numel: Count = 20_000_000  # elements that are reduced, or gathered, at a time
    compile: bool = False  # torch.compile
    timeout_minutes: Positive = 10  # limit for collectives: a rank that hangs for longer ends the run


class CheckpointSection(Options):
    """How often checkpoints are written, how many are kept, and when a run stops by itself with one."""

    every_epochs: Positive = 1  # may be a fraction
    every_minutes: Positive | None = None  # also so long after the last one began; null: by epochs alone
    keep: Count = 3  # how many of the newest checkpoints stay on disk, beside the best one
    keep_every_epochs: Positive | None = None  # also stay: those at multiples of so many epochs; null: none
    # The run stops with a checkpoint and exit code 75 so long after its process started: a little less than the limit
    # of a time-limited job. null: no limit.
    stop_after_minutes: Positive | None = None


class GuardSection(Options):
    """What a run does about a loss or gradient that is not finite, spikes of the loss, and ranks that drift apart."""

    max_bad_steps: Count = 10  # so many in a row: back to the last checkpoint; the second time ends the run
    # A loss is a spike if it exceeds the median of the last `spike_window` good steps by more than so many robust
    # standard deviations (1.4826 × the median absolute deviation), for example 20, once there are so many; null: never
    spike_sigmas: Positive | None = None
    spike_window: Annotated[int, Field(ge=8)] = 100
    # So often, and at checkpoints of `checkpoint.every_epochs`, ranks compare their copies of the state; null: never
    compare_every_steps: Count | None = 100
    # The run ends with exit code 75 if no rank has made progress for so long, from the first step of a start on; null:
    # 3/4 of `engine.timeout_minutes`
    hang_seconds: Positive | None = None


class LogSection(Options):
    """How often metrics are written and the model is evaluated."""

    every_steps: Count = 50
    eval_every_epochs: Positive = 1


class Config(Options):
    """The whole configuration of a run."""

    output: UserPath  # the run's folder: checkpoints, metrics, TensorBoard; the same command resumes from it
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    model: ModelSection = ModelSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    log: LogSection = LogSection()
    deepspeed: dict[str, Any] = {}  # merged last into DeepSpeed's configuration, for experts

    @model_validator(mode="after")
    def check(self) -> "Config":
        """Raise ValueError for DeepSpeed keys that a run cannot use, or a hang that is longer than a timeout."""
        _check_deepspeed(self.deepspeed)
        hang, timeout = self.guard.hang_seconds, 60 * self.engine.timeout_minutes
        if hang is not None and seconds_until_end(hang) > timeout:
            raise ValueError(
                f"guard.hang_seconds {hang:g} is too near to the {timeout:g} s of engine.timeout_minutes, which would"
                f" end the run before the hang is explained; use at most {0.75 * timeout:g}, or raise the timeout"
            )
        return self

    @property
    def hang_seconds(self) -> float:
        """The time without progress after which a run hangs."""
        return self.guard.hang_seconds or 0.75 * 60 * self.engine.timeout_minutes


def _check_deepspeed(section: dict[str, Any]) -> None:
    """Raise ValueError for a key of the raw section that a run cannot use; DeepSpeed checks the values."""
    given = {
        *section,
        *(f"{key}.{inner}" for key in section if isinstance(section[key], dict) for inner in section[key]),
    }
    for key, home in _DERIVED.items():
        if key in given:
            raise ValueError(f"deepspeed.{key} is derived; set {home} instead")
    for key, reason in _EXCLUDED.items():
        if key in given:
            raise ValueError(f"deepspeed.{key} cannot be used: {reason}; leave it out")
    for key in section:
        if key not in _USABLE:
            near = difflib.get_close_matches(key, _USABLE, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(_USABLE)}"
            raise ValueError(f"deepspeed.{key} is nothing that a run here can use; {remedy}")
    for key in ("zero_optimization", "torch_autocast", "timers"):
        if not isinstance(section.get(key, {}), dict):
            raise ValueError(f"deepspeed.{key} is {section[key]!r}; it is a section, set keys in it")
    for part in ("offload_optimizer", "offload_param"):
        offload = section.get("zero_optimization", {}).get(part)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            raise ValueError(
                f"deepspeed.zero_optimization.{part}.device=nvme cannot be used: checkpoints are read from memory; use"
                " cpu or leave it out"
            )
    if "zero_optimization.offload_optimizer" in given and section.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            "deepspeed.zero_optimization.offload_optimizer is for DeepSpeed's own optimizer, and this is PyTorch's"
            " AdamW; leave it out, or set deepspeed.zero_force_ds_cpu_optimizer=false as well, which is slow"
        )


def load_config(path: str | Path, overrides: list[str]) -> Config:
    """Return the configuration in a YAML file, with `section.key=value` overrides applied.

    Names and paths in overrides are taken as typed, all other values are read as YAML.
    Raises FileNotFoundError, or ValueError with one line per fault.
    """
    path = Path(path)
    if not path.is_file():
        near = ", ".join(sorted(str(other) for other in path.parent.glob("*.yaml"))) or "none in that folder"
        raise FileNotFoundError(f"no configuration at {path}; there are: {near}")
    tree = read_yaml(path.read_bytes(), Config, str(path))
    if not isinstance(tree, dict | None):
        raise ValueError(f"{path} holds no sections but {tree!r}; write for example output: runs/b4")
    tree = tree or {}
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Return the configuration in nested dictionaries. Raises ValueError with one line per fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ValueError("\n".join(map(_explain, error.errors()))) from error


def dump_config(config: Config) -> str:
    """Return the whole configuration as YAML, defaults included; `parse_config` reads it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def translate_renamed_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a dumped configuration in which RENAMED_KEYS have today's names and values."""
    translated = copy.deepcopy(tree)
    for old, new in RENAMED_KEYS.items():
        *sections, old_name = old.split(".")
        section: Any = translated
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict) and old_name in section:
            value = section.pop(old_name)
            new_values = _RENAMED_VALUES.get(old, {})
            section[new.rpartition(".")[2]] = new_values.get(value, value) if isinstance(value, str) else value
    return translated


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the key of a `section.key=value` override in nested dictionaries. Raises ValueError if it is malformed."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} is not key=value; write for example optimizer.lr=1e-3")
    if text.startswith("="):
        raise ValueError(f"override {override!r} has two =; write {key}={text.lstrip('=')}")
    *sections, last = key.split(".")
    schema: Any = Config
    for section in sections:
        tree, schema = tree.setdefault(section, {}), field_type(schema, section)
        if not isinstance(tree, dict):
            raise ValueError(f"override {override!r}: {section} is a value, not a section")
    tree[last] = read_value(text, field_type(schema, last), f"override {override!r}")


def _explain(fault: ErrorDetails) -> str:
    """Describe a fault in one line: its key, what is wrong, and the key that was probably meant."""
    where = ".".join(str(part) for part in fault["loc"])
    if where in RENAMED_KEYS:
        values = "".join(f" (value {old} → {new})" for old, new in _RENAMED_VALUES.get(where, {}).items())
        return f"{where} is now {RENAMED_KEYS[where]}{values}"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
        return f"unknown key {where}; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
    empty = fault["input"] is None and fault["type"] in ("path_type", "string_type")
    if empty or (fault["type"] == "missing" and isinstance(fault["loc"][-1], str)):  # a key, not an item of a list
        return f"{where} is not set; set it in the file or on the command line as {where}=…"
    message = describe_fault(fault)
    return (
        f"data.{message}" if where == "data" and fault["type"] == "value_error" else message
    )  # dataio knows no sections


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    section: Any = Config
    for part in location:
        section = field_type(section, part)
    return list(section.model_fields)

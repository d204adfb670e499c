"""DeepSpeed's configuration, the initial model, and every ZeRO stage against plain PyTorch."""

import json
import re
from pathlib import Path

import pytest
import torch
from timm.optim import param_groups_weight_decay

from launch.config import load_config
from launch.engine import build_model, check_engine, deepspeed_config
from launch.model_metadata import make_model_metadata
from launch.plan import make_plan
from polaformer.weights import save_weights

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture
def configured(fashion_shards, tmp_path):
    """Returns a function: overrides and ranks → configuration and plan over the small data set."""

    def build(*overrides: str, ranks: int = 1):
        paths = [f"data.train={fashion_shards / 'train'}", f"data.val={fashion_shards / 'val'}", f"output={tmp_path}"]
        config = load_config(QUICKSTART, [*paths, "optimizer.global_batch_size=32", *overrides])
        return config, make_plan(config, 0, ranks)

    return build


def test_deepspeed_configuration(configured):
    overrides = (
        "optimizer.gradient_accumulation_steps=4",
        "engine.precision=bf16",
        "engine.zero_stage=2",
        "optimizer.max_grad_norm=0.5",
    )
    derived = deepspeed_config(*configured(*overrides, ranks=2))
    assert derived == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "zero_optimization": {
            "stage": 2,
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 20_000_000,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "use_multi_rank_bucket_allreduce": False,
            "stage3_prefetch_bucket_size": 20_000_000,
        },
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
    }


def test_no_clipping_is_zero_in_deepspeed(configured):
    """As it is without ZeRO, where our optimizer clips."""
    assert deepspeed_config(*configured("optimizer.max_grad_norm=null"))["gradient_clipping"] == 0.0
    assert deepspeed_config(*configured("engine.zero_stage=0"))["gradient_clipping"] == 0.0


def test_the_raw_section_is_merged_key_by_key(configured):
    derived = deepspeed_config(
        *configured("deepspeed.zero_optimization.reduce_bucket_size=7", "deepspeed.dump_state=true")
    )
    assert derived["dump_state"] is True
    assert derived["zero_optimization"]["reduce_bucket_size"] == 7
    assert derived["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("zero_optimization.typo=1", "in the deepspeed section, typo is 1: Extra inputs are not permitted"),
        ("zero_optimization.reduce_bucket_size=-3", "in the deepspeed section, reduce_bucket_size is -3: Input should"),
        ("communication_data_type=fp8", "DeepSpeed does not accept the deepspeed section (Invalid communication_data_"),
        ("wandb.enabled=true", "deepspeed.wandb needs the package wandb; install it, or leave the section out"),
    ],
)
def test_settings_that_deepspeed_rejects(alone, configured, override, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        check_engine(*configured(f"deepspeed.{override}"))


def test_settings_that_deepspeed_accepts(alone, configured):
    """Numbers in DeepSpeed's own notation among them."""
    check_engine(*configured())
    check_engine(*configured("deepspeed.zero_optimization.reduce_bucket_size=1e7", "deepspeed.wandb.enabled=false"))


def test_initial_weights_depend_on_the_seed_only(configured):
    first, again, other = (
        build_model(*configured(f"seed={seed}"), torch.device("cpu")).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_weights_of_other_classes_need_a_new_head(configured, tmp_path):
    torch.save(build_model(*configured("model.num_classes=12"), torch.device("cpu")).state_dict(), tmp_path / "x.pth")
    starting = f"model.weights={tmp_path / 'x.pth'}"
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
        build_model(*configured(starting), torch.device("cpu"))
    model = build_model(*configured(starting, "model.new_head=true"), torch.device("cpu"))
    assert model.num_classes == 10


def test_weights_of_reordered_classes_need_a_new_head(configured, tmp_path):
    """As weights trained in torchvision's order of classes are, with data packed in timm's."""
    config, plan = configured()
    state, cpu = build_model(config, plan, torch.device("cpu")).state_dict(), torch.device("cpu")
    exchanged = plan.class_names[1::-1] + plan.class_names[2:]
    for name, classes in (("same", plan.class_names), ("exchanged", exchanged)):
        metadata = make_model_metadata(config.model.name, classes, config.data)
        save_weights(state, tmp_path / f"{name}.safetensors", metadata.safetensors_metadata())
    loaded = build_model(*configured(f"model.weights={tmp_path}/same.safetensors", "seed=5"), cpu)
    assert torch.equal(loaded.head.weight, state["head.weight"])
    starting = f"model.weights={tmp_path}/exchanged.safetensors"
    with pytest.raises(ValueError, match=f'class 0 is "{exchanged[0]}" in .* and "{plan.class_names[0]}" in the train'):
        build_model(*configured(starting), cpu)
    build_model(*configured(starting, "model.new_head=true"), cpu)


def test_weight_decay_excludes_biases_and_norms(configured):
    """It covers matrices, kernels, layer scales and polarity logits; no bias, and no weight of a norm."""
    config, plan = configured("optimizer.weight_decay=0.3")
    model = build_model(config, plan, torch.device("cpu"))
    spared, decayed = param_groups_weight_decay(model, config.optimizer.weight_decay)
    assert (spared["weight_decay"], decayed["weight_decay"]) == (0.0, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(parameter)] for parameter in decayed["params"]}
    spares = {names[id(parameter)] for parameter in spared["params"]}
    block = "stages.0.blocks.1"
    assert {
        f"{block}.gamma_1",
        f"{block}.gamma_2",
        f"{block}.attn.same_logits",
        f"{block}.attn.opposite_logits",
    } < decays
    assert {f"{block}.attn.qkvg.weight", f"{block}.pos.weight", "stem.0.weight", "head.weight"} < decays
    assert {f"{block}.norm1.weight", "stem.1.weight", "norm.weight", "head.bias", f"{block}.pos.bias"} < spares
    assert all(name.endswith(".bias") or ".norm" in name or name.startswith(("norm", "stem")) for name in spares)


@pytest.mark.slow
def test_every_zero_stage_trains_like_plain_pytorch(forked, fashion_shards, tmp_path):
    overrides = [
        *(f"data.train={fashion_shards / 'train'}", f"data.val={fashion_shards / 'val'}", f"output={tmp_path}"),
        *(
            "optimizer.global_batch_size=32",
            "optimizer.gradient_accumulation_steps=2",
            "optimizer.max_grad_norm=0.5",
            "optimizer.lr=0.01",
            "optimizer.eps=1e-2",  # else the signs of gradients near 0, which rounding decides, are whole updates
        ),
        *("model.drop_path_rate=0.2", "model.norm_group=4", "data.mixup=0.8", "data.cutmix=1.0"),
    ]
    script = Path(__file__).with_name("zero_losses.py")
    finished = forked(2, script, QUICKSTART, *overrides)
    assert finished.returncode == 0, finished.stderr
    traces = json.loads(finished.stdout.splitlines()[-1])
    plain = traces.pop("plain")
    assert plain["losses"][-1] != plain["losses"][0]
    assert max(plain["norms"]) > 0.5  # so that clipping is at work
    for stage, trace in traces.items():
        assert trace["losses"] == pytest.approx(plain["losses"], rel=1e-5), stage
        assert trace["running_vars"] == pytest.approx(plain["running_vars"], rel=1e-4), stage
        assert trace["norms"] == pytest.approx(plain["norms"], rel=1e-4), stage

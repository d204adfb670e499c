"""A checkpoint fits any number of ranks and any ZeRO stage, and nothing but the tensors it should have is loaded."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.checkpoint import layout
from launch.checkpoint.tensors import load
from launch.distributed import RunError

HAND_OVER = Path(__file__).with_name("hand_over.py")
BIAS_BEFORE_BATCHNORM = re.compile(r"(stem\.\d+|reduction|^proj)\.bias$")
TENSOR_FILES = (layout.MODEL_NAME, layout.EMA_NAME, *layout.MOMENT_NAMES.values())


@pytest.fixture(scope="module")
def hand_over(forked, small_config, tmp_path_factory):
    """Returns a function: ranks, ZeRO stage, steps, checkpoint or None → the checkpoint after these steps."""
    root = tmp_path_factory.mktemp("handed_over")

    def run(ranks: int, stage: int, steps: int, loaded: Path | None = None) -> Path:
        folder = root / f"{len(list(root.iterdir()))}"
        micro_steps = f"optimizer.gradient_accumulation_steps={1 if ranks > 2 else 2}"  # micro-batches of 24, 32, 48
        options = "optimizer.global_batch_size=96", micro_steps, "model.norm_group=8"
        more = f"engine.zero_stage={stage}", f"output={folder}", "optimizer.eps=1e-3"
        finished = forked(ranks, HAND_OVER, steps, loaded or "-", folder, small_config, *options, *more)
        assert finished.returncode == 0, finished.stderr
        newest, _ = layout.find_newest(folder)
        return newest

    return run


@pytest.fixture(scope="module")
def after_two_steps(hand_over) -> Path:
    """The checkpoint after two steps on two ranks under ZeRO-1."""
    return hand_over(2, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (1, 0), (3, 2), (4, 3)])
def test_a_checkpoint_passes_through_any_ranks_and_stage_unchanged(hand_over, after_two_steps, ranks, stage):
    """Parameters whose sizes are no multiples of the number of ranks among them."""
    again = hand_over(ranks, stage, 0, after_two_steps)
    before, after = (json.loads((path / layout.MANIFEST_NAME).read_text()) for path in (after_two_steps, again))
    assert {name: before[name] for name in TENSOR_FILES} == {name: after[name] for name in TENSOR_FILES}
    state = layout.read_state(again)
    assert (state.world_size, state.zero_stage) == (ranks, stage)


@pytest.mark.slow
def test_the_moments_and_steps_are_saved(after_two_steps):
    for name in layout.MOMENT_NAMES.values():
        tensors = load_file(after_two_steps / name)
        assert tensors.pop("step") == 2
        assert all(tensor.any() for tensor in tensors.values())


@pytest.mark.slow
def test_ranks_and_stages_may_change_while_training(hand_over, after_two_steps):
    """4 → 1 → 3 → 2 ranks, 12 steps in all, against 2 all along: equal up to the order of sums of floats.

    Not compared are the biases before BatchNorm, whose gradients are zero but for rounding. eps keeps AdamW from making
    whole steps of these, which would be seen in the running means.
    """
    last = after_two_steps
    for ranks, stage in ((4, 1), (1, 3), (3, 0), (2, 2)):
        last = hand_over(ranks, stage, 3, last)
    undisturbed = hand_over(2, 1, 12, after_two_steps)
    for name in (layout.MODEL_NAME, layout.EMA_NAME):  # 12 steps move weights by 1e-3
        found, expected = load_file(last / name), load_file(undisturbed / name)
        for key, tensor in expected.items():
            if not BIAS_BEFORE_BATCHNORM.search(key):
                torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=5e-6, msg=lambda m, k=key: f"{k}: {m}")
    for name in layout.MOMENT_NAMES.values():  # some gradients are nothing but rounding, so no tensor by itself
        found, expected = (moment(path / name) for path in (last, undisturbed))
        assert torch.linalg.norm(found - expected) < 1e-3 * torch.linalg.norm(expected), name


def moment(path: Path) -> torch.Tensor:
    """All numbers of a moment's file."""
    return torch.cat([tensor.double().flatten() for key, tensor in sorted(load_file(path).items()) if key != "step"])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_hyperparameters_are_the_configurations_and_not_the_checkpoints(begin, tmp_path, stage):
    """A run that resumes with another clipping and weight decay uses them."""
    staged = f"engine.zero_stage={stage}"
    started = begin(staged, "optimizer.max_grad_norm=1.0", "optimizer.weight_decay=0.05")
    started.step()
    writer = started.writer(tmp_path)
    writer.save(replace(started.state, step=1))
    writer.wait()
    started = begin(staged, "optimizer.max_grad_norm=0.25", "optimizer.weight_decay=0.3")
    load(tmp_path / "step-00000001", started.engine, started.ema)
    started.step()
    assert [group["weight_decay"] for group in started.engine.optimizer.param_groups] == [0.0, 0.3]
    clips = "_max_grad_norm" if started.engine.zero_optimization_stage() == 0 else "clip_grad"
    assert getattr(started.engine.optimizer, clips) == 0.25


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            layout.MODEL_NAME,
            lambda tensors: tensors.pop("head.bias"),
            r"head\.bias is absent there and float32 \[10\] here$",
        ),
        (
            layout.EMA_NAME,
            lambda tensors: tensors.update(x=torch.zeros(2, 3)),
            r"x is float32 \[2, 3\] there and absent here$",
        ),
        (
            layout.MOMENT_NAMES["exp_avg"],
            lambda tensors: tensors.update({"head.bias": torch.zeros(11)}),
            r"head\.bias is float32 \[11\] there and float32",
        ),
        (
            layout.MOMENT_NAMES["exp_avg_sq"],
            lambda tensors: tensors.update({"head.bias": tensors["head.bias"].half(), "x": torch.zeros(1)}),
            r"head\.bias is float16 \[10\] there and float32 \[10\] here, 1 more differ$",
        ),
    ],
)
def test_other_tensors_than_the_models_are_an_error_and_nothing_is_loaded(
    begin, trained_run, tmp_path, name, change, message
):
    newest, _ = layout.find_newest(trained_run / "checkpoints")
    for file in TENSOR_FILES:
        tensors = load_file(newest / file)
        if file == name:
            change(tensors)
        save_file(tensors, tmp_path / file)
    started = begin()
    before = {key: value.clone() for key, value in started.engine.module.state_dict().items()}
    with pytest.raises(RunError, match=f"{name} does not fit this model: {message}"):
        load(tmp_path, started.engine, started.ema)
    assert all(value.equal(before[key]) for key, value in started.engine.module.state_dict().items())
    (tmp_path / name).write_bytes(b"no tensors")
    with pytest.raises(RunError, match=f"{name} cannot be read"):
        load(tmp_path, started.engine, started.ema)

"""BatchNorm over groups of samples against PyTorch's, and its running statistics on one and two real ranks."""

import json

import pytest
import timm
import torch
from torch import nn

from launch.batchnorm import GroupBatchNorm2d, convert_batchnorm, sync_batchnorm_buffers

TWO_RANKS = """
import json, os, sys
from datetime import timedelta
import torch
from torch import nn
from launch.batchnorm import convert_batchnorm, sync_batchnorm_buffers
from launch.distributed import read_rank_info, init_distributed, destroy_process_group

rank_info = read_rank_info(os.environ)
init_distributed(rank_info, "cpu", timedelta(hours=1))
samples = torch.load(sys.argv[1])  # (micro-steps, ranks, B, C, height, width)
model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
convert_batchnorm(model, 4)
for micro_step in samples:
    model(micro_step[rank_info.rank])
riders = sync_batchnorm_buffers(model, torch.tensor([1.0, rank_info.rank]))
with open(f"{sys.argv[2]}/{rank_info.rank}.json", "w") as file:
    buffers = {name: buffer.tolist() for name, buffer in model[0].state_dict().items()}
    json.dump({"riders": riders.tolist(), **buffers}, file)
destroy_process_group()
"""


def images(count: int, seed: int = 0) -> torch.Tensor:
    """`count` channels-last images of 3 channels, whose means and scales differ among images."""
    generator = torch.Generator().manual_seed(seed)
    noise, level = torch.randn(count, 3, 5, 4, generator=generator), torch.randn(count, 3, 1, 1, generator=generator)
    return (noise * (level + 2) + 3 * level).contiguous(memory_format=torch.channels_last)


def norm_like(template: nn.BatchNorm2d, group_size: int) -> GroupBatchNorm2d:
    """A GroupBatchNorm2d with copies of the template's tensors."""
    copied = nn.BatchNorm2d(template.num_features)
    copied.load_state_dict(template.state_dict())
    return GroupBatchNorm2d(copied, group_size)


@pytest.fixture
def norm() -> nn.BatchNorm2d:
    """PyTorch's BatchNorm with weights and biases that are not those of the start."""
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    return norm


def outputs_and_gradients(norm: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x.clone().requires_grad_()
    norm.zero_grad()
    out = norm(x)
    out.sin().sum().backward()
    return out.detach(), x.grad, norm.weight.grad, norm.bias.grad


def expected_statistics(groups: torch.Tensor, momentum: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Running mean and variance after one step with these groups (groups, B, C, height, width), in float64."""
    values = groups.double().movedim(2, 1).flatten(2)
    return momentum * values.mean(2).mean(0), 1 - momentum + momentum * values.var(2, correction=1).mean(0)


def test_one_group_is_bit_identical_to_pytorch(norm):
    ours = outputs_and_gradients(norm_like(norm, 8), images(8))
    for mine, expected in zip(ours, outputs_and_gradients(norm, images(8)), strict=True):
        assert torch.equal(mine, expected)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_two_groups_are_two_batches(norm):
    out, x_grad, *own = outputs_and_gradients(norm_like(norm, 4), images(8))
    first, second = (outputs_and_gradients(norm, half) for half in images(8).split(4))
    assert torch.equal(out, torch.cat([first[0], second[0]]))
    assert torch.equal(x_grad, torch.cat([first[1], second[1]]))
    for mine, one, other in zip(own, first[2:], second[2:], strict=True):
        torch.testing.assert_close(mine, one + other)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_under_autocast_statistics_stay_in_float32(norm, alone):
    ours = norm_like(norm, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(images(8).bfloat16()), norm(images(8).bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    sync_batchnorm_buffers(ours, torch.zeros(1))
    assert ours.running_var.dtype == torch.float32
    torch.testing.assert_close(ours.running_var, norm.running_var)


def test_running_statistics_move_once_per_step(norm, alone):
    """Two micro-steps of two groups each, then a step of one."""
    ours = norm_like(norm, 4)
    micro_steps = images(8), images(8, seed=1)
    for micro_step in micro_steps:
        ours(micro_step)
    assert not ours.running_mean.any()
    assert torch.equal(sync_batchnorm_buffers(ours, torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]))
    mean, variance = expected_statistics(torch.cat(micro_steps).view(4, 4, 3, 5, 4))
    torch.testing.assert_close(ours.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.running_var.double(), variance, rtol=1e-6, atol=1e-6)
    assert ours.num_batches_tracked == 1
    norm.load_state_dict(ours.state_dict())
    norm(images(4, seed=2)), ours(images(4, seed=2))
    sync_batchnorm_buffers(ours, torch.zeros(0))
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=name)


def test_evaluation_uses_running_statistics_and_leaves_them_alone(norm, alone):
    ours = norm_like(norm, 4)
    ours(images(8))
    sync_batchnorm_buffers(ours, torch.zeros(1))
    norm.load_state_dict(ours.state_dict())
    ours.eval(), norm.eval()
    assert torch.equal(ours(images(7)), norm(images(7)))
    assert not ours.sums.any()


def test_a_converted_model_has_the_same_state_and_parameters():
    model = timm.create_model("polaformerpp_b0", num_classes=4).eval()
    before, parameters = model.state_dict(), list(model.parameters())
    convert_batchnorm(model, 2)
    assert not any(type(module) is nn.BatchNorm2d or module.training for module in model.modules())
    assert list(model.state_dict()) == list(before)
    assert all(value.data_ptr() == before[name].data_ptr() for name, value in model.state_dict().items())
    assert all(ours is other for ours, other in zip(model.parameters(), parameters, strict=True))


def test_two_ranks_share_the_statistics_of_all_groups(forked, tmp_path):
    script, samples = tmp_path / "script.py", images(2 * 2 * 8).view(2, 2, 8, 3, 5, 4)
    script.write_text(TWO_RANKS)
    torch.save(samples, tmp_path / "samples.pt")
    finished = forked(2, script, tmp_path / "samples.pt", tmp_path)
    assert finished.returncode == 0, finished.stderr
    mean, variance = expected_statistics(samples.view(8, 4, 3, 5, 4))
    of_ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0]["running_mean"] == pytest.approx(mean.tolist(), rel=1e-5, abs=1e-6)
    assert of_ranks[0]["running_var"] == pytest.approx(variance.tolist(), rel=1e-5)
    assert of_ranks[0]["num_batches_tracked"] == 1
    assert of_ranks[0]["riders"] == [2.0, 1.0]

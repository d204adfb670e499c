"""Stochastic depth: which samples keep a branch depends on the seed and the sample's position alone."""

from itertools import product

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from launch.batchnorm import GroupBatchNorm2d, convert_batchnorm
from launch.drop_path import PositionalDropPath, convert_drop_path, draw_drop_paths

RATES = 0.3, 0.0, 0.3, 0.6


def drop_paths(micro_batch_size: int) -> nn.Sequential:
    model = nn.Sequential(*map(DropPath, RATES), nn.Linear(1, 1))
    convert_drop_path(model, micro_batch_size)
    return model


def scales(model: nn.Sequential, seed: int, first: int) -> torch.Tensor:
    """What each module that drops anything multiplies the samples by: (modules, B)."""
    draw_drop_paths(model, seed, first)
    modules = [module for module in model if isinstance(module, PositionalDropPath)]
    ones = torch.ones(modules[0].scales.shape[1], 2, 3)
    outputs = torch.stack([module(ones) for module in modules])
    assert torch.equal(outputs, outputs[..., :1, :1].expand_as(outputs))  # a branch is dropped as a whole
    return outputs[..., 0, 0]


def test_samples_keep_branches_by_seed_and_position():
    whole = scales(drop_paths(48), seed=5, first=96)
    parts = [scales(drop_paths(16), seed=5, first=first) for first in (96, 112, 128)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert not torch.equal(whole, scales(drop_paths(48), seed=6, first=96))
    assert not torch.equal(whole, scales(drop_paths(48), seed=5, first=144))


def test_the_rate_is_the_share_of_dropped_samples():
    """Modules drop independently of each other."""
    count = 20_000
    found = scales(drop_paths(count), seed=0, first=10**9)
    kept = found > 0
    rates = torch.tensor([0.3, 0.3, 0.6])
    torch.testing.assert_close(found, kept / (1 - rates[:, None]))
    torch.testing.assert_close(kept.float().mean(1), 1 - rates, rtol=0, atol=5 * 0.5 / count**0.5)
    for one, other in product(range(3), repeat=2):
        if one != other:
            both = (kept[one] & kept[other]).float().mean()
            torch.testing.assert_close(both, (1 - rates[one]) * (1 - rates[other]), rtol=0, atol=5 * 0.5 / count**0.5)


def test_a_rate_of_one_drops_everything():
    model = nn.Sequential(DropPath(1.0), nn.Linear(1, 1))
    convert_drop_path(model, 8)
    assert not scales(model, seed=0, first=0).any()


def test_evaluation_keeps_all_branches():
    model = drop_paths(4)
    scales(model, seed=0, first=0)
    x = torch.randn(7, 1)
    assert all(torch.equal(module.eval()(x), x) for module in model[:-1])


@pytest.fixture
def model() -> nn.Module:
    """A b0 whose branches are dropped often."""
    return timm.create_model("polaformerpp_b0", num_classes=4, drop_path_rate=0.5)


def test_a_converted_model_has_the_same_state(model):
    names = list(model.state_dict())
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    convert_drop_path(model, 2)
    found = [module for module in model.modules() if isinstance(module, PositionalDropPath)]
    assert [module.drop_prob for module in found] == [rate for rate in rates if rate] != []
    assert list(model.state_dict()) == names


def test_gradient_checkpointing_recomputes_with_the_same_branches(model):
    convert_drop_path(model, 8)
    draw_drop_paths(model, seed=1, first=24)
    images, gradients = torch.randn(8, 3, 32, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_compiled_model_follows_the_draws_without_compiling_again():
    """With BatchNorm in groups, whose sums change in each micro-step."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), DropPath(0.5), DropPath(0.5))
    convert_batchnorm(model, 4)
    convert_drop_path(model, 8)
    norm, images = model[1], torch.randn(8, 3, 4, 4)
    assert isinstance(norm, GroupBatchNorm2d)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for first in (0, 8, 16):
            draw_drop_paths(model, seed=0, first=first)
            found = []
            for forward in (model, compiled):
                norm.sums.zero_()
                model.zero_grad()
                out = forward(images)
                out.sin().sum().backward()
                found.append((out.detach(), norm.sums.clone(), *(parameter.grad for parameter in model.parameters())))
            for eager, of_compiled in zip(*found, strict=True):
                torch.testing.assert_close(of_compiled, eager)
            assert norm.sums[-1] == 2

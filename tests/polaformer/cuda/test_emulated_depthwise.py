"""The depthwise convolution's CUDA kernels on emulated threads, against PyTorch's convolution in float64."""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.slow  # builds the emulator

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RESIDUALS = ("none", "input", "other")


def make_inputs(shape, kernel_size, dtype, residual="none"):
    """x, weight and bias in float32, residual, grad_out."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
    x, other, grad_out = (draw(*shape).to(dtype) for _ in range(3))
    weight, bias = draw(shape[3], 1, kernel_size, kernel_size) / kernel_size, draw(shape[3])
    return x, weight, bias, {"none": None, "input": x, "other": other}[residual], grad_out


def compute_exact(x, weight, bias, residual, grad_out) -> dict[str, torch.Tensor]:
    """Output and gradients in float64."""
    wide = [value.double().requires_grad_() for value in (x, weight, bias)]
    images, padding = wide[0].permute(0, 3, 1, 2), weight.shape[2] // 2
    out = F.conv2d(images, wide[1], wide[2], padding=padding, groups=weight.shape[0]).permute(0, 2, 3, 1)
    if residual is not None:
        out = out + (wide[0] if residual is x else residual.double())
    grads = torch.autograd.grad(out, wide, grad_out.double())
    return dict(zip(("out", "x", "weight", "bias"), (out.detach(), *grads), strict=True))


def assert_near(found, inputs) -> None:
    """Outputs are rounded once; sums over positions are those of float32."""
    x = inputs[0]
    for name, wanted in compute_exact(*inputs).items():
        actual = found.results[name]
        eps = torch.finfo(torch.float32 if name in ("weight", "bias") else x.dtype).eps
        terms = x[..., 0].numel() if name in ("weight", "bias") else 1
        scale = wanted.norm() + wanted.numel() ** 0.5
        assert (actual.double() - wanted).norm() <= 2 * eps * max(1, terms) ** 0.5 * scale, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_equals_pytorch(emulate_depthwise, kernel_size, residual, dtype):
    """Several images, blocks of channels, tiles, and an odd height."""
    inputs = make_inputs((3, 9, 16, 40), kernel_size, dtype, residual)
    assert_near(emulate_depthwise(*inputs), inputs)


@pytest.mark.parametrize(
    ("shape", "sm_count", "images_per_block", "several_splits"),
    [
        ((1, 1, 1, 8), 4, (1, 1), False),
        ((5, 1, 1, 32), 1, (5, 5), False),
        ((13, 4, 2, 8), 132, (8, 5), True),  # the last group is incomplete
        ((2, 30, 3, 8), 132, (2, 2), True),
        ((3, 7, 7, 64), 8, (3, 3), True),
        ((1, 4, 112, 8), 1, (1, 1), False),  # as wide as can be
        ((2, 9, 56, 24), 132, (1, 1), True),
        ((1, 3, 1, 104), 132, (1, 1), False),
    ],
)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_shapes(emulate_depthwise, shape, sm_count, images_per_block, several_splits, kernel_size):
    for dtype in (torch.bfloat16, torch.float32):
        inputs = make_inputs(shape, kernel_size, dtype, "other" if kernel_size == 5 else "input")
        found = emulate_depthwise(*inputs, sm_count=sm_count)
        assert_near(found, inputs)
        if dtype == torch.bfloat16:
            assert found.images_per_block[0] == images_per_block[kernel_size == 5]
            assert (found.splits[0] > 1) == several_splits


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_views_in_place(emulate_depthwise, dtype):
    """x as the values within a projection, the residual transposed, one gradient for all positions."""
    x, weight, bias, residual, grad_out = make_inputs((2, 6, 8, 32), 5, dtype, "other")
    projection = torch.cat((x, x * 0 + 7, x), dim=3)[..., 64:]
    turned = residual.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = projection, weight, bias, turned, grad_out[:, :1, :1].expand(grad_out.shape)
    assert_near(emulate_depthwise(*inputs), inputs)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_bit_identical_in_any_order(emulate_depthwise, kernel_size):
    """Threads and blocks run in random order."""
    inputs = make_inputs((2, 12, 10, 72), kernel_size, torch.bfloat16, "input")
    first, second = (emulate_depthwise(*inputs, seed=seed) for seed in (1, 2))
    assert min(first.splits) > 1
    assert all(torch.equal(first.results[name], second.results[name]) for name in first.results)


def test_numbers_that_are_not_finite_reach_their_neighbours_alone(emulate_depthwise):
    x, weight, bias, _, _ = make_inputs((2, 7, 9, 32), 3, torch.float32)
    x[0, 3, 4, 5] = torch.nan
    out = emulate_depthwise(x, weight, bias).results["out"]
    assert out.isnan()[0, 2:5, 3:6, 5].all()
    assert out.isnan().sum() == 9


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_address_and_undefined_behaviour_sanitizers(emulate_depthwise_sanitized, kernel_size, dtype):
    """An incomplete block of channels, group of images, tile and step."""
    inputs = make_inputs((3, 5, 36, 40), kernel_size, dtype, "other")
    assert_near(emulate_depthwise_sanitized(*inputs), inputs)

"""The CUDA kernels, compiled unchanged and run on emulated threads, against the reference in float64."""

import pytest
import torch

from polaformer import reference

pytestmark = pytest.mark.slow  # builds the emulator

NAMES = ("out", "q", "k", "v", "same_logits", "opposite_logits")
LIMITS = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 5e-6}


def make_inputs(shape, dtype, scale=1.0):
    """q, k, v as views of one (B, N, 4C) projection, and logits; scale multiplies q and k."""
    batch, heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(batch, tokens, 4, heads, head_dim, generator=generator)
    projection[:, :, :2] *= scale
    views = [part.transpose(1, 2) for part in projection.to(dtype).unbind(2)[:3]]
    return [*views, *(torch.randn(heads, 2 * head_dim, generator=generator) for _ in range(2))]


def make_grad_out(q):
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)


def compute_exact(inputs, size, grad_out):
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out = reference.polarity_attention(*wide, *size)
    return [x.detach() for x in (out, *torch.autograd.grad(out, wide, grad_out.double()))]


def assert_near(found, exact, limit, of_order=0.1):
    """The RMS difference is below `limit` × (RMS of the exact values + `of_order`)."""
    for name, actual, wanted in zip(NAMES, (found.out, *found.grads), exact, strict=True):
        assert actual.isfinite().all(), name
        size = wanted.norm() + of_order * wanted.numel() ** 0.5
        assert (actual.double() - wanted).norm() < limit * size, name


def assert_bit_identical(first, second):
    for name in ("out", "state", "key_mean", "key_shift"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert all(torch.equal(a, b) for a, b in zip(first.grads, second.grads, strict=True))


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("batch", "heads", "size", "head_dim"),
    [
        (2, 2, (7, 9), 32),
        (1, 2, (9, 13), 64),
        (1, 1, (7, 14), 96),
        (1, 1, (7, 5), 48),
        (1, 1, (5, 13), 128),
        (2, 3, (3, 5), 6),
        (1, 1, (1, 1), 2),
        (1, 1, (7, 11), 98),
    ],
)
def test_equals_reference(emulate, batch, heads, size, head_dim, dtype):
    inputs = make_inputs((batch, heads, size[0] * size[1], head_dim), dtype)
    grad_out = make_grad_out(inputs[0])
    assert_near(emulate(inputs, size, grad_out), compute_exact(inputs, size, grad_out), LIMITS[dtype])


@pytest.mark.parametrize(
    ("head_dim", "size", "scale", "sm_count"),
    [
        *((head_dim, (7, 11), 1, 1) for head_dim in (16, 32, 48, 64, 80, 96, 112, 128)),
        (48, (30, 30), 1, 1),  # many tiles of a warp
        (96, (281, 1), 1, 132),  # several splits, the last of them incomplete
        (64, (7, 9), 30, 4),  # queries with a shift
    ],
)
def test_warpgroups_multiply_as_warps_do(emulate, head_dim, size, scale, sm_count):
    """Both add products in the same order, so results are bit-identical."""
    inputs = make_inputs((1, 2, size[0] * size[1], head_dim), torch.bfloat16)
    inputs[0] = (scale * inputs[0]).contiguous()  # rows of q are in another order than those of k
    grad_out = make_grad_out(inputs[0])
    warps, warpgroups = (
        emulate(inputs, size, grad_out, sm_count=sm_count, has_warpgroups=choice) for choice in (False, True)
    )
    assert warpgroups.warpgroup_products > warps.warpgroup_products == 0
    assert_bit_identical(warps, warpgroups)


@pytest.mark.parametrize(
    ("dtype", "arrange", "path"),
    [
        (torch.bfloat16, "projection", "bfloat16"),
        (torch.float32, "projection", "float32"),
        (torch.bfloat16, "contiguous", "bfloat16"),
        (torch.bfloat16, "one element further", "generic 16-bit"),
        (torch.float32, "one element further", "generic float32"),
        (torch.float16, "projection", "generic 16-bit"),
        (torch.bfloat16, "one token for all", "bfloat16"),
    ],
)
def test_layouts(emulate, dtype, arrange, path):
    """Rows are read in place; rows that are not aligned to 16 bytes, element by element."""

    def one_further(x):
        moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
        return moved.copy_(x)

    arranged = {
        "projection": lambda x: x,
        "contiguous": lambda x: x.contiguous(),
        "one element further": one_further,
        "one token for all": lambda x: x[:, :, :1].expand(-1, -1, x.shape[2], -1),
    }[arrange]
    inputs = make_inputs((2, 2, 33, 32), dtype)
    inputs = [arranged(x) for x in inputs[:3]] + inputs[3:]
    grad_out = make_grad_out(inputs[0])
    found = emulate(inputs, (3, 11), grad_out)
    assert found.path == path
    assert_near(found, compute_exact(inputs, (3, 11), grad_out), LIMITS[dtype])


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_several_splits_per_head(emulate, dtype):
    """An odd number of tokens and incomplete last splits; one split per head gives the same up to rounding."""
    inputs, size = make_inputs((1, 2, 281, 32), dtype), (281, 1)
    grad_out = make_grad_out(inputs[0])
    exact = compute_exact(inputs, size, grad_out)
    split, whole = (emulate(inputs, size, grad_out, sm_count=count) for count in (132, 1))
    assert min(split.splits_per_head) > 1
    assert split.splits_per_head > whole.splits_per_head
    assert_near(split, exact, LIMITS[dtype])
    assert_near(whole, exact, LIMITS[dtype])


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_many_splits_per_head(emulate, dtype):
    """Several threads share the sum over a head's splits, and the sum of logits' gradients over all images."""
    inputs, size = make_inputs((2, 2, 1100, 16), dtype), (44, 25)
    grad_out = make_grad_out(inputs[0])
    first, second = (emulate(inputs, size, grad_out, seed=seed, sm_count=132) for seed in (1, 2))
    assert min(first.splits_per_head[0], first.splits_per_head[2]) > 16
    assert_near(first, compute_exact(inputs, size, grad_out), LIMITS[dtype])
    assert_bit_identical(first, second)


@pytest.mark.parametrize("largest", [1, 30])
def test_more_splits_than_threads(emulate, largest):
    """A block that adds up splits has 256 threads; the last split has the largest key."""
    inputs, size = make_inputs((1, 1, 8224, 2), torch.float32), (257, 32)
    inputs[1][0, 0, -1, 1] = largest
    grad_out = make_grad_out(inputs[0])
    found = emulate(inputs, size, grad_out, sm_count=132)
    assert min(found.splits_per_head[0], found.splits_per_head[2]) > 256
    assert found.key_shift.any() == (largest > 20)
    assert_near(found, compute_exact(inputs, size, grad_out), 1e-4 if largest > 20 else 5e-6)


def test_float32_stays_exact_over_many_tokens(emulate):
    """One split has all tokens of b5's first stage, as with 128 images, so each sum has 196 products.

    Accumulated in tensor cores alone, which round toward zero, the error would be 3e-5.
    """
    inputs, size = make_inputs((1, 1, 3136, 96), torch.float32), (56, 56)
    grad_out = make_grad_out(inputs[0])
    found = emulate(inputs, size, grad_out, sm_count=1)
    assert found.splits_per_head[0] == found.splits_per_head[2] == 1
    for name, actual, wanted in zip(
        NAMES, (found.out, *found.grads), compute_exact(inputs, size, grad_out), strict=True
    ):
        assert (actual.double() - wanted).norm() < 2e-6 * wanted.norm(), name


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
def test_bfloat16_is_as_exact_as_eager_pytorch(emulate, head_dim):
    """Packed features and rotations lose no more precision than the eager formulas in bf16."""
    inputs, size = make_inputs((1, 2, 143, head_dim), torch.bfloat16), (11, 13)
    grad_out = make_grad_out(inputs[0])
    found = emulate(inputs, size, grad_out)
    assert found.path == "bfloat16"
    wanted = compute_exact(inputs, size, grad_out)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = reference.eager_polarity_attention(*leaves, *size)
    eager = (out, *torch.autograd.grad(out, leaves, grad_out))
    for name, actual, of_eager, exact in zip(NAMES, (found.out, *found.grads), eager, wanted, strict=True):
        error, allowed = ((x.detach().double() - exact).norm() / exact.norm() for x in (actual, of_eager))
        assert error < 1.2 * allowed, name


@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bit_identical_in_any_block_order(emulate, dtype, scale):
    """Threads and blocks run in random order; at scale 30, exponents exceed 20 and need the shift."""
    inputs, size = make_inputs((1, 2, 85, 32), dtype, scale), (5, 17)
    grad_out = make_grad_out(inputs[0])
    first, second = (emulate(inputs, size, grad_out, seed=seed) for seed in (1, 2))
    assert bool(first.key_shift.any()) == (scale == 30)
    assert_bit_identical(first, second)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("largest", [20, 100, 1e4])
@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_exponents_of_any_size(emulate, dtype, largest, which):
    """Exact outputs and gradients for queries and keys whose features overflow float32."""
    inputs, size = make_inputs((1, 1, 35, 32), torch.float64), (5, 7)
    for index, name in ((0, "q"), (1, "k")):
        if which in (name, "both"):  # every feature and sign has the same largest value, so that none dominates
            inputs[index] = inputs[index].sign() * (largest - inputs[index].abs())
    inputs = [x.to(dtype) for x in inputs[:3]] + [x.float() for x in inputs[3:]]
    grad_out = make_grad_out(inputs[0])
    # e^x amplifies the rounding of x · temperature, a relative error of half an ulp, by x
    limit = 8 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps * largest
    assert_near(emulate(inputs, size, grad_out), compute_exact(inputs, size, grad_out), limit, of_order=1)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("largest", [20, 100, 1e4])
def test_finite_for_any_finite_input(emulate, dtype, largest):
    """Exponents far apart, vanishing normalizers: no infinity or NaN, and exact outputs where representable."""
    inputs, size = make_inputs((2, 2, 35, 32), dtype, scale=largest / 4), (5, 7)
    grad_out = make_grad_out(inputs[0])
    found, exact = emulate(inputs, size, grad_out), compute_exact(inputs, size, grad_out)[0]
    for name, x in zip(NAMES, (found.out, *found.grads), strict=True):
        assert x.isfinite().all(), name
    representable = exact.abs() < torch.finfo(dtype).max / 4
    assert representable.double().mean() > 0.5
    difference = (found.out.double() - exact).abs() / (exact.abs() + 1)
    assert difference[representable].quantile(0.9) < 8 * torch.finfo(dtype).eps + 1e-6 * largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_values_of_one_head_leave_the_others_unchanged(emulate, dtype):
    """Shifts are local to heads and splits: the other head's output is bit-identical with and without one."""
    inputs, size = make_inputs((1, 2, 85, 32), dtype), (5, 17)
    large = [x.clone() for x in inputs]
    large[1][:, 1, 3] *= 40
    found, unchanged = emulate(large, size), emulate(inputs, size)
    assert found.key_shift[0, 1].any()
    assert not found.key_shift[0, 0].any()
    assert torch.equal(found.out[:, 0], unchanged.out[:, 0])


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_zero_normalizers(emulate, dtype):
    """q = (1, 0), k = (0, 1): queries and keys share no nonzero feature, but do after rotation."""
    q, k = torch.zeros(1, 1, 6, 16), torch.zeros(1, 1, 6, 16)
    q[..., 0], k[..., 1] = 1, 1
    v = 1e-6 * torch.randn(1, 1, 6, 16, generator=torch.Generator().manual_seed(0))
    inputs = [*(x.to(dtype) for x in (q, k, v)), torch.zeros(1, 32), torch.zeros(1, 32)]
    grad_out = 1e-9 * make_grad_out(q)  # gradients of z are divided by epsilon twice
    exact = compute_exact(inputs, (2, 3), grad_out.to(dtype))
    found = emulate(inputs, (2, 3), grad_out.to(dtype))
    assert exact[0].abs().max() > 0.1  # divided by epsilon alone
    assert_near(found, exact, LIMITS[dtype], of_order=1e-3)


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_propagates(emulate, dtype, scale, index):
    """A NaN in q, k or v, with a shift and without: results are NaN wherever the reference's are."""
    inputs, size = make_inputs((1, 2, 35, 32), dtype, scale), (5, 7)
    inputs[index][0, 1, 20, 3] = torch.nan
    grad_out = make_grad_out(inputs[0])
    found, exact = emulate(inputs, size, grad_out), compute_exact(inputs, size, grad_out)
    for name, actual, wanted in zip(NAMES[:4], (found.out, *found.grads[:3]), exact[:4], strict=True):
        is_nan = wanted.isnan().any(dim=-1)  # per token
        assert (actual.isnan().any(dim=-1) | ~is_nan).all(), name
        assert actual[0, 0].isfinite().all(), name


@pytest.mark.parametrize("tiny", [1e-3, 1e-5, 1e-7, 0])
@pytest.mark.parametrize("index", [0, 1])
def test_tiny_queries_and_keys(emulate, tiny, index):
    """bf16 features have an absolute error of 2^-22: accurate for inputs down to 1e-4, finite for smaller ones."""
    inputs, size = make_inputs((1, 2, 35, 32), torch.bfloat16), (5, 7)
    inputs[index][:, :, 3:] *= tiny
    grad_out = make_grad_out(inputs[0])
    found = emulate(inputs, size, grad_out)
    if tiny == 1e-3:
        assert_near(found, compute_exact(inputs, size, grad_out), LIMITS[torch.bfloat16])
    assert all(x.isfinite().all() for x in (found.out, *found.grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_empty_batch(emulate, dtype):
    inputs = make_inputs((0, 2, 15, 32), dtype)
    found = emulate(inputs, (3, 5), make_grad_out(inputs[0]))
    assert found.out.shape == (0, 2, 15, 32)
    assert not any(grad.any() for grad in found.grads)


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "scale", "has_warpgroups"),
    [
        (torch.bfloat16, (1, 2, 21, 32), (3, 7), 1, False),
        (torch.bfloat16, (1, 1, 21, 48), (3, 7), 30, False),
        (torch.bfloat16, (1, 1, 900, 48), (30, 30), 1, False),  # several tiles of a warp
        (torch.bfloat16, (1, 1, 450, 48), (15, 30), 1, True),
        (torch.float32, (1, 1, 21, 32), (3, 7), 1, False),
        (torch.float32, (2, 1, 5, 6), (1, 5), 30, False),
        (torch.float16, (1, 2, 17, 10), (17, 1), 1, False),
        (torch.float32, (1, 2, 160, 6), (32, 5), 1, False),  # five splits of keys
    ],
)
def test_address_and_undefined_behaviour_sanitizers(emulate_sanitized, dtype, shape, size, scale, has_warpgroups):
    inputs = make_inputs(shape, dtype, scale)
    found = emulate_sanitized(inputs, size, make_grad_out(inputs[0]), has_warpgroups=has_warpgroups)
    assert all(x.isfinite().all() for x in (found.out, *found.grads))

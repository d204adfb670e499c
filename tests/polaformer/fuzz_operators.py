"""Fuzzer of the raw operators with random, mostly invalid arguments: `python fuzz_operators.py DEVICE SEED CALLS`.

Every call must raise a Python exception, or be valid for reference.py and return its results. Prints the numbers of
"refused" and "computed" calls per operator as one line of JSON; exits with 1 on a wrong result. Runs as a process of
its own because memory corruption ends it by a signal, and so that it can run under a sanitizer.
"""

import collections
import json
import random
import sys

import torch

from polaformer import ops, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOW = {torch.bfloat16, torch.float16}
WRONG_DTYPES = [*DTYPES, torch.int32, torch.bool, torch.complex64, torch.uint8]
REFUSALS = (ValueError, RuntimeError, TypeError, NotImplementedError)  # readable errors; not AssertionError
HUGE = [-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**33 + 1, 2**62, 2**63 - 1]


def draw_tensor(shape, dtype, device) -> torch.Tensor:
    """Draw numbers of either sign between 0.2 and 1: normalizers far from 0, so low precision stays accurate."""
    signs = torch.randint(0, 2, shape).mul(2).sub(1)
    return (signs * (0.2 + 0.8 * torch.rand(shape))).to(device, dtype)


def change_shape(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    shape = list(x.shape)
    axis = rng.randrange(len(shape)) if shape else 0
    kind = rng.randrange(5)
    if kind == 0 and shape:
        shape[axis] = max(0, shape[axis] + rng.choice([-2, -1, 1, 2, 7]))
    elif kind == 1 and shape:
        del shape[axis]
    elif kind == 2:
        shape.insert(axis, rng.choice([0, 1, 2]))
    elif kind == 3:
        rng.shuffle(shape)
    else:
        shape = []
    return x if x.shape == torch.Size(shape) else draw_tensor(shape, x.dtype, x.device)


def change_strides(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Keep the shape but change the memory: permuted axes, gaps, misaligned offsets, repeated elements."""
    kind = rng.randrange(5)
    if kind == 0 and x.dim() > 1:
        first, second = rng.sample(range(x.dim()), 2)
        return x.transpose(first, second).contiguous().transpose(first, second)
    if kind == 1 and x.dim():
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if kind == 2:
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
    if kind == 3 and x.dim() and x.numel():
        axis = rng.randrange(x.dim())
        return x.narrow(axis, 0, 1).expand(x.shape)
    return torch.as_strided(x, x.shape, [rng.choice([0, 1]) if size > 1 else 1 for size in x.shape])


def change_dtype_or_device(rng: random.Random, x: torch.Tensor) -> torch.Tensor:
    kind = rng.randrange(4)
    if kind == 0:
        return x.to_sparse() if x.dim() else x
    if kind == 1:
        return x.to("meta")
    if kind == 2 and x.device.type == "cuda":
        return x.cpu()
    return x.to(rng.choice(WRONG_DTYPES))


def draw_call(rng: random.Random, device: str) -> tuple[str, list]:
    """Draw (operator's name, arguments): a valid call with zero to three random changes."""
    return (draw_attention if rng.random() < 0.6 else draw_depthwise)(rng, device)


def draw_depthwise(rng: random.Random, device: str) -> tuple[str, list]:
    channels, kernel_size = rng.choice([1, 3, 8, 16, 17, 100, 150]), rng.choice([1, 3, 3, 5, 5, 7])
    shape, dtype, wide = (rng.randint(0, 3), rng.randint(1, 9), rng.randint(1, 9), channels), *rng.choices(DTYPES, k=2)
    x, other = (draw_tensor(shape, dtype, device) for _ in range(2))
    weight = draw_tensor((channels, 1, kernel_size, kernel_size), wide, device)
    name = rng.choice(["depthwise_conv2d", "depthwise_conv2d_backward"])
    arguments = [other, x, weight]
    if name == "depthwise_conv2d":
        arguments = [x, weight, draw_tensor((channels,), wide, device), rng.choice([other, None])]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        number = rng.randrange(len(arguments))
        arguments[number] = change_tensor(rng, arguments[number])
    return name, [*arguments, rng.random() < 0.3]


def change_tensor(rng: random.Random, x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None or x.layout != torch.strided or x.is_meta:
        return x
    return rng.choice([change_shape, change_strides, change_strides, change_dtype_or_device])(rng, x)


def draw_attention(rng: random.Random, device: str) -> tuple[str, list]:
    batch, heads, height, width = rng.randint(0, 3), rng.randint(1, 3), rng.randint(1, 9), rng.randint(1, 9)
    head_dim = 2 * rng.choice([1, 3, 8, 16, 17, 48])
    dtype = rng.choice(DTYPES)
    shape = (batch, heads, height * width, head_dim)
    inputs = [draw_tensor(shape, dtype, device) for _ in range(3)]
    inputs += [draw_tensor((heads, 2 * head_dim), rng.choice(DTYPES), device) for _ in range(2)]
    name = rng.choice(["polarity_attention", "polarity_attention_backward", "reference", "reference_backward"])
    arguments = inputs
    if name.endswith("backward"):
        _, *saved = reference.forward(*inputs, height, width)
        arguments = [draw_tensor(shape, dtype, device), *inputs, *saved]
    size = [height, width]
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 3])):
        number = rng.randrange(len(arguments) + 1)
        if number == len(arguments):
            size[rng.randrange(2)] = rng.choice([*HUGE, size[0] + 1, -size[0]])
            if rng.random() < 0.3:
                size = [-size[0], -size[1]]
        else:
            arguments[number] = change_tensor(rng, arguments[number])
    return name, [*arguments, *size, *([""] if name.startswith("reference") else [])]


def compute_expected(name: str, arguments: list) -> list[torch.Tensor]:
    """Compute by the reference in float64, on the CPU, which is faster for so few numbers.

    Raises ValueError if the call is invalid.
    """
    if name == "depthwise_conv2d":
        x, weight, bias, residual, adds_input = arguments
        reference.check_depthwise(*arguments)
        wide = [None if x is None else x.cpu().double() for x in (x, weight, bias, residual)]
        return [reference.depthwise_conv2d(*wide, adds_input)]
    if name == "depthwise_conv2d_backward":
        reference.check_depthwise_gradient(*arguments[:3])
        wide = [x.cpu().double() for x in arguments[:3]]
        return list(reference.depthwise_conv2d_backward(*wide, arguments[3]))
    *tensors, height, width = arguments[:-1] if name.startswith("reference") else arguments
    grad_out, inputs, saved = (tensors[0], tensors[1:6], tensors[6:]) if len(tensors) == 9 else (None, tensors, ())
    reference.check_inputs(*inputs[:3], tuple(inputs[3:]), height, width)
    wide = [x.cpu().double() for x in inputs]
    if grad_out is None:
        return [reference.forward(*wide, height, width)[0]]
    reference.check_saved(grad_out, inputs[0], tuple(saved))
    wide_saved = tuple(x.cpu().double() for x in saved)
    return list(reference.backward(grad_out.cpu().double(), wide, wide_saved, height, width))


def main(device: str, seed: int, calls: int) -> None:
    torch.manual_seed(seed)
    rng, counts = random.Random(seed), collections.Counter()
    for number in range(calls):
        name, arguments = draw_call(rng, device)
        described = f"call {number} of seed {seed}: {name} of {list(map(describe, arguments))}"
        try:
            results = getattr(torch.ops.polaformer, name)(*arguments)
        except REFUSALS:
            counts[f"{name} refused"] += 1
            continue
        counts[f"{name} computed"] += 1
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in arguments):
            continue  # no values to compare
        expected = compute_expected(name, arguments)
        results = [results] if isinstance(results, torch.Tensor) else results
        for result, wanted in zip(results, expected):  # noqa: B905 (backward covers the saved tensors)
            tolerance = 0.2 if LOW & {arguments[0].dtype, result.dtype} else 1e-3
            if is_wrong(result, wanted, tolerance):
                sys.exit(f"wrong result without an error in {described}")
    print(json.dumps(counts))


def is_wrong(result: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    largest = torch.finfo(result.dtype).max
    wanted = wanted.clamp(-largest, largest)
    allowed = tolerance * (wanted.norm() + wanted.numel() ** 0.5)
    return result.shape != wanted.shape or bool((result.cpu().double() - wanted).norm() > allowed)


def describe(x) -> str:
    return (
        f"{x.dtype} {tuple(x.shape)} strides {x.stride() if x.layout == torch.strided else x.layout}"
        if isinstance(x, torch.Tensor)
        else repr(x)
    )


if __name__ == "__main__":
    assert ops.has_compiled_kernels(sys.argv[1]), ops.kernels_unavailable_reason(sys.argv[1])
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""The operators as PyTorch sees them: schema, implementations, fake tensors, autograd, FLOPs.

The only file that names torch.ops. Compiled kernels (csrc/, built by setup.py as _cpu*.so and _cuda*.so beside this
file) register themselves for CPU and CUDA under the schema defined here. Where there is none, the dispatcher falls
through to the reference; what the CUDA kernels do not serve they hand to it themselves, as polaformer::reference:
float64, D above 128 (above 96 where a block has little shared memory), GPUs before compute capability 8.0. The
reference says once why it serves, of float64 nothing.
"""

import functools
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from polaformer import reference

_library = torch.library.Library("polaformer", "DEF")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor same_logits, Tensor opposite_logits"
_SAVED = "Tensor state, Tensor key_mean, Tensor key_shift"
_SIZE = "SymInt height, SymInt width"
_FORWARD = f"{_INPUTS}, {_SIZE}", f"(Tensor out, {_SAVED})"
_BACKWARD = f"Tensor grad_out, {_INPUTS}, {_SAVED}, {_SIZE}", "(Tensor, Tensor, Tensor, Tensor, Tensor)"
for _name, (_arguments, _results) in (("polarity_attention", _FORWARD), ("polarity_attention_backward", _BACKWARD)):
    _library.define(f"{_name}({_arguments}) -> {_results}")
for _name, (_arguments, _results) in (("reference", _FORWARD), ("reference_backward", _BACKWARD)):
    _library.define(f"{_name}({_arguments}, str reason) -> {_results}")
_forward_operator = torch.ops.polaformer.polarity_attention.default
_backward_operator = torch.ops.polaformer.polarity_attention_backward.default


_LOAD_ERRORS: dict[str, str] = {}  # device type → why its kernels are not there


def _load_kernels() -> None:
    for device_type in ("cpu", "cuda"):
        if os.environ.get("POLAFORMER_KERNELS") == "none":  # the build's own switch, for comparing with the reference
            _LOAD_ERRORS[device_type] = "POLAFORMER_KERNELS is none"
            continue
        libraries = sorted(Path(__file__).parent.glob(f"_{device_type}*.so"))
        if not libraries:
            _LOAD_ERRORS[device_type] = "they were not built"
        for library in libraries:
            try:
                torch.ops.load_library(library)
            except OSError as error:  # of another torch, or of another CUDA
                _LOAD_ERRORS[device_type] = str(error)


_load_kernels()


def polarity_attention(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> Tensor:
    """Polarity-aware linear attention of PolaFormer++ through the fastest implementation that is installed.

    q, k, v: (B, H, N, D), any strides, one floating dtype; logits: (H, 2D), any floating dtype.
    Returns (B, H, N, D) in q's dtype, laid out in memory as (B, N, H, D) so that joining the heads costs nothing.
    Keeps q, k, v, a (B, H, 2D, D) state and (B, H, 3D) numbers for backward.
    Differentiable any number of times in reverse mode, by torch.func as well: write jacrev(jacrev(f)) for
    torch.func.hessian, which needs forward mode. Second and higher derivatives are computed in plain PyTorch.
    The operator itself raises ValueError, on every device and in every graph, if N != height * width, D is odd, or
    shapes, dtypes or devices disagree.
    """
    return torch.ops.polaformer.polarity_attention(q, k, v, same_logits, opposite_logits, height, width)[0]


def has_compiled_kernels(device_type: str) -> bool:
    """Whether polarity attention on "cpu" or "cuda" runs a compiled kernel rather than the reference."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    return torch._C._dispatch_has_kernel_for_dispatch_key("polaformer::polarity_attention", key)


def kernels_unavailable_reason(device_type: str) -> str:
    """What is wrong with the compiled kernels for "cpu" or "cuda", and the remedy; empty if they are there."""
    if has_compiled_kernels(device_type):
        return ""
    fault = _LOAD_ERRORS.get(device_type, "they were not built")
    return f"no compiled kernels for {device_type}: {fault}; build them with: pip install --no-build-isolation -e ."


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"polarity attention runs in plain PyTorch: {reason}", stacklevel=2)


def _to_bnhd(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A (B, H, N, D) tensor in a dtype that may be narrower, within its range; memory is a contiguous (B, N, H, D)."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _empty_bnhd(like: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


# CompositeImplicitAutograd: called by itself, autograd differentiates its formulas.
@torch.library.impl(_library, "reference", "CompositeImplicitAutograd")
def _forward_reference(q, k, v, same_logits, opposite_logits, height, width, reason):
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    if reason:
        _warn_once(reason)
    out, *saved = reference.forward(q, k, v, same_logits, opposite_logits, height, width)
    return _to_bnhd(out, q.dtype), *saved


@torch.library.impl(_library, "reference_backward", "CompositeImplicitAutograd")
def _backward_reference(
    grad_out, q, k, v, same_logits, opposite_logits, state, key_mean, key_shift, height, width, _reason
):
    inputs, saved = (q, k, v, same_logits, opposite_logits), (state, key_mean, key_shift)
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    reference.check_saved(grad_out, q, saved)
    *grads, grad_same, grad_opposite = reference.backward(grad_out, inputs, saved, height, width)
    grad_q, grad_k, grad_v = (_to_bnhd(grad, q.dtype) for grad in grads)
    return grad_q, grad_k, grad_v, grad_same.to(same_logits.dtype), grad_opposite.to(opposite_logits.dtype)


@torch.library.impl(_library, "polarity_attention", "CompositeExplicitAutograd")
def _forward(q, *arguments):
    known = q.device.type in ("cpu", "cuda")  # of other devices nobody expects kernels
    return _forward_reference(q, *arguments, kernels_unavailable_reason(q.device.type) if known else "")


@torch.library.impl(_library, "polarity_attention_backward", "CompositeExplicitAutograd")
def _backward(*arguments):
    return _backward_reference(*arguments, "")


@torch.library.register_fake(_forward_operator, lib=_library)
def _forward_fake(q, k, v, same_logits, opposite_logits, height, width):
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    shapes, dtype = reference.saved_shapes(q), reference.compute_dtype(q)
    return _empty_bnhd(q), *(q.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.register_fake(_backward_operator, lib=_library)
def _backward_fake(grad_out, q, k, v, same_logits, opposite_logits, state, key_mean, key_shift, height, width):
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    reference.check_saved(grad_out, q, (state, key_mean, key_shift))
    logits = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (same_logits, opposite_logits))
    return *(_empty_bnhd(x) for x in (q, k, v)), *logits


def _vmap(operator, info, in_dims, *arguments):
    """vmap's rule for both operators: mapped calls become further heads, since no head knows of another.

    The heads' axis is 0 in logits (H, 2D) and their gradients, 1 in everything else.
    """
    calls = info.batch_size

    def fold(x: Tensor, dim: int | None) -> Tensor:
        axis = 0 if x.dim() - (dim is not None) == 2 else 1
        x = x.unsqueeze(axis).expand(*x.shape[:axis], calls, *x.shape[axis:]) if dim is None else x.movedim(dim, axis)
        return x.flatten(axis, axis + 1)

    tensors = zip(arguments[:-2], in_dims[:-2], strict=True)
    results = operator(*(fold(x, dim) for x, dim in tensors), *arguments[-2:])
    axes = tuple(0 if x.dim() == 2 else 1 for x in results)
    unfolded = (x.unflatten(axis, (calls, x.shape[axis] // calls)) for x, axis in zip(results, axes, strict=True))
    return tuple(unfolded), axes


def _below_autograd(operator, keys, arguments):
    """What the dispatcher would call next: a level of torch.func, which needs gradients switched on, or a kernel."""
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


class _Attention(_SingleLevelFunction):
    """The operator for autograd, at every level of torch.func; what it saves for backward has no gradient."""

    @staticmethod
    def forward(keys, *arguments):
        return _below_autograd(_forward_operator, keys, arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keys, *tensors, ctx.height, ctx.width = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    def backward(ctx, grad_out, *_grads_of_saved):
        return None, *_backward_operator(grad_out, *ctx.saved_tensors, ctx.height, ctx.width), None, None


class _AttentionBackward(_SingleLevelFunction):
    """The gradient's operator for autograd, itself differentiated through the reference.

    What forward saved counts as the function of the inputs that it is, not as an input of its own.
    """

    @staticmethod
    def forward(keys, *arguments):
        return _below_autograd(_backward_operator, keys, arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keys, grad_out, q, k, v, same_logits, opposite_logits, *_saved, ctx.height, ctx.width = inputs
        ctx.save_for_backward(grad_out, q, k, v, same_logits, opposite_logits)

    @staticmethod
    def backward(ctx, *grads):
        def differentiate(grad_out, *inputs):
            _, *saved = reference.forward(*inputs, ctx.height, ctx.width)
            first = reference.backward(grad_out, inputs, saved, ctx.height, ctx.width)
            return tuple(grad.to(x.dtype) for grad, x in zip(first, inputs, strict=True))

        _, vjp_fn = torch.func.vjp(differentiate, *ctx.saved_tensors)
        return None, *vjp_fn(grads), *(None,) * 5


for _operator, _function in ((_forward_operator, _Attention), (_backward_operator, _AttentionBackward)):
    # torch.library.register_autograd makes an autograd.Function, which torch.func cannot differentiate inside an
    # operator. These are differentiated as PyTorch's own operators are: level by level.
    _apply = enable_single_level_autograd_function()(_function.apply)
    _library.impl(_operator.name(), _apply, "Autograd", with_keyset=True)
    torch.library.register_vmap(_operator, functools.partial(_vmap, _operator), lib=_library)


# For exporters that take operators apart (torch.onnx); torch.compile and torch.export keep the operator whole.
register_decomposition(_forward_operator)(reference.forward)


@register_flop_formula(torch.ops.polaformer.polarity_attention)
def _forward_flops(q_shape, *_args, **_kwargs) -> int:
    """8·D² per token and head: keys with values into the state, both query flows with their half of it."""
    batch, heads, tokens, head_dim = q_shape
    return 8 * batch * heads * tokens * head_dim**2


@register_flop_formula(torch.ops.polaformer.polarity_attention_backward)
def _backward_flops(_grad_shape, q_shape, *_args, **_kwargs) -> int:
    """20·D² per token and head, as kernels must spend: the state is kept, features are computed again."""
    batch, heads, tokens, head_dim = q_shape
    return 20 * batch * heads * tokens * head_dim**2

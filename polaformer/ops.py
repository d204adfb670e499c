"""Polarity attention and depthwise convolution as operators: schemas, fake tensors, autograd, vmap, FLOP formulas.

The only file that names torch.ops.polaformer. Compiled kernels (csrc/, built by setup.py as _cpu*.so and _cuda*.so
beside this file) register themselves for CPU and CUDA under the schemas defined here; where none is registered the
dispatcher falls through to the reference. The CUDA binding itself calls polaformer::reference for what its kernels do
not support: float64, D above 128 (above 96 where a block has less than 163 KB of shared memory), compute capabilities
below 8.0; for the convolution see `depthwise_conv2d`. The reference warns once per reason, except for float64.
"""

import contextlib
import functools
import inspect
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction
from torch.utils.flop_counter import register_flop_formula

from polaformer import reference

# torch leaves Library and its methods unannotated
_library: Any = torch.library.Library("polaformer", "DEF")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor same_logits, Tensor opposite_logits"
_SAVED = "Tensor state, Tensor key_mean, Tensor key_shift"
_SIZE = "SymInt height, SymInt width"
_FORWARD = f"{_INPUTS}, {_SIZE}", f"(Tensor out, {_SAVED})"
_BACKWARD = f"Tensor grad_out, {_INPUTS}, {_SAVED}, {_SIZE}", "(Tensor, Tensor, Tensor, Tensor, Tensor)"
for _name, (_arguments, _results) in (("polarity_attention", _FORWARD), ("polarity_attention_backward", _BACKWARD)):
    _library.define(f"{_name}({_arguments}) -> {_results}")
for _name, (_arguments, _results) in (("reference", _FORWARD), ("reference_backward", _BACKWARD)):
    _library.define(f"{_name}({_arguments}, str reason) -> {_results}")
_CONV_FORWARD = "Tensor x, Tensor weight, Tensor bias, Tensor? residual, bool adds_input"
_CONV_BACKWARD = "Tensor grad_out, Tensor x, Tensor weight, bool adds_input"
for _name, _reason in (("depthwise_conv2d", ""), ("depthwise_reference", ", str reason")):
    _library.define(f"{_name}({_CONV_FORWARD}{_reason}) -> Tensor")
    _library.define(f"{_name}_backward({_CONV_BACKWARD}) -> (Tensor, Tensor, Tensor)")
_conv_operator = torch.ops.polaformer.depthwise_conv2d.default
_conv_backward_operator = torch.ops.polaformer.depthwise_conv2d_backward.default
_forward_operator = torch.ops.polaformer.polarity_attention.default
_backward_operator = torch.ops.polaformer.polarity_attention_backward.default


_DISABLED = "POLAFORMER_KERNELS is none"
_LOAD_ERRORS: dict[str, str] = {}  # device type → why its kernels are not loaded


def _load_kernels() -> None:
    """Load the compiled extensions beside this file; record in _LOAD_ERRORS why one is missing."""
    for device_type in ("cpu", "cuda"):
        if os.environ.get("POLAFORMER_KERNELS") == "none":  # setup.py's switch, here for comparisons with the reference
            _LOAD_ERRORS[device_type] = _DISABLED
            continue
        libraries = sorted(Path(__file__).parent.glob(f"_{device_type}*.so"))
        if not libraries:
            _LOAD_ERRORS[device_type] = "they were not built"
        for library in libraries:
            try:
                # torch leaves this function unannotated
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            except OSError as error:  # built against another torch or CUDA
                _LOAD_ERRORS[device_type] = str(error)


_load_kernels()


def polarity_attention(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> Tensor:
    """Polarity-aware linear attention of PolaFormer++ (formulas in reference.py), by compiled kernels where installed.

    q, k, v: (B, H, N, D), any strides, one floating dtype; logits: (H, 2D), any floating dtype.
    Returns (B, H, N, D) in q's dtype, in the memory layout (B, N, H, D), so that joining the heads copies nothing.
    Saves q, k, v, the logits, a (B, H, 2D, D) state and 3·B·H·D numbers for backward.
    Differentiable any number of times in reverse mode, also by torch.func: use jacrev(jacrev(f)) instead of
    torch.func.hessian, which needs forward mode. Second and higher derivatives run in plain PyTorch.
    Raises ValueError, on every device and inside every graph, if N != height * width, D is odd, or shapes, dtypes or
    devices disagree.
    """
    out: Tensor = torch.ops.polaformer.polarity_attention(q, k, v, same_logits, opposite_logits, height, width)[0]
    return out


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """Depthwise convolution with same padding, plus a residual, by compiled kernels where installed.

    x, residual: (B, height, width, C) in one floating dtype, any strides; `residual=x` costs nothing more. weight:
    (C, 1, k, k) with an odd k below 1024, as of torch.nn.Conv2d, and bias: (C), zeros where there is none, in one
    floating dtype, which may be another. Stride and dilation are 1, padding is zeros. An NCHW tensor's view
    x.permute(0, 2, 3, 1) has this shape.
    Returns a contiguous (B, height, width, C) in x's dtype, under autocast too. Kernels are for k = 3 and 5; on GPUs
    from compute capability 8.0 on for float32, bfloat16 and float16, channels that fill multiples of 16 bytes, and up
    to 112 columns (images of 448 pixels), in float32 fewer where blocks have less than 163 KB of shared memory (56 if
    k = 5). They take weights as they are and sum in float32, or float64 if x is. PyTorch computes the rest, with
    weights rounded to x's dtype, and a warning says once why. Saves x and weight for backward. Differentiable any
    number of times in reverse mode, also by torch.func.
    Raises ValueError, on every device and inside every graph, if shapes, dtypes or devices disagree.
    """
    if bias is None:
        raise ValueError("bias is None; pass torch.zeros(C) where there is none")
    adds_input = residual is x
    other = None if adds_input else residual
    out: Tensor = torch.ops.polaformer.depthwise_conv2d(x, weight, bias, other, adds_input)
    return out


def has_compiled_kernels(device_type: str) -> bool:
    """Whether this module's operators on "cpu" or "cuda" run compiled kernels rather than the reference."""
    has_kernel, key = torch._C._dispatch_has_kernel_for_dispatch_key, {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    return all(has_kernel(f"polaformer::{name}", key) for name in ("polarity_attention", "depthwise_conv2d"))


def kernels_unavailable_reason(device_type: str) -> str:
    """Why "cpu" or "cuda" lacks compiled kernels, with the remedy; empty if it has them."""
    if has_compiled_kernels(device_type):
        return ""
    fault = _LOAD_ERRORS.get(device_type, "they were not built")
    remedy = "build them in the project's folder with: pip install --no-build-isolation -e ."
    if fault == _DISABLED:
        remedy = "unset it to use those that are built"
    return f"no compiled kernels for {device_type}: {fault}; {remedy}"


#: Files between a caller and an operator: ours, PyTorch's, contextlib's, and code that torch.compile generates.
_NOT_CALLERS = (
    *(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__)),
    *(contextlib.__file__, "<eval_with_key>"),
)


@functools.cache
def _warn_once(reason: str, operation: str = "polarity attention") -> None:
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_CALLERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{operation} runs in plain PyTorch: {reason}", stacklevel=level)


def _to_bnhd(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a (B, H, N, D) tensor, clamped to the dtype's range, into the memory layout of a contiguous (B, N, H, D)."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _empty_bnhd(like: Tensor) -> Tensor:
    batch, heads, tokens, head_dim = like.shape
    return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _forward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    same_logits: Tensor,
    opposite_logits: Tensor,
    height: int,
    width: int,
    reason: str = "",
) -> tuple[Tensor, ...]:
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    if reason:
        _warn_once(reason)
    out, *saved = reference.forward(q, k, v, same_logits, opposite_logits, height, width)
    return _to_bnhd(out, q.dtype), *saved


def _backward_reference(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    same_logits: Tensor,
    opposite_logits: Tensor,
    state: Tensor,
    key_mean: Tensor,
    key_shift: Tensor,
    height: int,
    width: int,
    _reason: str = "",
) -> tuple[Tensor, ...]:
    inputs, saved = (q, k, v, same_logits, opposite_logits), (state, key_mean, key_shift)
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    reference.check_saved(grad_out, q, saved)
    *grads, grad_same, grad_opposite = reference.backward(grad_out, inputs, saved, height, width)
    grad_q, grad_k, grad_v = (_to_bnhd(grad, q.dtype) for grad in grads)
    return grad_q, grad_k, grad_v, grad_same.to(same_logits.dtype), grad_opposite.to(opposite_logits.dtype)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> tuple[Tensor, ...]:
    # no warning on devices that we have no kernels for
    reason = kernels_unavailable_reason(q.device.type) if q.device.type in ("cpu", "cuda") else ""
    return _forward_reference(q, k, v, same_logits, opposite_logits, height, width, reason)


# CompositeImplicitAutograd: autograd differentiates the formulas of the reference operators.
_library.impl("reference", _forward_reference, "CompositeImplicitAutograd")
_library.impl("reference_backward", _backward_reference, "CompositeImplicitAutograd")
_library.impl("polarity_attention", _forward, "CompositeExplicitAutograd")
_library.impl("polarity_attention_backward", _backward_reference, "CompositeExplicitAutograd")


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> tuple[Tensor, ...]:
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    shapes, dtype = reference.saved_shapes(q), reference.compute_dtype(q)
    return _empty_bnhd(q), *(q.new_empty(shape, dtype=dtype) for shape in shapes)


def _backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    same_logits: Tensor,
    opposite_logits: Tensor,
    state: Tensor,
    key_mean: Tensor,
    key_shift: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, ...]:
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    reference.check_saved(grad_out, q, (state, key_mean, key_shift))
    logits = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (same_logits, opposite_logits))
    return *(_empty_bnhd(x) for x in (q, k, v)), *logits


def _conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, adds_input: bool, reason: str = ""
) -> Tensor:
    if reason:
        _warn_once(reason, "depthwise convolution")
    return reference.depthwise_conv2d(x, weight, bias, residual, adds_input).contiguous()


def _conv_forward(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, adds_input: bool) -> Tensor:
    # no warning on devices that we have no kernels for
    reason = kernels_unavailable_reason(x.device.type) if x.device.type in ("cpu", "cuda") else ""
    return _conv_reference(x, weight, bias, residual, adds_input, reason)


def _conv_backward_reference(
    grad_out: Tensor, x: Tensor, weight: Tensor, adds_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = reference.depthwise_conv2d_backward(grad_out, x, weight, adds_input)
    return grad_x.contiguous(), grad_weight.contiguous(), grad_bias


def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, adds_input: bool) -> Tensor:
    reference.check_depthwise(x, weight, bias, residual, adds_input)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _conv_backward_fake(grad_out: Tensor, x: Tensor, weight: Tensor, adds_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_depthwise_gradient(grad_out, x, weight)
    of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format), of_weight, weight.new_empty(weight.shape[0])


_library.impl("depthwise_reference", _conv_reference, "CompositeImplicitAutograd")
_library.impl("depthwise_reference_backward", _conv_backward_reference, "CompositeImplicitAutograd")
_library.impl("depthwise_conv2d", _conv_forward, "CompositeExplicitAutograd")
_library.impl("depthwise_conv2d_backward", _conv_backward_reference, "CompositeExplicitAutograd")
torch.library.register_fake(_conv_operator, _conv_fake, lib=_library)
torch.library.register_fake(_conv_backward_operator, _conv_backward_fake, lib=_library)
torch.library.register_fake(_forward_operator, _forward_fake, lib=_library)
torch.library.register_fake(_backward_operator, _backward_fake, lib=_library)


def _fold_calls(x: Tensor, dim: int | None, axis: int, calls: int) -> Tensor:
    """Join the mapped calls, on axis `dim` of x or sharing x if it is None, with the axis of one call's tensor."""
    x = x.unsqueeze(axis).expand(*x.shape[:axis], calls, *x.shape[axis:]) if dim is None else x.movedim(dim, axis)
    return x.flatten(axis, axis + 1)


def _vmap(
    operator: torch._ops.OpOverload, info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Batching rule of attention's operators: mapped calls become additional heads, as heads are independent.

    The heads' axis is 0 in logits (H, 2D) and their gradients, 1 in everything else.
    """
    calls: int = info.batch_size
    tensors = zip(arguments[:-2], in_dims[:-2], strict=True)
    folded = (_fold_calls(x, dim, 0 if x.dim() - (dim is not None) == 2 else 1, calls) for x, dim in tensors)
    results = operator(*folded, *arguments[-2:])
    axes = tuple(0 if x.dim() == 2 else 1 for x in results)
    unfolded = (x.unflatten(axis, (calls, x.shape[axis] // calls)) for x, axis in zip(results, axes, strict=True))
    return tuple(unfolded), axes


_IMAGE, _WEIGHT = 3, 0  # axis of the channels in images, and in weights and bias
_CONV_AXES = (_IMAGE, _WEIGHT, _WEIGHT, _IMAGE), _IMAGE  # of arguments and result
_CONV_BACKWARD_AXES = (_IMAGE, _IMAGE, _WEIGHT), (_IMAGE, _WEIGHT, _WEIGHT)


def _conv_vmap(
    operator: torch._ops.OpOverload, axes: tuple[Any, Any], info: Any, in_dims: Sequence[int | None], *arguments: Any
) -> tuple[Any, Any]:
    """Batching rule of the convolution's operators: mapped calls become additional channels."""
    of_arguments, of_results = axes
    tensors = zip(arguments[:-1], in_dims[:-1], of_arguments, strict=True)
    folded = (None if x is None else _fold_calls(x, dim, axis, info.batch_size) for x, dim, axis in tensors)
    results = operator(*folded, arguments[-1])

    def unfold(x: Tensor, axis: int) -> Tensor:
        # torch leaves this function unannotated
        unfolded: Tensor = x.unflatten(axis, (info.batch_size, x.shape[axis] // info.batch_size))  # type: ignore[no-untyped-call]
        return unfolded

    if isinstance(results, Tensor):
        return unfold(results, of_results), of_results
    return tuple(map(unfold, results, of_results)), of_results


def _below_autograd(operator: torch._ops.OpOverload, keys: Any, arguments: tuple[Any, ...]) -> Any:
    """Redispatch below autograd: to an outer level of torch.func, which needs gradients enabled, or to a kernel.

    Forward mode must be enabled as well, or an outer level of it would lose its tangents without an error.
    """
    with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


class _ReverseMode(_SingleLevelFunction):
    """An autograd function without a derivative in forward mode."""

    @staticmethod
    def jvp(_ctx: Any, *_tangents: Any) -> Any:
        raise NotImplementedError(
            "polaformer.ops has no forward-mode derivatives (jvp, jacfwd, hessian, forward_ad); use reverse mode, for"
            " example jacrev(jacrev(f)) instead of hessian(f), or the functions of the same names in"
            " polaformer.reference, which have them"
        )


class _Attention(_ReverseMode):
    """Autograd function of the forward operator at every level of torch.func; the saved outputs have no gradient."""

    @staticmethod
    def forward(keys: Any, *arguments: Any) -> Any:
        return _below_autograd(_forward_operator, keys, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keys, *tensors, ctx.height, ctx.width = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # else zeros of the saved outputs' sizes are made for nothing
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_grads_of_saved: None) -> Any:
        if grad_out is None:
            return (None,) * 8
        return None, *_backward_operator(grad_out, *ctx.saved_tensors, ctx.height, ctx.width), None, None


class _AttentionBackward(_ReverseMode):
    """Autograd function of the backward operator, differentiated through the reference.

    The saved tensors are differentiated as functions of the inputs, not as independent inputs.
    """

    @staticmethod
    def forward(keys: Any, *arguments: Any) -> Any:
        return _below_autograd(_backward_operator, keys, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keys, grad_out, q, k, v, same_logits, opposite_logits, *_saved, ctx.height, ctx.width = inputs
        ctx.save_for_backward(grad_out, q, k, v, same_logits, opposite_logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        def differentiate(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *logits: Tensor) -> tuple[Tensor, ...]:
            inputs = (q, k, v, *logits)
            _, *saved = reference.forward(q, k, v, logits[0], logits[1], ctx.height, ctx.width)
            first = reference.backward(grad_out, inputs, (saved[0], saved[1], saved[2]), ctx.height, ctx.width)
            return tuple(grad.to(x.dtype) for grad, x in zip(first, inputs, strict=True))

        vjp_fn = torch.func.vjp(differentiate, *ctx.saved_tensors)[1]
        return None, *vjp_fn(grads), *(None,) * 5


class _Conv(_ReverseMode):
    """Autograd function of the convolution."""

    @staticmethod
    def forward(keys: Any, *arguments: Any) -> Any:
        return _below_autograd(_conv_operator, keys, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keys, x, weight, _bias, residual, ctx.adds_input = inputs
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        _, of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if of_weight or of_bias:
            grads = _conv_backward_operator(grad_out, x, weight, ctx.adds_input)
        elif of_x:  # weights are frozen: the gradient of x alone is a convolution too, with the mirrored kernel
            no_bias = weight.new_zeros(weight.shape[0])
            grads = _conv_operator(grad_out, weight.flip(2, 3), no_bias, None, ctx.adds_input), None, None
        return None, *grads, grad_out if ctx.has_residual else None, None


class _ConvBackward(_ReverseMode):
    """Autograd function of the convolution's gradient, differentiated through the reference."""

    @staticmethod
    def forward(keys: Any, *arguments: Any) -> Any:
        return _below_autograd(_conv_backward_operator, keys, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keys, grad_out, x, weight, ctx.adds_input = inputs
        ctx.save_for_backward(grad_out, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        differentiate = functools.partial(reference.depthwise_conv2d_backward, adds_input=ctx.adds_input)
        vjp_fn = torch.func.vjp(differentiate, *ctx.saved_tensors)[1]
        return None, *vjp_fn(grads), None


_operator: Any
_function: Any
_rule: Any
for _operator, _function, _rule in (
    (_forward_operator, _Attention, functools.partial(_vmap, _forward_operator)),
    (_backward_operator, _AttentionBackward, functools.partial(_vmap, _backward_operator)),
    (_conv_operator, _Conv, functools.partial(_conv_vmap, _conv_operator, _CONV_AXES)),
    (
        _conv_backward_operator,
        _ConvBackward,
        functools.partial(_conv_vmap, _conv_backward_operator, _CONV_BACKWARD_AXES),
    ),
):
    # torch.library.register_autograd makes an autograd.Function, which torch.func cannot differentiate inside an
    # operator. Single-level functions are differentiated level by level, as PyTorch's own operators are.
    _apply = enable_single_level_autograd_function()(_function.apply)
    _library.impl(_operator.name(), _apply, "Autograd", with_keyset=True)
    torch.library.register_vmap(_operator, _rule, lib=_library)


# For exporters that decompose operators (torch.onnx). torch.compile and torch.export keep the operator whole, but where
# sizes are symbols they take dtypes and strides from here instead of from the fake implementation.
register_decomposition(_forward_operator)(_forward_reference)
register_decomposition(_conv_operator)(_conv_reference)


@register_flop_formula(torch.ops.polaformer.polarity_attention)
def _forward_flops(q_shape: tuple[int, int, int, int], *_args: Any, **_kwargs: Any) -> int:
    """8·D² per token and head: the state from keys and values, and both query flows times their half of it."""
    batch, heads, tokens, head_dim = q_shape
    return 8 * batch * heads * tokens * head_dim**2


@register_flop_formula(torch.ops.polaformer.polarity_attention_backward)
def _backward_flops(_grad_shape: object, q_shape: tuple[int, int, int, int], *_args: Any, **_kwargs: Any) -> int:
    """20·D² per token and head: what kernels need that save the state and recompute features."""
    batch, heads, tokens, head_dim = q_shape
    return 20 * batch * heads * tokens * head_dim**2


@register_flop_formula(torch.ops.polaformer.depthwise_conv2d)
def _conv_flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_args: Any, **_kwargs: Any) -> int:
    """2·k² per number of the output, as of torch's own convolution."""
    return 2 * weight_shape[2] * weight_shape[3] * math.prod(x_shape)


@register_flop_formula(torch.ops.polaformer.depthwise_conv2d_backward)
def _conv_backward_flops(
    _grad_shape: object, x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_args: Any, **_kwargs: Any
) -> int:
    """Twice that of forward: the gradients of input and weights."""
    return 2 * _conv_flops(x_shape, weight_shape)

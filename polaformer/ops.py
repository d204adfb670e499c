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
from torch.utils.flop_counter import register_flop_formula

from polaformer import reference

_library = torch.library.Library("polaformer", "DEF")
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor same_logits, Tensor opposite_logits"
_SAVED = "Tensor state, Tensor key_mean, Tensor key_shift"
_FORWARD = f"{_INPUTS}, int height, int width", f"(Tensor out, {_SAVED})"
_BACKWARD = f"Tensor grad_out, {_INPUTS}, {_SAVED}, int height, int width", "(Tensor, Tensor, Tensor, Tensor, Tensor)"
for _name, (_arguments, _results) in (("polarity_attention", _FORWARD), ("polarity_attention_backward", _BACKWARD)):
    _library.define(f"{_name}({_arguments}) -> {_results}")
for _name, (_arguments, _results) in (("reference", _FORWARD), ("reference_backward", _BACKWARD)):
    _library.define(f"{_name}({_arguments}, str reason) -> {_results}")


_FAULTS: dict[str, str] = {}  # device type → why its kernels are not there


def _load_kernels() -> None:
    for device_type in ("cpu", "cuda"):
        if os.environ.get("POLAFORMER_KERNELS") == "none":  # the build's own switch, for comparing with the reference
            _FAULTS[device_type] = "POLAFORMER_KERNELS is none"
            continue
        libraries = sorted(Path(__file__).parent.glob(f"_{device_type}*.so"))
        if not libraries:
            _FAULTS[device_type] = "they were not built"
        for library in libraries:
            try:
                torch.ops.load_library(library)
            except OSError as error:  # of another torch, or of another CUDA
                _FAULTS[device_type] = str(error)


_load_kernels()


def polarity_attention(
    q: Tensor, k: Tensor, v: Tensor, same_logits: Tensor, opposite_logits: Tensor, height: int, width: int
) -> Tensor:
    """Polarity-aware linear attention of PolaFormer++ through the fastest implementation that is installed.

    q, k, v: (B, H, N, D), any strides, one floating dtype; logits: (H, 2D), any floating dtype.
    Returns (B, H, N, D) in q's dtype, laid out in memory as (B, N, H, D) so that joining the heads costs nothing.
    Keeps q, k, v, a (B, H, 2D, D) state and (B, H, 3D) numbers for backward.
    Raises ValueError if N != height * width, D is odd, or shapes or dtypes disagree.
    """
    reference.check_inputs(q, k, v, (same_logits, opposite_logits), height, width)
    return torch.ops.polaformer.polarity_attention(q, k, v, same_logits, opposite_logits, height, width)[0]


def has_compiled_kernels(device_type: str) -> bool:
    """Whether polarity attention on "cpu" or "cuda" runs a compiled kernel rather than the reference."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    return torch._C._dispatch_has_kernel_for_dispatch_key("polaformer::polarity_attention", key)


def why_no_kernels(device_type: str) -> str:
    """What is wrong with the compiled kernels for "cpu" or "cuda", and the remedy; empty if they are there."""
    if has_compiled_kernels(device_type):
        return ""
    fault = _FAULTS.get(device_type, "they were not built")
    return f"no compiled kernels for {device_type}: {fault}; build them with: pip install --no-build-isolation -e ."


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"polarity attention runs in plain PyTorch: {reason}", stacklevel=2)


def _tokens_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A (B, H, N, D) tensor in a dtype that may be narrower, within its range; memory is a contiguous (B, N, H, D)."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _empty_tokens_first(like: Tensor) -> Tensor:
    batch, heads, tokens, head_width = like.shape
    return like.new_empty(batch, tokens, heads, head_width).transpose(1, 2)


@torch.library.impl(_library, "reference", "CompositeExplicitAutograd")
def _forward_reference(q, k, v, same_logits, opposite_logits, height, width, reason):
    if reason:
        _say_once(reason)
    out, *saved = reference.forward(q, k, v, same_logits, opposite_logits, height, width)
    return _tokens_first(out, q.dtype), *saved


@torch.library.impl(_library, "reference_backward", "CompositeExplicitAutograd")
def _backward_reference(
    grad_out, q, k, v, same_logits, opposite_logits, state, key_mean, key_shift, height, width, _reason
):
    inputs, saved = (q, k, v, same_logits, opposite_logits), (state, key_mean, key_shift)
    *grads, grad_same, grad_opposite = reference.backward(grad_out, inputs, saved, height, width)
    grad_q, grad_k, grad_v = (_tokens_first(grad, q.dtype) for grad in grads)
    return grad_q, grad_k, grad_v, grad_same.to(same_logits.dtype), grad_opposite.to(opposite_logits.dtype)


@torch.library.impl(_library, "polarity_attention", "CompositeExplicitAutograd")
def _forward(q, *arguments):
    known = q.device.type in ("cpu", "cuda")  # of other devices nobody expects kernels
    return _forward_reference(q, *arguments, why_no_kernels(q.device.type) if known else "")


@torch.library.impl(_library, "polarity_attention_backward", "CompositeExplicitAutograd")
def _backward(*arguments):
    return _backward_reference(*arguments, "")


@torch.library.register_fake("polaformer::polarity_attention", lib=_library)
def _forward_fake(q, k, v, same_logits, opposite_logits, height, width):
    batch, heads, _, head_width = q.shape
    per_head = (2 * head_width, head_width), (2 * head_width,), (head_width,)  # state, key_mean, key_shift
    kept = torch.promote_types(q.dtype, torch.float32)
    return _empty_tokens_first(q), *(q.new_empty(batch, heads, *shape, dtype=kept) for shape in per_head)


@torch.library.register_fake("polaformer::polarity_attention_backward", lib=_library)
def _backward_fake(grad_out, q, k, v, same_logits, opposite_logits, state, key_mean, key_shift, height, width):
    logits = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (same_logits, opposite_logits))
    return *(_empty_tokens_first(x) for x in (q, k, v)), *logits


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.height, ctx.width = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(*tensors, *saved)


def _differentiate(ctx, grad_out, *_grads_of_saved):
    operator = torch.ops.polaformer.polarity_attention_backward
    return *operator(grad_out, *ctx.saved_tensors, ctx.height, ctx.width), None, None


torch.library.register_autograd(
    "polaformer::polarity_attention", _differentiate, setup_context=_save_for_backward, lib=_library
)


@register_flop_formula(torch.ops.polaformer.polarity_attention)
def _forward_flops(q_shape, *_args, **_kwargs) -> int:
    """8·D² per token and head: keys with values into the state, both query flows with their half of it."""
    batch, heads, tokens, head_width = q_shape
    return 8 * batch * heads * tokens * head_width**2


@register_flop_formula(torch.ops.polaformer.polarity_attention_backward)
def _backward_flops(_grad_shape, q_shape, *_args, **_kwargs) -> int:
    """20·D² per token and head, as kernels must spend: the state is kept, features are computed again."""
    batch, heads, tokens, head_width = q_shape
    return 20 * batch * heads * tokens * head_width**2

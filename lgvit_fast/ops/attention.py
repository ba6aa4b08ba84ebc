"""Self-attention on a fused query-key-value projection, for training global aggregation heads."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lgvit_fast.ops import _triton
from lgvit_fast.ops.checks import check_memory
from lgvit_fast.ops.dispatch import Backend, Op

__all__ = ["attention", "attention_reference"]


def attention_reference(qkv: Tensor, num_heads: int) -> Tensor:
    """`attention` in plain PyTorch: the definition every backend is compared with."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _probabilities(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k and v `[B, heads, n, d]`, softmax `[B, heads, n, n]`, log2 of its sums `[B, heads, n]`."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return q, k, v, (scores - lse[..., None]).exp(), lse * 1.4426950408889634


def _attention_kernel(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    kernels = import_module("lgvit_fast.kernels.attention")
    found: tuple[Tensor, Tensor] = kernels.attention(qkv, num_heads, precision=_triton.precision())
    return found


def _attention_plain(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    _, _, v, p, lse = _probabilities(qkv, num_heads)
    out = (p @ v).transpose(1, 2).flatten(2).contiguous()
    return out, lse.to(torch.promote_types(qkv.dtype, torch.float32))


# On a CPU the operators run in plain PyTorch, so that their registration can be checked there, or
# under Triton's interpreter.
_operator = torch.library.custom_op(
    "lgvit_fast::attention", _attention_kernel, mutates_args=(), device_types="cuda"
)
_operator.register_kernel("cpu")(_attention_kernel if _triton.INTERPRETED else _attention_plain)


@_operator.register_fake
def _(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    batch, count, columns = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return (
        qkv.new_empty((batch, count, columns // 3)),
        qkv.new_empty((batch, num_heads, count), dtype=dtype),
    )


def _backward_kernel(
    gradient: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int
) -> Tensor:
    kernels = import_module("lgvit_fast.kernels.attention")
    found: Tensor = kernels.attention_backward(
        gradient, qkv, out, lse, num_heads, precision=_triton.precision()
    )
    return found


def _backward_plain(
    gradient: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int
) -> Tensor:
    q, k, v, p, _ = _probabilities(qkv, num_heads)
    g = gradient.to(qkv.dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    y = out.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    ds = p * (g @ v.transpose(-2, -1) - (g * y).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    grads = torch.stack((ds @ k, ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ g))
    return grads.permute(1, 3, 0, 2, 4).flatten(2).contiguous()


_backward_operator = torch.library.custom_op(
    "lgvit_fast::attention_backward", _backward_kernel, mutates_args=(), device_types="cuda"
)
_backward_operator.register_kernel("cpu")(
    _backward_kernel if _triton.INTERPRETED else _backward_plain
)


@_backward_operator.register_fake
def _(gradient: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.num_heads = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, _: object) -> tuple[Tensor | None, None]:
    if gradient is None:
        return None, None
    return _backward_operator(gradient, *ctx.saved_tensors, ctx.num_heads), None


_operator.register_autograd(_backward, setup_context=_keep)


def _attention_triton(qkv: Tensor, num_heads: int) -> Tensor:
    out: Tensor = _operator(qkv, num_heads)[0]
    return out


def _refuse_triton(qkv: Tensor, num_heads: int) -> str | None:
    if qkv.shape[-1] > 3 * 128 * num_heads:
        return "the kernel takes heads of at most 128 channels"
    return _triton.refuse(qkv.detach())


_op = Op(
    "attention",
    Backend("triton", _attention_triton, _triton.why_missing, _refuse_triton),
    Backend("torch", attention_reference),
)


def attention(qkv: Tensor, num_heads: int, *, backend: str | None = None) -> Tensor:
    """`softmax(q k^T / sqrt(C / heads)) v`, heads side by side; differentiable once.

    Args:
        qkv: `[B, n, 3C]`, ordered q, k, v, heads contiguous in each.
        num_heads: heads; must divide C.
        backend: one of `lgvit_fast.ops.CHOICES` for this call only.

    Returns:
        `[B, n, C]`.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: the backend asked for cannot run here.
    """
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads) or not qkv.shape[2]:
        raise ValueError(
            f"attention: qkv has shape {tuple(qkv.shape)},"
            f" expected [B, n, 3C] with C a multiple of {num_heads} heads"
        )
    check_memory("attention", qkv=qkv)
    out: Tensor = _op(qkv, num_heads, backend=backend)
    return out

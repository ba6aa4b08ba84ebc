"""Depthwise 3x3 convolution, bias and gelu on the token layout, for training.

The grid of patch tokens is convolved where it lies: no permute to `[B, C, H, W]` and back.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lgvit_fast.ops import _triton
from lgvit_fast.ops.checks import check_memory
from lgvit_fast.ops.dispatch import Backend, Op
from lgvit_fast.ops.lph import depthwise3x3

__all__ = ["depthwise_gelu", "depthwise_gelu_reference"]


def depthwise_gelu_reference(
    tokens: Tensor, patch_grid: tuple[int, int], weight: Tensor, bias: Tensor
) -> Tensor:
    """`depthwise_gelu` in plain PyTorch: the definition every backend is compared with."""
    return F.gelu(depthwise3x3(tokens, patch_grid, weight, bias))


def _inner(
    tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens as a map, and the gelu's input, both `[B, C, H, W]`."""
    grid = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    kernel = weight.unsqueeze(1).to(tokens.dtype)
    return grid, F.conv2d(grid, kernel, bias.to(tokens.dtype), padding=1, groups=weight.shape[0])


def _kernel(tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    kernels = import_module("lgvit_fast.kernels.depthwise")
    out: Tensor = kernels.depthwise_gelu(tokens, (height, width), weight, bias)
    return out


def _plain(tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    _, z = _inner(tokens, height, width, weight, bias)
    return F.gelu(z).permute(0, 2, 3, 1).flatten(1, 2).contiguous()


# On a CPU the operators run in plain PyTorch, so that their registration can be checked there, or
# under Triton's interpreter.
_operator = torch.library.custom_op(
    "lgvit_fast::depthwise_gelu", _kernel, mutates_args=(), device_types="cuda"
)
_operator.register_kernel("cpu")(_kernel if _triton.INTERPRETED else _plain)


@_operator.register_fake
def _(tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _backward_kernel(
    gradient: Tensor, tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = import_module("lgvit_fast.kernels.depthwise")
    found: tuple[Tensor, Tensor, Tensor] = kernels.depthwise_gelu_backward(
        gradient, tokens, (height, width), weight, bias
    )
    return found


def _backward_plain(
    gradient: Tensor, tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grid_map, z = _inner(tokens, height, width, weight, bias)
    outer = gradient.unflatten(1, (height, width)).permute(0, 3, 1, 2).to(tokens.dtype)
    inner = torch.ops.aten.gelu_backward(outer, z)
    channels = weight.shape[0]
    result = torch.ops.aten.convolution_backward(
        inner, grid_map, weight.unsqueeze(1).to(tokens.dtype), [channels],
        [1, 1], [1, 1], [1, 1], False, [0, 0], channels, [True, True, True],
    )  # fmt: skip
    return (
        result[0].permute(0, 2, 3, 1).flatten(1, 2).contiguous(),
        result[1].squeeze(1).to(weight.dtype),
        result[2].to(bias.dtype),
    )


_backward_operator = torch.library.custom_op(
    "lgvit_fast::depthwise_gelu_backward", _backward_kernel, mutates_args=(), device_types="cuda"
)
_backward_operator.register_kernel("cpu")(
    _backward_kernel if _triton.INTERPRETED else _backward_plain
)


@_backward_operator.register_fake
def _(
    gradient: Tensor, tokens: Tensor, height: int, width: int, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        tokens.new_empty(tokens.shape),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, ctx.height, ctx.width, weight, bias = inputs
    ctx.save_for_backward(tokens, weight, bias)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tokens, weight, bias = ctx.saved_tensors
    grads = _backward_operator(gradient, tokens, ctx.height, ctx.width, weight, bias)
    return grads[0], None, None, grads[1], grads[2]


_operator.register_autograd(_backward, setup_context=_keep)


def _depthwise_gelu_triton(
    tokens: Tensor, patch_grid: tuple[int, int], weight: Tensor, bias: Tensor
) -> Tensor:
    out: Tensor = _operator(tokens, *patch_grid, weight, bias)
    return out


def _refuse_triton(tokens: Tensor, *args: object) -> str | None:
    return _triton.refuse(tokens.detach())


_op = Op(
    "depthwise_gelu",
    Backend("triton", _depthwise_gelu_triton, _triton.why_missing, _refuse_triton),
    Backend("torch", depthwise_gelu_reference),
)


def depthwise_gelu(
    tokens: Tensor,
    patch_grid: tuple[int, int],
    weight: Tensor,
    bias: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """`gelu(depthwise 3x3 of tokens + bias)` with zero padding; differentiable once.

    Args:
        tokens: `[B, H * W, C]`, row-major.
        patch_grid: `(H, W)`.
        weight: `[C, 3, 3]`.
        bias: `[C]`.
        backend: one of `lgvit_fast.ops.CHOICES` for this call only.

    Returns:
        `[B, H * W, C]`.

    Raises:
        ValueError: a shape or device does not fit.
        RuntimeError: the backend asked for cannot run here.
    """
    height, width = patch_grid
    if tokens.dim() != 3 or min(patch_grid) < 1 or tokens.shape[1] != height * width:
        raise ValueError(
            f"depthwise_gelu: tokens has shape {tuple(tokens.shape)},"
            f" expected [B, {height} * {width}, C]"
        )
    channels = tokens.shape[2]
    if tuple(weight.shape) != (channels, 3, 3) or tuple(bias.shape) != (channels,):
        raise ValueError(
            f"depthwise_gelu: weight has shape {tuple(weight.shape)} and bias {tuple(bias.shape)},"
            f" expected {(channels, 3, 3)} and {(channels,)}"
        )
    if weight.device != tokens.device or bias.device != tokens.device:
        raise ValueError(
            f"depthwise_gelu: weight is on {weight.device}, bias on {bias.device},"
            f" tokens on {tokens.device}; they must agree"
        )
    check_memory("depthwise_gelu", tokens=tokens, weight=weight, bias=bias)
    out: Tensor = _op(tokens, patch_grid, weight, bias, backend=backend)
    return out

"""The Triton side of the head ops: where it can run, and the launches as registered operators.

Eager calls launch the kernels directly. A call that is being compiled goes through an operator of
`torch.library` instead, which the compiler takes as one node. Triton itself is imported at the first
launch, so the package works without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

__all__ = [
    "INTERPRETED",
    "exit_step",
    "gah_pool",
    "lph_node",
    "lph_pool",
    "precision",
    "refuse",
    "why_missing",
]

_INSTALLED = find_spec("triton") is not None
# Triton's own variable stands in for a GPU: kernels then run on the CPU, under its interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None if they can."""
    if not _INSTALLED:
        return "Triton is not installed"
    if device.type == "cuda":
        return _why_too_old(device)
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"Triton kernels need a CUDA device, the tensors are on {device.type}"


@cache
def _why_too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"Triton kernels need compute capability 8.0, the device has {major}.{minor}"
    return None


def refuse(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "the kernels have no gradient; call under torch.no_grad() or inference_mode()"
    return None


def lph_pool(*args: Any) -> Tensor:
    """Launch `lgvit_fast.kernels.lph.lph_pool`; arguments as of `_lph_pool`."""
    return _lph_pool(*args) if torch.compiler.is_compiling() else _launch_lph_pool(*args)


def gah_pool(*args: Any) -> Tensor:
    """Launch `lgvit_fast.kernels.gah.gah_pool`; arguments as of `_gah_pool`."""
    return _gah_pool(*args) if torch.compiler.is_compiling() else _launch_gah_pool(*args)


def exit_step(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `lgvit_fast.kernels.exit_step.exit_step`; arguments as of `_exit_step`."""
    return _exit_step(*args) if torch.compiler.is_compiling() else _launch_exit_step(*args)


def precision() -> str:
    """How float32 products are made: torch's own setting for matrix products decides."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def lph_node(name: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pooled local head as an operator of torch, which `torch.compile` keeps as one node.

    Args:
        name: of the operator, with its namespace.
        run: takes the operator's arguments in their order.
    """

    def node(
        tokens: Tensor,
        height: int,
        width: int,
        num_prefix_tokens: int,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        depthwise_weight: Tensor | None,
        depthwise_bias: Tensor | None,
    ) -> Tensor:
        vectors = (weight, bias, scale, shift, depthwise_weight, depthwise_bias)
        return run(tokens, height, width, num_prefix_tokens, *vectors)

    def fake(tokens: Tensor, *args: object) -> Tensor:
        return tokens.new_empty((tokens.shape[0], 2, tokens.shape[2]), dtype=torch.float32)

    op = torch.library.custom_op(name, node, mutates_args=())
    op.register_fake(fake)
    return op


def _launch_lph_pool(
    tokens: Tensor, height: int, width: int, num_prefix_tokens: int, *vectors: Tensor | None
) -> Tensor:
    launch = import_module("lgvit_fast.kernels.lph").lph_pool
    grid = (height, width)
    pooled: Tensor = launch(tokens, grid, num_prefix_tokens, *vectors, precision=precision())
    return pooled


_lph_pool = lph_node("lgvit_fast::lph_pool_triton", _launch_lph_pool)


def _launch_gah_pool(
    tokens: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    qk_weight: Tensor,
    num_heads: int,
    stride: int,
    pool: str,
) -> Tensor:
    launch = import_module("lgvit_fast.kernels.gah").gah_pool
    grid, how = (height, width), precision()
    pooled: Tensor = launch(
        tokens, grid, num_prefix_tokens, qk_weight, num_heads, stride, pool, precision=how
    )
    return pooled


_gah_pool = torch.library.custom_op(
    "lgvit_fast::gah_pool_triton", _launch_gah_pool, mutates_args=()
)


@_gah_pool.register_fake
def _(
    tokens: Tensor,
    height: int,
    width: int,
    num_prefix_tokens: int,
    qk_weight: Tensor,
    num_heads: int,
    *args: object,
) -> Tensor:
    return tokens.new_empty((tokens.shape[0], num_heads, tokens.shape[2]))


def _launch_exit_step(
    pooled: Tensor,
    tokens: Tensor,
    num_class_tokens: int,
    weight: Tensor,
    bias: Tensor,
    kind: int,
    threshold: float,
    patience: int,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = import_module("lgvit_fast.kernels.exit_step").exit_step
    rule = (kind, threshold, patience)
    step = launch(
        pooled, tokens, num_class_tokens, weight, bias, rule, state, precision=precision()
    )
    if not torch.compiler.is_compiling() and not state.is_inference():
        increment_version(state)  # as any operator that writes in place
    return step.logits, step.leave, step.valid


_exit_step = torch.library.custom_op(
    "lgvit_fast::exit_step_triton", _launch_exit_step, mutates_args=("state",)
)


@_exit_step.register_fake
def _(
    pooled: Tensor, tokens: Tensor, num_class_tokens: int, weight: Tensor, *args: object
) -> tuple[Tensor, Tensor, Tensor]:
    batch = pooled.shape[0]
    logits = pooled.new_empty((batch, weight.shape[0]), dtype=weight.dtype)
    return (
        logits,
        pooled.new_empty((batch,), dtype=torch.bool),
        pooled.new_empty((batch,), dtype=torch.bool),
    )

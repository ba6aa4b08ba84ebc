"""Argument checks the head ops share, made before any kernel is launched."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_memory", "check_tokens", "check_vector"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_memory(op: str, **tensors: Tensor | None) -> None:
    """Check that storages hold the tensors: torch itself reads a storage resized to 0.

    Raises:
        ValueError: naming the op, the argument, and what its storage holds.
    """
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is None or tensor.layout != torch.strided or tensor.numel() == 0:
            continue
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        needs = (tensor.storage_offset() + last + 1) * tensor.itemsize
        if needs > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{op}: {name} needs {needs} bytes, its storage has"
                f" {tensor.untyped_storage().nbytes()}: was the storage resized?"
            )


def check_vector(
    op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor
) -> None:
    """Check one of a head's vectors against its shape and the device of `like`.

    Raises:
        ValueError: naming the op, the argument, what was given and what was expected.
    """
    if tensor is None:
        raise ValueError(f"{op}: {name} is missing, expected shape {shape}")
    if tuple(tensor.shape) != shape or tensor.dtype not in _FLOATING:
        raise ValueError(
            f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected floating {shape}"
        )
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {like.device}")


def check_tokens(
    op: str,
    tokens: Tensor,
    patch_grid: tuple[int, int],
    num_prefix_tokens: int,
    weight: Tensor,
    rows: int,
) -> None:
    """Check tokens `[B, P + N, C]` against a grid `(H, W)` and a `[rows * C, C]` matrix.

    Raises:
        ValueError: naming the op, the argument, what was given and what was expected.
    """
    if tokens.dim() != 3:
        raise ValueError(f"{op}: tokens has shape {tuple(tokens.shape)}, expected [B, P + N, C]")
    if tokens.dtype not in _FLOATING:
        raise ValueError(f"{op}: tokens is {tokens.dtype}, expected a floating dtype")
    height, width = patch_grid
    expected = num_prefix_tokens + height * width
    if height < 1 or width < 1 or num_prefix_tokens < 0 or tokens.shape[1] != expected:
        raise ValueError(
            f"{op}: tokens has {tokens.shape[1]} rows an image, expected {num_prefix_tokens} prefix"
            f" tokens + {height} x {width} patches = {expected}"
        )
    channels = tokens.shape[2]
    if channels < 1:
        raise ValueError(f"{op}: tokens has shape {tuple(tokens.shape)}, expected C of at least 1")
    if tuple(weight.shape) != (rows * channels, channels):
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)},"
            f" expected {(rows * channels, channels)} for width {channels}"
        )
    if weight.dtype != tokens.dtype or weight.device != tokens.device:
        raise ValueError(
            f"{op}: weight is {weight.dtype} on {weight.device},"
            f" tokens are {tokens.dtype} on {tokens.device}; they must agree"
        )
    check_memory(op, tokens=tokens, weight=weight)

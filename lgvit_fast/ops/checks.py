"""Argument checks the head ops share, made before any kernel is launched."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_tokens"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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

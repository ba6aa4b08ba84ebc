"""Global aggregation head, pooled: attention over a subsampled grid, averaged over its queries.

The mean over queries commutes with the value product: with `a_h` the column mean of head h's
attention matrix, the mean output is `(a_h s) Wv_h`. So the op ends at `a_h s`, one vector per image and
head; what is left is linear, and the exit folds it (see docs/kernels.md). Only queries and keys need
full GEMMs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lgvit_fast.ops import _cpp, _triton
from lgvit_fast.ops.checks import check_tokens
from lgvit_fast.ops.dispatch import Backend, Op

__all__ = ["POOLS", "gah_pool", "gah_pool_reference", "pool_grid", "pooled_grid"]

POOLS = ("subsample", "average")


def pooled_grid(patch_grid: tuple[int, int], stride: int) -> tuple[int, int]:
    """Grid size after pooling by `stride`; partial windows count (14 -> 5 at stride 3)."""
    return -(-patch_grid[0] // stride), -(-patch_grid[1] // stride)


def pool_grid(tokens: Tensor, patch_grid: tuple[int, int], stride: int, pool: str) -> Tensor:
    """Reduce patch tokens `[B, H * W, C]` to `[B, ceil(H/r) * ceil(W/r), C]`.

    Args:
        tokens: patch tokens, row-major.
        patch_grid: `(H, W)`.
        stride: r >= 1.
        pool: "subsample" takes every r-th row and column (the published form), "average" the mean
            of each r x r window, of what lies inside the grid at its border.
    """
    if stride == 1:
        return tokens
    grid = tokens.unflatten(1, patch_grid)
    if pool == "subsample":
        subsampled: Tensor = grid[:, ::stride, ::stride].flatten(1, 2)
        return subsampled
    pooled = F.avg_pool2d(grid.permute(0, 3, 1, 2), stride, ceil_mode=True, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1).flatten(1, 2)


def gah_pool_reference(
    tokens: Tensor,
    patch_grid: tuple[int, int],
    num_prefix_tokens: int,
    qk_weight: Tensor,
    num_heads: int,
    stride: int,
    pool: str,
) -> Tensor:
    """`gah_pool` in plain PyTorch: the definition every backend is compared with."""
    s = pool_grid(tokens[:, num_prefix_tokens:], patch_grid, stride, pool)
    batch, count, width = s.shape
    head_dim = width // num_heads
    accumulate = torch.promote_types(s.dtype, torch.float32)
    q, k = (
        F.linear(s, qk_weight)
        .view(batch, count, 2, num_heads, head_dim)
        .permute(2, 0, 3, 1, 4)
        .to(accumulate)
    )
    attention = torch.softmax(q @ k.transpose(-2, -1) * head_dim**-0.5, dim=-1).mean(dim=2)
    return (attention @ s.to(accumulate)).to(s.dtype)


def _gah_pool_triton(
    tokens: Tensor,
    patch_grid: tuple[int, int],
    num_prefix_tokens: int,
    qk_weight: Tensor,
    num_heads: int,
    stride: int,
    pool: str,
) -> Tensor:
    return _triton.gah_pool(
        tokens, *patch_grid, num_prefix_tokens, qk_weight, num_heads, stride, pool
    )


def _refuse_triton(tokens: Tensor, *args: object) -> str | None:
    return _triton.refuse(tokens)


def _gah_pool_cpp(
    tokens: Tensor,
    patch_grid: tuple[int, int],
    num_prefix_tokens: int,
    qk_weight: Tensor,
    num_heads: int,
    stride: int,
    pool: str,
) -> Tensor:
    op, average = torch.ops.lgvit_fast.gah_pool_cpp, pool == "average"
    pooled: Tensor = op(
        tokens, *patch_grid, num_prefix_tokens, qk_weight, num_heads, stride, average
    )
    return pooled


def _refuse_cpp(
    tokens: Tensor, grid: object, prefix: int, weight: Tensor, *args: object
) -> str | None:
    return _cpp.refuse(tokens, weight)


_op = Op(
    "gah_pool",
    Backend("triton", _gah_pool_triton, _triton.why_missing, _refuse_triton),
    Backend("cpp", _gah_pool_cpp, _cpp.why_missing, _refuse_cpp),
    Backend("torch", gah_pool_reference),
)


def gah_pool(
    tokens: Tensor,
    patch_grid: tuple[int, int],
    num_prefix_tokens: int,
    qk_weight: Tensor,
    num_heads: int = 8,
    stride: int = 2,
    pool: str = "subsample",
    *,
    backend: str | None = None,
) -> Tensor:
    """Pooled tokens of a global aggregation head, averaged by its attention (paper section 3.3).

    Args:
        tokens: `[B, P + N, C]`, any strides; float32, float64, bfloat16 or float16.
        patch_grid: `(H, W)` with `H * W == N`.
        num_prefix_tokens: P, the leading tokens to leave out.
        qk_weight: `[2C, C]`, rows ordered q, k, heads contiguous in each; no bias.
        num_heads: attention heads; must divide C.
        stride: pooling stride r >= 1.
        pool: "subsample" or "average", see `pool_grid`.
        backend: one of `lgvit_fast.ops.CHOICES` for this call only.

    Returns:
        `[B, heads, C]` in the tokens' dtype, summed in float32 or more: for each head
        `mean_q softmax(q k^T / sqrt(C / heads)) s`, before the value and the output projection.

    Raises:
        ValueError: a shape, dtype, device or option does not fit.
        RuntimeError: the backend asked for cannot run here.
    """
    check_tokens("gah_pool", tokens, patch_grid, num_prefix_tokens, qk_weight, rows=2)
    if num_heads < 1 or tokens.shape[-1] % num_heads:
        raise ValueError(
            f"gah_pool: num_heads={num_heads} does not divide width {tokens.shape[-1]}"
        )
    if stride < 1:
        raise ValueError(f"gah_pool: stride={stride}, expected at least 1")
    if pool not in POOLS:
        raise ValueError(f"gah_pool: pool={pool!r}, expected one of {POOLS}")
    return _op(
        tokens, patch_grid, num_prefix_tokens, qk_weight, num_heads, stride, pool, backend=backend
    )

"""Local perception head, pooled: from a block's tokens to the two vectors an exit decides on.

The mean over tokens commutes with every affine map after the last gelu, so the head's second GEMM,
its last BatchNorms and the classifier act on one vector an image (see docs/kernels.md). What is
left per token is one GEMM, a gelu, an affine, the depthwise 3x3 and a second gelu.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lgvit_fast import _extension
from lgvit_fast.ops import _cpp, _triton
from lgvit_fast.ops.checks import check_memory, check_tokens, check_vector
from lgvit_fast.ops.contest import Contest, size_class
from lgvit_fast.ops.dispatch import Backend, Op

__all__ = ["LPHWeights", "depthwise3x3", "gemm_and_tail", "lph_pool", "lph_pool_reference"]


class LPHWeights(NamedTuple):
    """What a local perception head computes per token, BatchNorm folded to an affine.

    The four fields after `bias` are None for the light head, which has no depthwise step. Matrices
    carry the compute dtype; vectors and depthwise taps are float32 (float64 in a float64 model).
    """

    weight: Tensor  # [C, C], first pointwise convolution
    bias: Tensor  # [C]
    scale: Tensor | None = None  # [C], BatchNorm 1
    shift: Tensor | None = (
        None  # [C]; cannot move into depthwise_bias: the zero padding comes after
    )
    depthwise_weight: Tensor | None = None  # [C, 3, 3]
    depthwise_bias: Tensor | None = None  # [C]


def depthwise3x3(
    tokens: Tensor, patch_grid: tuple[int, int], weight: Tensor, bias: Tensor
) -> Tensor:
    """Depthwise 3x3 convolution with zero padding on the token layout.

    Args:
        tokens: `[B, N, C]`, patches row-major.
        patch_grid: `(H, W)` with `H * W == N`.
        weight: `[C, 3, 3]`.
        bias: `[C]`.

    Returns:
        `[B, N, C]`.
    """
    batch, count, width = tokens.shape
    grid = tokens.reshape(batch, *patch_grid, width).permute(0, 3, 1, 2)
    out = F.conv2d(grid, weight.unsqueeze(1), bias, padding=1, groups=width)
    return out.permute(0, 2, 3, 1).reshape(batch, count, width)


def lph_pool_reference(
    tokens: Tensor, patch_grid: tuple[int, int], num_prefix_tokens: int, weights: LPHWeights
) -> Tensor:
    """`lph_pool` in plain PyTorch: the definition every backend is compared with."""
    x = tokens[:, num_prefix_tokens:]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    hidden = F.gelu(F.linear(x, weights.weight, weights.bias.to(x.dtype)))
    if weights.depthwise_weight is not None and weights.depthwise_bias is not None:
        assert weights.scale is not None and weights.shift is not None
        hidden = (hidden * weights.scale + weights.shift).to(x.dtype)
        taps, bias = weights.depthwise_weight.to(x.dtype), weights.depthwise_bias.to(x.dtype)
        hidden = F.gelu(depthwise3x3(hidden, patch_grid, taps, bias))
    pooled = (hidden.mean(1, dtype=accumulate), x.mean(1, dtype=accumulate))
    return torch.stack(pooled, dim=1)


def _lph_pool_triton(
    tokens: Tensor, patch_grid: tuple[int, int], num_prefix_tokens: int, weights: LPHWeights
) -> Tensor:
    return _triton.lph_pool(tokens, *patch_grid, num_prefix_tokens, *weights)


def _refuse_triton(tokens: Tensor, *args: object) -> str | None:
    return _triton.refuse(tokens)


def gemm_and_tail(
    tokens: Tensor, patch_grid: tuple[int, int], num_prefix_tokens: int, weights: LPHWeights
) -> Tensor:
    """`lph_pool` as torch's own GEMM and one kernel for all that follows it, `lgvit_fast::lph_tail`.

    The GEMM takes the prefix tokens along: its rows are contiguous then, and nothing is copied. The
    kernel adds the bias, in float32: a GEMM wants it in the tokens' dtype, which is a launch more.
    """
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    hidden = F.linear(tokens, weights.weight)
    vectors = (None if v is None else v.float().contiguous() for v in weights[1:])
    op = torch.ops.lgvit_fast.lph_tail
    pooled: Tensor = op(hidden, tokens, *patch_grid, num_prefix_tokens, *vectors)
    return pooled


if _extension.why_compact_missing() is None:

    @torch.library.register_fake("lgvit_fast::lph_tail")
    def _(hidden: Tensor, tokens: Tensor, *args: object) -> Tensor:
        return tokens.new_empty((tokens.shape[0], 2, tokens.shape[2]), dtype=torch.float32)


def _lph_pool_cpp(
    tokens: Tensor, patch_grid: tuple[int, int], num_prefix_tokens: int, weights: LPHWeights
) -> Tensor:
    if tokens.is_cuda:
        return gemm_and_tail(tokens, patch_grid, num_prefix_tokens, weights)
    op = torch.ops.lgvit_fast.lph_pool_cpp
    pooled: Tensor = op(tokens, *patch_grid, num_prefix_tokens, *weights)
    return pooled


def _missing_cpp(device: torch.device) -> str | None:
    if device.type == "cuda":
        return _extension.why_missing(device)
    return _cpp.why_missing(device)


def _refuse_cpp(tokens: Tensor, grid: object, prefix: int, weights: LPHWeights) -> str | None:
    if tokens.is_cuda:
        return _triton.refuse(tokens, *(v for v in weights if v is not None))
    return _cpp.refuse(tokens, *weights)


def _kind(
    tokens: Tensor, patch_grid: tuple[int, int], num_prefix_tokens: int, weights: LPHWeights
) -> Hashable | None:
    """What decides between the Triton pair, which stores u or nothing, and the GEMM and tail."""
    if not tokens.is_cuda:
        return None
    full = "full" if weights.depthwise_weight is not None else "light"
    rows = tokens.shape[0] * patch_grid[0] * patch_grid[1]
    return full, str(tokens.dtype), tokens.shape[2], size_class(rows)


def _run_measured(
    tokens: Tensor, height: int, width: int, num_prefix_tokens: int, *weights: Tensor
) -> Tensor:
    call = (tokens, (height, width), num_prefix_tokens, LPHWeights(*weights))
    return _op.measured(*call).run(*call)


_measured = _triton.lph_node("lgvit_fast::lph_pool", _run_measured)


def _as_one_node(
    tokens: Tensor, patch_grid: tuple[int, int], num_prefix_tokens: int, weights: LPHWeights
) -> Tensor:
    pooled: Tensor = _measured(tokens, *patch_grid, num_prefix_tokens, *weights)
    return pooled


_op = Op(
    "lph_pool",
    Backend("triton", _lph_pool_triton, _triton.why_missing, _refuse_triton),
    Backend("cpp", _lph_pool_cpp, _missing_cpp, _refuse_cpp),
    Backend("torch", lph_pool_reference),
    contest=Contest("lph_pool", _kind),
    compiled=Backend("measured", _as_one_node),
)


def lph_pool(
    tokens: Tensor,
    patch_grid: tuple[int, int],
    num_prefix_tokens: int,
    weights: LPHWeights,
    *,
    backend: str | None = None,
) -> Tensor:
    """Mean hidden vector and mean token of a local perception head (paper section 3.3, exact form).

    Args:
        tokens: `[B, P + N, C]`, any strides; float32, float64, bfloat16 or float16.
        patch_grid: `(H, W)` with `H * W == N`.
        num_prefix_tokens: P, the leading tokens to leave out.
        weights: the folded head; `depthwise_weight is None` selects the light head.
        backend: one of `lgvit_fast.ops.CHOICES` for this call only.

    Returns:
        `[B, 2, C]` float32 (float64 for float64 tokens). Row 0 is the mean over the N patches of
        `gelu(dw(scale * gelu(x W^T + b) + shift))` (full) or `gelu(x W^T + b)` (light), row 1 the
        mean of x.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        RuntimeError: the backend asked for cannot run here.
    """
    check_tokens("lph_pool", tokens, patch_grid, num_prefix_tokens, weights.weight, rows=1)
    width = tokens.shape[2]
    shapes: dict[str, tuple[int, ...]] = {"bias": (width,)}
    if weights.depthwise_weight is not None:
        shapes |= dict.fromkeys(("scale", "shift", "depthwise_bias"), (width,))
        shapes["depthwise_weight"] = (width, 3, 3)
    vectors = {name: getattr(weights, name) for name in LPHWeights._fields[1:]}
    for name, vector in vectors.items():
        if name in shapes:
            check_vector("lph_pool", name, vector, shapes[name], tokens)
        elif vector is not None:
            raise ValueError(f"lph_pool: {name} is given without depthwise_weight")
    check_memory("lph_pool", **vectors)
    return _op(tokens, patch_grid, num_prefix_tokens, weights, backend=backend)

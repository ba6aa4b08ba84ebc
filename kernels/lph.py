"""Local perception head, pooled: two launches from tokens to `[B, 2, C]`.

The first is a GEMM over all patch rows with gelu (and, for the full head, BatchNorm 1's affine) in
its epilogue. The full head stores that map u `[B, N, C]`, the one large intermediate, and the second
launch runs depthwise 3x3, gelu and mean over it. The light head stores only sums over rows, and the
second launch adds them up. Both second launches also take the mean of the tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgvit_fast.kernels.common import (
    check_tokens,
    check_weight,
    gelu_of,
    on_device,
    project_tile,
    projection_configs,
    projection_fits,
    projection_rows,
    require,
    within_reach,
)
from lgvit_fast.kernels.depthwise import CONFIGS, load_row, load_taps
from lgvit_fast.kernels.tuning import autotune, size_class

__all__ = ["lph_pool"]


@autotune(
    projection_configs(),
    key=["C", "BLOCK_M", "FULL", "PRECISION", "size"],
    fits=projection_fits,
)
@triton.jit(do_not_specialize=["rows", "size"])
def lph_project_kernel(
    x,  # tokens of the first image's first patch; image, token and channel strides follow
    weight,  # [C, C] contiguous
    bias,  # [C]
    scale,  # [C] BatchNorm 1 of the full head, unused by the light one
    shift,  # [C]
    out,  # full: u [B, N, C] contiguous; light: sums [tiles, segments, C] float32
    rows,  # B * N
    N,
    segments,  # images that a tile of BLOCK_M rows can touch
    size,  # size class of the rows, for the tuning alone
    stride_b,
    stride_t,
    stride_c,
    C: tl.constexpr,
    FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_M patch rows, across image borders, by BLOCK_N channels of u.

    Column tiles of the same rows are neighbours in launch order, so the rows are read from memory
    once and from L2 afterwards; the weight stays in L2 throughout.
    """
    column_tiles: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // column_tiles
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    col_mask = col < C
    image = row // N
    token = x + image.to(tl.int64) * stride_b + (row % N).to(tl.int64) * stride_t

    acc = project_tile(
        token, row_mask, 1, 1, 0, 0, stride_c, weight + col * C, col_mask,
        C, 1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    z = acc + tl.load(bias + col, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    hidden = gelu_of(z, x.dtype.element_ty)

    if FULL:
        gain = tl.load(scale + col, mask=col_mask, other=0.0).to(tl.float32)
        offset = tl.load(shift + col, mask=col_mask, other=0.0).to(tl.float32)
        hidden = hidden * gain[None, :] + offset[None, :]
        place = out + row.to(tl.int64)[:, None] * C + col[None, :]
        tl.store(place, hidden.to(out.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])
    else:
        first = tile * BLOCK_M // N
        for segment in range(segments):
            in_segment = row_mask & (image == first + segment)
            total = tl.sum(tl.where(in_segment[:, None], hidden, 0.0), axis=0)
            place = out + (tile.to(tl.int64) * segments + segment) * C + col
            tl.store(place, total, mask=col_mask)


@triton.jit
def mean_token(
    x, N, stride_t, stride_c, channel, mask, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean over one image's N tokens of BLOCK_C channels; `x` points at its first patch."""
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(0, N, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        place = x + p.to(tl.int64)[:, None] * stride_t + channel[None, :] * stride_c
        total += tl.load(place, mask=(p < N)[:, None] & mask[None, :], other=0.0).to(tl.float32)
    return tl.sum(total, axis=0) / N


@autotune(CONFIGS, key=["C", "H", "W", "size"])
@triton.jit(do_not_specialize=["size"])
def lph_depthwise_pool_kernel(
    u,  # [B, N, C] contiguous, from lph_project_kernel
    x,  # tokens of the first image's first patch; image, token and channel strides follow
    taps,  # [C, 9] contiguous depthwise weight, row-major over the 3 x 3 window
    bias,  # [C]
    pooled,  # [B, 2, C] contiguous float32
    H,
    W,
    size,  # size class of B, for the tuning alone
    stride_b,
    stride_t,
    stride_c,
    C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns one image by BLOCK_C channels and walks down the grid row by row.

    Each row of u, read in three column shifts, adds to the outputs above, at and below it: three
    accumulators of one row each take the place of a halo, and every value of u is loaded three times
    (two of them from L1) rather than nine.
    """
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image = (tl.program_id(0) // channel_tiles).to(tl.int64)
    c = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    N = H * W
    u += image * N * C
    x += image * stride_b
    pooled += image * 2 * C

    w00, w01, w02, w10, w11, w12, w20, w21, w22 = load_taps(taps, c, mask)
    offset = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[None, :]

    total = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    for start in range(0, W, BLOCK_W):
        col = start + tl.arange(0, BLOCK_W)
        above = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)  # output row y - 1
        here = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)  # output row y
        for y in range(H + 1):
            left, mid, right = load_row(u, y, col, c, mask, H, W, C)
            done = above + (left * w20 + mid * w21 + right * w22)
            above = here + (left * w10 + mid * w11 + right * w12)
            here = left * w00 + mid * w01 + right * w02
            inside = (y > 0) & (col < W)
            total += tl.where(inside[:, None], gelu_of(done + offset, u.dtype.element_ty), 0.0)

    tl.store(pooled + c, tl.sum(total, axis=0) / N, mask=mask)
    mean = mean_token(x, N, stride_t, stride_c, c, mask, BLOCK_P, BLOCK_C)
    tl.store(pooled + C + c, mean, mask=mask)


@triton.jit
def lph_sum_pool_kernel(
    sums,  # [tiles, segments, C] float32 contiguous, from lph_project_kernel
    x,  # tokens of the first image's first patch; image, token and channel strides follow
    pooled,  # [B, 2, C] contiguous float32
    N,
    segments,
    stride_b,
    stride_t,
    stride_c,
    C: tl.constexpr,
    ROWS: tl.constexpr,  # BLOCK_M of the projection
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns one image by BLOCK_C channels: its share of each tile's sums, in order."""
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image = (tl.program_id(0) // channel_tiles).to(tl.int64)
    c = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    first = image * N // ROWS
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for i in range(((image + 1) * N - 1) // ROWS - first + 1):
        tile = first + i
        segment = image - tile * ROWS // N
        total += tl.load(sums + (tile * segments + segment) * C + c, mask=mask, other=0.0)
    pooled += image * 2 * C
    x += image * stride_b
    tl.store(pooled + c, total / N, mask=mask)
    mean = mean_token(x, N, stride_t, stride_c, c, mask, BLOCK_P, BLOCK_C)
    tl.store(pooled + C + c, mean, mask=mask)


def lph_pool(
    tokens: Tensor,
    patch_grid: tuple[int, int],
    num_prefix_tokens: int,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    depthwise_weight: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    *,
    precision: str = "ieee",
) -> Tensor:
    """Mean hidden vector and mean token, see `lgvit_fast.ops.lph.lph_pool`.

    Args:
        tokens: `[B, P + N, C]`, any strides; float32, bfloat16 or float16.
        patch_grid: `(H, W)` with `H * W == N`.
        num_prefix_tokens: P.
        weight: `[C, C]`, the tokens' dtype.
        bias: `[C]`.
        scale: `[C]`; this and the rest are given for the full head, left out for the light one.
        shift: `[C]`.
        depthwise_weight: `[C, 3, 3]`.
        depthwise_bias: `[C]`.
        precision: "ieee", "tf32" or "tf32x3", for float32 products.

    Returns:
        `[B, 2, C]` float32.

    Raises:
        ValueError: an argument does not fit, before anything is launched.
    """
    check_tokens(tokens, patch_grid, num_prefix_tokens)
    batch, _, width = tokens.shape
    height, wide = patch_grid
    count = height * wide
    weight = check_weight("weight", weight, (width, width), tokens)
    require(weight.dtype == tokens.dtype, f"weight is {weight.dtype}, tokens are {tokens.dtype}")
    bias = check_weight("bias", bias, (width,), tokens)
    full = depthwise_weight is not None
    pooled = tokens.new_empty((batch, 2, width), dtype=torch.float32)
    rows = batch * count
    block_m = projection_rows(rows, width)
    segments = (block_m - 2) // count + 2
    if full:
        require(
            scale is not None and shift is not None and depthwise_bias is not None,
            "the full head needs scale, shift, depthwise_weight and depthwise_bias",
        )
        scale = check_weight("scale", scale, (width,), tokens)
        shift = check_weight("shift", shift, (width,), tokens)
        taps = check_weight("depthwise_weight", depthwise_weight, (width, 3, 3), tokens)
        depthwise_bias = check_weight("depthwise_bias", depthwise_bias, (width,), tokens)
        scratch = tokens.new_empty((batch, count, width))
    else:
        tiles = triton.cdiv(rows, block_m)
        scratch = tokens.new_empty((tiles, segments, width), dtype=torch.float32)
    if pooled.numel() == 0:
        return pooled
    patches = within_reach(tokens[:, num_prefix_tokens:])

    def projection_grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, block_m) * triton.cdiv(width, meta["BLOCK_N"]),)

    def pool_grid(meta: dict[str, int]) -> tuple[int]:
        return (batch * triton.cdiv(width, meta["BLOCK_C"]),)

    with on_device(tokens):
        lph_project_kernel[projection_grid](
            patches, weight, bias, scale if full else bias, shift if full else bias, scratch,
            rows, count, segments, size_class(rows), *patches.stride(),
            C=width, FULL=full, PRECISION=precision, BLOCK_M=block_m,
        )  # fmt: skip
        if full:
            lph_depthwise_pool_kernel[pool_grid](
                scratch, patches, taps, depthwise_bias, pooled,
                height, wide, size_class(batch), *patches.stride(),
                C=width, BLOCK_W=min(32, triton.next_power_of_2(wide)), BLOCK_P=16,
            )  # fmt: skip
        else:
            lph_sum_pool_kernel[pool_grid](
                scratch, patches, pooled, count, segments, *patches.stride(),
                C=width, ROWS=block_m, BLOCK_P=32, BLOCK_C=64,
            )  # fmt: skip
    return pooled

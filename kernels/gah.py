"""Global aggregation head, pooled: two launches from tokens to `[B, heads, C]`.

The first projects the pooled tokens to queries and keys, `[B, n, 2C]`. The second takes, for each
image and head, the attention matrix averaged over its queries (one row of n weights), then for many
heads at once the weighted means of the pooled tokens, one matrix product. Pooling, subsampled or
averaged, happens where tokens are loaded; the pooled grid is not stored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgvit_fast.kernels.common import (
    check_tokens,
    check_weight,
    dot,
    load_pooled,
    on_device,
    project_tile,
    projection_configs,
    projection_fits,
    projection_rows,
    require,
    within_reach,
)
from lgvit_fast.kernels.tuning import Device, autotune, size_class

__all__ = ["gah_pool"]


@autotune(
    projection_configs(),
    key=["C", "BLOCK_M", "R", "AVERAGE", "PRECISION", "size"],
    fits=projection_fits,
)
@triton.jit(do_not_specialize=["rows", "size"])
def gah_project_kernel(
    x,  # tokens of the first image's first patch; image, token and channel strides follow
    weight,  # [2C, C] contiguous; rows of q, then of k
    qk,  # [B, n, 2C] contiguous
    rows,  # B * n
    size,  # size class of the rows, for the tuning alone
    H,
    W,
    stride_b,
    stride_t,
    stride_c,
    C: tl.constexpr,
    R: tl.constexpr,  # pooling stride
    AVERAGE: tl.constexpr,  # else subsample
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_M pooled tokens, across image borders, by BLOCK_N columns of q and k."""
    column_tiles: tl.constexpr = (2 * C + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    col_mask = col < 2 * C
    wide = tl.cdiv(W, R)
    n = tl.cdiv(H, R) * wide
    y = row % n // wide * R
    x0 = row % n % wide * R
    token = x + (row // n).to(tl.int64) * stride_b + (y * W + x0).to(tl.int64) * stride_t
    acc = project_tile(
        token, row_mask, tl.minimum(H - y, R), tl.minimum(W - x0, R),
        W * stride_t, stride_t, stride_c, weight + col.to(tl.int64) * C, col_mask,
        C, R if AVERAGE else 1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    place = qk + row.to(tl.int64)[:, None] * (2 * C) + col[None, :]
    tl.store(place, acc.to(qk.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


@triton.jit
def scores(
    qk,  # the head's first query channel of the image's first pooled token
    i,  # [BLOCK_Q] queries
    j,  # [BLOCK_Q] keys
    n,
    scale,
    C: tl.constexpr,
    D: tl.constexpr,  # head width
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of queries i against keys j in log2 units, -inf beyond the n keys.

    The head width is walked in steps of 32: 96 is three steps, not a tile padded to 128.
    """
    s = tl.zeros((BLOCK_Q, BLOCK_Q), dtype=tl.float32)
    for start in range(0, D, 32):
        d = start + tl.arange(0, 32)
        inside = d < D if D % 32 else d >= 0
        q = qk + i[:, None] * (2 * C) + d[None, :]
        k = qk + C + j[None, :] * (2 * C) + d[:, None]
        q = tl.load(q, mask=(i < n)[:, None] & inside[None, :], other=0.0)
        k = tl.load(k, mask=(j < n)[None, :] & inside[:, None], other=0.0)
        s = dot(q, k, s, PRECISION)
    return tl.where((j < n)[None, :], s * scale, float("-inf"))


@triton.jit
def row_softmax(s):
    """Softmax of rows of scores in log2 units."""
    p = tl.exp2(s - tl.max(s, axis=1)[:, None])
    return p / tl.sum(p, axis=1)[:, None]


def pool_fits(config: triton.Config, args: dict[str, Any], device: Device) -> bool:
    """A tile of tokens for each stage must fit.

    Float32 products are unrolled over it: only the smallest share of a thread does not spill.
    """
    itemsize = args["x"].element_size()
    if itemsize == 4 and (config.kwargs["BLOCK_C"] > 64 or config.num_warps < 8):
        return False
    tiles = config.num_stages * args["BLOCK_Q"] * config.kwargs["BLOCK_C"] * itemsize
    return tiles <= device.shared


@autotune(
    [
        # ptxas would rather spill than run fewer programs at a time, unless told how far it may go.
        triton.Config({"BLOCK_C": c}, num_warps=warps, num_stages=stages, maxnreg=255)
        for c, warps, stages in ((128, 8, 3), (64, 4, 3), (64, 8, 2))
    ],
    key=["C", "BLOCK_Q", "GROUP", "R", "AVERAGE", "PRECISION", "size"],
    fits=pool_fits,
)
@triton.jit(do_not_specialize=["size"])
def gah_pool_kernel(
    x,  # tokens of the first image's first patch; image, token and channel strides follow
    qk,  # [B, n, 2C] contiguous, from gah_project_kernel
    column,  # [B, heads, n] float32 scratch: the attention's column means
    lse,  # [B, heads, n] float32 scratch: log2 of each row's sum of exponentials
    pooled,  # [B, heads, C] contiguous, the tokens' dtype
    size,  # size class of B, for the tuning alone
    H,
    W,
    scale,  # log2(e) / sqrt(C / heads)
    stride_b,
    stride_t,
    stride_c,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    AVERAGE: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,  # heads a program owns, a divisor of HEADS: they share one read of x
    ROWS: tl.constexpr,  # GROUP, padded
    BLOCK_Q: tl.constexpr,  # tile of queries and of keys
    ONE_TILE: tl.constexpr,  # n <= BLOCK_Q
    BLOCK_C: tl.constexpr,
):
    """One program owns an image by GROUP heads.

    All its scratch is its own. What one thread stores there another loads, so barriers stand between:
    they order a program's own accesses to memory.
    """
    D: tl.constexpr = C // HEADS
    window: tl.constexpr = R if AVERAGE else 1
    first = tl.program_id(0) % (HEADS // GROUP) * GROUP
    image = (tl.program_id(0) // (HEADS // GROUP)).to(tl.int64)
    wide = tl.cdiv(W, R)
    n = tl.cdiv(H, R) * wide
    scratch = (image * HEADS + first) * n

    for g in range(GROUP):
        head_qk = qk + image * n * (2 * C) + (first + g) * D
        row = scratch + g * n
        if ONE_TILE:
            j = tl.arange(0, BLOCK_Q)
            p = row_softmax(scores(head_qk, j, j, n, scale, C, D, BLOCK_Q, PRECISION))
            p = tl.where((j < n)[:, None], p, 0.0)
            tl.store(column + row + j, tl.sum(p, axis=0) / n, mask=j < n)
        else:
            for start in range(0, n, BLOCK_Q):
                q = start + tl.arange(0, BLOCK_Q)
                top = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
                total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
                for other in range(0, n, BLOCK_Q):
                    j = other + tl.arange(0, BLOCK_Q)
                    s = scores(head_qk, q, j, n, scale, C, D, BLOCK_Q, PRECISION)
                    higher = tl.maximum(top, tl.max(s, axis=1))
                    total = total * tl.exp2(top - higher)
                    total += tl.sum(tl.exp2(s - higher[:, None]), axis=1)
                    top = higher
                tl.store(lse + row + q, top + tl.log2(total), mask=q < n)
            tl.debug_barrier()
            for start in range(0, n, BLOCK_Q):
                j = start + tl.arange(0, BLOCK_Q)
                mean = tl.zeros((BLOCK_Q,), dtype=tl.float32)
                for other in range(0, n, BLOCK_Q):
                    q = other + tl.arange(0, BLOCK_Q)
                    s = scores(head_qk, q, j, n, scale, C, D, BLOCK_Q, PRECISION)
                    # Queries beyond n get an infinite lse, hence no weight.
                    sums = tl.load(lse + row + q, mask=q < n, other=float("inf"))
                    mean += tl.sum(tl.exp2(s - sums[:, None]), axis=0)
                tl.store(column + row + j, mean / n, mask=j < n)
    tl.debug_barrier()

    g = tl.arange(0, ROWS)
    # A constant bound: where one tile holds all tokens the inner loop is none, the outer is pipelined.
    last = BLOCK_Q if ONE_TILE else n
    for start in tl.range(0, C, BLOCK_C, num_stages=1 if window > 1 else None):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < C if C % BLOCK_C else c >= 0
        z = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
        for other in tl.range(0, last, BLOCK_Q, num_stages=1 if window > 1 else None):
            j = other + tl.arange(0, BLOCK_Q)
            y = j // wide * R
            x0 = j % wide * R
            token = x + image * stride_b + (y * W + x0).to(tl.int64) * stride_t
            s = load_pooled(
                token[:, None] + c[None, :] * stride_c, (j < n)[:, None] & inside[None, :],
                tl.minimum(H - y, R), tl.minimum(W - x0, R), W * stride_t, stride_t, window,
            )  # fmt: skip
            if window > 1:  # tiles past the grid have empty windows, 0 / 0: not to be summed
                s = tl.where((j < n)[:, None], s, 0.0)
            place = column + scratch + g[:, None] * n + j[None, :]
            a = tl.load(place, mask=(g < GROUP)[:, None] & (j < n)[None, :], other=0.0)
            # What rounding to the tokens' dtype takes from a weight is a product of its own.
            near = a.to(s.dtype)
            z = dot(near, s, z, PRECISION)
            if s.dtype != tl.float32:
                z = dot((a - near.to(tl.float32)).to(s.dtype), s, z, PRECISION)
        place = pooled + (image * HEADS + first + g[:, None]) * C + c[None, :]
        mask = (g < GROUP)[:, None] & inside[None, :]
        tl.store(place, z.to(pooled.dtype.element_ty), mask=mask)


def gah_pool(
    tokens: Tensor,
    patch_grid: tuple[int, int],
    num_prefix_tokens: int,
    qk_weight: Tensor,
    num_heads: int,
    stride: int,
    pool: str,
    *,
    precision: str = "ieee",
) -> Tensor:
    """Pooled tokens averaged by the attention, see `lgvit_fast.ops.gah.gah_pool`.

    Args:
        tokens: `[B, P + N, C]`, any strides; float32, bfloat16 or float16.
        patch_grid: `(H, W)` with `H * W == N`.
        num_prefix_tokens: P.
        qk_weight: `[2C, C]`, the tokens' dtype.
        num_heads: heads, a divisor of C.
        stride: r >= 1.
        pool: "subsample" or "average".
        precision: "ieee", "tf32" or "tf32x3", for float32 products.

    Returns:
        `[B, heads, C]`, the tokens' dtype.

    Raises:
        ValueError: an argument does not fit, before anything is launched.
    """
    check_tokens(tokens, patch_grid, num_prefix_tokens)
    batch, _, width = tokens.shape
    height, wide = patch_grid
    require(
        num_heads > 0 and width % num_heads == 0,
        f"num_heads is {num_heads}, expected a divisor of {width}",
    )
    require(stride > 0, f"stride is {stride}, expected at least 1")
    require(pool in ("subsample", "average"), f"pool is {pool!r}, expected subsample or average")
    qk_weight = check_weight("qk_weight", qk_weight, (2 * width, width), tokens)
    require(
        qk_weight.dtype == tokens.dtype,
        f"qk_weight is {qk_weight.dtype}, tokens are {tokens.dtype}",
    )
    pooled = tokens.new_empty((batch, num_heads, width))
    if pooled.numel() == 0:
        return pooled
    count = triton.cdiv(height, stride) * triton.cdiv(wide, stride)
    rows = batch * count
    qk = tokens.new_empty((batch, count, 2 * width))
    column, lse = tokens.new_empty((2, batch, num_heads, count), dtype=torch.float32)
    patches = within_reach(tokens[:, num_prefix_tokens:])
    average = pool == "average" and stride > 1
    block_m = projection_rows(rows, 2 * width)
    block_q = min(64, max(16, triton.next_power_of_2(count)))
    group = heads_of_a_program(batch, num_heads)

    def projection_grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, block_m) * triton.cdiv(2 * width, meta["BLOCK_N"]),)

    with on_device(tokens):
        gah_project_kernel[projection_grid](
            patches, qk_weight, qk, rows, size_class(rows), height, wide, *patches.stride(),
            C=width, R=stride, AVERAGE=average, PRECISION=precision, BLOCK_M=block_m,
        )  # fmt: skip
        gah_pool_kernel[(batch * num_heads // group,)](
            patches, qk, column, lse, pooled, size_class(batch),
            height, wide, (width // num_heads) ** -0.5 * 1.4426950408889634, *patches.stride(),
            C=width, HEADS=num_heads, R=stride, AVERAGE=average, PRECISION=precision,
            GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),
            BLOCK_Q=block_q, ONE_TILE=count <= block_q,
        )  # fmt: skip
    return pooled


def heads_of_a_program(batch: int, heads: int) -> int:
    """GROUP: all heads of an image where images alone fill a GPU (132 SMs), fewer in small batches."""
    most = min(16, max(1, batch // 16))
    return max(g for g in range(1, heads + 1) if heads % g == 0 and g <= most)

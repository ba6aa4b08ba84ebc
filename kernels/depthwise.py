"""Depthwise 3x3, bias and gelu on the token layout, with its gradients.

One kernel walks the grid in all three directions of use: forward, the gradient at the gelu's input,
and from there the gradient of the tokens, which is the same convolution with the taps turned round.
A second one sums the gradients of taps and bias.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgvit_fast.kernels.common import (
    DTYPES,
    check_device,
    check_memory,
    check_weight,
    gelu,
    on_device,
    require,
)
from lgvit_fast.kernels.tuning import autotune, size_class

__all__ = ["CONFIGS", "depthwise_gelu", "depthwise_gelu_backward", "load_row", "load_taps"]


SPLIT_CHANNELS = 512 * 64  # of gradients of taps that are summed side by side: 512 programs of 64


@triton.jit
def load_taps(taps, c, mask):
    """The nine taps of BLOCK_C channels from a contiguous [C, 9], each [1, BLOCK_C] float32."""
    w00 = tl.load(taps + c * 9 + 0, mask=mask, other=0.0).to(tl.float32)[None, :]
    w01 = tl.load(taps + c * 9 + 1, mask=mask, other=0.0).to(tl.float32)[None, :]
    w02 = tl.load(taps + c * 9 + 2, mask=mask, other=0.0).to(tl.float32)[None, :]
    w10 = tl.load(taps + c * 9 + 3, mask=mask, other=0.0).to(tl.float32)[None, :]
    w11 = tl.load(taps + c * 9 + 4, mask=mask, other=0.0).to(tl.float32)[None, :]
    w12 = tl.load(taps + c * 9 + 5, mask=mask, other=0.0).to(tl.float32)[None, :]
    w20 = tl.load(taps + c * 9 + 6, mask=mask, other=0.0).to(tl.float32)[None, :]
    w21 = tl.load(taps + c * 9 + 7, mask=mask, other=0.0).to(tl.float32)[None, :]
    w22 = tl.load(taps + c * 9 + 8, mask=mask, other=0.0).to(tl.float32)[None, :]
    return w00, w01, w02, w10, w11, w12, w20, w21, w22


@triton.jit
def load_row(u, y, col, c, mask, H, W, C: tl.constexpr):
    """Row y of one image's map [N, C], shifted to the left, not at all and to the right, float32.

    What lies outside the grid is zero: that is the convolution's padding.
    """
    place = u + (y * W + col)[:, None] * C + c[None, :]
    row = (y >= 0) & (y < H) & mask[None, :]
    left = tl.load(place - C, mask=row & ((col >= 1) & (col <= W))[:, None], other=0.0)
    mid = tl.load(place, mask=row & (col < W)[:, None], other=0.0)
    right = tl.load(place + C, mask=row & (col + 1 < W)[:, None], other=0.0)
    return left.to(tl.float32), mid.to(tl.float32), right.to(tl.float32)


CONFIGS = [
    triton.Config({"BLOCK_C": c}, num_warps=warps, maxnreg=255)  # else ptxas may spill
    for c, warps in ((64, 8), (64, 4), (32, 4), (128, 8), (32, 2))
]


@autotune(CONFIGS, key=["C", "H", "W", "USE", "size"])
@triton.jit(do_not_specialize=["size"])
def depthwise_kernel(
    u,  # [B, N, C] contiguous: what is convolved
    taps,  # [C, 9] contiguous
    bias,  # [C]; FORWARD and INNER
    gradient,  # [B, N, C] contiguous, of the output; INNER
    out,  # [B, N, C] contiguous
    size,  # size class of B, for the tuning alone
    H,
    W,
    C: tl.constexpr,
    USE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns one image by BLOCK_C channels and walks down the grid row by row.

    Each row of u adds to the outputs above, at and below it, so three accumulators of one row each
    take the place of a halo. USE says what becomes of a finished row z: "forward" gelu(z), "inner"
    gradient * gelu'(z), "plain" z itself (without bias).
    """
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    image = (tl.program_id(0) // channel_tiles).to(tl.int64) * H * W * C
    c = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    u += image
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = load_taps(taps, c, mask)
    if USE != "plain":
        offset = tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)[None, :]
    for start in range(0, W, BLOCK_W):
        col = start + tl.arange(0, BLOCK_W)
        above = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)  # output row y - 1
        here = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)  # output row y
        for y in range(H + 1):
            left, mid, right = load_row(u, y, col, c, mask, H, W, C)
            z = above + (left * w20 + mid * w21 + right * w22)
            above = here + (left * w10 + mid * w11 + right * w12)
            here = left * w00 + mid * w01 + right * w02
            place = image + ((y - 1) * W + col)[:, None] * C + c[None, :]
            inside = (y > 0) & (col < W)[:, None] & mask[None, :]
            if USE != "plain":
                z += offset
            if USE == "forward":
                z = gelu(z)
            if USE == "inner":
                slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
                slope += z * tl.exp(-0.5 * z * z) * 0.3989422804014327
                z = slope * tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + place, z.to(out.dtype.element_ty), mask=inside)


@autotune(CONFIGS, key=["C", "H", "W", "size"])
@triton.jit(do_not_specialize=["B", "splits", "size"])
def depthwise_taps_kernel(
    u,  # [B, N, C] contiguous: the convolution's input
    inner,  # [B, N, C] contiguous: gradient of its output
    sums,  # [splits, 10, C] contiguous float32: nine taps, then the bias
    B,
    splits,
    size,  # size class of B, for the tuning alone
    H,
    W,
    C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns every splits-th image by BLOCK_C channels, and one row of `sums`.

    A row of u meets the gradients of the rows below, at and above it, each kept from the step it
    was loaded in.
    """
    channel_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    split = tl.program_id(0) // channel_tiles
    c = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < C
    g00 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    g01 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    g02 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    g10 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    g11 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    g12 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    g20 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    g21 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    g22 = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    total = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)
    for i in range(split, B, splits):
        image = (tl.zeros((), dtype=tl.int64) + i) * H * W * C
        for start in range(0, W, BLOCK_W):
            col = start + tl.arange(0, BLOCK_W)
            place = inner + image + col[:, None] * C + c[None, :]
            inside = (col < W)[:, None] & mask[None, :]
            above = tl.zeros((BLOCK_W, BLOCK_C), dtype=tl.float32)  # gradient of row y - 1
            here = tl.load(place, mask=inside, other=0.0).to(tl.float32)  # of row y
            for y in range(H):
                left, mid, right = load_row(u + image, y, col, c, mask, H, W, C)
                below = tl.load(place + (y + 1) * W * C, mask=inside & (y + 1 < H), other=0.0)
                below = below.to(tl.float32)
                g00 += left * below
                g01 += mid * below
                g02 += right * below
                g10 += left * here
                g11 += mid * here
                g12 += right * here
                g20 += left * above
                g21 += mid * above
                g22 += right * above
                total += here
                above = here
                here = below
    sums += split.to(tl.int64) * 10 * C + c
    tl.store(sums + 0 * C, tl.sum(g00, axis=0), mask=mask)
    tl.store(sums + 1 * C, tl.sum(g01, axis=0), mask=mask)
    tl.store(sums + 2 * C, tl.sum(g02, axis=0), mask=mask)
    tl.store(sums + 3 * C, tl.sum(g10, axis=0), mask=mask)
    tl.store(sums + 4 * C, tl.sum(g11, axis=0), mask=mask)
    tl.store(sums + 5 * C, tl.sum(g12, axis=0), mask=mask)
    tl.store(sums + 6 * C, tl.sum(g20, axis=0), mask=mask)
    tl.store(sums + 7 * C, tl.sum(g21, axis=0), mask=mask)
    tl.store(sums + 8 * C, tl.sum(g22, axis=0), mask=mask)
    tl.store(sums + 9 * C, tl.sum(total, axis=0), mask=mask)


def depthwise_gelu(u: Tensor, patch_grid: tuple[int, int], weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(depthwise 3x3 of u)` with zero padding.

    Args:
        u: `[B, N, C]`; float32, bfloat16 or float16.
        patch_grid: `(H, W)` with `H * W == N`.
        weight: `[C, 3, 3]`.
        bias: `[C]`.

    Returns:
        `[B, N, C]`, contiguous, the dtype of `u`.

    Raises:
        ValueError: an argument does not fit, before anything is launched.
    """
    u, taps, bias = _check(u, patch_grid, weight, bias)
    out = torch.empty_like(u)
    _convolve(u, patch_grid, taps, bias, u, out, "forward")
    return out


def depthwise_gelu_backward(
    gradient: Tensor, u: Tensor, patch_grid: tuple[int, int], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `u`, `weight` and `bias` of `depthwise_gelu`, given its output's.

    The gelu's input is computed again rather than kept from the forward pass.

    Raises:
        ValueError: an argument does not fit, before anything is launched.
    """
    u, taps, bias = _check(u, patch_grid, weight, bias)
    require(
        gradient.shape == u.shape and gradient.device == u.device,
        f"gradient has shape {tuple(gradient.shape)}, expected {tuple(u.shape)}",
    )
    check_memory("gradient", gradient)
    batch, _, width = u.shape
    inner, out = torch.empty_like(u), torch.empty_like(u)
    _convolve(u, patch_grid, taps, bias, gradient.contiguous(), inner, "inner")
    _convolve(inner, patch_grid, taps.flip(1), bias, inner, out, "plain")
    splits = max(1, min(batch, SPLIT_CHANNELS // max(width, 1)))
    sums = u.new_empty((splits, 10, width), dtype=torch.float32)
    if u.numel():
        with on_device(u):
            depthwise_taps_kernel[_programs(splits, width)](
                u, inner, sums, batch, splits, size_class(batch), *patch_grid,
                C=width, BLOCK_W=_block_w(patch_grid),
            )  # fmt: skip
    else:
        sums.zero_()
    total = sums.sum(0)
    taps_gradient = total[:9].t().reshape(width, 3, 3)
    return out, taps_gradient.to(weight.dtype, copy=True), total[9].to(bias.dtype, copy=True)


def _check(
    u: Tensor, patch_grid: tuple[int, int], weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = patch_grid
    require(
        u.ndim == 3 and min(patch_grid) > 0 and u.shape[1] == height * width,
        f"u has shape {tuple(u.shape)}, expected [B, {height} * {width}, C]",
    )
    require(u.dtype in DTYPES, f"u is {u.dtype}, expected one of {DTYPES}")
    check_device("u", u)
    channels = u.shape[2]
    taps = check_weight("weight", weight, (channels, 3, 3), u).view(channels, 9)
    return u.contiguous(), taps, check_weight("bias", bias, (channels,), u)


def _convolve(
    u: Tensor,
    patch_grid: tuple[int, int],
    taps: Tensor,
    bias: Tensor,
    gradient: Tensor,
    out: Tensor,
    use: str,
) -> None:
    batch, _, width = u.shape
    if u.numel():
        with on_device(u):
            depthwise_kernel[_programs(batch, width)](
                u, taps, bias, gradient, out, size_class(batch), *patch_grid,
                C=width, USE=use, BLOCK_W=_block_w(patch_grid),
            )  # fmt: skip


def _programs(count: int, width: int) -> Callable[[dict[str, int]], tuple[int]]:
    return lambda meta: (count * triton.cdiv(width, meta["BLOCK_C"]),)


def _block_w(patch_grid: tuple[int, int]) -> int:
    return min(32, triton.next_power_of_2(patch_grid[1]))

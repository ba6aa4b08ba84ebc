"""Self-attention on a fused `[B, n, 3C]` projection, forward and backward, nothing permuted.

The score matrix is never stored: the forward pass keeps one number a query (log2 of its sum of
exponentials), and the backward pass computes the scores again from it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgvit_fast.kernels.common import (
    DTYPES,
    check_device,
    check_memory,
    dot,
    on_device,
    require,
)

__all__ = ["attention", "attention_backward"]


@triton.jit
def load_head(x, i, n, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens i of one head, [BLOCK, BLOCK_D]; `x` points at its first channel of the first token."""
    d = tl.arange(0, BLOCK_D)
    place = x + i[:, None] * stride + d[None, :]
    return tl.load(place, mask=(i < n)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_head(x, i, n, stride, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write tokens i of one head."""
    d = tl.arange(0, BLOCK_D)
    place = x + i[:, None] * stride + d[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=(i < n)[:, None] & (d < D)[None, :])


@triton.jit
def attention_kernel(
    qkv,  # [B, n, 3C] contiguous
    out,  # [B, n, C] contiguous
    lse,  # [B, heads, n] float32: log2 of each query's sum of exponentials
    n,
    blocks,  # tiles of queries
    scale,  # log2(e) / sqrt(C / heads)
    C: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK queries of one head of one image and walks over all keys."""
    D: tl.constexpr = C // HEADS
    image = (tl.program_id(0) // blocks // HEADS).to(tl.int64)
    head = tl.program_id(0) // blocks % HEADS
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    qkv += image * n * (3 * C) + head * D
    q = load_head(qkv, i, n, 3 * C, D, BLOCK_D)
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k = load_head(qkv + C, j, n, 3 * C, D, BLOCK_D)
        v = load_head(qkv + 2 * C, j, n, 3 * C, D, BLOCK_D)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK, BLOCK), dtype=tl.float32), PRECISION) * scale
        s = tl.where((j < n)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, axis=1)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        top = higher
    out += image * n * C + head * D
    store_head(out, i, n, C, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + (image * HEADS + head) * n + i, top + tl.log2(total), mask=i < n)


@triton.jit
def attention_backward_kernel(
    qkv,  # [B, n, 3C] contiguous
    out,  # [B, n, C] contiguous, from attention_kernel
    lse,  # [B, heads, n] float32, from attention_kernel
    gradient,  # [B, n, C] contiguous, of out
    result,  # [B, n, 3C] contiguous: gradient of qkv
    n,
    blocks,  # tiles of tokens
    scale,  # 1 / sqrt(C / heads)
    C: tl.constexpr,
    HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns BLOCK tokens of one head of one image: first as keys, then as queries.

    With p the attention, the gradients are dv = p^T g, ds = p (g v^T - rowsum(g out)),
    dk = ds^T q scale and dq = ds k scale. No two programs write the same place.
    """
    D: tl.constexpr = C // HEADS
    image = (tl.program_id(0) // blocks // HEADS).to(tl.int64)
    head = tl.program_id(0) // blocks % HEADS
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    qkv += image * n * (3 * C) + head * D
    result += image * n * (3 * C) + head * D
    out += image * n * C + head * D
    gradient += image * n * C + head * D
    lse += (image * HEADS + head) * n
    zeros = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    log2_scale = scale * 1.4426950408889634

    k = load_head(qkv + C, rows, n, 3 * C, D, BLOCK_D)
    v = load_head(qkv + 2 * C, rows, n, 3 * C, D, BLOCK_D)
    dk = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        q = load_head(qkv, i, n, 3 * C, D, BLOCK_D)
        g = load_head(gradient, i, n, C, D, BLOCK_D)
        y = load_head(out, i, n, C, D, BLOCK_D)
        delta = tl.sum(g.to(tl.float32) * y.to(tl.float32), axis=1)
        # Queries beyond n get an infinite lse, hence no weight.
        sums = tl.load(lse + i, mask=i < n, other=float("inf"))
        p = tl.exp2(dot(q, tl.trans(k), zeros, PRECISION) * log2_scale - sums[:, None])
        dv = dot(tl.trans(p.to(g.dtype)), g, dv, PRECISION)
        ds = p * (dot(g, tl.trans(v), zeros, PRECISION) - delta[:, None])
        dk = dot(tl.trans(ds.to(q.dtype)), q, dk, PRECISION)
    store_head(result + C, rows, n, 3 * C, dk * scale, D, BLOCK_D)
    store_head(result + 2 * C, rows, n, 3 * C, dv, D, BLOCK_D)

    q = load_head(qkv, rows, n, 3 * C, D, BLOCK_D)
    g = load_head(gradient, rows, n, C, D, BLOCK_D)
    y = load_head(out, rows, n, C, D, BLOCK_D)
    delta = tl.sum(g.to(tl.float32) * y.to(tl.float32), axis=1)
    sums = tl.load(lse + rows, mask=rows < n, other=float("inf"))
    dq = tl.zeros((BLOCK, BLOCK_D), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = load_head(qkv + C, j, n, 3 * C, D, BLOCK_D)
        value = load_head(qkv + 2 * C, j, n, 3 * C, D, BLOCK_D)
        p = tl.exp2(dot(q, tl.trans(other), zeros, PRECISION) * log2_scale - sums[:, None])
        p = tl.where((j < n)[None, :], p, 0.0)
        ds = p * (dot(g, tl.trans(value), zeros, PRECISION) - delta[:, None])
        dq = dot(ds.to(other.dtype), other, dq, PRECISION)
    store_head(result, rows, n, 3 * C, dq * scale, D, BLOCK_D)


def attention(qkv: Tensor, num_heads: int, *, precision: str = "ieee") -> tuple[Tensor, Tensor]:
    """`softmax(q k^T / sqrt(C / heads)) v`, heads side by side.

    Args:
        qkv: `[B, n, 3C]`, ordered q, k, v, heads contiguous in each; float32, bfloat16 or float16.
        num_heads: heads, a divisor of C; at most 128 channels each.
        precision: "ieee", "tf32" or "tf32x3", for float32 products.

    Returns:
        The output `[B, n, C]` in the dtype of `qkv`, and for the backward pass log2 of each query's
        sum of exponentials, `[B, heads, n]` float32.

    Raises:
        ValueError: an argument does not fit, before anything is launched.
    """
    qkv, width = _check(qkv, num_heads)
    batch, count, _ = qkv.shape
    out = qkv.new_empty((batch, count, width))
    lse = qkv.new_empty((batch, num_heads, count), dtype=torch.float32)
    if out.numel():
        programs, shape = _launch(qkv, num_heads, "forward")
        scale = (width // num_heads) ** -0.5 * 1.4426950408889634
        with on_device(qkv):
            attention_kernel[programs](
                qkv, out, lse, count, programs[0] // (batch * num_heads), scale,
                PRECISION=precision, **shape,
            )  # fmt: skip
    return out, lse


def attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    *,
    precision: str = "ieee",
) -> Tensor:
    """Gradient of `qkv`, given that of `attention`'s output and what it returned.

    Raises:
        ValueError: an argument does not fit, before anything is launched.
    """
    qkv, width = _check(qkv, num_heads)
    batch, count, _ = qkv.shape
    for name, tensor in (("gradient", gradient), ("out", out)):
        found = tuple(tensor.shape)
        require(
            found == (batch, count, width) and tensor.device == qkv.device,
            f"{name} has shape {found}, expected {(batch, count, width)}",
        )
        check_memory(name, tensor)
    check_memory("lse", lse)
    require(
        lse.dtype == torch.float32 and lse.device == qkv.device,
        f"lse is {lse.dtype} on {lse.device}, expected float32 on {qkv.device}",
    )
    require(
        tuple(lse.shape) == (batch, num_heads, count),
        f"lse has shape {tuple(lse.shape)}, expected {(batch, num_heads, count)}",
    )
    result = torch.empty_like(qkv)
    if result.numel():
        programs, shape = _launch(qkv, num_heads, "backward")
        with on_device(qkv):
            attention_backward_kernel[programs](
                qkv, out.contiguous(), lse.contiguous(), gradient.to(qkv.dtype).contiguous(),
                result, count, programs[0] // (batch * num_heads), (width // num_heads) ** -0.5,
                PRECISION=precision, **shape,
            )  # fmt: skip
    return result


def _check(qkv: Tensor, num_heads: int) -> tuple[Tensor, int]:
    require(
        qkv.ndim == 3 and qkv.shape[2] % 3 == 0,
        f"qkv has shape {tuple(qkv.shape)}, expected [B, n, 3C]",
    )
    width = qkv.shape[2] // 3
    require(
        num_heads > 0 and width % num_heads == 0 and width // num_heads <= 128,
        f"num_heads is {num_heads}, expected a divisor of {width} into at most 128 channels",
    )
    require(qkv.dtype in DTYPES, f"qkv is {qkv.dtype}, expected one of {DTYPES}")
    check_device("qkv", qkv)
    return qkv.contiguous(), width


# By use and width of the dtype: tile, warps, stages and the registers ptxas may take (None: its own
# choice). Pooled grids are small: there is nothing to tune, these are what compiles without spills.
_SHAPES = {
    ("forward", 2): (64, 8, 2, 255),
    ("forward", 4): (32, 8, 2, None),
    ("backward", 2): (32, 4, 1, 255),
    ("backward", 4): (16, 8, 1, None),
}


def _launch(qkv: Tensor, num_heads: int, use: str) -> tuple[tuple[int], dict[str, int | None]]:
    """The grid, and the keyword arguments that say how to compile."""
    batch, count, columns = qkv.shape
    largest, warps, stages, registers = _SHAPES[use, qkv.element_size()]
    block = min(largest, max(16, triton.next_power_of_2(count)))
    block_d = max(16, triton.next_power_of_2(columns // 3 // num_heads))
    shape = {"C": columns // 3, "HEADS": num_heads, "BLOCK": block, "BLOCK_D": block_d}
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    return (batch * num_heads * triton.cdiv(count, block),), shape | options

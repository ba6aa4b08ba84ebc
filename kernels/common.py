"""What the kernels share: gelu, pooled loads, a projection tile and its candidates, checks."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgvit_fast.kernels.tuning import INTERPRETED, Device

EMULATED = tl.constexpr(INTERPRETED)  # as kernels read it

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def gelu(x):
    """The exact gelu, `x Phi(x)`, in float32."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_of(x, dtype: tl.constexpr):
    """The exact gelu to the precision of a dtype: for one of 16 bits within 1.7e-4.

    There Phi is an odd polynomial, clamped where it leaves [0, 1] for good, at |x| > 3.8.
    csrc/stable/cuda/lph_tail_kernel.cu has the same one.
    """
    if dtype == tl.float32:
        y = gelu(x)
    else:
        t = x * x
        q = 2.483462857583163e-08 * t - 1.700766460999148e-06
        q = q * t + 4.992575850337744e-05
        q = q * t - 0.0008325065718963742
        q = q * t + 0.008858961053192616
        q = q * t - 0.06475630402565002
        q = q * t + 0.3980095386505127
        y = x * tl.clamp(x * q + 0.5, 0.0, 1.0)
    return y


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`a @ b + acc` in float32; the interpreter, which has no bfloat16 products, widens first."""
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_pooled(token, mask, high, wide, stride_y, stride_x, R: tl.constexpr):
    """A tile of tokens [rows, channels], each the mean of its R x R window inside the grid.

    `token` points at the window's first token, `high` and `wide` [rows] say how much of the window
    is inside, `stride_y` and `stride_x` step through it. R = 1 is a plain load: subsampling is only
    a matter of where `token` points.
    """
    if R == 1:
        tile = tl.load(token, mask=mask, other=0.0)
    else:
        total = tl.zeros(token.shape, dtype=tl.float32)
        for i in tl.static_range(R * R):
            inside = (i // R < high) & (i % R < wide)
            here = token + ((i // R) * stride_y + (i % R) * stride_x)
            total += tl.load(here, mask=mask & inside[:, None], other=0.0).to(tl.float32)
        tile = (total / (high * wide).to(tl.float32)[:, None]).to(token.dtype.element_ty)
    return tile


@triton.jit
def project_tile(
    token,  # [BLOCK_M] pointers to the first channel of each token (or of its window's first)
    row_mask,  # [BLOCK_M] which of them exist
    high,  # [BLOCK_M] rows of the pooling window that lie inside the grid
    wide,  # [BLOCK_M] columns of it
    stride_y,  # elements from a token to the one below it in the grid
    stride_x,  # elements to the next token
    stride_c,  # elements to the next channel
    weight,  # [BLOCK_N] pointers to rows of a contiguous Linear weight [out, C]
    col_mask,  # [BLOCK_N] which of them exist
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A [BLOCK_M, BLOCK_N] tile of `pool(tokens) @ weight.T`, accumulated in float32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Averaging loads R * R tiles a step: too many to hold in stages.
    for start in tl.range(0, C, BLOCK_K, num_stages=1 if R > 1 else None):
        k = start + tl.arange(0, BLOCK_K)
        # Whole tiles are the rule: then the channel masks fold away.
        inside = k < C if C % BLOCK_K else k >= 0
        mask = row_mask[:, None] & inside[None, :]
        a = load_pooled(
            token[:, None] + k[None, :] * stride_c, mask, high, wide, stride_y, stride_x, R
        )
        b = tl.load(
            weight[None, :] + k[:, None], mask=inside[:, None] & col_mask[None, :], other=0.0
        )
        acc = dot(a, b, acc, PRECISION)
    return acc


def projection_configs() -> list[triton.Config]:
    """Tiles of a projection; BLOCK_M is the launcher's choice (`projection_rows`).

    ptxas would rather spill than run fewer programs at a time, unless told how far it may go.
    """
    return [
        triton.Config(
            {"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages, maxnreg=registers
        )
        for n, k, warps, stages, registers in (
            (128, 64, 8, 3, None),
            (256, 32, 16, 7, 128),
            (128, 32, 8, 3, None),
            (128, 64, 4, 3, None),
            (64, 64, 4, 4, 255),
            (32, 64, 4, 4, None),
            (64, 32, 8, 3, None),
            (64, 32, 4, 3, None),
        )
    ]


def projection_fits(config: triton.Config, args: dict[str, Any], device: Device) -> bool:
    """A tile of both operands for each stage must fit, and what a thread holds its registers.

    A thread has at most 64 accumulators: twice as many spill beside an epilogue. Float32 products
    have no tensor cores and are unrolled over BLOCK_K: beyond 32, or on 4 warps, registers spill. So
    they do where a thread averages more than 32 numbers a step. 16 warps make products by wgmma; on
    sm_100 Triton gives them no tcgen05.
    """
    itemsize, rows, threads = args["x"].element_size(), args["BLOCK_M"], 32 * config.num_warps
    depth, columns = config.kwargs["BLOCK_K"], config.kwargs["BLOCK_N"]
    if config.num_warps == 16 and device.arch != 90:
        return False
    if rows * columns > 64 * threads or (args.get("AVERAGE") and rows * depth > 32 * threads):
        return False
    if itemsize == 4 and (depth > 32 or columns > 128 or config.num_warps < 8):
        return False
    return config.num_stages * (rows + columns) * depth * itemsize <= device.shared


def projection_rows(rows: int, columns: int) -> int:
    """BLOCK_M: 128 where tiles of 128 x 128 would fill a large GPU once (132 SMs), else 64."""
    return 128 if rows * columns >= 132 * 128 * 128 else 64


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_tokens(tokens: Tensor, patch_grid: tuple[int, int], num_prefix_tokens: int) -> None:
    """Check tokens `[B, P + N, C]`, of any strides, against their grid.

    Raises:
        ValueError: shape, dtype or device is not one the kernels take.
    """
    height, width = patch_grid
    require(tokens.ndim == 3, f"tokens has shape {tuple(tokens.shape)}, expected [B, P + N, C]")
    require(tokens.dtype in DTYPES, f"tokens is {tokens.dtype}, expected one of {DTYPES}")
    expected = num_prefix_tokens + height * width
    require(
        height > 0 and width > 0 and num_prefix_tokens >= 0 and tokens.shape[1] == expected,
        f"tokens has {tokens.shape[1]} rows an image, expected {num_prefix_tokens} prefix tokens"
        f" + {height} x {width} patches",
    )
    check_device("tokens", tokens)
    require(
        max(tokens.shape[0], tokens.shape[2]) * expected < 2**31,
        f"tokens has shape {tuple(tokens.shape)}: 2^31 or more rows, or numbers in an image",
    )


def within_reach(tokens: Tensor) -> Tensor:
    """Tokens `[B, n, C]`; a copy where some number of an image lies 2^31 or more beyond its first.

    Kernels count in 32 bits within an image. A whole batch may be transposed so that it spans more.
    """
    _, *sizes = tokens.shape
    far = sum((n - 1) * stride for n, stride in zip(sizes, tokens.stride()[1:], strict=True))
    return tokens.contiguous() if far >= 2**31 else tokens


def check_device(name: str, tensor: Tensor) -> None:
    """Check that kernels can run where `tensor` is, and that its storage holds it."""
    check_memory(name, tensor)
    require(tensor.is_cuda or INTERPRETED, f"{name} is on {tensor.device}, expected a CUDA device")


def check_memory(name: str, tensor: Tensor) -> None:
    """Check that the storage holds the tensor: it may have been resized."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needs = (tensor.storage_offset() + last + 1) * tensor.itemsize if tensor.numel() else 0
    holds = tensor.untyped_storage().nbytes() if tensor.device.type != "meta" else needs
    require(needs <= holds, f"{name} needs {needs} bytes, its storage has {holds}")


def check_weight(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """Check a weight's shape and device and return it contiguous."""
    found = tuple(tensor.shape)
    require(found == tuple(shape), f"{name} has shape {found}, expected {tuple(shape)}")
    require(tensor.device == like.device, f"{name} is on {tensor.device}, expected {like.device}")
    check_memory(name, tensor)
    return tensor.contiguous()


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

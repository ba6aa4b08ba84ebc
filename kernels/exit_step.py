"""The exit step in one launch: logits, softmax statistics and the decision, on `[B, ...]`."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lgvit_fast.kernels.common import (
    DTYPES,
    check_device,
    check_memory,
    check_weight,
    dot,
    on_device,
    require,
    within_reach,
)

__all__ = ["Step", "exit_step"]

FEW_PROGRAMS = 2 * 132  # fewer than two for each multiprocessor of a large GPU: split further


class Step(NamedTuple):
    """What the kernel writes, all `[B, ...]`."""

    logits: Tensor  # [B, K], the weight's dtype
    leave: Tensor  # [B] bool
    valid: Tensor  # [B] bool, False where the softmax is not a number
    confidence: Tensor  # [B] float32, largest softmax probability
    entropy: Tensor  # [B] float32, nats
    prediction: Tensor  # [B] int32, first class of largest logit


@triton.jit
def accumulate(
    acc,
    vector,  # [BLOCK_B] pointers to a vector [C] of each image
    row_mask,
    stride_c,
    weight,  # [BLOCK_K] pointers to the columns of the weight that this vector meets
    col_mask,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add `vector @ weight.T` to a tile of logits."""
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < C if C % BLOCK_C else c >= 0
        place = vector[:, None] + c[None, :] * stride_c
        a = tl.load(place, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            weight[None, :] + c[:, None], mask=inside[:, None] & col_mask[None, :], other=0.0
        )
        acc = dot(a.to(weight.dtype.element_ty), b, acc, PRECISION)
    return acc


@triton.jit
def finish_tile(
    acc, i, k, tile,
    bias, logits, partial, arrivals, leave, valid, confidence, entropy, prediction, state,
    threshold, patience, B, K, tiles, stride_s,
    RULE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """From products of images i and classes k to logits; the last tile of a row block also decides.

    Arguments as of `exit_step_kernel`, `arrivals` those of the row block.
    """
    row_mask, col_mask = i < B, k < K
    row = i.to(tl.int64)
    acc += tl.load(bias + k, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    rounded = acc.to(logits.dtype.element_ty)
    mask = row_mask[:, None] & col_mask[None, :]
    tl.store(logits + row[:, None] * K + k[None, :], rounded, mask=mask)

    # The tile's part, relative to its own maximum. What is not a number stays so in `mass`.
    z = tl.where(col_mask[None, :], rounded.to(tl.float32), float("-inf"))
    top = tl.max(z, axis=1)
    index = tl.min(tl.where(z == top[:, None], k[None, :], K), axis=1)
    base = tl.where(top == float("-inf"), 0.0, top)
    gap = z - base[:, None]
    e = tl.exp(gap)
    mass = tl.sum(e, axis=1)
    moment = tl.sum(tl.where(e > 0.0, e * gap, 0.0), axis=1)
    plane = tiles * B  # elements of one of the four planes
    part = partial + tile * B + i
    tl.store(part, top, mask=row_mask)
    tl.store(part + plane, index.to(tl.float32), mask=row_mask)
    tl.store(part + 2 * plane, mass, mask=row_mask)
    tl.store(part + 3 * plane, moment, mask=row_mask)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()

    if arrived == tiles - 1:
        tl.store(arrivals, 0)
        best = tl.full((BLOCK_B,), float("-inf"), dtype=tl.float32)
        choice = tl.zeros((BLOCK_B,), dtype=tl.float32)
        mass = tl.zeros((BLOCK_B,), dtype=tl.float32)
        moment = tl.zeros((BLOCK_B,), dtype=tl.float32)
        for other in range(tiles):
            part = partial + other * B + i
            tile_max = tl.load(part, mask=row_mask, other=0.0, cache_modifier=".cg")
            tile_class = tl.load(part + plane, mask=row_mask, other=0.0, cache_modifier=".cg")
            tile_mass = tl.load(part + 2 * plane, mask=row_mask, other=1.0, cache_modifier=".cg")
            tile_moment = tl.load(part + 3 * plane, mask=row_mask, other=0.0, cache_modifier=".cg")
            choice = tl.where(tile_max > best, tile_class, choice)
            higher = tl.maximum(best, tile_max)
            # Moving a sum of e^(z - b) (z - b) from base b to base h adds (b - h) of its mass.
            origin = tl.where(higher == float("-inf"), 0.0, higher)
            shift = tl.where(best == float("-inf"), 0.0, best - origin)
            lower = tl.where(tile_max == float("-inf"), 0.0, tile_max - origin)
            old = tl.exp(shift)
            new = tl.exp(lower)
            moment = old * (moment + shift * mass) + new * (tile_moment + lower * tile_mass)
            mass = old * mass + new * tile_mass
            best = higher
        top_probability = 1.0 / mass
        row_entropy = tl.log(mass) - moment / mass
        finite = (mass > 0.0) & (mass < float("inf"))
        top_probability = tl.where(finite, top_probability, float("nan"))
        row_entropy = tl.where(finite, row_entropy, float("nan"))
        label = choice.to(tl.int32)
        tl.store(confidence + i, top_probability, mask=row_mask)
        tl.store(entropy + i, row_entropy, mask=row_mask)
        tl.store(prediction + i, label, mask=row_mask)
        tl.store(valid + i, finite, mask=row_mask)

        out = finite & (i < 0)  # RULE 0: no image leaves
        if RULE == 1:
            out = top_probability > threshold
        if RULE == 2:
            out = row_entropy < threshold
        if RULE >= 3:
            memory = state + row * stride_s
            run = tl.load(memory, mask=row_mask, other=0)
            if RULE == 3:
                last = tl.load(memory + 1, mask=row_mask, other=0)
                run = tl.where(finite, tl.where(label == last, run + 1, 1), 0)
                tl.store(memory + 1, tl.where(finite, label, -1), mask=row_mask)
            else:
                run = tl.where(row_entropy < threshold, run + 1, 0)
            tl.store(memory, run, mask=row_mask)
            out = run >= patience
        tl.store(leave + i, out & finite, mask=row_mask)


@triton.jit(do_not_specialize=["B", "patience"])
def exit_step_kernel(
    pooled,  # [B, M, C] contiguous
    tokens,  # [B, P + N, C]; image, token and channel strides below; its first T rows are read
    weight,  # [K, (M + T) * C] contiguous
    bias,  # [K]
    logits,  # [B, K] contiguous
    products,  # [M + T, B, K] float32 scratch of SPLIT: what each vector adds to the logits
    partial,  # [4, tiles, B] float32 scratch: a class tile's maximum, its index and two sums
    arrivals,  # [row blocks, 1 + tiles] int32, zero before and after: tiles done, and parts of each
    leave,  # [B] bool
    valid,  # [B] bool
    confidence,  # [B] float32
    entropy,  # [B] float32
    prediction,  # [B] int32
    state,  # [B, 2] int32, rows `stride_s` apart: run length, last class
    threshold,
    patience,
    B,
    K,
    tiles,
    stride_b,
    stride_t,
    stride_c,
    stride_s,
    C: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    RULE: tl.constexpr,  # lgvit_fast.ops.exit_step.RuleKind
    SPLIT: tl.constexpr,  # a program for each of the M + T vectors
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program owns BLOCK_B images by BLOCK_K classes; the last of a row block also decides.

    Where that makes too few programs, each owns one of the M + T vectors, too (SPLIT), and the last of
    a tile adds up what they made, in fixed order.

    A program writes its part, then counts itself in. Its barrier puts all its threads' stores before
    the count (release); the program that counts last sees them all (acquire), goes on with them and
    sets the counter back to zero. So it is with the parts of a tile, and with the tiles' logits and
    what they add to the softmax.
    """
    parts: tl.constexpr = M + T if SPLIT else 1
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts % tiles
    block = tl.program_id(0) // parts // tiles
    i = block * BLOCK_B + tl.arange(0, BLOCK_B)
    row = i.to(tl.int64)
    row_mask = i < B
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    col_mask = k < K
    columns = weight + k.to(tl.int64) * ((M + T) * C)
    arrivals += block * (1 + tiles)

    vector = pooled + row * (M * C)
    acc = tl.zeros((BLOCK_B, BLOCK_K), dtype=tl.float32)
    if SPLIT:
        columns += part * C
        if part < M:
            acc = accumulate(
                acc, vector + part * C, row_mask, 1, columns, col_mask, C, BLOCK_C, PRECISION
            )  # fmt: skip
        else:
            vector_t = tokens + row * stride_b + (part - M) * stride_t
            acc = accumulate(
                acc, vector_t, row_mask, stride_c, columns, col_mask, C, BLOCK_C, PRECISION
            )  # fmt: skip
        mask = row_mask[:, None] & col_mask[None, :]
        tl.store(products + (part * B + row)[:, None] * K + k[None, :], acc, mask=mask)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + 1 + tile, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if arrived == parts - 1:
            tl.store(arrivals + 1 + tile, 0)
            total = tl.zeros((BLOCK_B, BLOCK_K), dtype=tl.float32)
            for other in tl.static_range(parts):
                place = products + (other * B + row)[:, None] * K + k[None, :]
                total += tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
            finish_tile(
                total, i, k, tile, bias, logits, partial, arrivals, leave, valid, confidence,
                entropy, prediction, state, threshold, patience, B, K, tiles, stride_s, RULE, BLOCK_B,
            )  # fmt: skip
    else:
        acc = accumulate(acc, vector, row_mask, 1, columns, col_mask, M * C, BLOCK_C, PRECISION)
        for t in tl.static_range(T):
            vector = tokens + row * stride_b + t * stride_t
            acc = accumulate(
                acc, vector, row_mask, stride_c, columns + (M + t) * C, col_mask, C, BLOCK_C, PRECISION
            )  # fmt: skip
        finish_tile(
            acc, i, k, tile, bias, logits, partial, arrivals, leave, valid, confidence,
            entropy, prediction, state, threshold, patience, B, K, tiles, stride_s, RULE, BLOCK_B,
        )  # fmt: skip


def exit_step(
    pooled: Tensor,
    tokens: Tensor,
    num_class_tokens: int,
    weight: Tensor,
    bias: Tensor,
    rule: tuple[int, float, int],
    state: Tensor,
    *,
    precision: str = "ieee",
) -> Step:
    """Logits, softmax statistics and the decision, see `lgvit_fast.ops.exit_step.exit_step`.

    Args:
        pooled: `[B, M, C]`.
        tokens: `[B, P + N, C]`, any strides.
        num_class_tokens: T, how many of the first tokens are read.
        weight: `[K, (M + T) * C]`, float32, bfloat16 or float16.
        bias: `[K]`.
        rule: kind (0 never, 1 confidence, 2 entropy, 3 patience, 4 patient and confident),
            threshold, patience.
        state: `[B, 2]` int32, the two numbers of an image side by side; updated in place.
        precision: "ieee", "tf32" or "tf32x3", for float32 products.

    Raises:
        ValueError: an argument does not fit, before anything is launched.
    """
    require(pooled.ndim == 3, f"pooled has shape {tuple(pooled.shape)}, expected [B, M, C]")
    batch, vectors, width = pooled.shape
    require(
        tokens.ndim == 3 and tokens.shape[0] == batch and tokens.shape[2] == width,
        f"tokens has shape {tuple(tokens.shape)}, expected [{batch}, P + N, {width}]",
    )
    require(
        0 <= num_class_tokens <= tokens.shape[1],
        f"num_class_tokens is {num_class_tokens}, tokens has {tokens.shape[1]} rows an image",
    )
    require(weight.ndim == 2, f"weight has shape {tuple(weight.shape)}, expected two dimensions")
    classes = weight.shape[0]
    require(0 < classes < 2**24, f"weight has {classes} rows, expected 1 to 2^24 classes")
    check_device("pooled", pooled)
    check_device("tokens", tokens)
    require(weight.dtype in DTYPES, f"weight is {weight.dtype}, expected one of {DTYPES}")
    weight = check_weight("weight", weight, (classes, (vectors + num_class_tokens) * width), pooled)
    bias = check_weight("bias", bias, (classes,), pooled)
    require(
        tuple(state.shape) == (batch, 2) and state.dtype == torch.int32 and state.stride(1) == 1,
        f"state is {state.dtype} {tuple(state.shape)} with strides {state.stride()},"
        f" expected int32 {(batch, 2)} with the two numbers of an image side by side",
    )
    check_memory("state", state)
    require(
        batch < 2 or state.stride(0) >= 2, f"state has strides {state.stride()}: its rows overlap"
    )
    require(state.device == pooled.device, f"state is on {state.device}, expected {pooled.device}")
    require(tokens.device == pooled.device, f"tokens are on {tokens.device}, not {pooled.device}")
    for name, tensor in (("pooled", pooled), ("tokens", tokens)):
        require(tensor.is_floating_point(), f"{name} is {tensor.dtype}, expected a floating dtype")
    kind, threshold, patience = rule
    require(kind in range(5), f"rule has kind {kind}, expected 0 to 4")
    require(
        kind < 3 or 0 < patience < 2**31, f"rule has patience {patience}, expected 1 to 2^31 - 1"
    )

    tokens = within_reach(tokens[:, :num_class_tokens])
    logits = pooled.new_empty((batch, classes), dtype=weight.dtype)
    kinds = (torch.bool, torch.bool, torch.float32, torch.float32, torch.int32)
    leave, valid, confidence, entropy, prediction = (
        pooled.new_empty((batch,), dtype=dtype) for dtype in kinds
    )
    step = Step(logits, leave, valid, confidence, entropy, prediction)
    if batch == 0:
        return step
    block_k, block_c = tile_of(classes, width, weight.dtype)
    tiles = triton.cdiv(classes, block_k)
    blocks = triton.cdiv(batch, 16)
    parts = vectors + num_class_tokens if blocks * tiles < FEW_PROGRAMS else 1
    partial = pooled.new_empty((4, tiles, batch), dtype=torch.float32)
    products = pooled.new_empty((parts, batch, classes), dtype=torch.float32) if parts > 1 else bias
    counters = arrivals(blocks * (1 + tiles), pooled)
    with on_device(pooled):
        exit_step_kernel[(blocks * tiles * parts,)](
            pooled.contiguous(), tokens, weight, bias, logits, products, partial, counters,
            leave, valid, confidence, entropy, prediction, state, float(threshold), int(patience),
            batch, classes, tiles, *tokens.stride(), state.stride(0),
            C=width, M=vectors, T=num_class_tokens, RULE=int(kind), SPLIT=parts > 1,
            PRECISION=precision, BLOCK_B=16, BLOCK_K=block_k, BLOCK_C=block_c,
            num_warps=4 if block_k == 16 else 8, num_stages=3, maxnreg=255,
        )  # fmt: skip
    return step


def tile_of(classes: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """BLOCK_K and BLOCK_C.

    Small tiles spread a few classes over many multiprocessors; large ones read the images less. The
    walk over the channels is bound by latency: few steps, deep as 96 KiB for three stages allow.
    Float32 products are unrolled over a step.
    """
    block_k = min(128, max(16, triton.next_power_of_2(triton.cdiv(classes, 16))))
    deep = 32 if dtype == torch.float32 else min(256, 8192 // block_k)
    return block_k, max(16, min(deep, triton.next_power_of_2(width)))


def arrivals(count: int, like: Tensor) -> Tensor:
    """At least `count` zeroed counters, int32. Kernels leave them zero, so a stream keeps its own.

    While a CUDA graph is captured, fresh ones: a kept buffer must not depend on memory or on a fill
    that belong to the graph.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return like.new_zeros((count,), dtype=torch.int32)
    return _kept_arrivals(
        triton.next_power_of_2(max(count, 64)),
        like.device,
        torch.cuda.current_stream(like.device).cuda_stream,
    )


@cache
def _kept_arrivals(count: int, device: torch.device, stream: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)

"""`compact_` on random batches: survivors first, one order for all tensors, the fewest rows moved."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from lgvit_fast.ops import compact_

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)


def run(count: int, seed: int) -> dict[str, int]:
    """Check `count` random cases; AssertionError at the first that is wrong."""
    draw = random.Random(seed)
    moved = 0
    for _ in range(count):
        moved += _case(draw)
    return {"cases": count, "rows moved": moved}


def _case(draw: random.Random) -> int:
    batch = draw.choice((0, 1, 2, 3, 7, 8, 16, 63, 64, 65, 257))
    share = draw.choice((0.0, 0.02, 0.1, 0.5, 0.9, 1.0))
    keep = torch.tensor([draw.random() < share for _ in range(batch)], dtype=torch.bool)
    tokens, companions = _rows(draw, batch), [_rows(draw, batch) for _ in range(draw.randrange(4))]
    order = torch.arange(batch)
    before = [tensor.clone() for tensor in (tokens, *companions)]
    backend = draw.choice((None, "torch", "cpp"))
    count = compact_(tokens, keep, *companions, order, backend=backend)
    assert count == int(keep.sum())
    survivors = order[:count]
    assert sorted(survivors.tolist()) == keep.nonzero().flatten().tolist()
    for tensor, old in zip((tokens, *companions), before, strict=True):
        assert torch.equal(_bits(tensor[:count]), _bits(old[survivors]))
    moved = int((survivors != torch.arange(count)).sum())
    assert moved == int((~keep[:count]).sum()), "more rows moved than there were holes"
    return moved


def _rows(draw: random.Random, batch: int) -> Tensor:
    """`[B, ...]` of a random dtype; some with rows that are parts of longer ones."""
    shape = draw.choice(((), (1,), (3,), (2, 5), (17, 8)))
    dtype = draw.choice(DTYPES)
    if shape and draw.random() < 0.3:
        width = torch.Size(shape).numel()
        wide = torch.randint(0, 100, (batch, width + 3)).to(dtype)
        return wide[:, 1 : 1 + width].unflatten(1, shape)
    return torch.randint(0, 100, (batch, *shape)).to(dtype)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.numel() and tensor.dim() else tensor

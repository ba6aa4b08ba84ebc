"""BatchNorm over the batch of all processes that train together, as one process would see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

__all__ = ["batchnorm", "synchronized"]

_synchronized = False


@contextmanager
def synchronized(wanted: bool = True) -> Iterator[None]:
    """BatchNorms in training mode take the rows of all processes together, which must be in step.

    torch's SyncBatchNorm does the same on GPUs only.
    """
    global _synchronized
    before, _synchronized = _synchronized, wanted
    try:
        yield
    finally:
        _synchronized = before


def batchnorm(norm: nn.BatchNorm1d, rows: Tensor) -> Tensor:
    """BatchNorm of `[R, C]`; under `synchronized` over the rows of all processes."""
    if not (_synchronized and norm.training):
        normed: Tensor = norm(rows)
        return normed
    mean, variance, count = _statistics(rows.detach())
    with torch.no_grad():
        _follow(norm, mean, variance * count / (count - 1).clamp(min=1))
    found: Tensor = _Normalize.apply(rows, norm.weight, norm.bias, mean, variance, count, norm.eps)
    return found


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance `[C]` and number `[1]` of all processes' rows, float32."""
    variance, mean = torch.var_mean(rows.float(), dim=0, correction=0)
    own = torch.cat((mean, variance, mean.new_full((1,), len(rows))))
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, own)
    means, variances, counts = torch.stack(every).split((len(mean), len(mean), 1), dim=1)
    count = counts.sum(dim=0)
    mean = (counts * means).sum(dim=0) / count
    variance = (counts * (variances + (means - mean).square())).sum(dim=0) / count
    return mean, variance, count


def _follow(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    """What is used in eval mode moves towards a batch's statistics."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    momentum = 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance, momentum)


class _Normalize(torch.autograd.Function):
    """`(x - mean) / sqrt(variance + eps) * weight + bias`, whose statistics depend on x."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, mean, torch.rsqrt(variance + eps), count)
        return F.batch_norm(rows, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, scale, count = ctx.saved_tensors
        gradient = gradients[0].float()
        normed = (rows.float() - mean) * scale
        to_bias, to_weight = gradient.sum(dim=0), (gradient * normed).sum(dim=0)
        sums = torch.cat((to_bias, to_weight))
        distributed.all_reduce(sums)
        shift, slope = (sums / count).chunk(2)
        to_rows = weight * scale * (gradient - shift - normed * slope)
        return to_rows.to(rows.dtype), to_weight, to_bias, None, None, None, None

"""BatchNorm on tokens: as a layer over all tokens of a batch, and folded to an affine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lgvit_fast.heads import synchronized

__all__ = ["batchnorm_affine", "batchnorm_tokens"]


def batchnorm_tokens(norm: nn.BatchNorm1d, tokens: Tensor) -> Tensor:
    """BatchNorm over the B * N rows of `[B, N, C]`, what BatchNorm2d does on the patch map."""
    return synchronized.batchnorm(norm, tokens.flatten(0, 1)).view(tokens.shape)


def batchnorm_affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C]`, float64, of a BatchNorm in eval mode."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale

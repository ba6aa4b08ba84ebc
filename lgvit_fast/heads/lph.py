"""Local perception head: convolution-flavoured, for shallow exits that lack local detail."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgvit_fast.heads.affine import batchnorm_affine, batchnorm_tokens
from lgvit_fast.ops.depthwise import depthwise_gelu
from lgvit_fast.ops.linear import Linear, inference_linear
from lgvit_fast.ops.lph import LPHWeights, lph_pool

__all__ = ["LocalPerceptionHead"]


class FoldedFeature(NamedTuple):
    """The head's layers up to its feature, every BatchNorm folded but the one before the padding."""

    pointwise1: Linear  # with gelu
    scale: Tensor | None  # [C], BatchNorm 1; None for the light head, as all up to pointwise2
    shift: Tensor | None
    depthwise_weight: Tensor | None  # [C, 3, 3]
    depthwise_bias: Tensor | None
    pointwise2: Linear


class LocalPerceptionHead(nn.Module):
    """Inverted-bottleneck-free MobileNet block on patch tokens (paper section 3.3).

    Full: `y = BN3(PW2(BN2(gelu(DW3x3(BN1(gelu(PW1 x))))))) + x`. Light: the same without the
    depthwise step and its norm. A pointwise convolution is a Linear on tokens and BatchNorm2d on the
    map is BatchNorm1d over all tokens of the batch, so nothing is permuted but for the depthwise step.

    Args:
        width: C.
        full: with the depthwise 3x3 convolution; otherwise the light head.
    """

    def __init__(self, width: int, full: bool) -> None:
        super().__init__()
        self.pointwise1 = nn.Linear(width, width)
        self.norm1 = nn.BatchNorm1d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width) if full else None
        self.depthwise_norm = nn.BatchNorm1d(width) if full else None
        self.pointwise2 = nn.Linear(width, width)
        self.norm2 = nn.BatchNorm1d(width)
        for linear in (self.pointwise1, self.pointwise2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, patches: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """Training form: patch tokens `[B, N, C]` to the feature y `[B, N, C]`."""
        hidden = batchnorm_tokens(self.norm1, F.gelu(self.pointwise1(patches)))
        if self.depthwise is not None and self.depthwise_norm is not None:
            weight, bias = self.depthwise.weight.squeeze(1), self.depthwise.bias
            assert bias is not None  # for the type checker: the convolution is made with one
            hidden = depthwise_gelu(hidden, patch_grid, weight, bias)
            hidden = batchnorm_tokens(self.depthwise_norm, hidden)
        return batchnorm_tokens(self.norm2, self.pointwise2(hidden)) + patches

    def start_plain(self) -> None:
        """Make the feature the patches themselves (`ExitHead.start_plain`)."""
        nn.init.zeros_(self.norm2.weight)
        nn.init.zeros_(self.norm2.bias)

    def fold(self, dtype: torch.dtype, classifier: Tensor) -> tuple[LPHWeights, Tensor, Tensor]:
        """Weights of the exact inference form.

        Args:
            dtype: of the tokens to come.
            classifier: Wc, `[K, C]` float64.

        Returns:
            The per-token weights in `dtype` for `pool`, and in float64 the matrix `[K, 2C]` and offset
            `[K]` with `Wc mean_n y = matrix @ pooled.flatten() + offset`.
        """
        weights, projection, bias = self._fold(dtype)
        matrix = torch.cat((classifier @ projection, classifier), dim=1)
        return weights, matrix, classifier @ bias

    def _fold(self, dtype: torch.dtype) -> tuple[LPHWeights, Tensor, Tensor]:
        """Per-token weights, and the float64 matrix `[C, C]` and bias `[C]` that act on the hidden."""
        vectors = torch.promote_types(dtype, torch.float32)
        scale1, shift1 = batchnorm_affine(self.norm1)
        scale3, shift3 = batchnorm_affine(self.norm2)
        weights = LPHWeights(self.pointwise1.weight.to(dtype), self.pointwise1.bias.to(vectors))
        scale2, shift2 = scale1, shift1  # what the mean hidden vector still has to pass
        if self.depthwise is not None and self.depthwise_norm is not None:
            assert self.depthwise.bias is not None
            scale2, shift2 = batchnorm_affine(self.depthwise_norm)
            weights = weights._replace(
                scale=scale1.to(vectors),
                shift=shift1.to(vectors),
                depthwise_weight=self.depthwise.weight.squeeze(1).to(vectors),
                depthwise_bias=self.depthwise.bias.to(vectors),
            )
        projection = scale3[:, None] * self.pointwise2.weight.double()
        bias = scale3 * self.pointwise2.bias.double() + shift3 + projection @ shift2
        return weights, projection * scale2, bias

    def pool(
        self,
        tokens: Tensor,
        patch_grid: tuple[int, int],
        num_prefix_tokens: int,
        weights: LPHWeights,
    ) -> Tensor:
        """Inference form: tokens `[B, P + N, C]` to pooled `[B, 2, C]`."""
        return lph_pool(tokens, patch_grid, num_prefix_tokens, weights)

    def fold_feature(self, dtype: torch.dtype) -> FoldedFeature:
        """Weights of `feature` in `dtype`, for a readout that needs the feature token by token."""
        pool, matrix, bias = self._fold(dtype)
        scale, shift, taps, offset = pool[2:]
        return FoldedFeature(
            inference_linear(pool.weight, pool.bias.to(dtype), "gelu"),
            None if scale is None else scale.to(dtype),
            None if shift is None else shift.to(dtype),
            None if taps is None else taps.to(dtype),
            None if offset is None else offset.to(dtype),
            inference_linear(matrix.to(dtype).contiguous(), bias.to(dtype)),
        )

    def feature(
        self, patches: Tensor, patch_grid: tuple[int, int], weights: FoldedFeature
    ) -> Tensor:
        """Inference form of `forward`: patch tokens `[B, N, C]` to the feature y `[B, N, C]`."""
        hidden = weights.pointwise1(patches)
        if weights.depthwise_weight is not None and weights.depthwise_bias is not None:
            assert weights.scale is not None and weights.shift is not None
            hidden = torch.addcmul(weights.shift, hidden, weights.scale)
            hidden = depthwise_gelu(
                hidden, patch_grid, weights.depthwise_weight, weights.depthwise_bias
            )
        return weights.pointwise2(hidden) + patches

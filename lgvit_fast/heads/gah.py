"""Global aggregation head: attention over a pooled grid, for deep exits that lack global context."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lgvit_fast.ops.attention import attention
from lgvit_fast.ops.gah import POOLS, gah_pool, pool_grid
from lgvit_fast.ops.linear import Linear, inference_linear

__all__ = ["GlobalAggregationHead"]


class GAHWeights(NamedTuple):
    """The head's layers up to the pooled vectors, as `pool` takes them."""

    query_key: Tensor  # [2C, C]
    values: Tensor | None  # [heads, C / heads, C]; None where the exit's matrix holds them


class GlobalAggregationHead(nn.Module):
    """Self-attention over the grid reduced by `stride` (paper section 3.3): no residual, no norm.

    Args:
        width: C.
        stride: r, pooling stride of the grid.
        num_heads: attention heads, must divide `width`.
        pool: "subsample" (what the published code does) or "average" (r x r means).

    Raises:
        ValueError: `num_heads` does not divide `width`, or an unknown `pool`.
    """

    def __init__(
        self, width: int, stride: int, num_heads: int = 8, pool: str = "subsample"
    ) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads={num_heads} must be positive and divide the width {width}")
        if pool not in POOLS:
            raise ValueError(f"pool={pool!r}, expected one of {POOLS}")
        self.stride, self.num_heads, self.pool_type = stride, num_heads, pool
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """Training form: patch tokens `[B, N, C]` to the feature y `[B, n, C]`, n pooled tokens."""
        return self.attend(self.reduce(patches, patch_grid))

    def reduce(self, patches: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """All that the head reads of patch tokens `[B, N, C]`: the pooled ones `[B, n, C]`."""
        return pool_grid(patches, patch_grid, self.stride, self.pool_type)

    def attend(self, pooled: Tensor) -> Tensor:
        """The rest of `forward`: pooled tokens `[B, n, C]` to the feature y `[B, n, C]`."""
        feature: Tensor = self.proj(attention(self.qkv(pooled), self.num_heads))
        return feature

    def start_plain(self) -> None:
        """Make the feature the pooled tokens, averaged by the attention (`ExitHead.start_plain`)."""
        with torch.no_grad():
            nn.init.eye_(self.qkv.weight[2 * self.proj.in_features :])
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def fold(self, dtype: torch.dtype, classifier: Tensor) -> tuple[GAHWeights, Tensor, Tensor]:
        """Weights of the exact inference form.

        With `z_h [C]` the pooled tokens averaged by head h, the classifier `Wc` sees
        `sum_h z_h (Wc Wo_h Wv_h)^T`. As one matrix that is `K heads C` weights, in two steps
        (`Wv_h`, then `Wc Wo`) `C C + K C`, and an image costs as many products. The smaller is taken:
        one matrix if `K (heads - 1) <= C`.

        Args:
            dtype: of the tokens to come.
            classifier: Wc, `[K, C]` float64.

        Returns:
            The weights of `pool` in `dtype`, and in float64 the matrix `[K, M C]` and offset `[K]`
            with `Wc mean_n y = matrix @ pooled.flatten() + offset`; M is 1, or `heads` where the
            matrix holds the values.
        """
        width, heads = self.proj.in_features, self.num_heads
        query_key, values = self.qkv.weight.split((2 * width, width))
        values = values.unflatten(0, (heads, width // heads))
        matrix = classifier @ self.proj.weight.double()
        offset = classifier @ self.proj.bias.double()
        if len(classifier) * (heads - 1) > width:
            return GAHWeights(query_key.to(dtype), values.to(dtype)), matrix, offset
        by_head = matrix.unflatten(1, (heads, width // heads))
        matrix = torch.einsum("khd,hdc->khc", by_head, values.double()).flatten(1)
        return GAHWeights(query_key.to(dtype), None), matrix, offset

    def pool(
        self,
        tokens: Tensor,
        patch_grid: tuple[int, int],
        num_prefix_tokens: int,
        weights: GAHWeights,
    ) -> Tensor:
        """Inference form: tokens `[B, P + N, C]` to pooled `[B, M, C]`, M as of `fold`."""
        pooled = gah_pool(
            tokens,
            patch_grid,
            num_prefix_tokens,
            weights.query_key,
            self.num_heads,
            self.stride,
            self.pool_type,
        )
        if weights.values is None:
            return pooled
        by_head = pooled.transpose(0, 1) @ weights.values.transpose(1, 2)  # [heads, B, C / heads]
        return by_head.transpose(0, 1).flatten(1).unsqueeze(1)

    def fold_feature(self, dtype: torch.dtype) -> tuple[Linear, Linear]:
        """Weights of `feature` in `dtype`, for a readout that needs the feature token by token."""
        return (
            inference_linear(self.qkv.weight.to(dtype), None),
            inference_linear(self.proj.weight.to(dtype), self.proj.bias.to(dtype)),
        )

    def feature(
        self, patches: Tensor, patch_grid: tuple[int, int], weights: tuple[Linear, Linear]
    ) -> Tensor:
        """Inference form of `forward`: patch tokens `[B, N, C]` to the feature y `[B, n, C]`."""
        qkv, proj = weights
        s = pool_grid(patches, patch_grid, self.stride, self.pool_type)
        return proj(attention(qkv(s), self.num_heads))

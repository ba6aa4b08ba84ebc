"""An exit: a perception head and the classifiers that read its mean, in both of its forms."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lgvit_fast.heads.gah import GlobalAggregationHead
from lgvit_fast.heads.layout import ExitSpec
from lgvit_fast.heads.lph import LocalPerceptionHead
from lgvit_fast.ops.exit_step import ExitRule, ExitStep, exit_step
from lgvit_fast.ops.lph import LPHWeights

__all__ = ["ExitHead"]


class FoldedHead(NamedTuple):
    """An exit in the exact inference form: per-token weights, then one matrix."""

    pool_weights: LPHWeights | Tensor
    weight: Tensor  # [K, (M + T) * C]
    bias: Tensor  # [K]


class ExitHead(nn.Module):
    """Reads a block's tokens and says what the image is.

    With the mean m of the head's feature over its tokens, the logits are `Wc (m + cls) + bc` for a
    ViT, the mean of two such classifiers on cls and dist for a distilled DeiT, and `Wc m + bc` for a
    model without a class token. Class tokens are the raw ones of the block, no LayerNorm.

    Args:
        spec: what the exit is made of.
        width: C.
        num_classes: K.
        num_prefix_tokens: P, all tokens before the patches (class, distillation, registers).
        num_class_tokens: T, how many of them the classifiers read: 0, 1 or 2.
        num_heads: attention heads of a global head.
        pool: grid pooling of a global head, "subsample" or "average".
    """

    def __init__(
        self,
        spec: ExitSpec,
        width: int,
        num_classes: int,
        num_prefix_tokens: int,
        num_class_tokens: int,
        num_heads: int = 8,
        pool: str = "subsample",
    ) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.num_class_tokens = num_class_tokens
        self.perception: LocalPerceptionHead | GlobalAggregationHead
        if spec.kind == "local":
            self.perception = LocalPerceptionHead(width, full=spec.head == "lph_full")
        else:
            self.perception = GlobalAggregationHead(width, spec.stride, num_heads, pool)
        count = max(1, num_class_tokens)
        self.classifiers = nn.ModuleList(nn.Linear(width, num_classes) for _ in range(count))
        for classifier in self._linears:
            nn.init.trunc_normal_(classifier.weight, std=0.02)
            nn.init.zeros_(classifier.bias)
        self.folded: FoldedHead | None = None
        self._folded_from: tuple[object, ...] = ()

    def forward(self, tokens: Tensor, patch_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Training form: tokens `[B, P + N, C]` to logits `[B, K]` and the feature `[B, n, C]`."""
        feature = self.perception(tokens[:, self.num_prefix_tokens :], patch_grid)
        mean = feature.mean(dim=1)
        class_tokens = tokens[:, : self.num_class_tokens].unbind(1) or (torch.zeros_like(mean),)
        votes = [
            classify(mean + token)
            for classify, token in zip(self.classifiers, class_tokens, strict=True)
        ]
        return torch.stack(votes).mean(0) if len(votes) > 1 else votes[0], feature

    def step(
        self, tokens: Tensor, patch_grid: tuple[int, int], rule: ExitRule, state: Tensor
    ) -> ExitStep:
        """Inference form: logits of every image and who leaves under `rule`.

        `prepare` must have been called since the parameters last changed.

        Args:
            tokens: `[B, P + N, C]`.
            patch_grid: `(H, W)`.
            rule: the policy's rule at this exit.
            state: `[B, 2]` int32 policy state, updated in place.
        """
        folded = self.folded
        if folded is None:
            raise RuntimeError("the exit head is not prepared: call prepare(dtype) first")
        tokens = tokens.to(folded.weight.dtype)
        pooled = self.perception.pool(
            tokens,
            patch_grid,
            self.num_prefix_tokens,
            folded.pool_weights,  # type: ignore[arg-type]
        )
        return exit_step(
            pooled, tokens, self.num_class_tokens, folded.weight, folded.bias, rule, state
        )

    @torch.no_grad()
    def prepare(self, dtype: torch.dtype) -> None:
        """Fold the head for compute `dtype`, unless nothing changed since the last time.

        A change is seen by a tensor's identity, storage and version counter; writing through
        `parameter.data` escapes the counter, call `train()` and `eval()` after doing so.
        """
        made_from = (dtype, *(_fingerprint(t) for t in (*self.parameters(), *self.buffers())))
        if self.folded is not None and made_from == self._folded_from:
            return
        linears = self._linears
        with torch.autocast(linears[0].weight.device.type, enabled=False):
            pool_weights, matrix, matrix_bias = self.perception.fold(dtype)
            votes = [linear.weight.double() / len(linears) for linear in linears]
            classifier = torch.stack(votes).sum(0)
            weight = torch.cat((classifier @ matrix, *votes[: self.num_class_tokens]), dim=1)
            bias = torch.stack([linear.bias.double() for linear in linears]).mean(0)
            bias = bias + classifier @ matrix_bias
            vectors = torch.promote_types(dtype, torch.float32)
            self.folded = FoldedHead(pool_weights, weight.to(dtype), bias.to(vectors))
        self._folded_from = made_from

    @property
    def _linears(self) -> list[nn.Linear]:
        return cast(list[nn.Linear], list(self.classifiers))

    def train(self, mode: bool = True) -> ExitHead:
        """Sets the mode; returning to train mode drops the folded weights."""
        if mode:
            self.folded, self._folded_from = None, ()
        super().train(mode)
        return self


def _fingerprint(tensor: Tensor) -> tuple[int, int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version

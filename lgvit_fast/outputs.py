"""What a model gives back: every exit's logits, or one answer an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lgvit_fast.ops.exit_step import ExitStep

__all__ = ["ExitOutputs", "Inference"]


@dataclass
class ExitOutputs:
    """Every exit's opinion of every image.

    Attributes:
        exits: logits `[B, K]` of each of the E exits, shallow to deep.
        final: logits `[B, K]` of the backbone's own classifier.
        features: the heads' features `[B, n, C]` before the mean, or None if not asked for.
        last_tokens: patch tokens `[B, N, C]` of the last block before the final norm, or None likewise.
        patch_grid: `(H, W)` of `last_tokens`.
    """

    exits: tuple[Tensor, ...]
    final: Tensor
    features: tuple[Tensor, ...] | None
    last_tokens: Tensor | None
    patch_grid: tuple[int, int]


@dataclass
class Inference:
    """One answer an image, in input order.

    Attributes:
        logits: `[B, K]` of the exit each image left at.
        exit_index: `[B]` int64, 0 to E - 1, E for the final classifier.
        exit_layer: `[B]` int64, the block after which it left, from 1.
        nonfinite: `[B]` bool, an exit or the final classifier met a NaN or +inf logit. No policy lets
            such an image leave at the exit where that happened.
    """

    logits: Tensor
    exit_index: Tensor
    exit_layer: Tensor
    nonfinite: Tensor

    @classmethod
    def blank(
        cls, batch: int, num_classes: int, dtype: torch.dtype, device: torch.device
    ) -> Inference:
        """Zeros, to be filled by `record`."""
        return cls(
            logits=torch.zeros(batch, num_classes, dtype=dtype, device=device),
            exit_index=torch.zeros(batch, dtype=torch.int64, device=device),
            exit_layer=torch.zeros(batch, dtype=torch.int64, device=device),
            nonfinite=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def record(self, rows: Tensor, index: int, layer: int, step: ExitStep) -> None:
        """Write an exit's word for all who reached it; for those who go on it is overwritten later.

        Args:
            rows: `[n]` int64, the place here of each image in `step`.
            index: the exit, from 0.
            layer: the block before it, from 1.
            step: what the exit said.
        """
        self.logits.index_copy_(0, rows, step.logits.to(self.logits.dtype))
        self.exit_index.index_fill_(0, rows, index)
        self.exit_layer.index_fill_(0, rows, layer)
        self.nonfinite.index_copy_(0, rows, self.nonfinite[rows] | ~step.valid)

    def map(self, function: Callable[[Tensor], Tensor]) -> Inference:
        """Apply a function to every tensor."""
        return Inference(*map(function, self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All tensors, as listed above."""
        return self.logits, self.exit_index, self.exit_layer, self.nonfinite

    @property
    def prediction(self) -> Tensor:
        """`[B]` int64, the class with the largest logit."""
        return self.logits.argmax(dim=-1)

    @property
    def confidence(self) -> Tensor:
        """`[B]` float32, the largest softmax probability."""
        return torch.softmax(self.logits.float(), dim=-1).amax(dim=-1)

"""What a model gives back: every exit's logits, or one answer an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    @property
    def prediction(self) -> Tensor:
        """`[B]` int64, the class with the largest logit."""
        return self.logits.argmax(dim=-1)

    @property
    def confidence(self) -> Tensor:
        """`[B]` float32, the largest softmax probability."""
        return torch.softmax(self.logits.float(), dim=-1).amax(dim=-1)

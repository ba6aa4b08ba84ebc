"""From an exit's feature to the vectors its classifiers see."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ClassReadout", "MeanReadout", "standard_mean"]


class MeanReadout(nn.Module):
    """The mean of the patches' features, plus each class token (paper section 3.3).

    Args:
        width: C.
        norm: LayerNorm on each token before the mean, as Swin has it.
    """

    def __init__(self, width: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None

    @property
    def affine(self) -> bool:
        """Whether the result is affine in the mean feature, so that a pooled form exists."""
        return self.norm is None

    def forward(self, patches: Tensor, class_tokens: Tensor) -> tuple[Tensor, ...]:
        """Features `[B, n, C]` and class tokens `[B, T, C]` to max(1, T) vectors `[B, C]`."""
        mean = (patches if self.norm is None else self.norm(patches)).mean(dim=1)
        return tuple(mean + token for token in class_tokens.unbind(1)) or (mean,)


def standard_mean(feature: Tensor, eps: float) -> Tensor:
    """Mean `[B, 1, C]` over the tokens `[B, n, C]` of a LayerNorm without weight and bias."""
    normed = F.layer_norm(feature, feature.shape[-1:], eps=eps)
    return normed.mean(1, keepdim=True, dtype=torch.promote_types(feature.dtype, torch.float32))


class ClassReadout(nn.Module):
    """The class tokens alone: through a tanh layer for one (BERT's pooler), a LayerNorm for two.

    The readout of linear exits, as the published code has it for ViT and distilled DeiT.

    Args:
        width: C.
        num_class_tokens: T, 1 or 2.
    """

    affine = False

    def __init__(self, width: int, num_class_tokens: int) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width) if num_class_tokens == 1 else None
        self.norm = nn.LayerNorm(width) if num_class_tokens > 1 else None

    def forward(self, patches: Tensor, class_tokens: Tensor) -> tuple[Tensor, ...]:
        """Class tokens `[B, T, C]` to T vectors `[B, C]`; the patches are not looked at."""
        if self.pooler is not None:
            return (torch.tanh(self.pooler(class_tokens[:, 0])),)
        normed: Tensor = cast(nn.LayerNorm, self.norm)(class_tokens)
        return normed.unbind(1)

"""Exits that begin with what the backbone knows already, instead of with noise.

An exit's classifiers read one vector or two of each image. The affine map from these to the model's own
logits that is best in the least squares is the composition of the model's classifier with the best map
to the features that it reads, so this is the model's own classifier moved to an earlier block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lgvit_fast.heads import ExitHead
from lgvit_fast.model import LGViT
from lgvit_fast.training.tokens import Tokens

__all__ = ["warm_start"]

RIDGE = 1e-3  # share of the mean variance of a coordinate


@torch.no_grad()
def warm_start(model: LGViT, batches: Iterable[Tokens]) -> tuple[int, ...]:
    """Fit the classifiers of the exits that were never trained to the model's own logits.

    Their heads are made to transform next to nothing at first (`ExitHead.start_plain`). One pass, sums
    in float64.

    Args:
        model: in eval mode.
        batches: of images that stand for those to come, as `run_backbone` gives them.

    Returns:
        The blocks (from 1) of the exits that were fitted.

    Raises:
        ValueError: no batches, or logits that are not finite.
    """
    layers = model.untrained_exits
    chosen = [place for place, spec in enumerate(model.exits) if spec.layer in layers]
    heads = {place: cast(ExitHead, model.exit_heads[place]) for place in chosen}
    for head in heads.values():
        head.start_plain()
    sums: dict[int, _Moments] = {place: _Moments() for place in chosen}
    for tokens in batches if chosen else ():
        if not tokens.final.isfinite().all():
            raise ValueError("the model's own logits hold NaN or infinities: it cannot teach exits")
        for place, head in heads.items():
            grid = model.adapter.patch_grid(tokens.image_size, model.exits[place].layer)
            vectors, _ = head.vectors(tokens.exits[place].to(model.compute_dtype), grid)
            sums[place].add(torch.cat(vectors, dim=1), tokens.final)
    for place, head in heads.items():
        weight, bias = sums[place].solve()
        count = len(head.classifiers)  # whose mean the logits are
        for part, linear in zip(weight.chunk(count, dim=1), head.classifiers, strict=True):
            assert isinstance(linear, nn.Linear)
            linear.weight.copy_(count * part)
            linear.bias.copy_(bias)
    return layers


class _Moments:
    """First and second moments of vectors x and logits y, for the regression of y on x."""

    def __init__(self) -> None:
        self.count = 0
        self.x = self.y = self.xx = self.xy = torch.zeros((), dtype=torch.float64)

    def add(self, vectors: Tensor, logits: Tensor) -> None:
        """Take `[b, D]` vectors and `[b, K]` logits into the sums."""
        x, y = vectors.double().cpu(), logits.double().cpu()
        self.count += len(x)
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.xx, self.xy = self.xx + x.T @ x, self.xy + x.T @ y

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weight `[K, D]` and bias `[K]` of the ridge regression; the bias is not shrunk."""
        if not self.count:
            raise ValueError("no image to fit the exits to")
        mean_x, mean_y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count - mean_x.outer(mean_x)
        xy = self.xy / self.count - mean_x.outer(mean_y)
        ridge = RIDGE * xx.diagonal().mean().clamp(min=1e-12)
        weight = torch.linalg.solve(xx + ridge * torch.eye(len(xx), dtype=xx.dtype), xy).T
        return weight, mean_y - weight @ mean_x

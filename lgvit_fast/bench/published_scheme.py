"""The published way to run an early-exit model, kept to measure against.

One image at a time through blocks and complete heads, features on a `[B, C, H, W]` map, and a decision
in Python after each exit (paper section 3.2). Same weights, same answers, none of the rewriting.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lgvit_fast.heads import ExitHead, LocalPerceptionHead
from lgvit_fast.model import LGViT
from lgvit_fast.ops.exit_step import ExitStep, apply_rule
from lgvit_fast.policies import Policy

__all__ = ["PublishedScheme"]


class PublishedScheme:
    """Answers one image at a time.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: LGViT) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, images: Tensor, policy: Policy) -> Tensor:
        """Logits `[B, K]` of images `[B, channels, height, width]` under any policy."""
        rows = [self._answer(images[i : i + 1], policy.part(i, i + 1)) for i in range(len(images))]
        return torch.cat(rows)

    def _answer(self, image: Tensor, policy: Policy) -> Tensor:
        model, adapter = self.model, self.model.adapter
        size, start = (image.shape[2], image.shape[3]), 0
        state = policy.start(1, image.device)
        tokens = adapter.embed(image)
        for index, (spec, head) in enumerate(zip(model.exits, model.exit_heads, strict=True)):
            grid = adapter.patch_grid(size, spec.layer)
            tokens = adapter.blocks(tokens, start, spec.layer, grid)
            logits = _published_head(cast(ExitHead, head), adapter.to_tokens(tokens), grid)
            step = ExitStep(logits, *apply_rule(policy.rule(index), logits, state[:, :2]))
            step = policy.decide(step, state, index)
            if step.leave.item():
                return step.logits
            start = spec.layer
        grid = adapter.patch_grid(size, model.num_blocks)
        return adapter.classify(adapter.blocks(tokens, start, model.num_blocks, grid))


def _published_head(head: ExitHead, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """A head in its training form; a local one with 1x1 convolutions on the map."""
    perception = head.perception
    if not isinstance(perception, LocalPerceptionHead):
        logits: Tensor = head(tokens, grid)[0]
        return logits
    batch, _, width = tokens.shape
    patches = tokens[:, head.num_prefix_tokens :].transpose(1, 2).reshape(batch, width, *grid)
    hidden = F.gelu(_pointwise(perception.pointwise1, patches))
    hidden = _batchnorm(perception.norm1, hidden)
    if perception.depthwise is not None and perception.depthwise_norm is not None:
        hidden = _batchnorm(perception.depthwise_norm, F.gelu(perception.depthwise(hidden)))
    hidden = _batchnorm(perception.norm2, _pointwise(perception.pointwise2, hidden))
    mean = (hidden + patches).flatten(2).transpose(1, 2).mean(1)
    class_logits = [
        classify(mean + token)
        for classify, token in zip(
            head.classifiers,
            tokens[:, : head.num_class_tokens].unbind(1) or (torch.zeros_like(mean),),
            strict=True,
        )
    ]
    return torch.stack(class_logits).mean(0)


def _pointwise(linear: torch.nn.Linear, maps: Tensor) -> Tensor:
    return F.conv2d(maps, linear.weight[:, :, None, None], linear.bias)


def _batchnorm(norm: torch.nn.BatchNorm1d, maps: Tensor) -> Tensor:
    return F.batch_norm(
        maps, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )

"""The model cut at its exits: some blocks, then the exit behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lgvit_fast.backbones import Backbone
from lgvit_fast.heads import ExitHead
from lgvit_fast.ops.exit_step import ExitRule, ExitStep, RuleKind
from lgvit_fast.policies import Policy

__all__ = ["Segment", "cut"]

_NEVER = ExitRule(RuleKind.NEVER)


class Segment(nn.Module):
    """Blocks `start + 1` to `stop` and what follows: an exit head, or the model's own classifier.

    Callable, compilable and exportable on its own; shares its weights with the model.

    Args:
        adapter: the backbone.
        index: the exit's number from 0; E for the last segment.
        start: blocks already run.
        stop: the block it ends with, counted from 1: its exit's layer.
        head: None for the last segment.
    """

    def __init__(
        self, adapter: Backbone, index: int, start: int, stop: int, head: ExitHead | None
    ) -> None:
        super().__init__()
        self.adapter, self.index, self.start, self.stop = adapter, index, start, stop
        self.parts = adapter.parts(start, stop)  # where `parameters` and `torch.export` find them
        self.head = head

    @property
    def is_last(self) -> bool:
        """Whether it ends with the model's own classifier, where nobody goes on."""
        return self.head is None

    def rule(self, policy: Policy) -> ExitRule:
        """The rule a policy has for this segment's exit; the final classifier asks none."""
        return _NEVER if self.head is None else policy.rule(self.index)

    def forward(
        self,
        tokens: Tensor,
        state: Tensor,
        patch_grid: tuple[int, int],
        rule: ExitRule = _NEVER,
    ) -> tuple[Tensor, ExitStep]:
        """Tokens `[B, ...]` after block `start` to those after `stop`, and the exit's word.

        A head must have been prepared since its parameters last changed (`LGViT.prepare`).

        Args:
            tokens: in the backbone's own layout (`Backbone.to_tokens`); not changed.
            state: `[B, 2]` int32 policy state, updated in place.
            patch_grid: `(H, W)` after block `stop`.
            rule: who leaves here; see `rule`.
        """
        tokens = self.blocks(tokens, patch_grid)
        return tokens, self.ask(tokens, state, patch_grid, rule)

    def blocks(self, tokens: Tensor, patch_grid: tuple[int, int]) -> Tensor:
        """The first half of `forward`: only the blocks."""
        return self.adapter.blocks(tokens, self.start, self.stop, patch_grid)

    def ask(
        self, tokens: Tensor, state: Tensor, patch_grid: tuple[int, int], rule: ExitRule = _NEVER
    ) -> ExitStep:
        """The second half of `forward`: only the exit."""
        if self.head is not None:
            return self.head.step(self.adapter.to_tokens(tokens), patch_grid, rule, state)
        logits = self.adapter.classify(tokens)
        valid = ~logits.logsumexp(-1).isnan()
        return ExitStep(logits, torch.ones_like(valid), valid)


def cut(
    adapter: Backbone,
    layers: Sequence[int],
    heads: Sequence[ExitHead],
    asked: Sequence[int] | None = None,
) -> tuple[Segment, ...]:
    """The segments of a model, one for each exit asked and the last.

    Args:
        adapter: the backbone.
        layers: the block of each exit, from 1.
        heads: the head of each exit.
        asked: numbers (from 0, increasing) of the exits to ask; None asks all.
    """
    asked = range(len(layers)) if asked is None else asked
    starts = [0, *(layers[i] for i in asked)]
    ends: list[tuple[int, int, ExitHead | None]] = [(i, layers[i], heads[i]) for i in asked]
    ends.append((len(layers), adapter.num_blocks, None))
    return tuple(
        Segment(adapter, index, start, stop, head)
        for start, (index, stop, head) in zip(starts, ends, strict=True)
    )

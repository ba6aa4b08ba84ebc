"""The model cut at its exits, and the one loop that takes a batch through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lgvit_fast.backbones import Backbone
from lgvit_fast.heads import ExitHead
from lgvit_fast.ops.end_exit import end_exit_, waiting
from lgvit_fast.ops.exit_step import ExitStep
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import NEVER, Policy

__all__ = ["Observer", "Segment", "cut", "run_segments"]

# Called after each part of a segment ("embed", "blocks", "exit") with the segment and its rows.
Observer = Callable[[str, "Segment", int], None]


def _ignore(part: str, segment: Segment, rows: int) -> None:
    pass


def run_segments(
    segments: Sequence[Segment],
    images: Tensor,
    policy: Policy,
    answer: Inference,
    observe: Observer = _ignore,
) -> None:
    """Answer a batch: every segment on the images that are left, which are compacted in between.

    Args:
        segments: shallow to deep, their heads prepared.
        images: `[B, channels, height, width]`; not changed.
        policy: who leaves where.
        answer: filled in; B rows, made by `Inference.blank`.
        observe: called after each part of a segment, for counts and timings.
    """
    if not len(images):
        return
    image_size = (images.shape[2], images.shape[3])
    tokens, rows = images, torch.arange(len(images), device=images.device)
    state, counts = policy.start(len(images), images.device), waiting(images.device)
    for segment in segments:
        tokens = segment.blocks(tokens, image_size, observe)
        step = segment.exit(tokens, state, image_size, policy)
        place = segment.index, segment.stop
        count = end_exit_(step, tokens, rows, state, answer.tensors(), *place, counts=counts)
        observe("exit", segment, len(rows))
        if not count:
            return
        tokens, rows, state = tokens[:count], rows[:count], state[:count]


class Segment(nn.Module):
    """Blocks `start + 1` to `stop` and the exit behind them: a head, or the model's own classifier.

    The first segment begins with the embedding. Callable, compilable and exportable on its own; shares
    its weights with the model.

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
    def is_first(self) -> bool:
        """Whether it begins with the embedding."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with the model's own classifier, after which no image goes on."""
        return self.head is None

    def forward(
        self, tokens: Tensor, state: Tensor, image_size: tuple[int, int], policy: Policy = NEVER
    ) -> tuple[Tensor, ExitStep]:
        """Tokens after block `start` to those after block `stop`, the exit's logits and who leaves.

        A head must have been prepared since its parameters last changed (`LGViT.prepare`).

        Args:
            tokens: `[B, ...]` in the backbone's own layout (`Backbone.to_tokens`), images
                `[B, channels, height, width]` for the first segment; not changed.
            state: `[B, ...]` policy state (`Policy.start`), updated in place.
            image_size: `(height, width)` of the images, in pixels.
            policy: its rule decides who leaves; by default no image does.

        Returns:
            The tokens `[B, ...]`, and an `ExitStep` whose `leave` is the policy's decision.
        """
        tokens, read = self.advance(tokens, image_size)
        return tokens, self.decide(read, tokens, state, policy)

    def advance(self, tokens: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Any]:
        """All of `forward` that asks neither policy nor state: the tokens, and what `read` gives."""
        tokens = self.blocks(tokens, image_size)
        return tokens, self.read(tokens, image_size)

    def blocks(
        self, tokens: Tensor, image_size: tuple[int, int], observe: Observer = _ignore
    ) -> Tensor:
        """The first half of `forward`: the embedding, if it is the first segment, and the blocks."""
        if self.is_first:
            tokens = self.adapter.embed(tokens)
            observe("embed", self, tokens.shape[0])
        grid = self.adapter.patch_grid(image_size, self.stop)
        tokens = self.adapter.blocks(tokens, self.start, self.stop, grid)
        observe("blocks", self, tokens.shape[0])
        return tokens

    def exit(
        self, tokens: Tensor, state: Tensor, image_size: tuple[int, int], policy: Policy = NEVER
    ) -> ExitStep:
        """The second half of `forward`: the head, the rule and the policy's decision."""
        return self.decide(self.read(tokens, image_size), tokens, state, policy)

    def read(self, tokens: Tensor, image_size: tuple[int, int]) -> Tensor | ExitStep:
        """What the exit decides on, for `decide`: of a head `ExitHead.read`, at the end the answer."""
        if self.head is None:
            logits = self.adapter.classify(tokens)
            valid = ~logits.logsumexp(-1).isnan()
            return ExitStep(logits, torch.ones_like(valid), valid)
        grid = self.adapter.patch_grid(image_size, self.stop)
        return self.head.read(self.adapter.to_tokens(tokens), grid)

    def decide(self, read: Any, tokens: Tensor, state: Tensor, policy: Policy = NEVER) -> ExitStep:
        """The exit's logits, the rule and the policy's decision, from what `read` gave of `tokens`."""
        if self.head is None:
            step: ExitStep = read
            return step
        rule = policy.rule(self.index)
        step = self.head.decide(read, self.adapter.to_tokens(tokens), rule, state[:, :2])
        return policy.decide(step, state, self.index)

    def logits(self, tokens: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The exit in training form: logits `[B, K]` and the head's feature `[B, n, C]`, or None."""
        if self.head is None:
            return self.adapter.classify(tokens), None
        grid = self.adapter.patch_grid(image_size, self.stop)
        logits, feature = self.head(self.adapter.to_tokens(tokens), grid)
        return logits, feature


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

"""Which exits to keep, given where images leave and what each part of the model costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.clock import now, seconds
from lgvit_fast.inference.engine import Engine
from lgvit_fast.model import LGViT
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import Confidence, Policy
from lgvit_fast.segments import Segment, run_segments

__all__ = ["Costs", "Plan", "measure_costs", "plan_exits"]

_SECONDS, _MOST_ROUNDS = 1.0, 25  # to measure a small model for, in how many passes


@dataclass(frozen=True)
class Costs:
    """Seconds of each part of a model at some batch sizes.

    Attributes:
        batches: the batch sizes, increasing.
        embed: seconds of the embedding at each of them.
        blocks: for each segment, seconds of its blocks at each of them.
        heads: for each segment, seconds of what follows: the head, the decision, recording and
            compaction; for the last, the classifier.
    """

    batches: tuple[int, ...]
    embed: tuple[float, ...]
    blocks: tuple[tuple[float, ...], ...]
    heads: tuple[tuple[float, ...], ...]

    def at(self, seconds: Sequence[float], batch: float) -> float:
        """A part's seconds at any batch size, by interpolation; below one image, in proportion."""
        return float(np.interp(batch, (0, *self.batches), (0, *seconds)))

    def per_image(self, histogram: Sequence[float], batch: int | None = None) -> float:
        """Seconds an image, all exits asked, where so many leave at each exit and at the classifier.

        Args:
            histogram: E + 1 numbers or shares.
            batch: images that enter together; None takes the largest measured.
        """
        batch = self.batches[-1] if batch is None else batch
        counts = np.asarray(histogram, dtype=float)
        entering = 1 - (np.cumsum(counts) - counts) / counts.sum()
        seconds = self.at(self.embed, batch)
        for blocks, head, share in zip(self.blocks, self.heads, entering, strict=True):
            seconds += self.at(blocks, batch * share) + self.at(head, batch * share)
        return seconds / batch


@dataclass(frozen=True)
class Plan:
    """Exits to ask, and what that should cost.

    Attributes:
        exits: layers of the exits to keep, for `Engine(model, exits=...)`.
        seconds: predicted for an image with these exits.
        seconds_with_all: predicted for an image with all exits.
        seconds_dense: predicted for an image without any.
        costs: what the predictions rest on.
    """

    exits: tuple[int, ...]
    seconds: float
    seconds_with_all: float
    seconds_dense: float
    costs: Costs


def plan_exits(
    model: LGViT | Engine,
    histogram: Sequence[float],
    batch_size: int = 16,
    *,
    costs: Costs | None = None,
    image_size: tuple[int, int] | None = None,
) -> Plan:
    """Choose the exits that make an image cheapest on average.

    An image whose exit is not kept leaves at the next one that is: it was sure enough before. All
    choices of exits are compared, by dynamic programming.

    Args:
        model: in eval mode, or an `Engine` made of it.
        histogram: how many images (or what share) leave at each exit, then at the classifier: E + 1
            numbers, as `torch.bincount(result.exit_index, minlength=E + 1)` gives.
        batch_size: images that enter together.
        costs: None measures them now (`measure_costs`), which takes several dense passes.
        image_size: `(height, width)` in pixels for the measurement; None takes the model's own.

    Raises:
        ValueError: a histogram of another length, with negative numbers or without images.
    """
    engine = model if isinstance(model, Engine) else Engine(model, max_batch=batch_size)
    layers = [spec.layer for spec in engine.model.exits]
    counts = np.asarray(histogram, dtype=float)
    if counts.shape != (len(layers) + 1,) or counts.min() < 0 or not counts.sum() > 0:
        raise ValueError(
            f"histogram={list(histogram)}, expected {len(layers) + 1} numbers, none negative and some"
            " positive: images that leave at each exit and at the classifier"
        )
    costs = measure_costs(engine.model, batch_size, image_size) if costs is None else costs
    left = np.cumsum(counts) / counts.sum()
    last = len(layers)

    def price(kept: int | None, following: int) -> float:
        """Seconds from behind one exit kept (None: the start) up to and with the following one."""
        staying = batch_size * (1 - (0.0 if kept is None else float(left[kept])))
        between = range(0 if kept is None else kept + 1, following + 1)
        blocks = sum(costs.at(costs.blocks[i], staying) for i in between)
        return blocks + costs.at(costs.heads[following], staying)

    @cache
    def cheapest(kept: int | None) -> tuple[float, tuple[int, ...]]:
        """Seconds from behind an exit to the end, and the exits kept on the way."""
        choices = [(price(kept, last), cast(tuple[int, ...], ()))]
        for exit in range(0 if kept is None else kept + 1, last):
            rest, exits = cheapest(exit)
            choices.append((price(kept, exit) + rest, (exit, *exits)))
        return min(choices)

    def along(exits: Sequence[int]) -> float:
        places: list[int | None] = [None, *exits]
        return sum(price(a, b) for a, b in zip(places, [*exits, last], strict=True))

    embed = costs.at(costs.embed, batch_size)
    seconds, exits = cheapest(None)
    return Plan(
        exits=tuple(layers[i] for i in exits),
        seconds=(embed + seconds) / batch_size,
        seconds_with_all=costs.per_image(counts.tolist(), batch_size),
        seconds_dense=(embed + along(())) / batch_size,
        costs=costs,
    )


def measure_costs(
    model: LGViT,
    batch_size: int,
    image_size: tuple[int, int] | None = None,
    rounds: int = 3,
) -> Costs:
    """Time the parts of a model, as an engine on torch runs them, at 1, 2, 4, ... `batch_size` images.

    Medians of at least `rounds` passes, more of a small model. All are scaled alike, so that their sum
    is what the engine takes for a batch that no image leaves: its own overhead is counted too.
    """
    engine = Engine(model, batch_size, "torch")
    parameter = next(model.parameters())
    built_for = getattr(model.backbone.patch_embed, "img_size", None)
    height, width = image_size or built_for or model.pretrained_cfg["input_size"][1:]
    batches = [1 << i for i in range(batch_size.bit_length()) if 1 << i < batch_size] + [batch_size]
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, model.adapter.in_chans, height, width, generator=draw)
    images = images.to(parameter.device, parameter.dtype)
    stay = Confidence(1.0)  # a rule that costs what rules cost, and that no image passes
    answers = [model.blank(batch, images.device) for batch in batches]
    parts, whole = list[list[list[float]]](), list[float]()
    start = time.perf_counter()
    while len(whole) < rounds or (
        len(whole) < _MOST_ROUNDS and time.perf_counter() - start < _SECONDS
    ):
        segments = engine.segments
        parts.append(
            [
                _time_parts(segments, images[: len(answer.logits)], stay, answer)
                for answer in answers
            ]
        )
        whole.append(seconds(partial(engine, images, stay), images.device))
    typical = np.median(parts, axis=0)
    typical *= np.median(whole) / typical[-1].sum()
    columns = typical.T.tolist()
    return Costs(
        batches=tuple(batches),
        embed=tuple(columns[0]),
        blocks=tuple(map(tuple, columns[1::2])),
        heads=tuple(map(tuple, columns[2::2])),
    )


@torch.no_grad()
def _time_parts(
    segments: Sequence[Segment], images: Tensor, policy: Policy, answer: Inference
) -> list[float]:
    """Seconds of the embedding, then of blocks and exit of each segment."""
    times = [now(images.device)]

    def stamp(*part: object) -> None:
        times.append(now(images.device))

    run_segments(segments, images, policy, answer, stamp)
    return [later - earlier for earlier, later in pairwise(times)]

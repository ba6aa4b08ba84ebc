"""Wall clock: early exit against the same backbone run to the end, side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.model import LGViT
from lgvit_fast.policies import Policy

__all__ = ["Spread", "Timing", "compare"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median, low, high)


@dataclass(frozen=True)
class Timing:
    """Early exit and the plain backbone on the same images.

    Attributes:
        batch_size: images per call.
        images: images per round.
        rounds: how often each side ran over all of them.
        dense_ms: milliseconds per image, the backbone run to the end, without any head.
        early_ms: milliseconds per image, `LGViT.infer`.
        ratio: dense / early of each round, so that a slow moment hits both sides.
        layer_ratio: L / mean exit layer of these images, to hold the ratio against.
    """

    batch_size: int
    images: int
    rounds: int
    dense_ms: Spread
    early_ms: Spread
    ratio: Spread
    layer_ratio: float


@torch.inference_mode()
def compare(
    model: LGViT,
    images: Tensor,
    policy: Policy | None = None,
    *,
    batch_size: int = 32,
    rounds: int = 9,
    warmup: int = 2,
    autocast: AbstractContextManager[Any] | None = None,
) -> Timing:
    """Time `model.infer` against `model.backbone`, both warm, in alternating rounds.

    Args:
        model: in eval mode.
        images: `[n, channels, height, width]`, preprocessed; they are moved to the model once, before
            the clock runs.
        policy: None takes the model's own.
        batch_size: the last batch of a round may be smaller.
        rounds: timed passes over all images, per side.
        warmup: passes before that.
        autocast: a re-enterable `torch.autocast`, or None.

    Raises:
        ValueError: no images, or no rounds.
    """
    if not len(images) or rounds < 1 or batch_size < 1:
        raise ValueError(
            f"{len(images)} images, {rounds} rounds, batch size {batch_size}: expected at least 1 each"
        )
    device = next(model.parameters()).device
    batches = images.to(device).split(batch_size)
    layers: list[Tensor] = []

    def dense() -> None:
        for batch in batches:
            model.backbone(batch)

    def early() -> None:
        layers[:] = [model.infer(batch, policy).exit_layer for batch in batches]

    times: dict[Callable[[], None], list[float]] = {dense: [], early: []}
    with autocast or nullcontext():
        for turn in range(warmup + rounds):
            # taking turns to go first, neither side always finds the other's caches
            for side in (dense, early) if turn % 2 else (early, dense):
                seconds = _clock(side, device)
                if turn >= warmup:
                    times[side].append(seconds)
    per_image = 1000 / len(images)
    return Timing(
        batch_size=batch_size,
        images=len(images),
        rounds=rounds,
        dense_ms=Spread.of([t * per_image for t in times[dense]]),
        early_ms=Spread.of([t * per_image for t in times[early]]),
        ratio=Spread.of([d / e for d, e in zip(times[dense], times[early], strict=True)]),
        layer_ratio=model.num_blocks / float(torch.cat(layers).double().mean()),
    )


def _clock(work: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Wall clock: early exit against the same backbone run to the end, side by side in one process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.clock import Spread, take_turns
from lgvit_fast.inference import Engine
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Policy

__all__ = ["Timing", "compare"]


@dataclass(frozen=True)
class Timing:
    """Early exit and the plain backbone on the same images.

    Attributes:
        batch_size: images per call.
        images: images per round.
        rounds: how often each side ran over all of them.
        dense_ms: milliseconds per image, the backbone run to the end, without any head.
        early_ms: milliseconds per image, an `Engine` on torch (an exported model as it is).
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
    """Time an engine of the model against its backbone, both warm, in alternating rounds.

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
    # On torch, as the backbone that it is compared with.
    torch_engine = partial(Engine, max_batch=batch_size, runtime="torch")
    answer = torch_engine(model) if isinstance(model, LGViT) else model.infer
    layers: list[Tensor] = []

    def dense() -> None:
        for batch in batches:
            model.backbone(batch)

    def early() -> None:
        layers[:] = [answer(batch, policy).exit_layer for batch in batches]

    with autocast or nullcontext():
        times = take_turns({"dense": dense, "early": early}, device, rounds, warmup=warmup)
    dense_seconds, early_seconds = times["dense"][:, 0], times["early"][:, 0]
    per_image = 1000 / len(images)
    return Timing(
        batch_size=batch_size,
        images=len(images),
        rounds=rounds,
        dense_ms=Spread.of(per_image * dense_seconds),
        early_ms=Spread.of(per_image * early_seconds),
        ratio=Spread.of(dense_seconds / early_seconds),
        layer_ratio=model.num_blocks / float(torch.cat(layers).double().mean()),
    )

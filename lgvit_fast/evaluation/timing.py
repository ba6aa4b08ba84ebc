"""Wall clock: early exit against the full model, side by side in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
    """Early exit and the full model on the same images.

    Attributes:
        batch_size: images per call.
        images: images per round.
        rounds: how often each side ran over all of them.
        dense_ms: milliseconds per image, the backbone as timm has it, without any head.
        full_ms: milliseconds per image, the backbone on an `Engine`, without any head.
        early_ms: milliseconds per image, an `Engine` of the model.
        ratio: dense / early of each round, so that a slow moment hits all sides.
        full_ratio: full / early likewise: what the exits gain on equal terms.
        layer_ratio: L / mean exit layer of these images, to hold the ratios against.
        exits: the layers whose exits were asked.
        full_runtime: what ran the full model: "torch", "onnxruntime" or "openvino".
        early_runtime: what ran early exit.
    """

    batch_size: int
    images: int
    rounds: int
    dense_ms: Spread
    full_ms: Spread
    early_ms: Spread
    ratio: Spread
    full_ratio: Spread
    layer_ratio: float
    exits: tuple[int, ...]
    full_runtime: str
    early_runtime: str


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
    runtime: str = "torch",
    exits: Sequence[int] | None = None,
) -> Timing:
    """Time an engine of the model against its backbone, all warm, in alternating rounds.

    An exported model is timed as it is; its full model is the same graphs with no image leaving.

    Args:
        model: in eval mode.
        images: `[n, channels, height, width]`, preprocessed; they are moved to the model once, before
            the clock runs.
        policy: None takes the model's own.
        batch_size: the last batch of a round may be smaller.
        rounds: timed passes over all images, per side.
        warmup: passes before that.
        autocast: a re-enterable `torch.autocast`, or None.
        runtime: of both engines, see `Engine`; "auto" measures what is installed.
        exits: the layers whose exits to ask, see `Engine`.

    Raises:
        ValueError: no images, or no rounds.
    """
    if not len(images) or rounds < 1 or batch_size < 1:
        raise ValueError(
            f"{len(images)} images, {rounds} rounds, batch size {batch_size}: expected at least 1 each"
        )
    device = next(model.parameters()).device
    batches = images.to(device).split(batch_size)
    full: Callable[[Tensor], Any] = model.backbone
    early: Callable[[Tensor, Policy | None], Any] = model.infer
    asked = tuple(spec.layer for spec in model.exits)
    layers: list[Tensor] = []

    with autocast or nullcontext():
        if isinstance(model, LGViT):
            full = Engine(model, batch_size, runtime, exits=())
            early = Engine(model, batch_size, runtime, exits=exits)
            asked = early.exits
            if runtime != "torch":
                full.warm_up(batches[0])
                early.warm_up(batches[0], policy)

        def run_dense() -> None:
            for batch in batches:
                model.backbone(batch)

        def run_full() -> None:
            for batch in batches:
                full(batch)

        def run_early() -> None:
            layers[:] = [early(batch, policy).exit_layer for batch in batches]

        sides = {"dense": run_dense, "full": run_full, "early": run_early}
        if full is model.backbone:
            del sides["full"]
        taken = take_turns(sides, device, rounds, warmup=warmup)
    seconds = {side: times[:, 0] for side, times in taken.items()}
    seconds.setdefault("full", seconds["dense"])
    per_image = 1000 / len(images)
    return Timing(
        batch_size=batch_size,
        images=len(images),
        rounds=rounds,
        dense_ms=Spread.of(per_image * seconds["dense"]),
        full_ms=Spread.of(per_image * seconds["full"]),
        early_ms=Spread.of(per_image * seconds["early"]),
        ratio=Spread.of(seconds["dense"] / seconds["early"]),
        full_ratio=Spread.of(seconds["full"] / seconds["early"]),
        layer_ratio=model.num_blocks / float(torch.cat(layers).double().mean()),
        exits=asked,
        full_runtime=_runtime_of(full, model),
        early_runtime=_runtime_of(early, model),
    )


def _runtime_of(side: Any, model: Any) -> str:
    """What a side ran on."""
    if isinstance(side, Engine):
        return side.report().runtime
    return str(model.deployed.runtime)

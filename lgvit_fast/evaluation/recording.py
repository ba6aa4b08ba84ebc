"""What every exit says of every image, kept, so that any policy can be tried afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.data.batches import BadImage, Batch
from lgvit_fast.model import LGViT

__all__ = ["Recording", "record"]


@dataclass(frozen=True)
class Recording:
    """Logits of all classifiers for a set of images, nobody having left early.

    Attributes:
        logits: `[E + 1, n, K]` on the CPU, the exits' from shallow to deep, then the final ones.
        targets: `[n]` int64.
        layers: blocks after which the classifiers sit, from 1; the last entry is L.
        bad: files that could not be read; they are not among the n images.
    """

    logits: Tensor
    targets: Tensor
    layers: tuple[int, ...]
    bad: list[BadImage] = field(default_factory=list)

    @property
    def num_exits(self) -> int:
        """E, the final classifier not counted."""
        return len(self.layers) - 1

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Top-1 accuracy in [0, 1] of each exit on all images, and of the final classifier."""
        right = self.logits.argmax(-1) == self.targets
        return tuple(right.double().mean(1).tolist())

    @property
    def final_accuracy(self) -> float:
        """Top-1 accuracy in [0, 1] of the final classifier."""
        return self.accuracies[-1]


@torch.inference_mode()
def record(
    model: LGViT, batches: Iterable[Batch], autocast: AbstractContextManager[Any] | None = None
) -> Recording:
    """Run all images to the end once and keep what every exit said.

    Args:
        model: in eval mode; runs where its parameters are.
        batches: images and classes; what could not be read is passed on in `Recording.bad`.
        autocast: a re-enterable `torch.autocast`, or None.

    Raises:
        RuntimeError: the model is in train mode.
        ValueError: no image could be read, or a class number is beyond the model's classes.
    """
    if model.training:
        raise RuntimeError("record needs eval mode: call model.eval() first")
    device = next(model.parameters()).device
    logits, targets, bad = [], [], []
    for batch in batches:
        bad += batch.bad
        if not len(batch.targets):
            continue
        with autocast or nullcontext():
            outputs = model.forward_exits(batch.images.to(device))
        opinions = torch.stack((*outputs.exits, outputs.final))
        logits.append(opinions.to(torch.promote_types(opinions.dtype, torch.float32)).cpu())
        targets.append(batch.targets)
    if not logits:
        reason = f"; the first: {bad[0].name}: {bad[0].reason}" if bad else ""
        raise ValueError(f"none of the images could be read{reason}")
    classes = torch.cat(targets)
    if int(classes.max()) >= model.num_classes:
        raise ValueError(
            f"the images have a class number {int(classes.max())}, the model has"
            f" {model.num_classes} classes, 0 to {model.num_classes - 1}"
        )
    layers = (*(spec.layer for spec in model.exits), model.num_blocks)
    return Recording(torch.cat(logits, dim=1), classes, layers, bad)

"""Accuracy of every classifier on the validation images, or agreement; no image leaving early."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lgvit_fast.data.batches import BadImage, BadImageError, Batch, Loader
from lgvit_fast.model import LGViT
from lgvit_fast.text import printable
from lgvit_fast.training.tokens import all_exits

__all__ = ["Accuracy", "take_bad", "validate"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on the validation images, 0 to 1: of each exit, and of the final classifier.

    Without labels it is agreement: how often an exit's answer is the final classifier's.
    """

    exits: tuple[float, ...]
    final: float


@torch.no_grad()
def validate(
    model: LGViT,
    loader: Loader,
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
    bad: list[BadImage] | None = None,
    labelled: bool = True,
) -> Accuracy:
    """Accuracy of every classifier, no image leaving early. Unreadable images are added to `bad`.

    With `labelled=False` the final classifier's answers stand in for the targets.

    Raises:
        BadImageError: at an unreadable image, if `bad` is None; or if none of the images can be read.
    """
    was_training = model.training
    model.eval()
    right = torch.zeros(len(model.exits) + 1, dtype=torch.long, device=device)
    count = 0
    for batch in loader.epoch():
        take_bad(batch, bad)
        if not len(batch.targets):
            continue
        targets = batch.targets.to(device, non_blocking=True)
        with autocast or nullcontext():
            outputs = all_exits(model, batch.images.to(device, non_blocking=True))
        answers = torch.stack([logits.argmax(-1) for logits in (*outputs.exits, outputs.final)])
        right += (answers == (targets if labelled else answers[-1])).sum(dim=1)
        count += len(targets)
    model.train(was_training)
    if bad and not count:
        raise BadImageError(f"no validation image can be read; the first: {bad[0].name}")
    shares = (right.double() / max(count, 1)).tolist()
    return Accuracy(tuple(shares[:-1]), shares[-1])


def take_bad(batch: Batch, bad: list[BadImage] | None) -> None:
    """Collect a batch's unreadable images, or stop at them."""
    for image in batch.bad:
        if bad is None:
            raise BadImageError(f"cannot read {image.name}: {image.reason}")
        if not bad or image not in bad:
            logger.warning("left out %s", printable(f"{image.name}: {image.reason}"))
        bad.append(image)

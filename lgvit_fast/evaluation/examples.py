"""Some images of each exit, with what was recorded of them: what a picture of the exits shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.data.batches import BadImage, Source
from lgvit_fast.evaluation.recording import Recording
from lgvit_fast.evaluation.tradeoff import answers
from lgvit_fast.policies import Policy

__all__ = ["Examples", "pick_examples"]


@dataclass(frozen=True)
class Examples:
    """Images with their recorded answers under a policy.

    Attributes:
        images: `[m, channels, height, width]`, preprocessed.
        exit_index: `[m]` int64, where each leaves, from 0; E for the final classifier.
        prediction: `[m]` int64, the class answered there.
        right: `[m]` bool, whether that is the image's class.
    """

    images: Tensor
    exit_index: Tensor
    prediction: Tensor
    right: Tensor


def pick_examples(
    recording: Recording,
    policy: Policy,
    source: Source,
    rows: Tensor | None = None,
    number: int = 12,
    wrong: int = 2,
) -> Examples:
    """Images of every exit at which any leaves, read once more from their source.

    Args:
        recording: of images of the source.
        policy: says where they leave.
        source: what was recorded; no image is run through the model again.
        rows: `[n]` int64, which of the source's readable images were recorded; None: all of them.
        number: images an exit at most, drawn at random by a fixed seed.
        wrong: how many of these are answered wrongly, if so many are: such images are rare and tell
            more. Where too few are answered rightly there are more of them.
    """
    exit_index, prediction = answers(recording, policy)
    right = prediction == recording.labels
    order = torch.randperm(len(recording), generator=torch.Generator().manual_seed(0))
    shown: list[int] = []
    for index in range(recording.num_exits + 1):
        here = order[exit_index[order] == index]
        good, odd = here[right[here]].tolist(), here[~right[here]].tolist()
        good = good[: number - min(wrong, len(odd))]
        shown += [*good, *odd[: number - len(good)]]
    positions = _readable(source, recording.bad)
    if rows is not None:
        positions = [positions[row] for row in rows.tolist()]
    images, kept = [], []
    for row in shown:
        batch = source.__getitems__([(0, positions[row])])
        if len(batch.targets):  # else it is gone since
            images.append(batch.images)
            kept.append(row)
    chosen = torch.tensor(kept, dtype=torch.long)
    return Examples(
        torch.cat(images) if images else torch.empty(0),
        exit_index[chosen],
        prediction[chosen],
        right[chosen],
    )


def _readable(source: Any, bad: Sequence[BadImage]) -> list[int]:
    """Positions of the images in a recording, which leaves out what could not be read."""
    if not bad:
        return list(range(len(source)))
    names = {image.name for image in bad}
    places = enumerate(source.positions)
    return [position for position, index in places if source.name(index) not in names]

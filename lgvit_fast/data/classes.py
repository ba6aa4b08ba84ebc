"""Class numbers of images and of a model, matched by the names of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.data.batches import Batch, Key, Source

__all__ = ["Relabelled", "match_classes"]


def match_classes(names: Sequence[str], known: Sequence[str] | None, where: str) -> Tensor | None:
    """What brings the class numbers of images to a model's.

    Args:
        names: of the images' classes, in the order of their numbers; empty if they have none.
        known: of the model's classes, likewise; None or empty if it has none.
        where: the images, for the error.

    Returns:
        `[len(names)]` int64, the model's number of each class; None if the numbers are the same, or one
        side has no names.

    Raises:
        ValueError: the images have classes that the model does not know, naming them.
    """
    if not names or not known or list(names) == list(known):
        return None
    strange = [name for name in names if name not in known]
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise ValueError(
            f"{where} has classes that the model does not know: {', '.join(strange[:5])}{more}"
        )
    return torch.tensor([list(known).index(name) for name in names])


class Relabelled:
    """A source with other class numbers.

    Args:
        source: where the images come from.
        places: `[classes of the source]` int64, the new number of each class.
        class_names: of the new numbers.
    """

    def __init__(self, source: Source, places: Tensor, class_names: list[str]) -> None:
        self.source, self.places, self.class_names = source, places, class_names

    @property
    def dataset(self) -> Any:
        """The data set behind the source, None if it has none."""
        return getattr(self.source, "dataset", None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        batch = self.source.__getitems__(keys)
        return batch._replace(targets=self.places[batch.targets])

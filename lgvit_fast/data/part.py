"""Some images of a source, as a source of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lgvit_fast.data.batches import Batch, Key, Source

__all__ = ["Part"]


class Part:
    """Images of a source by their places in it.

    Args:
        source: where they come from.
        positions: their places there, in order.
    """

    def __init__(self, source: Source, positions: Sequence[int]) -> None:
        self.source, self.positions = source, positions
        self.class_names = source.class_names

    @property
    def dataset(self) -> Any:
        """The data set behind the source, None if it has none."""
        return getattr(self.source, "dataset", None)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        return self.source.__getitems__([(epoch, self.positions[place]) for epoch, place in keys])

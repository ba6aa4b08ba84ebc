"""What flows from data to training: keys, batches of images, and the loader that makes them.

A source turns keys `(epoch, position)` into a `Batch`. `Batches` decides which keys, as a function of
(seed, epoch) alone, and a sample's augmentation is a function of (seed, epoch, position) alone, so
training can stop and go on anywhere in an epoch, with any number of loader workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lgvit_fast.data.seeds import generator

__all__ = ["BadImage", "BadImageError", "Batch", "Batches", "Key", "Loader", "Source"]

Key = tuple[int, int]


class BadImage(NamedTuple):
    """A file that could not be read, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Images `[b, C, H, W]` float32, classes `[b]` int64 (-1: no label), and what could not be read."""

    images: Tensor
    targets: Tensor
    bad: list[BadImage]


class BadImageError(ValueError):
    """Training met a file that is not a readable image."""


class Source(Protocol):
    """Labelled images by key."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitems__(self, keys: Sequence[Key]) -> Batch: ...


class Batches:
    """The keys of each batch of an epoch: a sampler whose order depends on (seed, epoch) alone.

    Training batches are full ones (unless there are fewer images than one batch), dealt out to the
    processes of a distributed run; validation takes every image once.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length, self.batch_size, self.training = length, batch_size, training
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        together = self.batch_size * self.world_size
        if self.training:
            return max(self.length // together, 1)
        return -(-self.length // together)

    def __iter__(self) -> Iterator[list[Key]]:
        if self.training:
            shuffle = generator(self.seed, "order", self.epoch)
            order = torch.randperm(self.length, generator=shuffle).tolist()
        else:
            order = list(range(self.length))
        for step in range(self.start, len(self)):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, position) for position in order[first : first + self.batch_size]]


class Loader:
    """A source's batches, loaded by `workers` processes (0: in this one)."""

    def __init__(
        self, source: Source, batches: Batches, workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.source, self.batches = source, batches
        self._loader: DataLoader[Any] = DataLoader(
            source,  # type: ignore[arg-type]
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            # the loader draws its workers' base seed here, not from the global generator
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from batch number `start` on."""
        self.batches.epoch, self.batches.start = epoch, start
        return iter(self._loader)


def _as_it_is(batch: Batch) -> Batch:
    return batch

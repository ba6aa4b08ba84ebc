"""A recorded distribution of exits, replayed so that speed is measured without trained weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lgvit_fast.checkpoints.files import load_json
from lgvit_fast.policies import Replay

__all__ = ["REAL_TRACE", "Trace"]


@dataclass(frozen=True)
class Trace:
    """How many images left at each exit of some model on some data.

    Attributes:
        name: of the model, the data and the policy.
        layers: the block before each exit, from 1; the last is the model's depth.
        images: how many left there.

    Raises:
        ValueError: lengths that differ, no images, negative counts, or layers that do not increase.
    """

    name: str
    layers: tuple[int, ...]
    images: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.images) or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(
                f"a trace needs increasing layers and a count for each; got {self.layers} and"
                f" {self.images}"
            )
        if min(self.images, default=0) < 0 or sum(self.images) < 1:
            raise ValueError(f"a trace needs counts of images, some positive; got {self.images}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read `{"name": ..., "layers": [...], "images": [...]}`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file.
        """
        content = load_json(Path(path))
        try:
            layers, images = (tuple(map(int, content[key])) for key in ("layers", "images"))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path} is no trace: expected lists `layers` and `images`") from None
        return cls(str(content.get("name", path)), layers, images)

    @property
    def layer_ratio(self) -> float:
        """Depth / mean exit layer."""
        weighted = sum(n * layer for n, layer in zip(self.images, self.layers, strict=True))
        return self.layers[-1] * sum(self.images) / weighted

    def exits(self, count: int, seed: int = 0) -> list[int]:
        """Exits (from 0) of `count` images with these shares, as near as may be, shuffled.

        The largest remainders are rounded up, so that few images still follow the trace.
        """
        total = sum(self.images)
        quotas = [count * n / total for n in self.images]
        counts = [int(q) for q in quotas]
        by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
        for i in by_remainder[: count - sum(counts)]:
            counts[i] += 1
        exits = [i for i, n in enumerate(counts) for _ in range(n)]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        return [exits[i] for i in order.tolist()]

    def policy(self, count: int, layers: Sequence[int], seed: int = 0) -> Replay:
        """A policy that replays the trace on `count` images of a model with exits after `layers`.

        Raises:
            ValueError: the model has other exits than the trace.
        """
        if tuple(layers) != self.layers[:-1]:
            raise ValueError(
                f"the trace {self.name!r} has exits after {list(self.layers[:-1])},"
                f" the model after {list(layers)}"
            )
        return Replay(self.exits(count, seed))


REAL_TRACE = Trace(
    "LGViT ViT-B/16 on CIFAR-100, confidence 0.8",
    (4, 5, 6, 7, 8, 9, 10, 11, 12),
    (4330, 1556, 943, 894, 1136, 498, 236, 94, 313),
)

"""A recorded distribution of exits, replayed so that speed is measured without trained weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lgvit_fast.checkpoints.files import load_json
from lgvit_fast.policies import Replay

__all__ = ["REAL_TRACE", "TRACES", "Trace"]


@dataclass(frozen=True)
class Trace:
    """How many images left at each exit of some model on some data.

    Attributes:
        name: of the model, the data and the policy.
        layers: the block before each exit, from 1; the last is the model's depth.
        images: how many left there.
        accuracy: percent of all images that were answered rightly, or None if that is not known.
        dense_accuracy: percent that the same model has when no image leaves early, or None likewise.

    Raises:
        ValueError: lengths that differ, no images, negative counts, or layers that do not increase.
    """

    name: str
    layers: tuple[int, ...]
    images: tuple[int, ...]
    accuracy: float | None = None
    dense_accuracy: float | None = None

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
        """Read a json object of the attributes above; name and accuracies may be left out.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file.
        """
        content = load_json(Path(path))
        try:
            layers, images = (tuple(map(int, content[key])) for key in ("layers", "images"))
            accuracies = [
                None if content.get(key) is None else float(content[key])
                for key in ("accuracy", "dense_accuracy")
            ]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{path} is no trace: expected lists `layers` and `images`") from None
        return cls(str(content.get("name", path)), layers, images, *accuracies)

    def __str__(self) -> str:
        accuracy = "accuracy not known" if self.accuracy is None else f"{self.accuracy:.1f} % right"
        dense = f", dense {self.dense_accuracy:.1f} %" if self.dense_accuracy is not None else ""
        return f"{self.name}: {self.layer_ratio:.2f}x fewer layers, {accuracy}{dense}"

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


def _recorded(threshold: float, accuracy: float, *images: int) -> Trace:
    name = f"LGViT ViT-B/16 on CIFAR-100, confidence {threshold}"
    return Trace(name, (4, 5, 6, 7, 8, 9, 10, 11, 12), images, accuracy, dense_accuracy=90.8)


# A public port of the published LGViT-ViT-B on the 10,000 test images of CIFAR-100; the dense
# model's accuracy is the paper's.
TRACES = {
    "0.8": _recorded(0.8, 87.31, 4330, 1556, 943, 894, 1136, 498, 236, 94, 313),
    "0.9": _recorded(0.9, 89.41, 3234, 1481, 878, 991, 1539, 675, 317, 174, 711),
    "0.99": _recorded(0.99, 90.36, 1149, 1105, 663, 999, 2103, 1087, 539, 316, 2039),
}
REAL_TRACE = TRACES["0.9"]

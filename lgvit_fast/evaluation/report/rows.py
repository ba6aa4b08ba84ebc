"""What is compared: ways of answering the same images, and what was measured of each. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lgvit_fast.clock import Spread
from lgvit_fast.deploy.dense import TITLES
from lgvit_fast.evaluation.bounds import drop_interval, rate_interval

__all__ = ["ENGINES", "PRECISIONS", "LeftOut", "Row", "Way"]

# What runs a model, and what it is called on the page.
ENGINES = {
    "eager": "PyTorch",
    "compiled": "compiled PyTorch",
    "engine": "lgvit_fast.Engine",
    **TITLES,
}
PRECISIONS = ("float32", "int8")


@dataclass(frozen=True)
class Way:
    """One way of answering images.

    Attributes:
        engine: a key of `ENGINES`.
        precision: one of `PRECISIONS`.
        early: images leave early; else every image runs to the end, without exit heads.
        rival: what the user named; empty for the model itself.
    """

    engine: str
    precision: str = "float32"
    early: bool = False
    rival: str = ""

    @property
    def model(self) -> str:
        """What answers: "full model", "early exit", or the rival's name."""
        return self.rival or ("early exit" if self.early else "full model")

    def __str__(self) -> str:
        return f"{self.model} on {ENGINES[self.engine]}, {self.precision}"


class LeftOut(NamedTuple):
    """A way that could not be measured, and why."""

    way: Way
    reason: str


@dataclass(frozen=True)
class Row:
    """What was measured of one way.

    Attributes:
        way: the way.
        images: n, the same images for every way.
        correct: how many it answers rightly.
        losses: images that the full model (PyTorch, float32) has right and this way wrong.
        gains: images the other way round.
        ms: milliseconds an image, by batch size: median and quartiles of the rounds.
        layer_ratio: L / mean exit layer over all images; 1 where none leaves early.
    """

    way: Way
    images: int
    correct: int
    losses: int
    gains: int
    ms: Mapping[int, Spread]
    layer_ratio: float = 1.0

    @property
    def accuracy(self) -> float:
        """Top-1 in [0, 1]."""
        return self.correct / self.images

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Its 95 % interval (Clopper-Pearson)."""
        return rate_interval(self.correct, self.images)

    @property
    def drop(self) -> float:
        """Points lost to the full model on the same images; negative: gained."""
        return 100 * (self.losses - self.gains) / self.images

    @property
    def drop_interval(self) -> tuple[float, float]:
        """Its 95 % interval, in points (`bounds.drop_interval`)."""
        low, high = drop_interval(self.losses, self.gains, self.images)
        return 100 * low, 100 * high

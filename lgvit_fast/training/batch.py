"""What flows from data to training: keys, batches, unreadable files, and what a model wants to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import timm.data
from torch import Tensor, nn

__all__ = ["BadImage", "BadImageError", "Batch", "InputSpec", "Key", "Source"]

Key = tuple[int, int]


class BadImage(NamedTuple):
    """A file that could not be read, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Images `[b, C, H, W]` float32, classes `[b]` int64, and what could not be read."""

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


@dataclass(frozen=True)
class InputSpec:
    """The images a model wants: channels, (H, W), and how they are resized and normalised."""

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    @classmethod
    def of(cls, backbone: nn.Module) -> InputSpec:
        """Read a timm model's own data config, with the size and channels it was really built for."""
        config = timm.data.resolve_model_data_config(backbone)
        embed: Any = backbone.patch_embed
        size = getattr(embed, "img_size", None) or config["input_size"][1:]
        projection = next(module for module in embed.modules() if isinstance(module, nn.Conv2d))
        channels = projection.in_channels
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if len(mean) != channels:
            mean = (sum(mean) / len(mean),) * channels
            std = (sum(std) / len(std),) * channels
        return cls(
            channels=channels,
            size=(int(size[0]), int(size[1])),
            mean=mean,
            std=std,
            interpolation=config["interpolation"],
            # a crop margin costs detail that a small image does not have
            crop_pct=config["crop_pct"] if min(size) > 64 else 1.0,
        )

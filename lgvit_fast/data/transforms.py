"""How a model wants its images: channels, size, normalisation, and the transform to that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import timm.data
import torch
from PIL import Image
from torch import Tensor, nn

from lgvit_fast.data.images import open_image, upright
from lgvit_fast.text import printable

__all__ = ["InputSpec", "eval_transform", "to_batch"]


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
        """Read a timm model's own data config, with the size and channels it was really built for.

        A backbone with an `input_spec` of its own says it by that.
        """
        own = getattr(backbone, "input_spec", None)
        if isinstance(own, cls):
            return own
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


def eval_transform(spec: InputSpec) -> Any:
    """The evaluation transform, timm's: PIL image to normalised tensor `[C, H, W]`."""
    return timm.data.create_transform(
        (spec.channels, *spec.size),
        is_training=False,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
    )


def to_batch(items: Sequence[str | os.PathLike[str] | Image.Image], spec: InputSpec) -> Tensor:
    """Image files or PIL images, transformed for a model: `[n, C, H, W]` float32; at least one.

    Raises:
        ValueError: a file that is no readable image, named, or something else than a file or image.
    """
    transform, mode = eval_transform(spec), "L" if spec.channels == 1 else "RGB"

    def read(item: Any) -> Tensor:
        if isinstance(item, Image.Image):
            image: Tensor = transform(upright(item, mode))
            return image
        if not isinstance(item, str | os.PathLike):
            raise ValueError(f"{item!r}, expected a path or a PIL image")
        try:
            return cast(Tensor, transform(open_image(item, mode)))
        except Exception as error:
            name = printable(os.fspath(item))
            raise ValueError(f"{name} cannot be read: {type(error).__name__}: {error}") from error

    return torch.stack([read(item) for item in items])

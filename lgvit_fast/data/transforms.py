"""How a model wants its images: channels, size, normalisation, and the transform to that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm.data
from torch import nn

__all__ = ["InputSpec", "eval_transform"]


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

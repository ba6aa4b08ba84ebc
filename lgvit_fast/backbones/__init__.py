"""Backbones: what differs between the timm families, behind one interface."""

from __future__ import annotations

from torch import nn

from lgvit_fast.backbones.base import Backbone
from lgvit_fast.backbones.vit import ViTBackbone

__all__ = ["Backbone", "ViTBackbone", "adapt"]


def adapt(model: nn.Module) -> Backbone:
    """The adapter for a timm model.

    Raises:
        ValueError: no adapter knows this architecture, or it has no classifier.
    """
    if not ViTBackbone.supports(model):
        raise ValueError(
            f"{type(model).__name__} is not supported; expected a timm VisionTransformer such as"
            " vit_base_patch16_224 or deit_base_distilled_patch16_224"
        )
    return ViTBackbone(model)  # type: ignore[arg-type]

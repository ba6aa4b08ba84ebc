"""Backbones: what differs between the timm families, behind one interface."""

from __future__ import annotations

import difflib

from torch import nn

from lgvit_fast.backbones.base import Backbone
from lgvit_fast.backbones.eva import EvaBackbone
from lgvit_fast.backbones.swin import SwinBackbone
from lgvit_fast.backbones.vit import ViTBackbone

__all__ = ["Backbone", "EvaBackbone", "SwinBackbone", "ViTBackbone", "adapt"]

_ADAPTERS: tuple[type[ViTBackbone | SwinBackbone | EvaBackbone], ...] = (
    ViTBackbone,
    SwinBackbone,
    EvaBackbone,
)
_EXAMPLES = {
    "VisionTransformer": "vit_base_patch16_224 or deit_base_distilled_patch16_224",
    "SwinTransformer": "swin_base_patch4_window7_224",
    "SwinTransformerV2": "swinv2_base_window8_256",
    "Eva": "eva02_base_patch14_224 or vit_base_patch16_dinov3",
}


def adapt(model: nn.Module) -> Backbone:
    """The adapter for a timm model.

    Raises:
        ValueError: no adapter knows this architecture, naming the nearest that is known, or the model
            has an option that exits cannot work with.
    """
    for adapter in _ADAPTERS:
        if adapter.supports(model):
            return adapter(model)
    name, library = type(model).__name__, type(model).__module__.split(".")[0]
    if library in ("transformers", "torchvision"):
        function = "from_huggingface" if library == "transformers" else "from_torchvision"
        raise ValueError(
            f"{name} is of {library}: lgvit_fast.checkpoints.{function}(model) converts it"
        )
    near = difflib.get_close_matches(name, _EXAMPLES, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"{name} is not supported; the nearest that is: timm's {near}, such as {_EXAMPLES[near]}"
        f" (all: {', '.join(_EXAMPLES)})"
    )

"""What timm's own tools ask of a model: features, classifier, parameter groups, configuration."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from lgvit_fast.parameter_names import BACKBONE

__all__ = ["TimmInterface"]


class TimmInterface:
    """timm's model interface for `LGViT`: the backbone's, where early exits make no difference.

    Attributes:
        backbone: the timm model.
    """

    backbone: Any

    def forward_features(self, images: Tensor) -> Tensor:
        """The backbone's final features, in its own layout; no exit is asked."""
        features: Tensor = self.backbone.forward_features(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The backbone's classifier on `forward_features`."""
        logits: Tensor = self.backbone.forward_head(features, pre_logits=pre_logits)
        return logits

    def forward_intermediates(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's, see timm."""
        return self.backbone.forward_intermediates(images, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        """The backbone's own classifier."""
        classifier: nn.Module = self.backbone.get_classifier()
        return classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory exempts from weight decay."""
        return {BACKBONE + name for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth for timm's layer-wise lr decay; the heads count as deepest."""
        matcher = self.backbone.group_matcher(coarse)
        return {
            name: [(_below_backbone(pattern), suffix) for pattern, suffix in spec]
            if isinstance(spec, list | tuple)
            else _below_backbone(spec)
            for name, spec in matcher.items()
        }

    @property
    def num_features(self) -> int:
        """Width of `forward_features`."""
        return int(self.backbone.num_features)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Timm's configuration of the backbone: mean, std, input size and so on."""
        config: dict[str, Any] = self.backbone.pretrained_cfg
        return config

    default_cfg = pretrained_cfg


def _below_backbone(pattern: str) -> str:
    return rf"^{re.escape(BACKBONE)}(?:{pattern.replace('^', '')})"

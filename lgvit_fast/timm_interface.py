"""What timm's own tools ask of a model: features, classifier, parameter groups, configuration."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import Tensor, nn

from lgvit_fast.backbones.timm_models import with_pooling
from lgvit_fast.parameter_names import BACKBONE

__all__ = ["TimmInterface"]


class TimmInterface:
    """timm's model interface for `LGViT`: the backbone's, where early exits make no difference."""

    def forward_features(self, images: Tensor) -> Tensor:
        """The backbone's final features, in its own layout; no exit is asked."""
        features: Tensor = self._timm.forward_features(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The backbone's classifier on `forward_features`."""
        logits: Tensor = self._timm.forward_head(features, pre_logits=pre_logits)
        return logits

    def forward_intermediates(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's, see timm."""
        return self._timm.forward_intermediates(images, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        """The backbone's own classifier."""
        classifier: nn.Module = self._timm.get_classifier()
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers for another number of classes, the final one and every exit's.

        Args:
            num_classes: K.
            global_pool: how the backbone pools its last tokens, as timm names it ("token", "avg", ...);
                None leaves that as it is. The exits are not changed by it.

        Raises:
            ValueError: no classes.
        """
        if num_classes < 1:
            raise ValueError(
                f"num_classes={num_classes}, expected at least 1: exits are classifiers"
            )
        model = cast(Any, self)
        self._timm.reset_classifier(num_classes, global_pool)
        for head in model.exit_heads:
            head.reset_classifiers(num_classes)
        model.num_classes = model.adapter.num_classes = num_classes
        model.class_names = None
        if model.backbone_config is not None:
            model.backbone_config["args"]["num_classes"] = num_classes
            if global_pool is not None:
                model.backbone_config = with_pooling(self._timm, model.backbone_config, global_pool)
        model.cut_segments()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self._timm.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizer factory exempts from weight decay."""
        return {BACKBONE + name for name in self._timm.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth for timm's layer-wise lr decay; the heads count as deepest."""
        matcher = self._timm.group_matcher(coarse)
        return {
            name: [(_below_backbone(pattern), suffix) for pattern, suffix in spec]
            if isinstance(spec, list | tuple)
            else _below_backbone(spec)
            for name, spec in matcher.items()
        }

    @property
    def num_features(self) -> int:
        """Width of `forward_features`."""
        return int(self._timm.num_features)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Timm's configuration of the backbone: mean, std, input size and so on."""
        config: dict[str, Any] = self._timm.pretrained_cfg
        return config

    default_cfg = pretrained_cfg

    @property
    def _timm(self) -> Any:
        return cast(Any, self).backbone


def _below_backbone(pattern: str) -> str:
    return rf"^{re.escape(BACKBONE)}(?:{pattern.replace('^', '')})"

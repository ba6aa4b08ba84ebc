"""Image classifiers of Hugging Face transformers: ViT, DeiT and Swin weights in a timm backbone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lgvit_fast.checkpoints.backbones import swin_from, vit_from
from lgvit_fast.checkpoints.fit import build_fitting, malformed
from lgvit_fast.checkpoints.foreign import Config, Source, load_named, read, require_named
from lgvit_fast.checkpoints.names import Names, huggingface_names
from lgvit_fast.model import LGViT

__all__ = ["from_huggingface"]

_NAME = "the Hugging Face checkpoint"
_UNUSED = r"\w+\.pooler\.|.*\.(mask_token|relative_position_index)$"
# transformers 5 renamed its modules; files keep the older names, which are the ones used here.
_SINCE_5 = [
    (r"^(vit|deit)\.layers\.", r"\1.encoder.layer."),
    (r"(\.layer\.\d+\.attention)\.([qkv])_proj\.", r"\1.attention.\2_proj."),
    (r"(\.blocks\.\d+\.attention)\.([qkv])_proj\.", r"\1.self.\2_proj."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
]


def from_huggingface(source: nn.Module | Source, config: Config = None, **options: Any) -> LGViT:
    """Give early exits to a Hugging Face image classifier.

    Args:
        source: a `ViTForImageClassification`, `DeiTForImageClassification` (with or without teacher) or
            `SwinForImageClassification`; its state dict; or a folder or file that it was saved in.
        config: its configuration as a dict or json file, if `source` is neither a model nor a folder.
        **options: go to `LGViT`: exits, heads, num_classes, ...

    Returns:
        The model in eval mode. Its final logits are the classifier's own; its exits are untrained.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, another architecture, or keys that do not fit, naming them.
    """
    given: Source
    if isinstance(source, nn.Module):
        given, own = source.state_dict(), getattr(source, "config", None)
        config = own.to_dict() if config is None and own is not None else config
    else:
        given = source
    tensors, settings = read(given, config)
    tensors = {_as_in_files(name): value for name, value in tensors.items()}
    roots = {name.split(".")[0] for name in tensors} & {"vit", "deit", "swin"}
    name = "cls_classifier.weight" if "cls_classifier.weight" in tensors else "classifier.weight"
    if len(roots) != 1 or name not in tensors:
        raise ValueError(
            "expected the weights of a ViT, DeiT or Swin for image classification, with a classifier;"
            f" found names that start with {sorted(tensors)[:3]}"
        )
    (root,) = roots
    if settings.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act={settings['hidden_act']!r}, expected 'gelu' (the erf form)")
    with malformed(_NAME):
        num_classes = tensors[name].shape[0]

    def build() -> nn.Module:
        if root == "swin":
            return swin_from(tensors, settings, num_classes)
        return vit_from(tensors, settings, root, num_classes)

    def names(model: nn.Module) -> Names:
        return huggingface_names(model.state_dict(), root, distilled=name.startswith("cls"))

    def check(model: nn.Module) -> None:
        require_named(model, names(model), tensors, _UNUSED, _NAME)

    backbone = build_fitting(build, check, _NAME)
    load_named(backbone, names(backbone), tensors, _UNUSED, _NAME)
    model = LGViT(backbone, **options)
    model.set_layer_norm_eps(settings.get("layer_norm_eps", 1e-5 if root == "swin" else 1e-12))
    if model.num_classes == num_classes:
        model.class_names = _class_names(settings.get("id2label"), num_classes)
    return model.eval()


def _as_in_files(name: str) -> str:
    for pattern, replacement in _SINCE_5:
        name = re.sub(pattern, replacement, name)
    return name


def _class_names(labels: Mapping[Any, str] | None, num_classes: int) -> list[str] | None:
    """The labels in their order; None if there are none but the placeholders LABEL_0, ..."""
    named = {int(index): label for index, label in (labels or {}).items()}
    if sorted(named) != list(range(num_classes)):
        return None
    names = [named[i] for i in range(num_classes)]
    return None if names == [f"LABEL_{i}" for i in range(num_classes)] else names

"""Classifiers of torchvision (`vit_b_16`, `swin_b` and their kin), their weights in a timm backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lgvit_fast.checkpoints.backbones import depth_of, make_swin, make_vit
from lgvit_fast.checkpoints.fit import build_fitting
from lgvit_fast.checkpoints.foreign import Source, load_named, read, require_named
from lgvit_fast.checkpoints.names import torchvision_names
from lgvit_fast.model import LGViT

__all__ = ["from_torchvision"]

_NAME = "the torchvision checkpoint"
_UNUSED = r".*\.relative_position_index$"


def from_torchvision(source: nn.Module | Source, **options: Any) -> LGViT:
    """Give early exits to a torchvision `VisionTransformer` or `SwinTransformer`.

    Args:
        source: the model, its state dict, or a file with that. A state dict does not tell a ViT's
            number of attention heads; heads of width 64 are assumed, as all torchvision's have.
        **options: go to `LGViT`: exits, heads, num_classes, ...

    Returns:
        The model in eval mode. Its final logits are the classifier's own; its exits are untrained.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, another architecture, or keys that do not fit, naming them.
    """
    num_heads = None
    if isinstance(source, nn.Module):
        blocks = [m for m in source.modules() if isinstance(m, nn.MultiheadAttention)]
        num_heads = blocks[0].num_heads if blocks else None
        source = source.state_dict()
    tensors, _ = read(source)
    if any(".cpb_mlp." in name for name in tensors):
        raise ValueError(
            "this is a torchvision Swin V2, which is not converted; the nearest that works is"
            " create_model('swinv2_tiny_window8_256'), or a torchvision Swin V1"
        )
    swin = "encoder.pos_embedding" not in tensors
    if swin and "features.1.0.attn.relative_position_bias_table" not in tensors:
        raise ValueError(
            "expected the weights of a torchvision VisionTransformer or SwinTransformer;"
            f" found names that start with {sorted(tensors)[:3]}"
        )

    def build() -> nn.Module:
        return _swin(tensors) if swin else _vit(tensors, num_heads)

    def check(model: nn.Module) -> None:
        names = torchvision_names(model.state_dict(), swin)
        require_named(model, names, tensors, _UNUSED, _NAME)

    backbone = build_fitting(build, check, _NAME)
    names = torchvision_names(backbone.state_dict(), swin)
    load_named(backbone, names, tensors, _UNUSED, _NAME)
    return LGViT(backbone, **options).eval()


def _vit(tensors: Mapping[str, Tensor], num_heads: int | None) -> nn.Module:
    layer = r"encoder\.layers\.encoder_layer_(\d+)\."
    return make_vit(
        position=tensors["encoder.pos_embedding"],
        patch=tensors["conv_proj.weight"],
        depth=depth_of(tensors, layer),
        hidden=tensors["encoder.layers.encoder_layer_0.mlp.0.weight"].shape[0],
        num_classes=tensors["heads.head.weight"].shape[0],
        num_heads=num_heads,
    )


def _swin(tensors: Mapping[str, Tensor]) -> nn.Module:
    # Stages and patch mergings take turns: features.1, 3, 5, 7 are the stages.
    stages = range(1, depth_of(tensors, r"features\.(\d+)\."), 2)
    table = "features.{}.0.attn.relative_position_bias_table"
    return make_swin(
        patch=tensors["features.0.0.weight"],
        depths=[depth_of(tensors, rf"features\.{s}\.(\d+)\.") for s in stages],
        tables=[tensors[table.format(s)] for s in stages],
        hidden=tensors["features.1.0.mlp.0.weight"].shape[0],
        num_classes=tensors["head.weight"].shape[0],
        drop_path_rate=0.0,
    )

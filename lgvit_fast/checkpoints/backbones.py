"""A timm backbone for weights from elsewhere, its sizes read from their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lgvit_fast.backbones.timm_models import make_backbone, set_layer_norm_eps

__all__ = ["depth_of", "make_swin", "make_vit", "swin_depths", "swin_from", "vit_from"]


def depth_of(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers the pattern's group matches at the start of a name, from 0 on."""
    numbers = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    if not numbers:
        raise ValueError(f"no name matches {pattern}; it starts with {sorted(tensors)[:3]}")
    if max(numbers) >= len(numbers):  # also a single block numbered two million
        raise ValueError(f"{pattern} matches {len(numbers)} numbers up to {max(numbers)}, not all")
    return len(numbers)


def make_vit(
    *,
    position: Tensor,
    patch: Tensor,
    depth: int,
    hidden: int,
    num_classes: int,
    num_heads: int | None = None,
    image_size: Any = None,
    qkv_bias: bool = True,
    distilled: bool = False,
    registers: int = 0,
    eps: float = 1e-6,
) -> nn.Module:
    """A timm ViT, or DeiT, of these sizes with fresh weights.

    Args:
        position: position embeddings `[1, P + N, C]`.
        patch: weight of the patch projection `[C, channels, p, p]`.
        depth: L.
        hidden: width inside the perceptrons.
        num_classes: K.
        num_heads: attention heads; None assumes heads of width 64.
        image_size: pixels; None assumes a square.
        qkv_bias: whether queries, keys and values have biases.
        distilled: a distillation token with its own classifier.
        registers: further tokens, which no classifier reads.
        eps: of every LayerNorm.
    """
    width, size = position.shape[-1], patch.shape[-1]
    prefix = 1 + distilled + registers
    side = round((position.shape[1] - prefix) ** 0.5)
    options: dict[str, Any] = {"reg_tokens": registers} if registers else {}
    model = make_backbone(
        "deit_base_distilled_patch16_224" if distilled else "vit_base_patch16_224",
        img_size=image_size or side * size,
        patch_size=size,
        in_chans=patch.shape[1],
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads or max(1, width // 64),
        mlp_ratio=hidden / width,
        qkv_bias=qkv_bias,
        **options,
    )
    set_layer_norm_eps(model, eps)
    return model


def make_swin(
    *,
    patch: Tensor,
    depths: list[int],
    tables: list[Tensor],
    hidden: int,
    num_classes: int,
    image_size: Any = None,
    qkv_bias: bool = True,
    drop_path_rate: float = 0.1,
    eps: float = 1e-5,
) -> nn.Module:
    """A timm Swin of these sizes with fresh weights.

    Args:
        patch: weight of the patch projection `[C, channels, p, p]`.
        depths: blocks of each stage.
        tables: a relative position table `[(2w - 1)^2, heads]` of each stage.
        hidden: width inside the first stage's perceptrons.
        num_classes: K.
        image_size: pixels; None assumes that the last stage is one window.
        qkv_bias: whether queries, keys and values have biases.
        drop_path_rate: of stochastic depth in training.
        eps: of every LayerNorm.
    """
    width, size = patch.shape[0], patch.shape[-1]
    window = (round(tables[0].shape[0] ** 0.5) + 1) // 2
    model = make_backbone(
        "swin_base_patch4_window7_224",
        img_size=image_size or window * size * 2 ** (len(depths) - 1),
        patch_size=size,
        window_size=window,
        in_chans=patch.shape[1],
        num_classes=num_classes,
        embed_dim=width,
        depths=depths,
        num_heads=[table.shape[1] for table in tables],
        mlp_ratio=hidden / width,
        qkv_bias=qkv_bias,
        drop_path_rate=drop_path_rate,
    )
    set_layer_norm_eps(model, eps)
    return model


def vit_from(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], root: str, num_classes: int
) -> nn.Module:
    """The timm ViT or DeiT for weights under Hugging Face names."""
    layer = f"{root}.encoder.layer"
    token = f"{root}.embeddings.distillation_token" in tensors
    distilled = "distillation_classifier.weight" in tensors
    return make_vit(
        position=_get(tensors, f"{root}.embeddings.position_embeddings"),
        patch=_get(tensors, f"{root}.embeddings.patch_embeddings.projection.weight"),
        depth=depth_of(tensors, rf"{re.escape(layer)}\.(\d+)\."),
        hidden=_get(tensors, f"{layer}.0.intermediate.dense.weight").shape[0],
        num_classes=num_classes,
        num_heads=settings.get("num_attention_heads"),
        image_size=settings.get("image_size"),
        qkv_bias=f"{layer}.0.attention.attention.query.bias" in tensors,
        distilled=distilled,
        registers=int(token and not distilled),
        eps=settings.get("layer_norm_eps", 1e-12),
    )


def swin_from(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], num_classes: int
) -> nn.Module:
    """The timm Swin for weights under Hugging Face names."""
    depths = swin_depths(tensors)
    first = "swin.encoder.layers.{}.blocks.0."
    table = first + "attention.self.relative_position_bias_table"
    return make_swin(
        patch=_get(tensors, "swin.embeddings.patch_embeddings.projection.weight"),
        depths=depths,
        tables=[_get(tensors, table.format(s)) for s in range(len(depths))],
        hidden=_get(tensors, first.format(0) + "intermediate.dense.weight").shape[0],
        num_classes=num_classes,
        image_size=settings.get("image_size"),
        qkv_bias=first.format(0) + "attention.self.query.bias" in tensors,
        drop_path_rate=settings.get("drop_path_rate", 0.1),
        eps=settings.get("layer_norm_eps", 1e-5),
    )


def swin_depths(tensors: Mapping[str, Tensor]) -> list[int]:
    """Blocks of each stage of a Swin under Hugging Face names."""
    layers = r"swin\.encoder\.layers"
    stages = depth_of(tensors, rf"{layers}\.(\d+)\.blocks")
    return [depth_of(tensors, rf"{layers}\.{s}\.blocks\.(\d+)\.") for s in range(stages)]


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the checkpoint lacks {name}; it starts with {sorted(tensors)[:3]}")
    return tensors[name]

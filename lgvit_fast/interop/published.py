"""Checkpoints of the published LGViT code: ViT and DeiT, their names mapped to timm's and ours."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from lgvit_fast.heads.layout import ExitSpec, default_heads, default_layers
from lgvit_fast.model import LGViT
from lgvit_fast.pretrained import load_strictly, set_layer_norm_eps
from lgvit_fast.weights import load_json, load_weights

__all__ = ["load_published"]

_LAYER_NORM_EPS = 1e-12  # default of the configuration class the published code builds on

_HEAD = r"deit\.encoder\.highway\.(\d+)\."
# Published name -> ours; query, key and value are joined first.
_RENAMES = [
    (r"deit\.embeddings\.cls_token", "cls_token"),
    (r"deit\.embeddings\.distillation_token", "dist_token"),
    (r"deit\.embeddings\.position_embeddings", "pos_embed"),
    (r"deit\.embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"deit\.encoder\.layer\.(\d+)\.attention\.attention\.qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"deit\.encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"deit\.encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"deit\.encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"deit\.encoder\.layer\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"deit\.encoder\.layer\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"deit\.layernorm\.(\w+)", r"norm.\1"),
    (r"(?:cls_)?classifier\.(\w+)", r"head.\1"),
    (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
    (_HEAD + r"mlp\.conv1\.0\.(\w+)", r"exit_heads.\1.perception.pointwise1.\2"),
    (_HEAD + r"mlp\.conv1\.2\.(\w+)", r"exit_heads.\1.perception.norm1.\2"),
    (_HEAD + r"mlp\.proj_bn\.(\w+)", r"exit_heads.\1.perception.depthwise_norm.\2"),
    (_HEAD + r"mlp\.conv2\.0\.(\w+)", r"exit_heads.\1.perception.pointwise2.\2"),
    (_HEAD + r"mlp\.conv2\.1\.(\w+)", r"exit_heads.\1.perception.norm2.\2"),
    (_HEAD + r"mlp\.depthwise\.(\w+)", r"exit_heads.\1.perception.depthwise.\2"),
    (_HEAD + r"mlp\.proj\.(\w+)", r"exit_heads.\1.perception.proj.\2"),
    (_HEAD + r"mlp\.qkv\.(\w+)", r"exit_heads.\1.perception.qkv.\2"),
    (_HEAD + r"(?:cls_)?classifier\.(\w+)", r"exit_heads.\1.classifiers.0.\2"),
    (_HEAD + r"distillation_classifier\.(\w+)", r"exit_heads.\1.classifiers.1.\2"),
]  # fmt: skip
_UNUSED = re.compile(r"deit\.pooler\.")  # trained by nothing, read by nothing


def load_published(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
) -> LGViT:
    """Load a checkpoint of the published code.

    Args:
        source: a state dict, a `.safetensors` or `pytorch_model.bin` file (loaded with
            `weights_only=True`: no code in it runs), or a folder holding one.
        config: the code's configuration as a dict or json file; None takes `config.json` beside the
            weights, or reads everything from the shapes and assumes attention heads of width 64.

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, a checkpoint of another architecture, or keys that do not fit,
            naming them.
    """
    published, settings = _read(source, config)
    if not any(key.startswith("deit.encoder.highway.") for key in published):
        raise ValueError(
            "no key starts with 'deit.encoder.highway.': no published LGViT ViT or DeiT;"
            f" it starts with {sorted(published)[:3]}"
        )
    tensors = _convert(published)
    distilled = "dist_token" in tensors
    depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
    width = tensors["pos_embed"].shape[-1]
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    side = round((tensors["pos_embed"].shape[1] - (2 if distilled else 1)) ** 0.5)
    backbone = timm.create_model(
        "deit_base_distilled_patch16_224" if distilled else "vit_base_patch16_224",
        img_size=settings.get("image_size", side * patch),
        patch_size=patch,
        in_chans=tensors["patch_embed.proj.weight"].shape[1],
        num_classes=tensors["head.weight"].shape[0],
        embed_dim=width,
        depth=depth,
        num_heads=settings.get("num_attention_heads", max(1, width // 64)),
        mlp_ratio=tensors["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
    )
    eps = settings.get("layer_norm_eps", _LAYER_NORM_EPS)
    set_layer_norm_eps(backbone, eps)
    model = LGViT(backbone, _exits(tensors, settings, depth))
    if model._backbone_config is not None:
        model._backbone_config["layer_norm_eps"] = eps
    load_strictly(model, tensors, "the published checkpoint")
    return model.eval()


def _read(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    config: str | os.PathLike[str] | Mapping[str, Any] | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        path = Path(source)
        if path.is_dir():
            names = [path / "model.safetensors", path / "pytorch_model.bin"]
            found = [name for name in names if name.exists()]
            if not found:
                raise FileNotFoundError(f"neither of {[n.name for n in names]} is in {path}")
            path = found[0]
        tensors = load_weights(path) if path.suffix == ".safetensors" else _load_bin(path)
        if config is None and (path.parent / "config.json").exists():
            config = path.parent / "config.json"
    if config is None:
        config = {}
    settings = dict(config) if isinstance(config, Mapping) else load_json(config)
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, settings


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is not a whole file of plain tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise ValueError(f"{path} does not hold a state dict")
    return tensors


def _convert(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, join query, key and value, and turn 1x1 convolutions into matrices."""
    joined = dict(published)
    for key in published:
        if ".attention.attention.query." in key:
            names = [key.replace("query", part) for part in ("query", "key", "value")]
            absent = [name for name in names if name not in published]
            if absent:
                raise ValueError(f"the published checkpoint lacks {absent}, which belong to {key}")
            joined[key.replace("query", "qkv")] = torch.cat([joined.pop(name) for name in names])
    converted, unknown = {}, []
    for key, value in joined.items():
        name = _rename(key, published)
        if name is None:
            unknown.append(key)
        elif name:
            pointwise = ".pointwise" in name and value.dim() == 4
            converted[name] = value.flatten(1) if pointwise else value
    if unknown:
        raise ValueError(f"the published checkpoint has unknown keys: {sorted(unknown)[:6]}")
    return converted


def _rename(key: str, published: Mapping[str, Tensor]) -> str | None:
    """Our name for a published key, "" for one that is not used, None for an unknown one."""
    if _UNUSED.match(key):
        return ""
    head, proj, rest = key.partition(".mlp.proj.")
    if proj:  # one name for the depthwise convolution and for attention's output projection
        proj = ".mlp.depthwise." if f"{head}.mlp.proj_bn.weight" in published else proj
    for pattern, replacement in _RENAMES:
        name, count = re.subn(f"^{pattern}$", replacement, head + proj + rest)
        if count:
            return name
    return None


def _exits(tensors: Mapping[str, Tensor], config: Mapping[str, Any], depth: int) -> list[ExitSpec]:
    """The layout: kinds from the weights, positions and pooling strides from the configuration."""
    count = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("exit_heads."))
    positions = config.get("position_exits")
    if isinstance(positions, str):
        positions = json.loads(positions)
    layers = default_layers(depth, count) if positions is None else tuple(positions)
    if len(layers) != count:
        raise ValueError(f"position_exits={positions}, but the checkpoint holds {count} exits")
    heads = []
    for index, usual in enumerate(default_heads(layers, depth)):
        perception = f"exit_heads.{index}.perception"
        if f"{perception}.qkv.weight" in tensors:
            heads.append(usual if usual.startswith("gah") else "gah_2")
        elif f"{perception}.depthwise.weight" in tensors:
            heads.append("lph_full")
        else:
            heads.append("lph_light")
    return [ExitSpec(layer, head) for layer, head in zip(layers, heads, strict=True)]

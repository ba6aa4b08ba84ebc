"""What others call our tensors: every name of a model with the names it is made of elsewhere.

One table serves both ways. A name of ours has one source, or three where query, key and value are
kept apart there and are one matrix here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lgvit_fast.model import LGViT
from lgvit_fast.parameter_names import file_names

__all__ = [
    "Names",
    "collect",
    "huggingface_names",
    "published_names",
    "scatter",
    "torchvision_names",
]

Names = dict[str, tuple[str, ...]]
_SPLIT = ("query", "key", "value")

# Our pattern -> the template there; {root}, \1... and {qkv} are filled in.
_VIT = {
    r"cls_token": "{root}.embeddings.cls_token",
    r"dist_token|reg_token": "{root}.embeddings.distillation_token",
    r"pos_embed": "{root}.embeddings.position_embeddings",
    r"patch_embed\.proj\.(\w+)": r"{root}.embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.attn\.qkv\.(\w+)": r"{root}.encoder.layer.\1.attention.attention.{qkv}.\2",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"{root}.encoder.layer.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"{root}.encoder.layer.\1.intermediate.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"{root}.encoder.layer.\1.output.dense.\2",
    r"blocks\.(\d+)\.norm1\.(\w+)": r"{root}.encoder.layer.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(\w+)": r"{root}.encoder.layer.\1.layernorm_after.\2",
    r"norm\.(\w+)": r"{root}.layernorm.\1",
    r"head\.(\w+)": r"{classifier}.\1",
    r"head_dist\.(\w+)": r"distillation_classifier.\1",
}
_SWIN_BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
_SWIN = {
    r"patch_embed\.proj\.(\w+)": r"swin.embeddings.patch_embeddings.projection.\1",
    r"patch_embed\.norm\.(\w+)": r"swin.embeddings.norm.\1",
    _SWIN_BLOCK + r"attn\.qkv\.(\w+)": r"swin.encoder.layers.\1.blocks.\2.attention.self.{qkv}.\3",
    _SWIN_BLOCK + r"attn\.proj\.(\w+)": r"swin.encoder.layers.\1.blocks.\2.attention.output.dense.\3",
    _SWIN_BLOCK + r"attn\.relative_position_bias_table":
        r"swin.encoder.layers.\1.blocks.\2.attention.self.relative_position_bias_table",
    _SWIN_BLOCK + r"mlp\.fc1\.(\w+)": r"swin.encoder.layers.\1.blocks.\2.intermediate.dense.\3",
    _SWIN_BLOCK + r"mlp\.fc2\.(\w+)": r"swin.encoder.layers.\1.blocks.\2.output.dense.\3",
    _SWIN_BLOCK + r"norm1\.(\w+)": r"swin.encoder.layers.\1.blocks.\2.layernorm_before.\3",
    _SWIN_BLOCK + r"norm2\.(\w+)": r"swin.encoder.layers.\1.blocks.\2.layernorm_after.\3",
    r"layers\.(\d+)\.downsample\.(.+)": r"swin.encoder.layers.{below}.downsample.\2",
    r"norm\.(\w+)": r"swin.layernorm.\1",
    r"head\.fc\.(\w+)": r"classifier.\1",
}  # fmt: skip
_TORCHVISION_VIT = {
    r"cls_token": "class_token",
    r"pos_embed": "encoder.pos_embedding",
    r"patch_embed\.proj\.(\w+)": r"conv_proj.\1",
    r"blocks\.(\d+)\.attn\.qkv\.(\w+)": r"encoder.layers.encoder_layer_\1.self_attention.in_proj_\2",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layers.encoder_layer_\1.self_attention.out_proj.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"encoder.layers.encoder_layer_\1.mlp.0.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"encoder.layers.encoder_layer_\1.mlp.3.\2",
    r"blocks\.(\d+)\.norm([12])\.(\w+)": r"encoder.layers.encoder_layer_\1.ln_\2.\3",
    r"norm\.(\w+)": r"encoder.ln.\1",
    r"head\.(\w+)": r"heads.head.\1",
}
_TORCHVISION_SWIN = {
    r"patch_embed\.proj\.(\w+)": r"features.0.0.\1",
    r"patch_embed\.norm\.(\w+)": r"features.0.2.\1",
    _SWIN_BLOCK + r"mlp\.fc1\.(\w+)": r"features.{odd}.\2.mlp.0.\3",
    _SWIN_BLOCK + r"mlp\.fc2\.(\w+)": r"features.{odd}.\2.mlp.3.\3",
    _SWIN_BLOCK + r"(.+)": r"features.{odd}.\2.\3",
    r"layers\.(\d+)\.downsample\.(.+)": r"features.{even}.\2",
    r"norm\.(\w+)": r"norm.\1",
    r"head\.fc\.(\w+)": r"head.\1",
}
# Below exit_heads.N; {qkv} as above. Where a readout sits depends on the head, see `_head_names`.
_PERCEPTION = {
    r"pointwise1\.(\w+)": r"mlp.conv1.0.\1",
    r"norm1\.(\w+)": r"mlp.conv1.2.\1",
    r"depthwise\.(\w+)": r"mlp.proj.\1",
    r"depthwise_norm\.(\w+)": r"mlp.proj_bn.\1",
    r"pointwise2\.(\w+)": r"mlp.conv2.0.\1",
    r"norm2\.(\w+)": r"mlp.conv2.1.\1",
    r"conv\.(\w+)": r"mlp.conv.0.\1",
    r"norm\.(\w+)": r"mlp.conv.2.\1",
}
_ATTENTION = {
    "gah": {r"qkv\.(\w+)": r"mlp.qkv.\1", r"proj\.(\w+)": r"mlp.proj.\1"},
    "attention": {
        r"qkv\.(\w+)": r"mlp.attention.{qkv}.\1",
        r"proj\.(\w+)": r"mlp.output.dense.\1",
    },
    "vit_ee": {
        r"block\." + ours.removeprefix(r"blocks\.(\d+)\."): (
            theirs.removeprefix(r"{root}.encoder.")
            .replace(r"layer.\1", "layer")
            .replace(r"\2", r"\1")
        )
        for ours, theirs in _VIT.items()
        if ours.startswith("blocks")
    },
}


def huggingface_names(keys: Iterable[str], root: str, distilled: bool = False) -> Names:
    """Names in a Hugging Face image classifier.

    Args:
        keys: names in the timm model.
        root: "vit", "deit" or "swin".
        distilled: whether it has a classifier on the distillation token.
    """
    table = _SWIN if root == "swin" else _VIT
    classifier = "cls_classifier" if distilled else "classifier"
    return {key: _find(key, table, root=root, classifier=classifier) for key in keys}


def torchvision_names(keys: Iterable[str], swin: bool) -> Names:
    """Names in a torchvision `VisionTransformer` or `SwinTransformer`, of names in the timm model."""
    table = _TORCHVISION_SWIN if swin else _TORCHVISION_VIT
    return {key: _find(key, table) for key in keys}


def published_names(model: LGViT) -> Names:
    """Names in a checkpoint of the published code, of every tensor of a model as files name it."""
    swin = len(model.adapter.depths) > 1
    distilled = model.adapter.num_class_tokens == 2
    keys = list(file_names(model.state_dict()))
    own = [key for key in keys if not key.startswith("exit_heads.")]
    names = huggingface_names(own, "swin" if swin else "deit", distilled)
    for key in keys:
        if key.startswith("exit_heads."):
            _, index, part = key.split(".", 2)
            home = _highway(model, int(index))
            sources = _head_names(part, model.exits[int(index)].family, swin, distilled)
            names[key] = tuple(f"{home}.{source}" for source in sources)
    return names


def collect(names: Names, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from theirs; a name without all its sources there is left out."""
    ours = {}
    for key, sources in names.items():
        if all(source in tensors for source in sources):
            parts = [tensors[source] for source in sources]
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            # A 1x1 convolution there is a matrix here.
            ours[key] = value.flatten(1) if _is_pointwise(key) and value.dim() == 4 else value
    return ours


def scatter(names: Names, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours: what `collect` undoes."""
    theirs: dict[str, Tensor] = {}
    for key, sources in names.items():
        value = tensors[key]
        if _is_pointwise(key) and value.dim() == 2:
            value = value[:, :, None, None]
        parts = value.chunk(len(sources)) if len(sources) > 1 else (value,)
        theirs |= {source: part.clone() for source, part in zip(sources, parts, strict=True)}
    return theirs


def _highway(model: LGViT, index: int) -> str:
    """Where the published code keeps an exit: by number, in Swin by stage and number in the stage."""
    depths = model.adapter.depths
    if len(depths) == 1:
        return f"deit.encoder.highway.{index}"
    layers = [spec.layer for spec in model.exits]
    stage = next(s for s in range(len(depths)) if layers[index] <= sum(depths[: s + 1]))
    first = sum(layer <= sum(depths[:stage]) for layer in layers)
    return f"swin.encoder.layers.{stage}.highway.{index - first}"


def _head_names(part: str, family: str, swin: bool, distilled: bool) -> tuple[str, ...]:
    group, _, rest = part.partition(".")
    if group == "perception":
        return _find(rest, _ATTENTION.get(family, _PERCEPTION))
    inner = "" if family == "linear" or (family != "vit_ee" and not swin) else "classifier."
    if group == "readout":
        name = rest.replace("pooler.", "pooler.dense.").replace("norm.", "layernorm.")
        return (inner + name,)
    number, _, leaf = rest.partition(".")
    name = (
        "distillation_classifier"
        if number == "1"
        else "cls_classifier"
        if distilled
        else "classifier"
    )
    return (f"{inner}{name}.{leaf}",)


def _find(key: str, table: Mapping[str, str], **filled: str) -> tuple[str, ...]:
    for pattern, template in table.items():
        match = re.fullmatch(pattern, key)
        if match:
            stage = int(match[1]) if match.groups() and match[1].isdigit() else 0
            numbers = {"below": stage - 1, "odd": 2 * stage + 1, "even": 2 * stage}
            parts = _SPLIT if "{qkv}" in template else ("",)
            text = match.expand(template)
            return tuple(text.format(qkv=part, **numbers, **filled) for part in parts)
    raise KeyError(key)


def _is_pointwise(key: str) -> bool:
    return bool(re.search(r"\.perception\.pointwise\d\.weight$", key))

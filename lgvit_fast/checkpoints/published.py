"""Checkpoints of the published LGViT code (ViT, DeiT and Swin, every head type), both ways."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lgvit_fast.checkpoints.backbones import depth_of, swin_depths, swin_from, vit_from
from lgvit_fast.checkpoints.files import save_json, save_weights
from lgvit_fast.checkpoints.fit import build_fitting, malformed
from lgvit_fast.checkpoints.foreign import Config, Source, load_named, read, require_named
from lgvit_fast.checkpoints.names import published_names, scatter
from lgvit_fast.heads.layout import ExitSpec, default_heads, default_layers
from lgvit_fast.model import LGViT
from lgvit_fast.parameter_names import file_names

__all__ = ["export_published", "load_published"]

_NAME = "the published checkpoint"
# The pooler and stage 2's second norm are trained by nothing and read by nothing we keep.
_UNUSED = r"(deit\.pooler|swin\.pooler|layernorm)\.|.*\.relative_position_index$"
# Strides of Swin's global heads by stage and number; the code has them built in.
_SWIN_STRIDES = {(2, 3): 1, (2, 4): 1, (2, 5): 2, (3, 0): 2}
# A parameter that only one head type has -> that type. The first match counts.
_SIGNS = {
    "mlp.attention.query.weight": "attention",
    "mlp.qkv.weight": "gah",
    "mlp.proj_bn.weight": "lph_full",
    "mlp.conv1.0.weight": "lph_light",
    "mlp.conv.0.weight": "conv",
    "layer.layernorm_before.weight": "vit_ee",
    "pooler.dense.weight": "linear",
    "layernorm.weight": "linear",
}
_HIGHWAY_TYPES = {
    "linear": "linear",
    "vit_ee": "vit",
    "conv": "conv_normal",
    "attention": "self_attention",
    "lph_full": "conv1_1",
    "lph_light": "conv2_1",
}


def load_published(source: Source, config: Config = None) -> LGViT:
    """Load a checkpoint of the published code, of stage 1 or 2.

    Args:
        source: a state dict, a `.safetensors` or `pytorch_model.bin` file (loaded with
            `weights_only=True`: no code in it runs), or a folder holding one.
        config: the code's configuration as a dict or json file; None takes `config.json` beside the
            weights, or reads everything from the shapes, assuming attention heads of width 64 and the
            published places of the exits.

    Returns:
        The model in eval mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, a checkpoint of another architecture, a configuration for another
            checkpoint, or keys that do not fit, naming them.
    """
    tensors, settings = read(source, config)
    swin = any(re.match(r"swin\.encoder\.layers\.\d+\.highway\.", key) for key in tensors)
    if not swin and not any(key.startswith("deit.encoder.highway.") for key in tensors):
        plain = any(re.match(r"(vit|deit|swin)\.encoder\.", key) for key in tensors)
        hint = "; it has no exits: see lgvit_fast.checkpoints.from_huggingface" if plain else ""
        raise ValueError(
            "no key starts with 'deit.encoder.highway.' or 'swin.encoder.layers.N.highway.': no"
            f" published LGViT; it starts with {sorted(tensors)[:3]}{hint}"
        )
    _check_backbone(tensors, settings, swin)
    if swin:
        with malformed(_NAME):
            tensors = _without_unused_heads(tensors, settings)

    def check(model: LGViT) -> None:
        require_named(model, published_names(model), tensors, _UNUSED, _NAME)

    model = build_fitting(lambda: _build(tensors, settings, swin), check, _NAME)
    load_named(model, published_names(model), tensors, _UNUSED, _NAME)
    return model.eval()


def _build(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], swin: bool) -> LGViT:
    """The model for a checkpoint, with fresh weights."""
    num_classes = _num_classes(tensors, settings)
    backbone: nn.Module
    if swin:
        backbone = swin_from(tensors, settings, num_classes)
        _, specs = _swin_exits(tensors, settings, swin_depths(tensors))
        num_heads = 8
    else:
        backbone = vit_from(tensors, settings, "deit", num_classes)
        specs = _vit_exits(tensors, settings, len(backbone.blocks))  # type: ignore[arg-type]
        own = specs[0].family in ("attention", "vit_ee")  # they take the backbone's number
        num_heads = backbone.blocks[0].attn.num_heads if own else 8  # type: ignore[index, union-attr]
    model = LGViT(backbone, specs, num_heads=num_heads)
    model.set_layer_norm_eps(settings.get("layer_norm_eps", 1e-5 if swin else 1e-12))
    return model


def _without_unused_heads(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors but those of heads that no position uses: the code makes some in a Swin."""
    homes, _ = _swin_exits(tensors, settings, swin_depths(tensors))
    used = tuple(homes)
    return {k: v for k, v in tensors.items() if ".highway." not in k or k.startswith(used)}


def export_published(
    model: LGViT, folder: str | os.PathLike[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The model as a checkpoint of the published code: what `load_published` undoes, exactly.

    Args:
        model: a ViT, distilled DeiT or Swin with a layout that the published code has.
        folder: also write `model.safetensors` and `config.json` there.

    Returns:
        The state dict under the published names, and the configuration.

    Raises:
        ValueError: a backbone or layout that the published code cannot express, saying why.
    """
    adapter, backbone = model.adapter, model.backbone
    swin = len(adapter.depths) > 1
    config = _describe(model, swin)
    try:
        tensors = scatter(published_names(model), file_names(model.state_dict()))
    except KeyError as error:
        raise ValueError(
            f"the published code has no place for {error.args[0]} of a {type(backbone).__name__};"
            " it knows plain ViT, distilled DeiT and Swin"
        ) from None
    if folder is not None:
        save_weights(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
        save_json(Path(folder) / "config.json", config)
    return tensors, config


def _describe(model: LGViT, swin: bool) -> dict[str, Any]:
    """The published configuration of a model."""
    backbone: Any = model.backbone
    depths, layers = model.adapter.depths, [spec.layer for spec in model.exits]
    if not isinstance(backbone.norm, nn.LayerNorm):
        raise ValueError("the published code has no place for a backbone without a final norm")
    embed = backbone.patch_embed
    height, width = embed.img_size
    if height != width:
        raise ValueError(f"images of {height} x {width} pixels: the published code wants squares")
    if model.pool != "subsample" and any(spec.stride > 1 for spec in model.exits):
        raise ValueError(f"pool={model.pool!r}: the published code subsamples")
    config: dict[str, Any] = {
        "image_size": height,
        "patch_size": embed.patch_size[0],
        "num_channels": model.adapter.in_chans,
        "num_labels": model.num_classes,
        "highway_type": _highway_type(model, swin),
        "layer_norm_eps": backbone.norm.eps,
    }
    if swin:
        stages = [[x - sum(depths[:s]) for x in layers if sum(depths[:s]) < x <= sum(depths[: s + 1])]
                  for s in range(len(depths))]  # fmt: skip
        blocks = [stage.blocks[0] for stage in backbone.layers]
        return config | {
            "backbone": "Swin",
            "embed_dim": model.adapter.width(1),
            "depths": list(depths),
            "num_heads": [block.attn.num_heads for block in blocks],
            "window_size": max(blocks[0].window_size),
            "mlp_ratio": blocks[0].mlp.fc1.out_features / model.adapter.width(1),
            "num_early_exits": json.dumps([len(stage) for stage in stages]),
            "position_exits": json.dumps(stages),
        }
    return config | {
        "backbone": "DeiT" if model.adapter.num_class_tokens == 2 else "ViT",
        "hidden_size": model.adapter.width(1),
        "num_hidden_layers": model.num_blocks,
        "num_attention_heads": backbone.blocks[0].attn.num_heads,
        "intermediate_size": backbone.blocks[0].mlp.fc1.out_features,
        "num_early_exits": len(layers),
        "position_exits": json.dumps(layers),
    }


def _highway_type(model: LGViT, swin: bool) -> str:
    """The published name of a layout."""
    layers, heads = [s.layer for s in model.exits], [s.head for s in model.exits]
    families = {spec.family for spec in model.exits}
    own = model.backbone.blocks[0].attn.num_heads if not swin else 8
    if swin and families != {"linear"}:
        usual = _swin_heads(model.adapter.depths, layers)
        kinds = {"lph_full", "lph_light", "gah"}
        if heads == usual or (len(families) == 1 and families == {"vit_ee"}):
            if model.num_heads == 8:
                return "vit" if families == {"vit_ee"} else "LGViT"
        if families <= kinds:
            raise ValueError(f"heads={heads}: for these exits the published code has {usual}")
    elif len(heads) in (2, 4, 6, 8) and tuple(heads) == default_heads(layers, model.num_blocks):
        if model.num_heads == 8:
            return "LGViT"
    elif len(set(heads)) == 1:
        family = families.pop()
        if family == "gah" and model.num_heads == 8:
            return f"attention_r{model.exits[0].stride}"
        if family in _HIGHWAY_TYPES and (not model.exits[0].attends or model.num_heads == own):
            return _HIGHWAY_TYPES[family]
    raise ValueError(
        f"heads={heads} with num_heads={model.num_heads}: the published code has LGViT's rows of 2, 4,"
        " 6 or 8 exits with 8 attention heads, or one head type for all exits"
    )


def _check_backbone(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], swin: bool) -> None:
    distilled = "distillation_classifier.weight" in tensors
    held = "Swin" if swin else "DeiT" if distilled else "ViT"
    said = settings.get("backbone", "Swin" if "depths" in settings else None)
    if said is not None and said != held:
        raise ValueError(f"the configuration says backbone {said!r}, the checkpoint holds a {held}")


def _num_classes(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> int:
    name = "cls_classifier.weight" if "cls_classifier.weight" in tensors else "classifier.weight"
    if name not in tensors:
        raise ValueError(f"the published checkpoint lacks {name}")
    count = tensors[name].shape[0]
    said = settings.get("num_labels", len(settings.get("id2label", ())) or count)
    if said != count:
        raise ValueError(f"the configuration says {said} classes, {name} has {count}")
    return count


def _vit_exits(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], depth: int
) -> list[ExitSpec]:
    """The layout: kinds from the weights, positions and pooling strides from the configuration."""
    count = depth_of(tensors, r"deit\.encoder\.highway\.(\d+)\.")
    positions = _parsed(settings.get("position_exits"))
    layers = default_layers(depth, count) if positions is None else positions
    if len(layers) != count:
        raise ValueError(f"position_exits={layers}, but the checkpoint holds {count} exits")
    given = re.fullmatch(r"attention_r(\d)", str(settings.get("highway_type")))
    heads = []
    for index, usual in enumerate(default_heads(layers, depth)):
        family = _family(tensors, f"deit.encoder.highway.{index}.")
        stride = int(given[1]) if given else ExitSpec(1, usual).stride if "gah" in usual else 2
        heads.append(f"gah_{stride}" if family == "gah" else family)
    return [ExitSpec(layer, head) for layer, head in zip(layers, heads, strict=True)]


def _swin_exits(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], depths: Sequence[int]
) -> tuple[list[str], list[ExitSpec]]:
    """Where the exits' keys begin, and the layout. The code makes heads that no position uses."""
    positions = _parsed(settings.get("position_exits"))
    if positions is None:
        held = [
            m
            for k in tensors
            if (m := re.match(r"swin\.encoder\.layers\.(\d+)\.highway\.(\d+)", k))
        ]
        counts = [len({m[2] for m in held if int(m[1]) == s}) for s in range(len(depths))]
        usual = default_layers(sum(depths), sum(counts), depths)
        positions = [
            [x - sum(depths[:s]) for x in usual if sum(depths[:s]) < x <= sum(depths[: s + 1])]
            for s in range(len(depths))
        ]
        if [len(stage) for stage in positions] != counts:
            raise ValueError(
                f"the stages hold {counts} exits, not the usual places: give position_exits"
            )
    homes, specs = [], []
    for stage, inside in enumerate(positions):
        for number, place in enumerate(inside):
            homes.append(f"swin.encoder.layers.{stage}.highway.{number}.")
            head = _family(tensors, homes[-1])
            if head == "gah":
                head = f"gah_{_SWIN_STRIDES.get((stage, number), 2)}"
            specs.append(ExitSpec(sum(depths[:stage]) + place, head))
    return homes, specs


def _swin_heads(depths: Sequence[int], layers: Sequence[int]) -> list[str]:
    """What the published code puts at these exits of a Swin, as far as it can."""
    heads = []
    for layer in layers:
        stage = next(s for s in range(len(depths)) if layer <= sum(depths[: s + 1]))
        number = sum(sum(depths[:stage]) < other < layer for other in layers)
        if (stage, number) in _SWIN_STRIDES:
            heads.append(f"gah_{_SWIN_STRIDES[stage, number]}")
        else:
            heads.append("lph_light" if stage == 2 and number else "lph_full")
    return heads


def _family(tensors: Mapping[str, Tensor], home: str) -> str:
    """The head type of the exit whose keys begin with `home`."""
    for sign, family in _SIGNS.items():
        if home + sign in tensors:
            if family == "vit_ee":
                hidden, width = tensors[f"{home}layer.intermediate.dense.weight"].shape
                return family if hidden == 4 * width else f"vit_ee_{hidden // width}"
            return family
    raise ValueError(f"the published checkpoint has no head that is known at {home}")


def _parsed(value: Any) -> Any:
    """The published code keeps lists as strings."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"position_exits={value!r}, expected a list") from error

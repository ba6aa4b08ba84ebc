"""Making timm models by name, and saying how one was made."""

from __future__ import annotations

import json
from typing import Any

import timm
import torch
from torch import nn

from lgvit_fast.backbones.timm_arguments import check_arguments, check_description
from lgvit_fast.backbones.timm_private import note_arguments, noted_arguments

__all__ = [
    "DATA_KEYS",
    "describe_backbone",
    "make_backbone",
    "remake_backbone",
    "set_layer_norm_eps",
    "with_pooling",
]

# How images are prepared, as timm's configurations of weights name it.
DATA_KEYS = ("mean", "std", "interpolation", "crop_pct")


# Arguments that say where weights come from, not what the model is.
_ABOUT_WEIGHTS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
    "num_classes",
}  # fmt: skip


def make_backbone(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A timm model that knows how it was made, whatever timm's version."""
    backbone = timm.create_model(name, pretrained=pretrained, **kwargs)
    note_arguments(backbone, kwargs)
    return backbone


def remake_backbone(made: dict[str, Any]) -> nn.Module:
    """The timm model, with fresh weights, that `describe_backbone` described, perhaps in a file.

    Raises:
        ValueError: a name or argument that no file may set, or that timm cannot make a model of.
    """
    check_description(made)
    try:
        data = {"pretrained_cfg_overlay": made["data"]} if made.get("data") else {}
        return make_backbone(made["name"], **made["args"], **data)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"timm cannot make {made['name']!r} with {made['args']}: {type(error).__name__}: {error}"
        ) from error


def describe_backbone(model: nn.Module) -> dict[str, Any] | None:
    """How to make this timm model again by name, or None if that cannot be said with json types."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name or not timm.is_model(name):
        return None
    recorded = noted_arguments(model)
    given = _size_of(model) if recorded is None else recorded  # timm notes them since 1.0.31
    args = {key: value for key, value in given.items() if key not in _ABOUT_WEIGHTS}
    args["num_classes"] = model.num_classes
    try:
        args = json.loads(json.dumps(args))
        check_arguments(args, "args")  # what is described must be readable again
        again = _without_storage(name, args)
    except (TypeError, ValueError, RuntimeError):
        return None
    if _shapes(model) != _shapes(again):
        return None  # changed after it was made, by set_input_size for one
    if recorded is None and _settings(model) != _settings(again):
        return None
    data = _own_data(name, model.pretrained_cfg)
    return {"name": name, "args": args, **({"data": data} if data else {})}


def _own_data(name: str, cfg: Any) -> dict[str, Any]:
    """How images are prepared for these weights, where timm does not do so for the bare name."""
    usual = timm.get_pretrained_cfg(name)
    if usual is None:
        return {}
    own = {key: cfg[key] for key in DATA_KEYS if cfg.get(key) is not None}
    own = {key: _listed(value) for key, value in own.items()}
    return {key: value for key, value in own.items() if value != _listed(getattr(usual, key))}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def with_pooling(
    model: nn.Module, config: dict[str, Any], global_pool: str
) -> dict[str, Any] | None:
    """What `describe_backbone` gave, for the same model after its pooling was changed.

    Pooling decides, in timm, where a new model has its last norm; here that stays where it was. None if
    no arguments make such a model.
    """
    args = {**config["args"], "global_pool": global_pool}
    for norm in ({}, {"fc_norm": False}, {"use_fc_norm": False}, {"fc_norm": True}):
        try:
            again = _without_storage(config["name"], {**args, **norm})
        except (TypeError, ValueError, RuntimeError, AssertionError):
            continue
        if _shapes(again) == _shapes(model):
            return {**config, "args": {**args, **norm}}
    return None


def _shapes(model: nn.Module) -> dict[str, Any]:
    """The shape of every tensor."""
    return {key: value.shape for key, value in model.state_dict().items()}


def _size_of(model: nn.Module) -> dict[str, Any]:
    """The argument that most often differs from a model's defaults."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    default = tuple(model.pretrained_cfg["input_size"][1:])  # type: ignore[index]
    return {} if size is None or tuple(size) == default else {"img_size": list(size)}


def _settings(model: nn.Module) -> list[tuple[str, type, dict[str, Any]]]:
    """What modules are and hold besides tensors: activations, rates, how features are pooled."""
    plain = (bool, int, float, str, tuple, type(None))

    def of(module: nn.Module) -> dict[str, Any]:
        held = {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        return {**held, "training": None}

    return [(name, type(module), of(module)) for name, module in model.named_modules()]


def _without_storage(name: str, args: dict[str, Any]) -> nn.Module:
    """A timm model for its shapes' sake; with storage where an older timm cannot do without."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **args)
    except RuntimeError:
        return timm.create_model(name, **args)


def set_layer_norm_eps(model: nn.Module, eps: float | None) -> None:
    """Give every LayerNorm of a model this eps; None leaves them as they are."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and eps is not None:
            module.eps = eps

"""Models that timm made or trained, given early exits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lgvit_fast.backbones.timm_arguments import check_description
from lgvit_fast.backbones.timm_models import DATA_KEYS, make_backbone
from lgvit_fast.checkpoints.files import load_json, load_weights
from lgvit_fast.checkpoints.torch_files import load_checkpoint
from lgvit_fast.model import LGViT

__all__ = ["from_timm", "is_timm"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class _Found(NamedTuple):
    """A checkpoint, and what it says of itself."""

    tensors: dict[str, Tensor]
    name: str | None  # timm's, of the architecture
    args: dict[str, Any]  # of `timm.create_model`
    data: dict[str, Any]  # how images were normalised and resized
    class_names: list[str] | None


def from_timm(
    source: str | os.PathLike[str],
    model_name: str | None = None,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> LGViT:
    """Give early exits to a timm model with trained weights.

    Args:
        source: the name of a timm model, whose pretrained weights are taken; a folder with timm's
            `config.json` and weights; a checkpoint of timm's training script (its EMA weights, if it
            has any); or a file that holds a state dict.
        model_name: timm's name of the architecture, if a state dict does not say.
        model_kwargs: further arguments of the timm model (`img_size`, `drop_path_rate`, ...).
        **options: go to `LGViT`: exits, heads, num_classes, ...

    Returns:
        The model in eval mode, with the class names and the normalisation that the source tells. Its
        final logits are timm's own; its exits are untrained.

    Raises:
        FileNotFoundError: neither a file nor a folder nor a timm model.
        ValueError: a damaged file, one that sets what no file may set, weights that do not fit, or no
            name of an architecture.
    """
    kwargs, path = dict(model_kwargs or {}), Path(source)
    if not path.exists():
        if not timm.is_model(str(source)):
            raise FileNotFoundError(
                f"{str(source)!r} is neither a file nor a folder nor the name of a timm model"
            )
        backbone = make_backbone(str(source), True, **kwargs)
        names = backbone.pretrained_cfg.get("label_names")  # type: ignore[union-attr, operator]
    else:
        found = _read(path)
        name = found.name or model_name
        if name is None:
            raise ValueError(
                f"{path} does not say which timm model it is of: give the model's name"
            )
        check_description({"name": name, "args": found.args, "data": found.data})
        overlay = {
            **found.data,
            "state_dict": found.tensors,
            "custom_load": False,
            "label_offset": 0,
            "num_classes": _num_classes(name, found.tensors),
        }
        args = {**found.args, **kwargs, "num_classes": overlay["num_classes"]}
        try:
            backbone = make_backbone(name, True, pretrained_cfg_overlay=overlay, **args)
        except (RuntimeError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} does not fit timm's {name}: {reason[:500]}") from error
        backbone.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
        names = found.class_names
    model = LGViT(backbone, **options).eval()
    if names and len(names) == model.num_classes:
        model.class_names = list(names)
    return model


def is_timm(source: str | os.PathLike[str]) -> bool:
    """Whether `from_timm` is what reads a source: a model's name, a folder, or a file."""
    path = Path(source)
    if not path.exists():
        return bool(timm.is_model(str(source)))
    if "architecture" in _config_beside(path):
        return True
    if path.is_dir():
        return False
    if path.suffix != ".safetensors":
        content = load_checkpoint(path)
        return "state_dict" in content or _timm_names(content)
    try:
        with safe_open(path, framework="pt") as file:
            return _timm_names(file.keys())
    except SafetensorError:
        return False


def _timm_names(names: Any) -> bool:
    """Whether these are tensors of a ViT, DeiT, Swin or Eva of timm."""
    names = {str(name).removeprefix("module.") for name in names}
    heads = any(name.startswith(("exit_heads.", "vit.", "swin.", "deit.")) for name in names)
    return "patch_embed.proj.weight" in names and not heads


def _config_beside(path: Path) -> dict[str, Any]:
    """The json object in `config.json` of a folder, or beside a file; empty if there is none."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    if not config.exists():
        return {}
    content = load_json(config)
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> _Found:
    config = _config_beside(path)
    if path.is_dir():
        files = [path / name for name in _WEIGHTS if (path / name).exists()]
        if not files:
            raise FileNotFoundError(f"none of {', '.join(_WEIGHTS)} is in {path}")
        path = files[0]
    load: Any = load_weights if path.suffix == ".safetensors" else load_checkpoint
    content: dict[str, Any] = load(path)
    said = vars(content["args"]) if "args" in content and "state_dict" in content else {}
    cfg = config.get("pretrained_cfg") or {}
    data = {key: cfg.get(key, said.get(key)) for key in DATA_KEYS}
    weights = content.get("state_dict_ema") or content.get("state_dict") or content
    tensors = {key.removeprefix("module."): value for key, value in weights.items()}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} does not hold a state dict")
    return _Found(
        tensors,
        config.get("architecture") or content.get("arch") or said.get("model"),
        {**(said.get("model_kwargs") or {}), **(config.get("model_args") or {})},
        {key: value for key, value in data.items() if value is not None},
        config.get("label_names") or cfg.get("label_names"),
    )


def _num_classes(name: str, tensors: Mapping[str, Tensor]) -> int:
    """Rows of the classifier, 0 without one."""
    cfg = timm.get_pretrained_cfg(name)
    classifier = (cfg.classifier if cfg else None) or "head"
    first = classifier if isinstance(classifier, str) else classifier[0]
    weight = tensors.get(f"{first}.weight")
    return 0 if weight is None else len(weight)

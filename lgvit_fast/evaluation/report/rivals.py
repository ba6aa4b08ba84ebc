"""Rivals: what the user names, as a model of the same classes, and how it wants its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from lgvit_fast.checkpoints.files import load_json, load_weights
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.model import LGViT

__all__ = ["input_spec", "load_rival"]

_OWN = "model.safetensors"


def load_rival(name: str, num_classes: int, class_names: Sequence[str] | None = None) -> nn.Module:
    """A rival in eval mode on the CPU.

    Args:
        name: a folder that `save_pretrained` wrote (an early-exit model); a folder in timm's own format
            (`config.json` with `architecture`, `model.safetensors`); `TIMM_NAME=FILE.safetensors`, a
            timm model with the weights of a file; or a timm name, with its pretrained weights.
        num_classes: K that it must have.
        class_names: that it must have, where both have names.

    Raises:
        ValueError: its classes do not match, no such timm model, or weights that do not fit.
        FileNotFoundError: no weights in the folder, no such file, or pretrained weights out of reach.
    """
    architecture, _, file = name.partition("=")
    try:
        if Path(name).is_dir():
            model = _from_folder(Path(name))
        elif file:
            model = _create(architecture, name, num_classes=_classes_in(file, num_classes))
            model.load_state_dict(load_weights(file))
        else:
            model = _create(name, name, pretrained=True)
    except (RuntimeError, KeyError) as error:
        first = " ".join(str(error).split())[:300]
        raise ValueError(f"rival {name!r}: the weights do not fit the model: {first}") from error
    found = int(getattr(model, "num_classes", 0))
    if found != num_classes:
        raise ValueError(f"rival {name!r} has {found} classes, expected the model's {num_classes}")
    names = getattr(model, "class_names", None)
    if names and class_names and list(names) != list(class_names):
        pairs = enumerate(zip(names, class_names, strict=True))
        place, (theirs, ours) = next((p, pair) for p, pair in pairs if pair[0] != pair[1])
        raise ValueError(
            f"rival {name!r} has other classes: class {place} is {theirs!r}, the model's is {ours!r}"
        )
    return model.eval()


def input_spec(model: nn.Module) -> InputSpec:
    """How a model wants its images, also where it is no transformer."""
    backbone: Any = model.backbone if isinstance(model, LGViT) else model
    if hasattr(backbone, "patch_embed"):
        return InputSpec.of(backbone)
    config = timm.data.resolve_model_data_config(backbone)
    channels, height, width = config["input_size"]
    return InputSpec(
        channels=int(channels),
        size=(int(height), int(width)),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"] if min(height, width) > 64 else 1.0,
    )


def _from_folder(folder: Path) -> nn.Module:
    missing = [file for file in ("config.json", _OWN) if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"rival {str(folder)!r}: {' and '.join(missing)} not found in it")
    config = load_json(folder / "config.json")
    if "architecture" not in config:
        return LGViT.from_pretrained(folder)
    options = dict(config.get("model_args") or {})
    if isinstance(names := config.get("label_names"), list):
        options.setdefault("num_classes", len(names))
    options.setdefault("num_classes", config.get("num_classes"))
    model = _create(str(config["architecture"]), str(folder), **options)
    model.load_state_dict(load_weights(folder / _OWN))
    found: Any = model
    if isinstance(data := config.get("pretrained_cfg"), dict):
        found.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), **data}
    if names:
        found.class_names = [str(label) for label in names]
    return model


def _create(architecture: str, name: str, **options: Any) -> nn.Module:
    if not timm.is_model(architecture.partition(".")[0]):
        raise ValueError(
            f"rival {name!r}: expected a folder with {_OWN}, TIMM_NAME=FILE.safetensors, or the name of"
            f" a timm model; timm has no {architecture!r}"
        )
    try:
        model: nn.Module = timm.create_model(architecture, **options)
    except Exception as error:
        if not options.get("pretrained"):
            raise
        raise FileNotFoundError(
            f"rival {name!r}: its pretrained weights are not at hand ({type(error).__name__}); give a"
            " folder, or TIMM_NAME=FILE.safetensors"
        ) from error
    return model


def _classes_in(file: str, default: int) -> int:
    """Classes of a file of weights, by its last layer's bias."""
    weights = load_weights(file)
    last = ("head.bias", "head.fc.bias", "fc.bias", "classifier.bias")
    biases: list[torch.Tensor] = [weights[key] for key in last if key in weights]
    return len(biases[0]) if biases else default

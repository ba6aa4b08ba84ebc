"""Saving a model as safetensors and json, and making it again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from torch import nn

from lgvit_fast import policies
from lgvit_fast.heads import ExitSpec
from lgvit_fast.weights import load_json, load_weights, save_json, save_weights

if TYPE_CHECKING:
    from typing import Self

    from lgvit_fast.model import LGViT

__all__ = [
    "PretrainedMixin",
    "describe_backbone",
    "load_strictly",
    "set_layer_norm_eps",
    "shortened",
]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_FORMAT = "lgvit_fast/1"


class PretrainedMixin:
    """`save_pretrained` and `from_pretrained` for `LGViT`."""

    def get_config(self) -> dict[str, Any]:
        """Everything but the weights, as json types: backbone, exits, head options, policy."""
        model = cast("LGViT", self)
        return {
            "format": _FORMAT,
            "backbone": model._backbone_config,
            "num_classes": model.num_classes,
            "class_names": model.class_names,
            "exits": [dataclasses.asdict(spec) for spec in model.exits],
            "pool": model.pool,
            "num_heads": model.num_heads,
            "policy": _describe_policy(model.policy),
        }

    def remember_layer_norm_eps(self, eps: float) -> None:
        """Give every LayerNorm this eps, and keep it with the model: it is no argument of timm's."""
        model = cast("LGViT", self)
        set_layer_norm_eps(model, eps)
        if model._backbone_config is not None:
            model._backbone_config["layer_norm_eps"] = eps

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, each atomically."""
        model = cast("LGViT", self)
        save_weights(Path(folder) / _WEIGHTS, model.state_dict(), {"format": _FORMAT})
        save_json(Path(folder) / _CONFIG, self.get_config())

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], backbone: nn.Module | None = None
    ) -> Self:
        """Make the model that `save_pretrained` wrote, in eval mode on the CPU.

        Args:
            folder: where it was written.
            backbone: a timm model of the same shape; needed only where the saved one was not made by
                `timm.create_model` with plain arguments and so cannot be made again by name.

        Raises:
            FileNotFoundError: no such folder or a file is missing in it.
            ValueError: another format, a damaged file, or weights that do not fit, naming the keys.
        """
        config = load_json(Path(folder) / _CONFIG)
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            found = config.get("format") if isinstance(config, dict) else config
            raise ValueError(f"{folder} has format {found!r}, expected {_FORMAT!r}")
        tensors = load_weights(Path(folder) / _WEIGHTS)
        model = cls.from_config(config, backbone)
        load_strictly(cast("LGViT", model), tensors, str(Path(folder) / _WEIGHTS))
        return model.eval()  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: dict[str, Any], backbone: nn.Module | None = None) -> Self:
        """Make a model with fresh weights from what `get_config` gave.

        Raises:
            ValueError: the backbone cannot be made by name and none was given.
        """
        if backbone is None:
            made = config["backbone"]
            if made is None:
                raise ValueError(
                    "the backbone was not made by timm.create_model with plain arguments,"
                    " so its config does not say how to make it again: give backbone="
                )
            backbone = timm.create_model(made["name"], **made["args"])
        model = cls(  # type: ignore[call-arg]
            backbone,
            [ExitSpec(**spec) for spec in config["exits"]],
            config["num_classes"],
            pool=config["pool"],
            num_heads=config["num_heads"],
        )
        model._backbone_config = config["backbone"]  # type: ignore[attr-defined]
        set_layer_norm_eps(cast("LGViT", model), (config["backbone"] or {}).get("layer_norm_eps"))
        model.class_names = config.get("class_names")  # type: ignore[attr-defined]
        if config.get("policy"):
            arguments = dict(config["policy"])
            model.policy = getattr(policies, arguments.pop("name"))(**arguments)  # type: ignore[attr-defined]
        return model


def load_strictly(model: LGViT, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        ValueError: naming the keys that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    problems = []
    for title, keys in (
        ("missing", [k for k in own if k not in tensors]),
        ("unknown", [k for k in tensors if k not in own]),
        (
            "of another shape",
            [
                f"{k} {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
                for k in own
                if k in tensors and tensors[k].shape != own[k].shape
            ],
        ),
    ):
        if keys:
            problems.append(f"{title}: {shortened(keys)}")
    if problems:
        raise ValueError(f"{source} does not fit the model; {'; '.join(problems)}")
    model.load_state_dict(tensors)


def describe_backbone(model: nn.Module) -> dict[str, Any] | None:
    """How to make this timm model again by name, or None if that cannot be said with json types."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    recorded = getattr(model, "_model_args", None)
    if not name or recorded is None or not timm.is_model(name):
        return None
    unwanted = ("pretrained", "num_classes", "cache_dir", "pretrained_cfg_overlay")
    args = {key: value for key, value in recorded.items() if key not in unwanted}
    args["num_classes"] = model.num_classes
    try:
        args = json.loads(json.dumps(args))
        with torch.device("meta"):
            again = timm.create_model(name, **args)
    except (TypeError, RuntimeError, NotImplementedError):
        return None
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if shapes != {key: value.shape for key, value in again.state_dict().items()}:
        return None  # changed after it was made, by set_input_size for one
    return {"name": name, "args": args}


def set_layer_norm_eps(model: nn.Module, eps: float | None) -> None:
    """Give every LayerNorm of a model this eps; None leaves them as they are."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and eps is not None:
            module.eps = eps


def _describe_policy(policy: policies.Policy) -> dict[str, Any] | None:
    """A built-in policy as json; None for one whose meaning lives in user code."""
    if getattr(policies, type(policy).__name__, None) is not type(policy):
        return None
    if not dataclasses.is_dataclass(policy):
        return None
    return {"name": type(policy).__name__, **dataclasses.asdict(policy)}


def shortened(keys: Sequence[str], limit: int = 6) -> str:
    """The first few of many names, and how many more there are."""
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + rest

"""Saving a model as safetensors and json, and making it again."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from lgvit_fast import policies
from lgvit_fast.heads import ExitSpec
from lgvit_fast.weights import load_json, load_weights, save_json, save_weights, write_atomic

if TYPE_CHECKING:
    from typing import Self


__all__ = [
    "PretrainedMixin",
    "describe_backbone",
    "load_strictly",
    "make_backbone",
    "set_layer_norm_eps",
    "shortened",
]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_FORMAT = "lgvit_fast/1"


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_CARD = """\
---
{{ card_data }}
---

# {{ backbone }} with early exits

An image classifier ({{ num_classes }} classes) that answers easy images after a few of its
{{ num_blocks }} blocks ([LGViT](https://arxiv.org/abs/2308.00255)), made with lgvit_fast.

| exit after block | head |
|---|---|
{% for layer, head in exits %}| {{ layer }} | {{ head }} |
{% endfor %}
Saved exit policy: `{{ policy }}`.

```python
import lgvit_fast

model = lgvit_fast.LGViT.from_pretrained("{{ repo_id | default('user/model', true) }}")
result = model.infer(images)  # logits, and the exit at which each image left
```
"""


class PretrainedMixin(
    PyTorchModelHubMixin,
    model_card_template=_CARD,
    library_name="lgvit_fast",
    license="apache-2.0",
    pipeline_tag="image-classification",
    tags=["early-exit", "vision-transformer", "lgvit"],
):
    """`save_pretrained`, `from_pretrained` and `push_to_hub` for `LGViT`.

    Of the hub's mixin it keeps the interface; what is written, and how, is ours.
    """

    def get_config(self) -> dict[str, Any]:
        """Everything but the weights, as json types: backbone, exits, head options, policy."""
        model = cast(Any, self)
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
        model = cast(Any, self)
        set_layer_norm_eps(model, eps)
        if model._backbone_config is not None:
            model._backbone_config["layer_norm_eps"] = eps

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `config.json`, `model.safetensors` and, if there is none, a model card `README.md`.

        Each file appears whole or not at all.

        Args:
            folder: where to.
            push_to_hub: also upload to the Hugging Face hub, see `push_to_hub`.
            repo_id: name there, "user/model"; None takes the folder's name.
            model_card_kwargs: values for the model card beyond what the model says of itself.
            **push_to_hub_kwargs: go to `push_to_hub`.

        Returns:
            The address of the upload, if there was one.
        """
        model, folder = cast(Any, self), Path(folder)
        save_weights(folder / _WEIGHTS, model.state_dict(), {"format": _FORMAT})
        save_json(folder / _CONFIG, self.get_config())
        if not (folder / "README.md").exists():
            card = str(self.generate_model_card(**(model_card_kwargs or {})))
            write_atomic(folder / "README.md", lambda file: _write(file, card))
        if not push_to_hub:
            return None
        push_to_hub_kwargs.pop("config", None)  # ours is in the folder
        return self.push_to_hub(
            repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs
        )

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """A model card that says what the exits are and how to use the model."""
        model = cast(Any, self)
        backbone = (model._backbone_config or {}).get("name") or type(model.backbone).__name__
        facts = {
            "backbone": backbone,
            "num_blocks": model.num_blocks,
            "num_classes": model.num_classes,
            "exits": [(spec.layer, spec.head) for spec in model.exits],
            "policy": repr(model.policy),
        }
        return super().generate_model_card(*args, **{**facts, **kwargs})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        folder: str | os.PathLike[str],
        backbone: nn.Module | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Make the model that `save_pretrained` wrote, in eval mode on the CPU.

        Args:
            folder: where it was written, or its name on the Hugging Face hub, "user/model".
            backbone: a timm model of the same shape; needed only where the saved one was not made by
                `timm.create_model` with plain arguments and so cannot be made again by name.
            revision: on the hub: branch, tag or commit.
            token: for a private repository on the hub.
            cache_dir: where files from the hub are kept.
            force_download: fetch them anew.
            local_files_only: take them from there, without asking the hub.

        Raises:
            FileNotFoundError: no such folder, a file is missing in it, or the hub does not have it or
                cannot be reached.
            ValueError: another format, a damaged file, or weights that do not fit, naming the keys.
        """
        place = Path(folder)
        if not place.exists() and _HUB_NAME.fullmatch(str(folder)):
            place = _download(
                str(folder),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        config = load_json(place / _CONFIG)
        if not isinstance(config, dict) or config.get("format") != _FORMAT:
            found = config.get("format") if isinstance(config, dict) else config
            raise ValueError(f"{folder} has format {found!r}, expected {_FORMAT!r}")
        tensors = load_weights(place / _WEIGHTS)
        model = cls.from_config(config, backbone)
        load_strictly(cast(nn.Module, model), tensors, str(place / _WEIGHTS))
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
            backbone = make_backbone(made["name"], **made["args"])
        model = cls(
            backbone,
            [ExitSpec(**spec) for spec in config["exits"]],
            config["num_classes"],
            pool=config["pool"],
            num_heads=config["num_heads"],
        )
        model._backbone_config = config["backbone"]  # type: ignore[attr-defined]
        set_layer_norm_eps(cast(nn.Module, model), (config["backbone"] or {}).get("layer_norm_eps"))
        model.class_names = config.get("class_names")  # type: ignore[attr-defined]
        if config.get("policy"):
            arguments = dict(config["policy"])
            model.policy = getattr(policies, arguments.pop("name"))(**arguments)  # type: ignore[attr-defined]
        return model


def load_strictly(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
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


def make_backbone(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A timm model that knows how it was made, whatever timm's version."""
    backbone = timm.create_model(name, pretrained=pretrained, **kwargs)
    if not hasattr(backbone, "_model_args"):  # older timm does not note it
        backbone._model_args = dict(kwargs)  # type: ignore[assignment]
    return backbone


def describe_backbone(model: nn.Module) -> dict[str, Any] | None:
    """How to make this timm model again by name, or None if that cannot be said with json types."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name or not timm.is_model(name):
        return None
    recorded = getattr(model, "_model_args", None)
    given = _size_of(model) if recorded is None else recorded  # timm notes them since 1.0.31
    unwanted = ("pretrained", "num_classes", "cache_dir", "pretrained_cfg_overlay")
    args = {key: value for key, value in given.items() if key not in unwanted}
    args["num_classes"] = model.num_classes
    try:
        args = json.loads(json.dumps(args))
        again = _without_storage(name, args)
    except (TypeError, RuntimeError):
        return None
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if shapes != {key: value.shape for key, value in again.state_dict().items()}:
        return None  # changed after it was made, by set_input_size for one
    if recorded is None and _settings(model) != _settings(again):
        return None
    return {"name": name, "args": args}


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


def _download(name: str, **options: Any) -> Path:
    """The folder in the hub's cache that holds a model's two files."""
    try:
        files = [hf_hub_download(name, file, **options) for file in (_CONFIG, _WEIGHTS)]
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give it ({reason}); offline, give"
            " a folder that save_pretrained wrote, or a model that is in the cache"
        ) from error
    return Path(files[0]).parent


def _describe_policy(policy: policies.Policy) -> dict[str, Any] | None:
    """A built-in policy as json; None for one whose meaning lives in user code."""
    if getattr(policies, type(policy).__name__, None) is not type(policy):
        return None
    if not dataclasses.is_dataclass(policy):
        return None
    return {"name": type(policy).__name__, **dataclasses.asdict(policy)}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def shortened(keys: Sequence[str], limit: int = 6) -> str:
    """The first few of many names, and how many more there are."""
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + rest

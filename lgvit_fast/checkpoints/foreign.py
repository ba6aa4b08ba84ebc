"""Reading what others saved, and loading it so that nothing is silently left out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lgvit_fast.checkpoints.files import load_json, load_weights, shortened
from lgvit_fast.checkpoints.names import Names, collect
from lgvit_fast.checkpoints.torch_files import load_state_dict
from lgvit_fast.parameter_names import file_names
from lgvit_fast.rules import Rule, integer, number, one_or_list, require, text

__all__ = ["Config", "Source", "load_named", "read", "require_named"]

Source = str | os.PathLike[str] | Mapping[str, Tensor]
Config = str | os.PathLike[str] | Mapping[str, Any] | None

# Of the settings that are read.
_RULES = {
    "image_size": one_or_list(integer(1, 8192)),
    "num_attention_heads": integer(1, 1024),
    "num_labels": integer(1, 10_000_000),
    "layer_norm_eps": number(0, 1),
    "drop_path_rate": number(0, 1),
    "id2label": Rule(
        "a table of strings",
        lambda value: (
            isinstance(value, Mapping) and all(isinstance(name, str) for name in value.values())
        ),
    ),
    "backbone": text,
    "highway_type": text,
    "hidden_act": text,
}


def read(source: Source, config: Config = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float32 and settings, from files or as given.

    Args:
        source: a state dict; a `.safetensors` or `pytorch_model.bin` file, which is loaded with
            `weights_only=True`, so that no code in it runs; or a folder holding one.
        config: settings as a dict or json file; None takes `config.json` beside the weights, or none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one with more than plain tensors in it.
    """
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
        tensors = load_weights(path) if path.suffix == ".safetensors" else load_state_dict(path)
        if config is None and (path.parent / "config.json").exists():
            config = path.parent / "config.json"
    settings = load_json(config) if isinstance(config, str | os.PathLike) else dict(config or {})
    if not isinstance(settings, dict):
        raise ValueError(f"{config} holds a {type(settings).__name__}, expected a json object")
    require(settings, _RULES, "the configuration's ")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, settings


def load_named(
    model: nn.Module, names: Names, tensors: Mapping[str, Tensor], unused: str, source: str
) -> None:
    """Load tensors under their foreign names into a model that they must fit; see `require_named`."""
    require_named(model, names, tensors, unused, source)
    model.load_state_dict(collect(names, tensors))


def require_named(
    model: nn.Module, names: Names, tensors: Mapping[str, Tensor], unused: str, source: str
) -> None:
    """Check that tensors under their foreign names fit a model exactly.

    Args:
        model: every entry of its state dict is to be filled; it may be without storage.
        names: for each entry, what it is called there.
        tensors: all tensors there.
        unused: pattern of the names there that nothing reads.
        source: what to call the tensors in an error.

    Raises:
        ValueError: naming, as they are called there, what is missing, unknown or of another shape.
    """
    ours = collect(names, {name: tensor.to("meta") for name, tensor in tensors.items()})
    own = file_names(model.state_dict())
    wanted = {name for sources in names.values() for name in sources}
    problems = {
        "missing": [name for name in sorted(wanted) if name not in tensors],
        "unknown": [n for n in sorted(tensors) if n not in wanted and not re.match(unused, n)],
        "of another shape": [
            f"{'+'.join(names[key])} {tuple(value.shape)}, expected {tuple(own[key].shape)}"
            for key, value in ours.items()
            if value.shape != own[key].shape
        ],
    }
    found = [f"{title}: {shortened(keys)}" for title, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit the model; {'; '.join(found)}")

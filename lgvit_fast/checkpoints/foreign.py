"""Reading what others saved, and loading it so that nothing is silently left out."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lgvit_fast.checkpoints.files import load_json, load_weights, shortened
from lgvit_fast.checkpoints.names import Names, collect

__all__ = ["Config", "Source", "load_named", "read"]

Source = str | os.PathLike[str] | Mapping[str, Tensor]
Config = str | os.PathLike[str] | Mapping[str, Any] | None


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
        tensors = load_weights(path) if path.suffix == ".safetensors" else _load_bin(path)
        if config is None and (path.parent / "config.json").exists():
            config = path.parent / "config.json"
    settings = load_json(config) if isinstance(config, str | os.PathLike) else dict(config or {})
    if not isinstance(settings, dict):
        raise ValueError(f"{config} holds a {type(settings).__name__}, expected a json object")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, settings


def load_named(
    model: nn.Module, names: Names, tensors: Mapping[str, Tensor], unused: str, source: str
) -> None:
    """Load tensors under their foreign names into a model that they must fit exactly.

    Args:
        model: every entry of its state dict is to be filled.
        names: for each entry, what it is called there.
        tensors: all tensors there.
        unused: pattern of the names there that nothing reads.
        source: what to call the tensors in an error.

    Raises:
        ValueError: naming, as they are called there, what is missing, unknown or of another shape.
    """
    ours, own = collect(names, tensors), model.state_dict()
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
    model.load_state_dict(ours)


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is not a whole file of plain tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise ValueError(f"{path} does not hold a state dict")
    return tensors

"""What a tensor of a model is called: in the module, and in files, which keep timm's names.

In the module the timm model's tensors begin with `backbone.`, so that `state_dict` and
`named_parameters` agree. Files leave that out: timm can read the backbone from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["BACKBONE", "file_names", "module_names"]

BACKBONE = "backbone."
HEADS = "exit_heads."

Value = TypeVar("Value")


def module_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The same under the module's names; given are names of either kind."""
    known = (BACKBONE, HEADS)
    return {k if k.startswith(known) else BACKBONE + k: v for k, v in tensors.items()}


def file_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The same under the names that files have; given are names of either kind."""
    return {name.removeprefix(BACKBONE): value for name, value in tensors.items()}

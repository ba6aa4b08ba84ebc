"""A twin of a backbone that shares its weights and runs on what is fastest here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers import Mlp
from torch import nn

__all__ = ["compiled_twin", "prepared_twin"]


def prepared_twin(backbone: nn.Module) -> nn.Module:
    """A backbone for CPU inference: linear layers packed for the fastest library, gelu fused.

    It answers for the weights as they are now; make another when they change.
    """
    return _twin(backbone, _prepared)


def compiled_twin(backbone: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """A backbone whose `blocks` are each compiled: they share one piece of code, compiled once."""
    members = {id(block) for block in blocks}

    def replace(module: nn.Module) -> nn.Module | None:
        return torch.compile(module, dynamic=True) if id(module) in members else None  # type: ignore[return-value]

    return _twin(backbone, replace)


class PackedLinear(nn.Module):
    """A linear layer, with gelu if asked, on oneDNN with its weight packed once.

    Other dtypes than it was packed for, and autocast, go to the layer it was made from.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self.after: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], "")
        self.packed = linear.weight.dtype in (torch.float32, torch.bfloat16)
        if not self.packed:
            return
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (
            not self.packed
            or torch.is_autocast_enabled("cpu")
            or x.dtype != self.linear.weight.dtype
        ):
            y = self.linear(x)
            return torch.nn.functional.gelu(y) if self.after[0] == "gelu" else y
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.after)


def _prepared(module: nn.Module) -> nn.Module | None:
    if type(module) is nn.Linear:
        return PackedLinear(module)
    if isinstance(module, Mlp) and type(module.fc1) is nn.Linear and _is_exact_gelu(module.act):
        twin = _copy(module)
        twin._modules = {name: _twin(child, _prepared) for name, child in module.named_children()}
        twin._modules["fc1"] = PackedLinear(module.fc1, gelu=True)
        twin._modules["act"] = nn.Identity()
        return twin
    return None


def _is_exact_gelu(module: nn.Module) -> bool:
    return isinstance(module, nn.GELU) and module.approximate == "none"


def _twin(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module tree anew, with the same tensors and with what `replace` gives in its place."""
    replacement = replace(module)
    if replacement is not None:
        return replacement
    twin = _copy(module)
    twin._modules = {
        name: None if child is None else _twin(child, replace)
        for name, child in module._modules.items()
    }
    return twin


def _copy(module: nn.Module) -> nn.Module:
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    return twin

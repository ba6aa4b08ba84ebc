"""A twin of a backbone that shares its weights and runs on what is fastest here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from lgvit_fast.backbones import adapt
from lgvit_fast.model import LGViT
from lgvit_fast.ops.linear import PackedLinear

__all__ = ["compiled_twin", "pack_", "prepared_twin"]

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_logger = logging.getLogger("lgvit_fast")


def prepared_twin(backbone: nn.Module) -> nn.Module:
    """A backbone for CPU inference in float32 or bfloat16: linear layers packed, gelu fused.

    Each layer takes the GEMM measured fastest for its shape, if that agrees with the plain layer to
    1e-4 (2e-2 in bfloat16). The twin answers for the weights as they are now.
    """
    return _twin(backbone, _prepared)


def pack_(model: LGViT) -> LGViT:
    """Pack the linear layers of a model's backbone in place, for CPU inference.

    `infer` then runs on what an `Engine` prepares for itself, and the backbone's matrices are held once
    instead of twice. The model can be saved, but no longer trained, loaded into or moved.

    Args:
        model: on the CPU, in float32 or bfloat16, in eval mode.

    Returns:
        The same model.

    Raises:
        RuntimeError: the model is in train mode.
        ValueError: another device or dtype.
    """
    if model.training:
        raise RuntimeError("pack_ is for inference: call model.eval() first")
    weight = next(model.backbone.parameters())
    if weight.device.type != "cpu" or weight.dtype not in _TOLERANCE:
        raise ValueError(
            f"the model is {weight.dtype} on {weight.device}, expected float32 or bfloat16 on the CPU"
        )
    with torch.no_grad():
        _replace_(model.backbone)
    model.adapter = adapt(model.backbone)
    model.cut_segments()
    return model


def _replace_(module: nn.Module) -> None:
    for name, child in module.named_children():
        replacement = _prepared(child)
        if replacement is None:
            _replace_(child)
        else:  # one by one, so that never more than one layer is held twice
            module._modules[name] = replacement


def compiled_twin(backbone: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """A backbone whose `blocks` are each compiled: they share one piece of code, compiled once."""
    members = {id(block) for block in blocks}

    def replace(module: nn.Module) -> nn.Module | None:
        if id(module) not in members:
            return None
        compiled: nn.Module = torch.compile(module, dynamic=True)  # type: ignore[assignment]
        return compiled

    return _twin(backbone, replace)


def _prepared(module: nn.Module) -> nn.Module | None:
    if isinstance(module, PackedLinear):
        return module
    if type(module) is nn.Linear:
        return _packed(module)
    if isinstance(module, Mlp) and type(module.fc1) is nn.Linear and _is_exact_gelu(module.act):
        twin = _twin_of_children(module, _prepared)
        twin._modules["fc1"] = _packed(module.fc1, "gelu")
        twin._modules["act"] = nn.Identity()
        return twin
    if getattr(module, "q_bias", None) is not None:  # such attention reads `qkv.weight` itself
        twin = _twin_of_children(module, _prepared)
        twin._modules["qkv"] = module.get_submodule("qkv")
        return twin
    return None


def _packed(linear: nn.Linear, activation: str | None = None) -> nn.Module:
    packed = PackedLinear(linear.weight, linear.bias, activation)
    sample = torch.randn(8, linear.in_features, generator=torch.Generator().manual_seed(0))
    sample = sample.to(linear.weight.dtype)
    expected, got = F.linear(sample, linear.weight, linear.bias), packed(sample)
    if activation == "gelu":
        expected = F.gelu(expected)
    tolerance = _TOLERANCE[linear.weight.dtype]
    error = (got - expected).abs().max()
    if error <= tolerance * expected.abs().max().clamp(min=1) or not expected.isfinite().all():
        return packed
    _logger.warning("%s: packed, it differs by %.1e; it stays as it is", linear, float(error))
    return linear if activation is None else nn.Sequential(linear, nn.GELU())


def _is_exact_gelu(module: nn.Module) -> bool:
    return isinstance(module, nn.GELU) and module.approximate == "none"


def _twin(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module tree anew, with the same tensors and with what `replace` gives in its place."""
    replacement = replace(module)
    return _twin_of_children(module, replace) if replacement is None else replacement


def _twin_of_children(
    module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]
) -> nn.Module:
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    twin._modules = {
        name: None if child is None else _twin(child, replace)
        for name, child in module._modules.items()
    }
    return twin

"""A twin of a backbone that shares its weights and runs on what is fastest here."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lgvit_fast.backbones import adapt
from lgvit_fast.model import LGViT
from lgvit_fast.ops.linear import PackedLinear
from lgvit_fast.segments import Segment

__all__ = ["compiled_segment", "compiled_twin", "pack_", "prepared_twin"]

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_logger = logging.getLogger("lgvit_fast")


def prepared_twin(backbone: nn.Module) -> nn.Module:
    """A backbone for CPU inference in float32 or bfloat16: linear layers packed, gelu fused.

    Each layer takes the GEMM measured fastest for its shape, if that agrees with the plain layer to
    1e-4 (2e-2 in bfloat16). The twin answers for the weights as they are now.
    """
    twin = _sharing_copy(backbone)
    _pack_layers_(twin)
    return twin


def compiled_twin(backbone: nn.Module) -> nn.Module:
    """A backbone whose blocks are each compiled: they share one piece of code, compiled once."""
    twin = _sharing_copy(backbone)
    adapter = adapt(twin)
    blocks = {id(adapter.parts(i, i + 1)[0]) for i in range(adapter.num_blocks)}
    for name, module in list(twin.named_modules()):
        if id(module) in blocks:
            twin.set_submodule(name, torch.compile(module, dynamic=True))  # type: ignore[arg-type]
    return twin


def compiled_segment(
    segment: Segment, image_size: tuple[int, int]
) -> Callable[[Tensor], tuple[Tensor, Any]]:
    """`segment.advance` as one compiled graph, for tokens of the shape that it is first called with.

    So what is between two products of matrices becomes one kernel, across blocks too. The first call
    runs the segment uncompiled before: then heads measure their backends, which no compiled graph does.
    """
    measured = False

    def advance(tokens: Tensor) -> tuple[Tensor, Any]:
        return segment.advance(tokens, image_size)

    # torch keeps what it compiled with the code object, and compiles few versions of one.
    code = advance.__code__.replace(co_name=f"segment_{segment.index}")
    own = FunctionType(code, advance.__globals__, closure=advance.__closure__)
    compiled: Callable[[Tensor], tuple[Tensor, Any]]
    compiled = torch.compile(own, fullgraph=True, dynamic=False)

    def run(tokens: Tensor) -> tuple[Tensor, Any]:
        nonlocal measured
        if not measured:
            segment.advance(tokens, image_size)
            measured = True
        return compiled(tokens)

    return run


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
        _pack_layers_(model.backbone)
    model.adapter = adapt(model.backbone)
    model.cut_segments()
    return model


def _sharing_copy(backbone: nn.Module) -> nn.Module:
    """The module tree anew around the same tensors; packed layers have no state of their own."""
    shared = [*backbone.parameters(), *backbone.buffers()]
    packed = [module for module in backbone.modules() if isinstance(module, PackedLinear)]
    return copy.deepcopy(backbone, {id(kept): kept for kept in (*shared, *packed)})


def _pack_layers_(module: nn.Module) -> None:
    """Replace the linear layers below `module`, one by one: never more than one is held twice."""
    fused = isinstance(module, Mlp) and type(module.fc1) is nn.Linear and _is_exact_gelu(module.act)
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            if name == "qkv" and getattr(module, "q_bias", None) is not None:
                continue  # such attention reads `qkv.weight` itself
            activation = "gelu" if fused and name == "fc1" else None
            module.set_submodule(name, _packed(child, activation))
        elif fused and name == "act":
            module.set_submodule(name, nn.Identity())
        else:
            _pack_layers_(child)


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

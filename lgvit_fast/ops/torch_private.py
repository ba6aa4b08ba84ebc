"""Every name of torch that is not part of its public interface, in one place.

A test asks for each of them, so that a torch which has renamed one says which.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "fake_tensors",
    "gpu_sleep",
    "pack_linear_weight",
    "packed_linear",
    "profiled_allocations",
    "submodules",
    "tensors",
    "version",
]


def fake_tensors() -> AbstractContextManager[object]:
    """A mode in which tensors have shapes and dtypes, but no memory."""
    from torch._subclasses.fake_tensor import (
        FakeTensorMode,  # not needed by most, and slow to import
    )

    mode: AbstractContextManager[object] = FakeTensorMode()
    return mode


def gpu_sleep(cycles: int) -> None:
    """Keep the current CUDA stream busy for so many cycles of its device."""
    torch.cuda._sleep(cycles)


def pack_linear_weight(weight: Tensor) -> Tensor:
    """A weight `[N, K]` in the blocked layout of oneDNN's product on this processor.

    Raises:
        RuntimeError: oneDNN has none for this dtype here.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`activation(x weight^T + bias)` on a packed weight; the activation is "none" or "gelu"."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return out


def version(tensor: Tensor) -> int:
    """How often a tensor was written in place; 0 for an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def tensors(module: nn.Module) -> list[dict[str, Tensor | None]]:
    """A module's own parameters and buffers: the live dictionaries, those that are not empty."""
    held: tuple[Any, ...] = (module._parameters, module._buffers)
    return [found for found in held if found]


def submodules(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own submodules: the live dictionary."""
    return module._modules


def profiled_allocations(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """Nanoseconds and bytes of each allocation, in order; bytes given back are negative."""
    events: Any = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")

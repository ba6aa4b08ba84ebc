"""Kernel tests make their tensors on the device under test, which conftest.py makes the default."""

from typing import Any

import torch


def generator(seed: int) -> torch.Generator:
    """Random numbers of that device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def far_apart(batch: int, count: int, width: int) -> torch.Tensor:
    """Random tokens `[B, n, C]` in bfloat16, the last channel of each 2^31 numbers beyond the first.

    Memory for what lies between is asked for, but never touched.
    """
    stride = -(-(2**31) // (width - 1))
    size = (width - 1) * stride + batch * count
    storage = torch.UntypedStorage(2 * size, device=torch.get_default_device())
    tokens = torch.empty(0, dtype=torch.bfloat16).set_(
        storage, 0, (batch, count, width), (count, 1, stride)
    )
    return tokens.copy_(torch.randn(batch, count, width, generator=generator(0)))


def moved(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors that were made while tests were collected, brought there."""
    here = torch.get_default_device()
    return {k: v.to(here) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

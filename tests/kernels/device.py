"""Kernel tests make their tensors on the device under test, which conftest.py makes the default."""

from typing import Any

import torch


def generator(seed: int) -> torch.Generator:
    """Random numbers of that device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def moved(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tensors that were made while tests were collected, brought there."""
    here = torch.get_default_device()
    return {k: v.to(here) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

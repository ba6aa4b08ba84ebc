"""A number that tells whether a tensor still holds what it held, however it was written."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lgvit_fast import _extension

__all__ = ["checksum", "device_checksum"]


def checksum(tensor: Tensor) -> int:
    """Of the tensor's bytes; comparable between calls for one tensor in one process.

    A change of one 4-byte word always changes it, any other change but for a chance of about 2^-64.
    On a CPU it reads some 20 GB/s a thread; elsewhere it waits for the device.

    Args:
        tensor: dense, of any dtype and device.
    """
    tensor = tensor.detach()
    if tensor.is_mkldnn or tensor.device.type == "meta":
        return 0  # the one cannot be written to, the other holds nothing
    if _extension.why_missing(tensor.device) is None and tensor.device.type == "cpu":
        value: int = torch.ops.lgvit_fast.checksum(tensor.contiguous())
        return value
    return int(device_checksum(tensor))


def device_checksum(tensor: Tensor) -> Tensor:
    """`checksum` in plain PyTorch, int64 `[]` where the tensor is: the words' sum by random weights."""
    flat = tensor.detach().contiguous().flatten()
    size = flat.numel() * flat.itemsize
    if size == 0:
        return torch.zeros((), dtype=torch.int64, device=flat.device)
    word = next(d for d in (torch.int32, torch.int16, torch.uint8) if size % d.itemsize == 0)
    words = flat.view(torch.uint8).view(word)
    return (words * _weights(len(words), flat.device)).sum()


@lru_cache(maxsize=64)
def _weights(count: int, device: torch.device) -> Tensor:
    """Odd, so that no change of one word is lost; modulo 2^64, so that the product is exact."""
    draw = torch.Generator().manual_seed(count)
    with torch.inference_mode(False):
        weights = torch.randint(-(2**62), 2**62, (count,), generator=draw) * 2 + 1
        return weights.to(device)

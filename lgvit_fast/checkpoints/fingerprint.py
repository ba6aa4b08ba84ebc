"""A model's weights in one number, to tell whether a certificate is theirs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal of names, shapes and values, whatever their order and device.

    Floating point counts as float32, so a model saved in bfloat16 and loaded in float32 is the same.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()

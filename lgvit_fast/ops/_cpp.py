"""The C++ side of the head ops: where the compiled CPU kernels can run, and their fake versions."""

from __future__ import annotations

import torch
from torch import Tensor

from lgvit_fast import _extension

__all__ = ["refuse", "why_missing"]


def why_missing(device: torch.device) -> str | None:
    """Why the heads' C++ kernels cannot run on `device`; None if they can."""
    if device.type != "cpu":
        return f"the heads' C++ kernels run on the CPU, the tensors are on {device.type}"
    return _extension.why_missing(device)


def refuse(*tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            return f"the kernels take float32 and bfloat16, not {tensor.dtype}"
        if grad and tensor.requires_grad:
            return "the kernels have no gradient; call under torch.no_grad() or inference_mode()"
    return None


if _extension.why_missing(torch.device("cpu")) is None:

    @torch.library.register_fake("lgvit_fast::lph_pool_cpp")
    def _(tokens: Tensor, *args: object) -> Tensor:
        return tokens.new_empty((tokens.shape[0], 2, tokens.shape[2]), dtype=torch.float32)

    @torch.library.register_fake("lgvit_fast::gah_pool_cpp")
    def _(
        tokens: Tensor, height: int, width: int, prefix: int, weight: Tensor, heads: int, *a: object
    ) -> Tensor:
        return tokens.new_empty((tokens.shape[0], heads, tokens.shape[2]))

    @torch.library.register_fake("lgvit_fast::exit_step_cpp")
    def _(
        pooled: Tensor, tokens: Tensor, num_class_tokens: int, weight: Tensor, *args: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = weight.new_empty((pooled.shape[0], weight.shape[0]))
        leave, valid = (logits.new_empty(pooled.shape[:1], dtype=torch.bool) for _ in range(2))
        return logits, leave, valid

"""Noticing that a model is no longer the one something was prepared from."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Watch"]


class Watch:
    """Watches a module's parameters, buffers and submodules for replacement and in-place change.

    Looking costs tens of microseconds, not a walk over the module tree. Writing through
    `parameter.data` escapes the version counter and so is not seen.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._tensors = [d for m in modules for d in (m._parameters, m._buffers) if d]
        self._children = [m._modules for m in modules if m._modules]
        self._seen = self._look()

    def changed(self) -> bool:
        """Whether anything differs from when the watch was made."""
        return self._look() != self._seen

    def _look(self) -> tuple[object, ...]:
        tensors = tuple(_mark(t) for d in self._tensors for t in d.values() if t is not None)
        return (tensors, tuple(id(m) for d in self._children for m in d.values()))


def _mark(tensor: Tensor) -> tuple[int, int, int]:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version

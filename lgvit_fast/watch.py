"""Noticing that a model is no longer the one something was prepared from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lgvit_fast.ops.checksum import checksum, device_checksum
from lgvit_fast.ops.torch_private import submodules, tensors, version

__all__ = ["Watch"]


class Watch:
    """Watches a module's parameters, buffers and submodules for replacement and change.

    Every look sees what was replaced and every in-place operation, by identity, address and version
    counter; that costs tens of microseconds. Writes that no counter tells of (through `.data`, to an
    inference tensor, by other libraries) are seen in the contents, by a checksum of every byte. On a
    CPU a look takes in as much of them as the caller says, in turn. On other devices it takes one
    tensor and learns the result at the next look, so that nothing waits for the device.

    Args:
        module: what to watch.
        contents: the parts of it whose values were copied; None for all. What is read in place needs
            no checksum.
    """

    def __init__(self, module: nn.Module, contents: Iterable[nn.Module] | None = None) -> None:
        modules = list(module.modules())
        self._tensors = [held for m in modules for held in tensors(m)]
        self._children = [submodules(m) for m in modules if submodules(m)]
        self._seen = self._look()
        self._contents = _Contents([module] if contents is None else contents)

    def changed(self, share: float = 1.0) -> bool:
        """Whether anything differs from when the watch was made.

        Args:
            share: of the contents' bytes to look at, on a CPU: 1 is all, exactly; with less, every
                byte is looked at once in at most 1 / share calls, rounded up.
        """
        return self._look() != self._seen or self._contents.changed(share)

    def _look(self) -> tuple[object, ...]:
        marks = tuple(_mark(t) for d in self._tensors for t in d.values() if t is not None)
        return (marks, tuple(id(m) for d in self._children for m in d.values()))


class _Contents:
    """The bytes of modules' parameters and buffers, looked at in turn."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        every = (t for m in modules for t in (*m.parameters(), *m.buffers()))
        self._tensors = list({id(t): t for t in every}.values())
        self._waits = any(t.device.type not in ("cpu", "meta") for t in self._tensors)
        self._bytes = sum(t.nbytes for t in self._tensors if not t.is_mkldnn)
        self._expected = self._all()
        self._next = 0
        self._flight: tuple[int, Tensor, torch.cuda.Event] | None = None

    def changed(self, share: float) -> bool:
        if not self._tensors:
            return False
        if self._waits:
            return self._landed() or self._launch()
        looked, least = 0, share * self._bytes
        for _ in self._tensors:
            place, self._next = self._next, (self._next + 1) % len(self._tensors)
            if checksum(self._tensors[place]) != self._expected[place]:
                return True
            looked += self._tensors[place].nbytes
            if looked >= least:
                break
        return False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_flight": None}  # an event is of one process

    def _all(self) -> list[int]:
        if not self._waits:
            return [checksum(t) for t in self._tensors]
        device = self._tensors[0].device
        found: list[int] = torch.stack(
            [device_checksum(t).to(device) for t in self._tensors]
        ).tolist()
        return found

    def _landed(self) -> bool:
        """Whether the tensor looked at last time has changed."""
        if self._flight is None:
            return False
        place, found, event = self._flight
        event.synchronize()
        self._flight = None
        return int(found) != self._expected[place]

    def _launch(self) -> bool:
        """Looks at the next tensor; only a device without streams answers at once."""
        place, self._next = self._next, (self._next + 1) % len(self._tensors)
        tensor = self._tensors[place]
        if not tensor.is_cuda:
            return checksum(tensor) != self._expected[place]
        if torch.cuda.is_current_stream_capturing():
            return False
        found = torch.empty((), dtype=torch.int64, pin_memory=True)
        found.copy_(device_checksum(tensor), non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        self._flight = place, found, event
        return False


def _mark(tensor: Tensor) -> tuple[int, int, int]:
    return id(tensor), tensor.data_ptr(), version(tensor)

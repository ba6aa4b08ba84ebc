"""Which of an op's backends is fastest on a CUDA device, measured once for each kind of call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.ops.torch_private import gpu_sleep

__all__ = ["Contest", "gpu_times", "must_not_measure", "size_class"]

_ROUNDS = 7
_HOST_AHEAD = 20_000_000  # cycles, some 10 ms: time for the host to launch all rounds

_logger = logging.getLogger("lgvit_fast")


def size_class(rows: int) -> int:
    """What is measured at a number of rows holds for those up to the same power of two."""
    return max(0, rows - 1).bit_length()


def gpu_times(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of the device for each call, as medians of interleaved rounds.

    The device sleeps while the host launches, so that the time of launching does not count: in a CUDA
    graph it would not, either.
    """
    for call in [*calls, *calls]:
        call()  # compiles, tunes and allocates
    marks = [[_mark(), _mark()] for _ in range(_ROUNDS * len(calls))]
    gpu_sleep(_HOST_AHEAD)
    for call, (start, end) in zip(list(calls) * _ROUNDS, marks, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.current_stream().synchronize()
    times = [start.elapsed_time(end) for start, end in marks]
    return [median(times[i :: len(calls)]) for i in range(len(calls))]


def _mark() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def must_not_measure() -> bool:
    """While a CUDA graph is captured nothing may wait, and nothing that is launched runs."""
    return torch.cuda.is_current_stream_capturing()


class Contest:
    """Picks the fastest backend by measuring all of them on the first call of a kind.

    While a CUDA graph is captured nothing is measured; the first is taken where none has won. Nor is it
    inside a graph of `torch.compile`, which takes what was measured before (`Op.measured`).

    Args:
        op: the op's name in the log.
        kind: takes the op's arguments and returns what the choice depends on beside the device, or None
            where the first backend is taken.
    """

    def __init__(self, op: str, kind: Callable[..., Hashable | None]) -> None:
        self._op, self._kind = op, kind
        self._winners: dict[Hashable, int] = {}

    def known(
        self, runs: Sequence[tuple[str, Callable[..., Any]]], *args: Any, **kwargs: Any
    ) -> int | None:
        """What `winner` would say without measuring; None where it would have to measure."""
        kind = self._kind(*args, **kwargs)
        return 0 if kind is None else self._winners.get(_key(kind, runs, args[0]))

    def winner(
        self, runs: Sequence[tuple[str, Callable[..., Any]]], *args: Any, **kwargs: Any
    ) -> int:
        """The place in `runs`, names and calls, of the one to take for these arguments."""
        known = self.known(runs, *args, **kwargs)
        if known is not None:
            return known
        tokens: Tensor = args[0]
        with torch.cuda.device(tokens.device):
            if must_not_measure():
                return 0
            times = gpu_times([partial(run, *args, **kwargs) for _, run in runs])
        kind, fastest = self._kind(*args, **kwargs), times.index(min(times))
        self._winners[_key(kind, runs, tokens)] = fastest
        told = ", ".join(
            f"{name} {1000 * time:.0f} us" for (name, _), time in zip(runs, times, strict=True)
        )
        _logger.info("%s on %s, %s: %s", self._op, tokens.device, kind, told)
        return fastest


def _key(kind: Hashable, runs: Sequence[tuple[str, Any]], tokens: Tensor) -> Hashable:
    return (tokens.device, kind, *(name for name, _ in runs))

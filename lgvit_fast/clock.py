"""The stopwatch: seconds of a call, and of several calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Spread", "now", "seconds", "synchronize", "take_turns"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """Of at least one value."""
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        return cls(median, low, high)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished what was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds since some point in the past, once the device has finished what was launched on it."""
    synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, with what it launches on `device`."""
    start = now(device)
    work()
    return now(device) - start


def take_turns(
    work: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    *,
    warmup: int = 2,
    repeats: int = 1,
) -> dict[str, np.ndarray]:
    """Time several calls against each other: all of them in every round, in alternating order.

    So a slow moment of the machine hits all sides, and none always finds another's caches.

    Args:
        work: the calls by name.
        device: where they run.
        rounds: timed rounds, at least 1.
        warmup: rounds before those.
        repeats: how often a call runs in a row in each round.

    Returns:
        Seconds `[rounds, repeats]` of each call.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in work}
    for turn in range(warmup + rounds):
        order = list(work.items())
        for name, call in order if turn % 2 else reversed(order):
            taken = [seconds(call, device) for _ in range(repeats)]
            if turn >= warmup:
                times[name].append(taken)
    return {name: np.array(taken) for name, taken in times.items()}

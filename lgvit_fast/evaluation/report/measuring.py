"""Measures several ways of answering the same images, each in a process of its own, in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.clock import Spread
from lgvit_fast.evaluation.report.rows import LeftOut, Row
from lgvit_fast.evaluation.report.worker import Task, Worker
from lgvit_fast.isolated import Failure, Isolated

__all__ = ["measure_all"]

_LONGEST = 3600.0  # seconds for all images, or for a round


def measure_all(
    tasks: Sequence[Task],
    targets: Tensor,
    full: Tensor,
    *,
    num_blocks: int,
    batch_sizes: Sequence[int],
    rounds: int,
    progress: Callable[[str], None],
) -> tuple[list[Row], list[LeftOut]]:
    """A row for each task, or the reason why there is none.

    Args:
        tasks: the ways with their models and images; all have the same n images in the same order.
        targets: `[n]` classes.
        full: `[n]` the full model's answers in PyTorch and float32.
        num_blocks: L.
        batch_sizes: to time at.
        rounds: of each way and batch size, after one to warm up.
        progress: gets lines that say what is being done.

    Raises:
        ValueError: no rounds, or a batch size below 1.
    """
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(
            f"rounds={rounds}, batch_sizes={tuple(batch_sizes)}: expected at least 1 each"
        )
    answers: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
    left_out: list[LeftOut] = []
    processes: dict[int, Isolated] = {}
    times: dict[tuple[int, int], list[float]] = {}

    def ask(place: int, request: int | None) -> Any:
        """The answer, or None if there is none and never will be."""
        try:
            if place not in processes:
                processes[place] = Isolated(Worker, tasks[place], timeout=_LONGEST)
            return processes[place].ask(request)
        except Failure as failure:
            leave_out(place, str(failure))
            return None

    def leave_out(place: int, reason: str) -> None:
        left_out.append(LeftOut(tasks[place].way, reason))
        if place in processes:
            processes.pop(place).close()

    try:
        for place, task in enumerate(tasks):
            progress(f"{task.way}: answers {len(targets)} images")
            found = ask(place, None)
            if found is not None and len(found[0]) != len(targets):
                leave_out(place, f"it could read {len(found[0])} of {len(targets)} images")
            elif found is not None:
                answers[place] = found
        for size in batch_sizes:
            for turn in range(1 + rounds):
                progress(f"batch {size}: " + (f"round {turn} of {rounds}" if turn else "warm-up"))
                order = list(processes)
                for place in order if turn % 2 else reversed(order):
                    took = ask(place, size)
                    if turn and took is not None:
                        times.setdefault((place, size), []).append(took)
    finally:
        for process in processes.values():
            process.close()
    rows = []
    for place in processes:
        classes, layers = answers[place]
        predicted = torch.from_numpy(classes)
        right, right_in_full = predicted == targets, full == targets
        rows.append(
            Row(
                way=tasks[place].way,
                images=len(targets),
                correct=int(right.sum()),
                losses=int((right_in_full & ~right).sum()),
                gains=int((right & ~right_in_full).sum()),
                ms={size: Spread.of(times[place, size]) for size in batch_sizes},
                layer_ratio=1.0 if layers is None else float(num_blocks / layers.mean()),
            )
        )
    return rows, left_out

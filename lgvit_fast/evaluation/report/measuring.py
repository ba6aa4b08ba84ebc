"""Measures several ways of answering the same images, each in a process of its own, in turns.

Idle threads of one runtime may spin and slow another one, in the same process or not, so a process is
stopped by the kernel whenever it is not its turn.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.clock import Spread
from lgvit_fast.evaluation.report.rows import LeftOut, Row
from lgvit_fast.evaluation.report.worker import Task, serve

__all__ = ["measure_all"]


class _Process:
    """A way in a process that runs only while it is asked."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.task = task
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, request: Any = None) -> Any:
        """Its answer to a request (None: whether it is ready).

        Raises:
            _Failure: it cannot, or has died.
        """
        self._signal(signal.SIGCONT)
        try:
            if request is not None:
                self._connection.send(request)
            found = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise _Failure(f"its process ended with code {self._process.exitcode}") from error
        self._signal(signal.SIGSTOP)
        if isinstance(found, str) and found != "ready":
            raise _Failure(found)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)


class _Failure(Exception):
    """Why a way cannot be measured."""


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
    processes: dict[int, _Process] = {}
    times: dict[tuple[int, int], list[float]] = {}

    def ask(place: int, request: Any = None) -> Any:
        """The answer, or None if there is none and never will be."""
        try:
            return processes[place].ask(request)
        except _Failure as failure:
            left_out.append(LeftOut(tasks[place].way, str(failure)))
            processes.pop(place).close()
            return None

    try:
        for place, task in enumerate(tasks):
            progress(f"{task.way}: answers {len(targets)} images")
            processes[place] = _Process(task)
            if ask(place) is None:
                continue
            found = ask(place, "answer")
            if found is not None and len(found[0]) != len(targets):
                reason = f"it could read {len(found[0])} of {len(targets)} images"
                left_out.append(LeftOut(task.way, reason))
                processes.pop(place).close()
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

"""Continuous batching over the graphs of a model: images join as others leave.

A batch that loses its easy images at every exit grows small. Here a queue stands before every graph
instead: an image that stays joins the next one, and a graph runs when a full batch waits for it. In
`inference.streaming` the same is done in torch, for a loader; here images come one by one and must not
wait long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lgvit_fast.runtimes.loaders import SegmentOutput
from lgvit_fast.runtimes.loop import GraphSegment, broken_images, checked, decide

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from lgvit_fast.policies import Policy

__all__ = ["ContinuousBatcher", "Finished"]


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of one image.

    Attributes:
        key: what `add` was given.
        policy: number of the policy it was answered under.
        queued: seconds it waited.
        computed: seconds that the runs took which it was part of.
        error: what its graph raised, or None. The fields below are then those of no answer.
        logits: `[K]` float32.
        exit_index: 0 to E - 1, E for the final classifier.
        exit_layer: the block after which it left, from 1.
        nonfinite: as `Answers.nonfinite`.
    """

    key: Hashable
    policy: int
    queued: float
    computed: float
    error: Exception | None = None
    logits: NDArray[np.float32] | None = None
    exit_index: int = -1
    exit_layer: int = -1
    nonfinite: bool = False


@dataclass(slots=True, eq=False)
class _Ticket:
    """An image on its way: what is known of it, and its row for the graph it waits for."""

    key: Hashable
    policy: int
    accepted: float
    joined: float  # when it joined the queue it is in
    row: NDArray[np.float32]
    state: NDArray[np.int32]
    broken: bool
    computed: float = 0.0


class ContinuousBatcher:
    """Queues of images before the graphs of a model. Answers are those of `run_graphs`.

    Not for several threads at once.

    Args:
        segments: shallow to deep.
        policies: those that images may be added under; all need states of one shape.
        batch_size: images a graph runs at most, and waits for.
        max_wait: seconds after which an image no longer waits for others to fill its batch: in the
            first queue since it came, deeper since it joined the queue.
        lock: held while a graph runs, for graphs that others use too.
        observe: called after each run with the number of the segment, its images, and its seconds.
        clock: seconds.

    Attributes:
        max_wait: as given; may be changed.
    """

    def __init__(
        self,
        segments: Sequence[GraphSegment],
        policies: Sequence[Policy],
        batch_size: int,
        max_wait: float,
        lock: AbstractContextManager[object] | None = None,
        observe: Callable[[int, int, float], None] = lambda place, images, seconds: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}, expected an integer of at least 1")
        if not max_wait >= 0:
            raise ValueError(f"max_wait={max_wait!r}, expected seconds, 0 or more")
        self._segments, self._policies = tuple(segments), tuple(policies)
        self._batch_size, self.max_wait, self._clock = batch_size, max_wait, clock
        self._lock = threading.Lock() if lock is None else lock
        self._observe = observe
        self._queues: list[list[_Ticket]] = [[] for _ in self._segments]

    def __len__(self) -> int:
        """Images that have no answer yet; those of a step that is running not counted."""
        return sum(map(len, self._queues))

    @property
    def waiting(self) -> tuple[int, ...]:
        """Images before each graph."""
        return tuple(map(len, self._queues))

    def add(self, image: NDArray[np.float32], key: Hashable, policy: int = 0) -> None:
        """Take in an image.

        Args:
            image: `[channels, H, W]` float32, as the first graph wants it; not copied.
            key: what `Finished` names it by.
            policy: number of its policy.
        """
        now = self._clock()
        state = self._policies[policy].start_array(1)[0]
        broken = bool(broken_images(image[None])[0])
        self._queues[0].append(_Ticket(key, policy, now, now, image, state, broken))

    def drop(self, keys: set[Hashable]) -> int:
        """Forget the images with these keys; how many there were."""
        before = len(self)
        for queue in self._queues:
            queue[:] = [ticket for ticket in queue if ticket.key not in keys]
        return before - len(self)

    def wait(self) -> float | None:
        """Seconds until `step` will have something to run; None while there is no image."""
        if not any(self._queues):
            return None
        if self._next() is not None:
            return 0.0
        return max(0.0, self._queues[0][0].joined + self.max_wait - self._clock())

    def step(self) -> list[Finished]:
        """Run one graph on up to a batch, unless it is better to wait; the images that left."""
        place = self._next()
        if place is None:
            return []
        batch = self._queues[place][: self._batch_size]
        del self._queues[place][: len(batch)]
        return self._run(place, batch)

    def _next(self) -> int | None:
        """The queue to run, if one is worth it.

        First whoever has waited too long in a deep queue; then the deepest full batch, which makes
        room; then new images that have waited long enough; and rather than nothing the shallowest
        queue behind the first, so that the deeper ones fill up.
        """
        limit = self._clock() - self.max_wait
        heads = [(queue[0].joined, place) for place, queue in enumerate(self._queues) if queue]
        overdue = [head for head in heads if head[0] <= limit and head[1]]
        if overdue:
            return min(overdue)[1]
        for place in reversed(range(len(self._queues))):
            if len(self._queues[place]) >= self._batch_size:
                return place
        if self._queues[0] and self._queues[0][0].joined <= limit:
            return 0
        return next((place for _, place in heads if place), None)

    def _run(self, place: int, batch: list[_Ticket]) -> list[Finished]:
        try:
            return self._advance(place, batch)
        except Exception as error:  # each runtime has exceptions of its own
            if len(batch) == 1:
                return [_finished(batch[0], self._clock(), error=error)]
        return [done for ticket in batch for done in self._run(place, [ticket])]

    def _advance(self, place: int, batch: list[_Ticket]) -> list[Finished]:
        """Run a graph; those who stay join the next queue."""
        graph, index, layer = self._segments[place]
        last = place == len(self._segments) - 1
        rows = np.stack([ticket.row for ticket in batch])
        broken = np.array([ticket.broken for ticket in batch])
        state = np.stack([ticket.state for ticket in batch])
        with self._lock:
            began = self._clock()
            output = checked(graph.run(rows), broken)
            if last:
                logits, leave = output.logits.copy(), np.ones(len(batch), bool)
            else:
                logits, leave = self._decide(index, batch, output, state)
            stay = [] if output.tokens is None else [output.tokens[i].copy() for i in _rows(~leave)]
            now = self._clock()
        self._observe(place, len(batch), now - began)
        for ticket, valid in zip(batch, output.valid, strict=True):
            ticket.computed += now - began
            ticket.broken |= not valid
        survivors = [batch[i] for i in _rows(~leave)]
        for ticket, row, kept in zip(survivors, stay, state[~leave], strict=True):
            ticket.row, ticket.state, ticket.joined = row, kept, now
        if survivors:
            self._queues[place + 1] += survivors
        return [_finished(batch[i], now, logits[i], index, layer) for i in _rows(leave)]

    def _decide(
        self, index: int, batch: list[_Ticket], output: SegmentOutput, state: NDArray[np.int32]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits `[n, K]` and who leaves `[n]`, each image under its own policy; updates `state`."""
        logits, leave = output.logits.copy(), np.zeros(len(batch), bool)
        numbers = np.array([ticket.policy for ticket in batch])
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            part = SegmentOutput(*(None if x is None else x[mine] for x in output[:-1]))  # type: ignore[arg-type]
            kept = state[mine]
            answer, gone = decide(self._policies[number], index, part, kept)
            logits[mine], leave[mine], state[mine] = answer.logits, gone, kept
        return logits, leave


def _rows(which: NDArray[np.bool_]) -> list[int]:
    found: list[int] = np.flatnonzero(which).tolist()
    return found


def _finished(
    ticket: _Ticket,
    now: float,
    logits: NDArray[np.float32] | None = None,
    index: int = -1,
    layer: int = -1,
    error: Exception | None = None,
) -> Finished:
    return Finished(
        ticket.key,
        ticket.policy,
        max(0.0, now - ticket.accepted - ticket.computed),
        ticket.computed,
        error,
        logits,
        index,
        layer,
        ticket.broken,
    )

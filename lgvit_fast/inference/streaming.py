"""Answering a whole data set: refill instead of shrink.

A batch that loses its easy images at every exit grows small, and small batches are slow. A stream keeps
a queue before every segment instead: whoever stays joins the queue of the next segment, whoever leaves
makes room for new images, and a segment runs when a full batch waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import RLock
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lgvit_fast.inference.engine import Engine
from lgvit_fast.inference.report import Report, Tally
from lgvit_fast.inference.source import EXHAUSTED, PulledSource, ThreadedSource
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Policy
from lgvit_fast.segments import Segment

__all__ = ["Answer", "Stream", "stream"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One image's answer.

    Attributes:
        index: the image's place in the loader's order, from 0.
        logits: `[K]`.
        exit_index: 0 to E - 1, E for the final classifier.
        exit_layer: the block after which it left, from 1.
        nonfinite: as `Inference.nonfinite`.
        target: what came with the image in the loader's batch, or None.
    """

    index: int
    logits: Tensor
    exit_index: int
    exit_layer: int
    nonfinite: bool
    target: Any


class _Ticket(NamedTuple):
    """What travels with an image on the host."""

    number: int
    target: Any
    since: float
    nonfinite: bool = False


class _Queue:
    """Images that wait for a segment, in the order they came, in buffers that are kept.

    Rows belong to the queue only once their tickets do, and `tickets` and `head` are plain attributes,
    so that a caller can add and remove images of several queues in one statement.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: tuple[Tensor, ...] = ()
        self.head = 0
        self.tickets: list[_Ticket] = []

    def __len__(self) -> int:
        return len(self.tickets)

    def peek(self, count: int) -> tuple[Tensor, ...]:
        """Views of the first rows."""
        return tuple(buffer[self.head : self.head + count] for buffer in self._buffers)

    def write(self, rows: tuple[Tensor, ...], chosen: Sequence[int]) -> None:
        """Put the chosen rows of tokens or pixels and of policy state behind those in the queue."""
        if not self.tickets and not self._fits(rows):
            self._buffers = tuple(r.new_empty(self._capacity, *r.shape[1:]) for r in rows)
        size = len(self)
        if self.head + size + len(chosen) > self._capacity:
            for buffer, row in zip(self._buffers, self.peek(size), strict=True):
                buffer[:size].copy_(row if self.head >= size else row.clone())
            self.head = 0
        end = self.head + size
        index = torch.tensor(chosen, device=rows[0].device)
        for buffer, row in zip(self._buffers, rows, strict=True):
            torch.index_select(row, 0, index, out=buffer[end : end + len(chosen)])

    def _fits(self, rows: tuple[Tensor, ...]) -> bool:
        def kind(tensor: Tensor) -> tuple[Any, ...]:
            return tensor.shape[1:], tensor.dtype, tensor.device

        return [kind(buffer) for buffer in self._buffers] == [kind(row) for row in rows]


class _Intake(NamedTuple):
    """A loader's batch on its way into the first queue."""

    images: Tensor
    state: Tensor
    tickets: list[_Ticket]

    def after(self, count: int) -> _Intake | None:
        """Without its first images; None if that were all."""
        if count >= len(self.tickets):
            return None
        return _Intake(self.images[count:], self.state[count:], self.tickets[count:])


class Stream(Iterator[Answer]):
    """Iterator of answers; made by `stream`. One image each, exactly once.

    An exception from the loader, or a batch the model cannot take, is raised after every image before
    it has been answered. Any other exception (an interrupt, a policy that fails) comes at once and
    loses nothing: iterating on continues, and `close` gives what is finished. Threads that share a
    stream take turns.
    """

    def __init__(
        self,
        engine: Engine,
        loader: Iterable[Any],
        batch_size: int,
        order: str,
        policy: Policy,
        max_wait: float | None,
        max_pending: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._batch_size, self._order = engine, batch_size, order
        self._policy, self._max_wait, self._max_pending = policy, max_wait, max_pending
        self._clock, self._lock = clock, RLock()
        self._source = PulledSource(loader) if max_wait is None else ThreadedSource(loader)
        self._intake: _Intake | None = None
        self._queues = [_Queue(2 * batch_size) for _ in range(len(engine.exits) + 1)]
        self._finished: dict[int, Answer] = {}
        self._accepted = self._delivered = 0
        self._generation = -1
        self._image_size = (0, 0)
        self._exhausted = False
        self._failure: Exception | None = None
        self._tally = Tally((*engine.exits, engine.model.num_blocks))

    def __next__(self) -> Answer:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            while True:
                answer = self._deliverable()
                if answer is not None:
                    return answer
                if not self._advance():
                    self._source.close()
                    if self._failure is not None:
                        failure, self._failure = self._failure, None
                        raise failure
                    raise StopIteration

    def report(self) -> Report:
        """Occupancy so far: batches and images of each segment, runs below a full batch."""
        return self._tally.report()

    def close(self) -> list[Answer]:
        """Stop: take no more images, drop those on their way, give the finished ones not yet given."""
        with self._lock:
            self._source.close()
            self._exhausted = True
            self._intake = None
            self._queues = [_Queue(0) for _ in self._queues]
            rest = [self._finished.pop(index) for index in sorted(self._finished)]
            self._delivered += len(rest)
            return rest

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_source"):
            self._source.close()

    def _deliverable(self) -> Answer | None:
        if self._order == "completion" and self._finished:
            index = next(iter(self._finished))
        elif self._delivered in self._finished:
            index = self._delivered
        else:
            return None
        self._delivered += 1
        return self._finished.pop(index)

    def _advance(self) -> bool:
        """Run a segment or take in images; False when there is nothing left to do."""
        for place in reversed(range(len(self._queues))):  # the deepest first: it makes room
            if len(self._queues[place]) >= self._batch_size:
                self._run(place)
                return True
        patience = self._patience()
        if patience is not None and patience <= 0:
            self._run(self._oldest()[1], forced=True)
            return True
        if self._intake is None and not self._exhausted:
            self._accept(patience)
        waiting = [place for place, queue in enumerate(self._queues) if len(queue)]
        if self._intake is not None:
            size = (self._intake.images.shape[2], self._intake.images.shape[3])
            if size == self._image_size or not waiting:
                self._image_size = size
                self._enqueue(self._intake)
                return True  # else those of another size go first
        elif not self._exhausted:
            return True  # nothing came in time
        if waiting:  # the shallowest first, so that the deeper ones fill up
            self._run(waiting[0], forced=True)
        return bool(waiting)

    def _oldest(self) -> tuple[_Ticket, int]:
        """The image that came first of all that wait, and the place of its queue."""
        tickets = ((t, place) for place, q in enumerate(self._queues) for t in q.tickets)
        return min(tickets, key=lambda pair: pair[0].number)

    def _patience(self) -> float | None:
        """Seconds until somebody has waited enough; None: nobody waits for time."""
        if not any(map(len, self._queues)):
            return None
        ticket, _ = self._oldest()
        if self._accepted - ticket.number > self._max_pending:
            return 0.0
        if self._max_wait is None:
            return None
        return ticket.since + self._max_wait - self._clock()

    def _accept(self, patience: float | None) -> None:
        """Take a batch from the loader, if one comes in time."""
        try:
            item = self._source.get(patience)
            if item is EXHAUSTED:
                self._exhausted = True
            elif item is not None:
                images, targets = _split(item)
                images = self._to_model(images)
                self._engine.model.admit(images, self._policy)
                first, last, now = self._accepted, self._accepted + len(images), self._clock()
                state = self._policy.part(first, last).start(len(images), images.device)
                tickets = [_Ticket(first + i, targets[i], now) for i in range(len(images))]
                if tickets:
                    self._intake, self._accepted = _Intake(images, state, tickets), last
        except Exception as error:
            error.add_note(f"in a stream, after {self._accepted} images")
            self._failure, self._exhausted = error, True

    def _enqueue(self, intake: _Intake) -> None:
        """Fill the first queue up to a batch."""
        queue = self._queues[0]
        space = self._batch_size - len(queue)
        queue.write((intake.images, intake.state), range(min(space, len(intake.tickets))))
        tickets, rest = queue.tickets + intake.tickets[:space], intake.after(space)
        queue.tickets, self._intake = tickets, rest

    def _to_model(self, images: Any) -> Any:
        if not isinstance(images, Tensor):
            return images
        parameter = next(self._engine.model.parameters())
        dtype = parameter.dtype if images.is_floating_point() else images.dtype
        return images.to(parameter.device, dtype, non_blocking=True)

    def _run(self, place: int, forced: bool = False) -> None:
        """Run a segment on what waits for it, at most a batch. Changes nothing if it fails."""
        segment, queue = self._segments()[place], self._queues[place]
        count = min(len(queue), self._batch_size)
        source, state = queue.peek(count)
        state = state.clone()
        tokens = segment.adapter.embed(source) if segment.start == 0 else source
        grid = segment.adapter.patch_grid(self._image_size, segment.stop)
        tokens, step = segment(tokens, state, grid, segment.rule(self._policy))
        leave = step.leave
        if not segment.is_last:
            leave = self._policy.decide(leave, state, segment.index)
        left, valid = torch.stack((leave, step.valid)).tolist()  # the one wait

        tickets = [
            ticket._replace(nonfinite=ticket.nonfinite or not fine)
            for ticket, fine in zip(queue.tickets, valid, strict=False)
        ]
        gone = [i for i in range(count) if left[i]]
        stay = [i for i in range(count) if not left[i]]
        answers = {
            ticket.number: Answer(
                ticket.number, logits, segment.index, segment.stop, ticket.nonfinite, ticket.target
            )
            for ticket, logits in zip(
                [tickets[i] for i in gone], step.logits[gone].unbind(), strict=True
            )
        }
        target = queue if segment.is_last else self._queues[place + 1]
        if stay:
            target.write((tokens, state), stay)
        joined, rest = target.tickets + [tickets[i] for i in stay], queue.tickets[count:]
        finished, head = {**self._finished, **answers}, queue.head + count
        # One statement without a call: an interrupt comes before or after it, never inside.
        target.tickets, queue.tickets, queue.head, self._finished = joined, rest, head, finished
        self._tally.add(place, count)
        self._tally.forced += forced

    def _segments(self) -> tuple[Segment, ...]:
        segments, generation = self._engine.segments, self._engine.generation
        if generation != self._generation:
            on_their_way = sum(map(len, self._queues)) - len(self._queues[0])
            if on_their_way:
                raise RuntimeError(
                    f"the model changed while {on_their_way} images were on their way through it"
                )
            self._generation = generation
        return segments


def stream(
    model: LGViT | Engine,
    loader: Iterable[Any],
    batch_size: int = 64,
    *,
    order: Literal["input", "completion"] = "input",
    policy: Policy | None = None,
    max_wait: float | None = None,
    max_pending: int | None = None,
) -> Stream:
    """Answer every image of a loader, each segment at a (nearly) full batch.

    The answers are those of `model.infer`. Images are moved to the model's device and dtype.

    Args:
        model: in eval mode, or an `Engine` made of it.
        loader: iterable of `[B, channels, height, width]` batches, or of tuples that begin with one;
            any B. It is asked only when there is room.
        batch_size: images a segment waits for.
        order: "input": answers come in the loader's order; "completion": as soon as they are there.
        policy: None takes the model's as it is now. A `Replay` scripts the whole stream.
        max_wait: seconds after which an image waits no longer for others to fill its batches. The
            loader is then read in a thread of its own. None: no limit in time.
        max_pending: images that may be taken in after one that has no answer yet; after that it waits
            no longer. Bounds the memory for answers held back. None takes 64 batches.

    Raises:
        ValueError: an argument out of range.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}, expected an integer of at least 1")
    if order not in ("input", "completion"):
        raise ValueError(f"order={order!r}, expected 'input' or 'completion'")
    if max_wait is not None and not max_wait >= 0:
        raise ValueError(f"max_wait={max_wait!r}, expected seconds, 0 or more")
    if max_pending is None:
        max_pending = 64 * batch_size
    if isinstance(max_pending, bool) or not isinstance(max_pending, int) or max_pending < 1:
        raise ValueError(f"max_pending={max_pending!r}, expected an integer of at least 1")
    engine = model if isinstance(model, Engine) else Engine(model, max_batch=batch_size)
    chosen = engine.model.policy if policy is None else engine.model.fitting(policy)
    return Stream(engine, loader, batch_size, order, chosen, max_wait, max_pending)


def _split(item: Any) -> tuple[Any, Any]:
    """Images and what comes with each of them."""
    if not isinstance(item, tuple | list):
        return item, _Nothing()
    images, *rest = item
    if not rest:
        return images, _Nothing()
    if any(len(part) != len(images) for part in rest):
        raise ValueError(f"{len(images)} images came with {[len(part) for part in rest]} targets")
    return images, rest[0] if len(rest) == 1 else list(zip(*rest, strict=True))


class _Nothing:
    """The targets of images that have none."""

    def __getitem__(self, index: int) -> None:
        return None

"""Answering a whole data set: refill instead of shrink.

A batch that loses its easy images at every exit grows small, and small batches are slow. A stream keeps
a queue before every segment instead: whoever stays joins the queue of the next segment, whoever leaves
makes room for new images, and a segment runs when a full batch waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import RLock
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lgvit_fast.inference.engine import Engine
from lgvit_fast.inference.reader import EXHAUSTED, PulledSource, ThreadedSource
from lgvit_fast.inference.report import Report, Tally
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
    """An image on its way: what is known of it, and its row for the segment it waits for."""

    number: int
    target: Any
    since: float
    tokens: Tensor  # pixels before the first segment
    state: Tensor
    nonfinite: bool = False


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
        self._intake: list[_Ticket] = []  # of the loader's last batch, what has no room yet
        self._queues: list[list[_Ticket]] = [[] for _ in range(len(engine.exits) + 1)]
        self._finished: dict[int, Answer] = {}
        self._accepted = self._delivered = 0
        self._running: tuple[Segment, ...] = ()
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
            self._intake, self._queues = [], [[] for _ in self._queues]
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
        if not self._intake and not self._exhausted:
            self._accept(patience)
        waiting = [place for place, queue in enumerate(self._queues) if queue]
        if self._intake:
            _, height, width = self._intake[0].tokens.shape
            if (height, width) == self._image_size or not waiting:
                self._image_size = (height, width)
                self._enqueue()
                return True  # else those of another size go first
        elif not self._exhausted:
            return True  # nothing came in time
        if waiting:  # the shallowest first, so that the deeper ones fill up
            self._run(waiting[0], forced=True)
        return bool(waiting)

    def _oldest(self) -> tuple[_Ticket, int]:
        """The image that came first of all that wait, and the place of its queue."""
        tickets = ((t, place) for place, queue in enumerate(self._queues) for t in queue)
        return min(tickets, key=lambda pair: pair[0].number)

    def _patience(self) -> float | None:
        """Seconds until somebody has waited enough; None: nobody waits for time."""
        if not any(self._queues):
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
                rows = zip(images.unbind(), state.unbind(), strict=True)
                intake = [_Ticket(first + i, targets[i], now, *row) for i, row in enumerate(rows)]
                self._intake, self._accepted = intake, last
        except Exception as error:
            error.add_note(f"in a stream, after {self._accepted} images")
            self._failure, self._exhausted = error, True

    def _enqueue(self) -> None:
        """Fill the first queue up to a batch, with copies: the loader may use its memory again."""
        queue, *others = self._queues
        space = self._batch_size - len(queue)
        images = torch.stack([ticket.tokens for ticket in self._intake[:space]]).unbind()
        joined = [t._replace(tokens=image) for t, image in zip(self._intake, images, strict=False)]
        queues, rest = [queue + joined, *others], self._intake[space:]
        self._queues, self._intake = queues, rest

    def _to_model(self, images: Any) -> Any:
        if not isinstance(images, Tensor):
            return images
        parameter = next(self._engine.model.parameters())
        dtype = parameter.dtype if images.is_floating_point() else images.dtype
        return images.to(parameter.device, dtype, non_blocking=True)

    def _run(self, place: int, forced: bool = False) -> None:
        """Run a segment on what waits for it, at most a batch. Changes nothing if it fails."""
        segment, queue = self._segments()[place], self._queues[place]
        batch, rest = queue[: self._batch_size], queue[self._batch_size :]
        tokens = torch.stack([ticket.tokens for ticket in batch])
        state = torch.stack([ticket.state for ticket in batch])
        tokens, step = segment(tokens, state, self._image_size, self._policy)
        left, valid = torch.stack((step.leave, step.valid)).tolist()  # the one wait

        batch = [
            ticket._replace(nonfinite=ticket.nonfinite or not fine)
            for ticket, fine in zip(batch, valid, strict=True)
        ]
        gone = [i for i, leaves in enumerate(left) if leaves]
        stay = [i for i, leaves in enumerate(left) if not leaves]
        leavers = zip([batch[i] for i in gone], step.logits[gone].unbind(), strict=True)
        answers = {
            t.number: Answer(t.number, row, segment.index, segment.stop, t.nonfinite, t.target)
            for t, row in leavers
        }
        survivors = zip(tokens[stay].unbind(), state[stay].unbind(), strict=True)
        joined = [
            batch[i]._replace(tokens=row, state=kept)
            for i, (row, kept) in zip(stay, survivors, strict=True)
        ]
        queues, finished = list(self._queues), {**self._finished, **answers}
        queues[place] = rest
        if joined:
            queues[place + 1] = queues[place + 1] + joined
        # One statement without a call: an interrupt comes before or after it, never inside.
        self._queues, self._finished = queues, finished
        self._tally.add(place, len(batch))
        self._tally.forced += forced

    def _segments(self) -> tuple[Segment, ...]:
        segments = self._engine.segments
        if segments is not self._running:
            on_their_way = sum(map(len, self._queues[1:]))
            if on_their_way:
                raise RuntimeError(
                    f"the model changed while {on_their_way} images were on their way through it"
                )
            self._running = segments
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

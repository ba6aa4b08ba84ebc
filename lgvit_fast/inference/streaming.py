"""Answering a whole data set: refill instead of shrink.

A batch that loses its easy images at every exit grows small, and small batches are slow. A stream keeps
a queue before every segment instead: an image that stays joins the queue of the next segment, one that
leaves makes room for new images, and a segment runs when a full batch waits for it.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lgvit_fast.inference.engine import Engine
from lgvit_fast.inference.reader import (
    DIED,
    EXHAUSTED,
    NOTHING,
    PulledSource,
    Slot,
    ThreadedSource,
    found,
)
from lgvit_fast.inference.report import Report, Tally
from lgvit_fast.inference.turns import add_lock, take_turn
from lgvit_fast.inference.untrained import warn_if_untrained
from lgvit_fast.model import LGViT
from lgvit_fast.outputs import TopK, top_classes
from lgvit_fast.policies import Policy
from lgvit_fast.segments import Segment

__all__ = ["Answer", "Stream", "stream"]


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """One image's answer.

    Attributes:
        index: the image's place in the loader's order, from 0.
        logits: `[K]`.
        exit_index: 0 to E - 1, E for the final classifier.
        exit_layer: the block after which it left, from 1.
        nonfinite: as `Inference.nonfinite`.
        target: what came with the image in the loader's batch, or None.
        class_names: what the K classes are called, or None.
    """

    index: int
    logits: Tensor
    exit_index: int
    exit_layer: int
    nonfinite: bool
    target: Any
    class_names: Sequence[str] | None = None

    @property
    def prediction(self) -> int:
        """The class with the largest logit."""
        return int(self.logits.argmax())

    @property
    def confidence(self) -> float:
        """The largest softmax probability."""
        return float(torch.softmax(self.logits.float(), dim=-1).amax())

    @property
    def name(self) -> str:
        """The name of the predicted class; its number where the model has no names."""
        return (
            str(self.prediction) if self.class_names is None else self.class_names[self.prediction]
        )

    def topk(self, k: int = 5) -> TopK:
        """The k likeliest classes: probabilities `[k]` float32, descending, and classes `[k]` int64.

        Raises:
            ValueError: k is no positive integer.
        """
        return top_classes(self.logits, k)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Answer:
        """The same with its logits on another device or in another dtype."""
        return dataclasses.replace(self, logits=self.logits.to(device=device, dtype=dtype))

    def cpu(self) -> Answer:
        """The same with its logits on the CPU."""
        return self.to("cpu")

    def __repr__(self) -> str:
        flagged = ", nonfinite" if self.nonfinite else ""
        return f"Answer(image {self.index}: {self.name!r} after block {self.exit_layer}{flagged})"


class _Ticket(NamedTuple):
    """An image on its way: what is known of it, and its row for the segment it waits for."""

    number: int
    target: Any
    since: float
    tokens: Tensor  # pixels before the first segment
    state: Tensor
    nonfinite: bool = False


class _State(NamedTuple):
    """Where every image is. Replaced as a whole, so that an interrupt finds it before or after."""

    slot: Slot  # what the loader gave and has not been taken in; a source fills it
    intake: list[_Ticket]  # of the loader's last batch, what has no room yet
    queues: list[list[_Ticket]]
    held: dict[int, Answer]  # finished, but an earlier image is not
    ready: list[Answer]  # to be given, in this order
    given: int = 0  # how many of `ready` have been
    accepted: int = 0
    due: int = 0  # the image whose answer follows those in `ready`, if answers come in input order
    image_size: tuple[int, int] = (0, 0)
    ended: bool = False  # the loader is asked no more
    failure: Exception | None = None  # raised when everything before it has been given

    @property
    def on_their_way(self) -> int:
        return len(self.intake) + sum(map(len, self.queues))


class Stream(Iterator[Answer]):
    """Iterator of answers; made by `stream`. One image each, exactly once.

    An exception from the loader, or a batch the model cannot take, is raised after every image before
    it has been answered; then the stream is at its end. Any other exception (an interrupt, a policy
    that fails) comes at once and loses nothing, whenever it comes: iterating on continues, and `close`
    gives what is finished. Two things end it: an interrupt inside the loader's own code, after which
    what the loader would give next is unknown, and a step that fails 8 times in a row. Both raise a
    RuntimeError that says how many images were answered. Threads that share a stream take turns.
    """

    _MAX_FAILURES = 8

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
        self._clock = clock
        self._lock: Any
        add_lock(self)
        self._source = PulledSource(loader) if max_wait is None else ThreadedSource(loader)
        self._state = _State(deque(), [], [[] for _ in range(len(engine.exits) + 1)], {}, [])
        self._dropped = [0] * (len(engine.exits) + 1)  # on their way when the stream was closed
        self._running: tuple[Segment, ...] = ()
        self._failures = 0  # in a row
        self._told = False
        self._tally = Tally((*engine.exits, engine.model.num_blocks))

    def __next__(self) -> Answer:
        answer = None
        try:
            with take_turn(self, "the stream"), torch.inference_mode(False), torch.no_grad():
                while self._state.given == len(self._state.ready):
                    if not self._step():
                        break
                else:
                    state = self._state
                    answer = state.ready[state.given]
                    self._state = state._replace(given=state.given + 1)
            if answer is not None:
                return answer
        except BaseException:
            if answer is not None:
                self._take_back(answer)
            raise
        self._source.close()
        failure = self._state.failure
        if failure is None or self._told:
            raise StopIteration
        self._told = True
        raise failure

    def report(self) -> Report:
        """Occupancy so far: batches and images of each segment, runs below a full batch."""
        with take_turn(self, "the stream"):
            waiting = zip(map(len, self._state.queues), self._dropped, strict=True)
            return self._tally.report(tuple(map(sum, waiting)))

    def close(self) -> list[Answer]:
        """Stop: take no more images, drop those on their way, give the finished ones not yet given."""
        with take_turn(self, "the stream"):
            self._source.close()
            state = self._state
            self._dropped = [n + len(q) for n, q in zip(self._dropped, state.queues, strict=True)]
            rest = [*state.ready[state.given :], *state.held.values()]
            self._state = state._replace(
                slot=deque(),
                intake=[],
                queues=[[] for _ in state.queues],
                held={},
                ready=[],
                given=0,
                ended=True,
                failure=None,
            )
            return sorted(rest, key=lambda answer: answer.index)

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

    def _take_back(self, answer: Answer) -> None:
        """Keep an answer that an interrupt stopped on its way out, to be given first."""
        with self._lock:
            state = self._state
            waiting = state.ready[state.given :]
            if not any(other is answer for other in waiting):
                self._state = state._replace(ready=[answer, *waiting], given=0)

    def _step(self) -> bool:
        """`_advance`, which gives up when it fails too often in a row."""
        try:
            going = self._advance()
        except Exception as error:
            self._failures += 1
            if self._failures >= self._MAX_FAILURES:
                self._give_up(error)
            raise
        self._failures = 0
        return going

    def _give_up(self, error: Exception) -> None:
        state, lost = self._state, self._state.on_their_way
        failure = RuntimeError(
            f"the stream failed {self._failures} times in a row and stops: {state.accepted - lost}"
            f" images were answered, {lost} that were taken in were not; the last error was"
            f" {type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        queues: list[list[_Ticket]] = [[] for _ in state.queues]
        self._state = state._replace(intake=[], queues=queues, ended=True, failure=failure)

    def _advance(self) -> bool:
        """Run a segment or take in images; False when there is nothing left to do."""
        state = self._state
        for place in reversed(range(len(state.queues))):  # the deepest first: it makes room
            if len(state.queues[place]) >= self._batch_size:
                self._run(place)
                return True
        patience = self._patience()
        if patience is not None and patience <= 0:
            self._run(self._oldest()[1], forced=True)
            return True
        if not state.intake and not state.ended:
            self._accept(patience)
            state = self._state
        waiting = [place for place, queue in enumerate(state.queues) if queue]
        if state.intake:
            _, height, width = state.intake[0].tokens.shape
            if (height, width) == state.image_size or not waiting:
                self._enqueue((height, width))
                return True  # else those of another size go first
        elif not state.ended:
            return True  # nothing came in time
        if waiting:  # the shallowest first, so that the deeper ones fill up
            self._run(waiting[0], forced=True)
        return bool(waiting)

    def _oldest(self) -> tuple[_Ticket, int]:
        """The image that came first of all that wait, and the place of its queue."""
        tickets = ((t, place) for place, queue in enumerate(self._state.queues) for t in queue)
        return min(tickets, key=lambda pair: pair[0].number)

    def _patience(self) -> float | None:
        """Seconds until an image has waited long enough; None without a limit in time."""
        if not any(self._state.queues):
            return None
        ticket, _ = self._oldest()
        if self._state.accepted - ticket.number > self._max_pending:
            return 0.0
        if self._max_wait is None:
            return None
        return ticket.since + self._max_wait - self._clock()

    def _accept(self, patience: float | None) -> None:
        """Take in a batch from the loader, if one comes in time."""
        slot = self._state.slot
        if not slot:
            try:
                self._source.get(slot, patience)
            except Exception as error:
                if found(slot) is not DIED:
                    raise
                return self._fail(error)
        item = found(slot)
        if item is NOTHING:
            return None
        if item is EXHAUSTED:
            self._state = self._state._replace(ended=True)
            return None
        if item is DIED:
            return self._fail(RuntimeError("the loader was interrupted and cannot be read on"))
        try:
            return self._take_in(item)
        except Exception as error:
            if self._state.slot is not slot:
                raise  # it came after the images were taken in
            try:
                self._take_in(item)
            except Exception as again:
                return self._fail(again)
            raise error  # the batch is fine: the exception came from outside

    def _fail(self, failure: Exception) -> None:
        failure.add_note(f"in a stream, after {self._state.accepted} images")
        self._state = self._state._replace(ended=True, failure=failure)

    def _take_in(self, item: Any) -> None:
        """Make tickets of a loader's batch."""
        images, targets = _split(item)
        images = self._to_model(images)
        self._engine.model.admit(images, self._policy)
        state = self._state
        first, last, now = state.accepted, state.accepted + len(images), self._clock()
        starts = self._policy.part(first, last).start(len(images), images.device)
        rows = zip(images.unbind(), starts.unbind(), strict=True)
        intake = [_Ticket(first + i, targets[i], now, *row) for i, row in enumerate(rows)]
        self._state = state._replace(slot=deque(), intake=intake, accepted=last)

    def _enqueue(self, image_size: tuple[int, int]) -> None:
        """Fill the first queue up to a batch, with copies: the loader may use its memory again."""
        state = self._state
        queue, *others = state.queues
        space = self._batch_size - len(queue)
        images = torch.stack([ticket.tokens for ticket in state.intake[:space]]).unbind()
        joined = [t._replace(tokens=image) for t, image in zip(state.intake, images, strict=False)]
        queues, intake = [queue + joined, *others], state.intake[space:]
        self._state = state._replace(queues=queues, intake=intake, image_size=image_size)

    def _to_model(self, images: Tensor) -> Tensor:
        parameter = next(self._engine.model.parameters())
        dtype = parameter.dtype if images.is_floating_point() else images.dtype
        # Waits for the copy, from pinned memory too: the loader is asked next, and may write there.
        return images.to(parameter.device, dtype)

    def _run(self, place: int, forced: bool = False) -> None:
        """Run a segment on what waits for it, at most a batch. Changes nothing if it fails."""
        before = self._state
        queue = before.queues[place]
        batch, rest = queue[: self._batch_size], queue[self._batch_size :]
        segment = self._segments(len(batch))[place]
        tokens = torch.stack([ticket.tokens for ticket in batch])
        state = torch.stack([ticket.state for ticket in batch])
        tokens, step = segment(tokens, state, before.image_size, self._policy)
        order = step.leave.byte().argsort(stable=True)  # those that stay, then those that leave
        left, valid = torch.stack((step.leave, step.valid)).tolist()  # the one wait

        batch = [
            ticket._replace(nonfinite=ticket.nonfinite or not fine)
            for ticket, fine in zip(batch, valid, strict=True)
        ]
        gone = [i for i, leaves in enumerate(left) if leaves]
        stay = [i for i, leaves in enumerate(left) if not leaves]
        logits = step.logits[order[len(stay) :]]
        leavers = zip([batch[i] for i in gone], logits.unbind(), strict=True)
        names = self._engine.model.class_names
        answers = [
            Answer(t.number, row, segment.index, segment.stop, t.nonfinite, t.target, names)
            for t, row in leavers
        ]
        on = order[: len(stay)]
        survivors = zip(tokens[on].unbind(), state[on].unbind(), strict=True)
        joined = [
            batch[i]._replace(tokens=row, state=kept)
            for i, (row, kept) in zip(stay, survivors, strict=True)
        ]
        queues = list(before.queues)
        queues[place] = rest
        if joined:
            queues[place + 1] = queues[place + 1] + joined
        self._state = self._finish(before, answers)._replace(queues=queues)
        self._tally.add(place, len(batch))
        self._tally.forced += forced

    def _finish(self, state: _State, answers: list[Answer]) -> _State:
        """The state with these answers finished, those ready that may be given."""
        ready, held, due = state.ready[state.given :], state.held, state.due
        if self._order == "completion":
            ready = ready + answers
        else:
            held = {**held, **{answer.index: answer for answer in answers}}
            while due in held:
                ready.append(held.pop(due))
                due += 1
        return state._replace(ready=ready, given=0, held=held, due=due)

    def _segments(self, images: int) -> tuple[Segment, ...]:
        segments = self._engine.segments_for(images)
        if segments is not self._running:
            on_their_way = sum(map(len, self._state.queues[1:]))
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

    The answers are those of `model.infer`. Images are moved to the model's device and dtype. Segments
    run on torch, whatever runtime an engine has chosen: an image waits between them, and the memory of
    a runtime's outputs is overwritten by its next call.

    Args:
        model: in eval mode, or an `Engine` made of it.
        loader: iterable of batches: images `[B, channels, height, width]`; tuples that begin with them,
            what follows being the targets; or dicts of images under "image", "images" or
            "pixel_values" and targets, if any, under "label", "labels", "target" or "targets". Any
            B. It is asked only when there is room.
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
    if policy is None:
        chosen = engine.model.policy
    else:
        chosen = engine.model.fitting(engine.for_all_exits(policy))
    warn_if_untrained(engine.model, chosen)
    return Stream(engine, loader, batch_size, order, chosen, max_wait, max_pending)


_IMAGE_KEYS = ("image", "images", "pixel_values")
_TARGET_KEYS = ("label", "labels", "target", "targets")


def _split(item: Any) -> tuple[Tensor, Any]:
    """A loader's item as images, and what can be indexed for each one's target.

    Raises:
        ValueError: it is none of what `stream` takes.
    """
    if isinstance(item, Mapping):
        images, rest = _named(item)
    elif isinstance(item, tuple | list) and item:
        images, *rest = item
    else:
        images, rest = item, []
    if not isinstance(images, Tensor) or not images.dim():
        raise ValueError(
            f"the loader gave {_kind(item)}, expected images [B, channels, height, width] as a tensor,"
            " a tuple that begins with them, or a dict with them under one of "
            + ", ".join(map(repr, _IMAGE_KEYS))
        )
    sizes = [len(part) if hasattr(part, "__len__") else _kind(part) for part in rest]
    if any(size != len(images) for size in sizes):
        raise ValueError(f"{len(images)} images came with {sizes} targets")
    if not rest:
        return images, _Nothing()
    return images, rest[0] if len(rest) == 1 else list(zip(*rest, strict=True))


def _named(batch: Mapping[Any, Any]) -> tuple[Any, list[Any]]:
    """Images and targets of a dict."""
    unknown = [key for key in batch if key not in _IMAGE_KEYS + _TARGET_KEYS]
    images = [batch[key] for key in _IMAGE_KEYS if key in batch]
    targets = [batch[key] for key in _TARGET_KEYS if key in batch]
    if unknown or len(images) != 1 or len(targets) > 1:
        raise ValueError(
            f"the loader gave a dict with the keys {list(batch)}, expected one of"
            f" {', '.join(map(repr, _IMAGE_KEYS))}, at most one of"
            f" {', '.join(map(repr, _TARGET_KEYS))}, and no others"
        )
    return images[0], targets


def _kind(item: Any) -> str:
    """What an item is, in a few words."""
    if isinstance(item, tuple | list):
        return f"{type(item).__name__} of {', '.join(map(_kind, item[:3])) or 'nothing'}"
    return "None" if item is None else type(item).__name__


class _Nothing:
    """The targets of images that have none."""

    def __getitem__(self, index: int) -> None:
        return None

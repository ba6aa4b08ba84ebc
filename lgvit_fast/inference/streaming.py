"""Answering a whole data set: refill instead of shrink.

A batch that loses its easy images at every exit grows small, and small batches are slow. A stream keeps
a queue before every segment instead: an image that stays joins the queue of the next segment, one that
leaves makes room for new images, and a segment runs when a full batch waits for it.

On a GPU two runs are launched before the host waits for the first one's end: what stays there is read
while the second runs. That wait, one a run, is left because the next batch is put together on the host;
the device has work meanwhile. It has none behind it only where no other full batch is known of and no
new images can be had, as at the end of the data.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import filterfalse, islice
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lgvit_fast.inference.answer import Answer
from lgvit_fast.inference.engine import Engine
from lgvit_fast.inference.graphs import CaptureError
from lgvit_fast.inference.items import split_item
from lgvit_fast.inference.reader import (
    DIED,
    EXHAUSTED,
    NOTHING,
    Inbox,
    PulledSource,
    ThreadedSource,
    found,
)
from lgvit_fast.inference.report import Report, Tally
from lgvit_fast.inference.slots import Run, Slots, answer_rows, mark
from lgvit_fast.inference.turns import add_lock, take_turn
from lgvit_fast.inference.untrained import warn_if_untrained
from lgvit_fast.model import LGViT
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import Policy
from lgvit_fast.segments import Segment

__all__ = ["Answer", "Stream", "stream"]

_MOST_LAUNCHED = 2  # runs: the end of one is waited for while the other keeps the device busy


class _Image(NamedTuple):
    """An image on its way: what the host knows of it."""

    number: int
    target: Any
    since: float
    slot: int = -1  # where it is, once it is past the first segment
    nonfinite: bool = False


class _Intake(NamedTuple):
    """What has no room yet of the loader's last batch; there is at least one."""

    waiting: list[_Image]
    images: Tensor
    state: Tensor

    def part(self, start: int, stop: int | None) -> _Intake:
        rows = slice(start, stop)
        return _Intake(self.waiting[rows], self.images[rows], self.state[rows])


class _Launched(NamedTuple):
    """A run that was launched, and of what."""

    run: Run
    place: int
    segment: Segment
    batch: list[_Image]
    forced: bool


class _State(NamedTuple):
    """Where every image is. Replaced as a whole, so that an interrupt finds it before or after."""

    inbox: Inbox  # what the loader gave and has not been taken in; a source fills it
    queues: list[list[_Image]]
    held: dict[int, Answer]  # finished, but an earlier image is not
    ready: list[Answer]  # to be given, in this order
    intake: _Intake | None = None
    launched: tuple[_Launched, ...] = ()  # in no queue meanwhile; the first ends first
    given: int = 0  # how many of `ready` have been
    accepted: int = 0
    due: int = 0  # the image whose answer follows those in `ready`, if answers come in input order
    ended: bool = False  # the loader is asked no more
    failure: Exception | None = None  # raised when everything before it has been given

    @property
    def waiting(self) -> list[int]:
        """Images that have not passed each segment."""
        counts = [len(queue) for queue in self.queues]
        for launched in self.launched:
            counts[launched.place] += len(launched.batch)
        return counts

    @property
    def on_their_way(self) -> int:
        return len(self.intake.waiting if self.intake else ()) + sum(self.waiting)


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
        self._state = _State(deque(), [[] for _ in range(len(engine.exits) + 1)], {}, [])
        self._dropped = [0] * (len(engine.exits) + 1)  # on their way when the stream was closed
        self._slots = Slots(batch_size)
        self._running: tuple[Segment, ...] = ()
        self._answers: list[Inference] = []  # for the runs to write to, in turns
        self._copied: Any = None  # by now, what the loader gave last
        self._graphs_off = ""  # why full batches are not replayed from graphs
        self._failures = 0  # in a row
        self._told = False
        self._tally = Tally((*engine.exits, engine.model.num_blocks))

    def __next__(self) -> Answer:
        answer = None
        try:
            with take_turn(self, "the stream"):
                if not self._is_ready:
                    with torch.inference_mode(False), torch.no_grad():
                        while not self._is_ready and self._step():
                            pass
                if self._is_ready:
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
        """Occupancy so far: batches and images of each segment, runs below a full batch; graphs."""
        with take_turn(self, "the stream"):
            waiting = zip(self._state.waiting, self._dropped, strict=True)
            report = self._tally.report(tuple(map(sum, waiting)))
            graphs, size = self._slots.graphs
            off = self._graphs_off
            return dataclasses.replace(report, graphs=graphs, graph_bytes=size, graphs_off=off)

    def close(self) -> list[Answer]:
        """Stop: take no more images, drop those on their way, give the finished ones not yet given."""
        with take_turn(self, "the stream"):
            self._source.close()
            state = self._state
            self._dropped = [n + w for n, w in zip(self._dropped, state.waiting, strict=True)]
            rest = [*state.ready[state.given :], *state.held.values()]
            nothing = _State(deque(), [[] for _ in state.queues], {}, [], ended=True)
            self._state = nothing._replace(accepted=state.accepted)
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

    @property
    def _is_ready(self) -> bool:
        """Whether there is an answer to give."""
        return self._state.given < len(self._state.ready)

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
        queues: list[list[_Image]] = [[] for _ in state.queues]
        self._state = state._replace(
            queues=queues, intake=None, launched=(), ended=True, failure=failure
        )

    def _advance(self) -> bool:
        """Launch a run, end one or take in images; False when there is nothing left to do."""
        state = self._state
        launched = state.launched
        if launched and (len(launched) == _MOST_LAUNCHED or launched[0].run.is_done):
            self._collect()
            return True
        for place in reversed(range(len(state.queues))):  # the deepest first: it makes room
            if len(state.queues[place]) >= self._batch_size:
                self._launch(place)
                return True
        patience = 0.0 if launched else self._patience()
        if patience is not None and patience <= 0 and not launched:
            self._launch(self._oldest()[1], forced=True)
            return True
        if state.intake is None and not state.ended:
            self._accept(patience)
            state = self._state
        waiting = [place for place, queue in enumerate(state.queues) if queue]
        if state.intake is not None:
            if self._slots.fits(state.intake.images) or not (waiting or launched):
                self._enqueue(state.intake)
                return True  # else those of another size go first
        elif not state.ended and not launched:
            return True  # nothing came in time
        if launched:
            self._collect()
        elif waiting:  # the shallowest first, so that the deeper ones fill up
            self._launch(waiting[0], forced=True)
        return bool(launched or waiting)

    def _oldest(self) -> tuple[_Image, int]:
        """The image that came first of all that wait, and the place of its queue."""
        images = ((i, place) for place, queue in enumerate(self._state.queues) for i in queue)
        return min(images, key=lambda pair: pair[0].number)

    def _patience(self) -> float | None:
        """Seconds until an image has waited long enough; None without a limit in time."""
        if not any(self._state.queues):
            return None
        oldest, _ = self._oldest()
        if self._state.accepted - oldest.number > self._max_pending:
            return 0.0
        if self._max_wait is None:
            return None
        return oldest.since + self._max_wait - self._clock()

    def _accept(self, patience: float | None) -> None:
        """Take in a batch from the loader, if one comes in time."""
        inbox = self._state.inbox
        if not inbox:
            if self._copied is not None:
                self._copied.synchronize()  # it was long ago; the loader may use its memory again
            try:
                self._source.get(inbox, patience)
            except Exception as error:
                if found(inbox) is not DIED:
                    raise
                return self._fail(error)
        item = found(inbox)
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
            if self._state.inbox is not inbox:
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
        """Make an intake of a loader's batch."""
        images, targets = split_item(item)
        images = self._to_model(images)
        self._copied = mark(images.device)
        self._engine.model.admit(images, self._policy)
        state = self._state
        first, last, now = state.accepted, state.accepted + len(images), self._clock()
        intake = None
        if len(images):
            start = self._policy.part(first, last).start(len(images), images.device)
            waiting = [_Image(first + i, targets[i], now) for i in range(len(images))]
            intake = _Intake(waiting, images, start)
        self._state = state._replace(inbox=deque(), intake=intake, accepted=last)

    def _enqueue(self, intake: _Intake) -> None:
        """Fill the first queue up to a batch, with copies: the loader may use its memory again."""
        state = self._state
        queue, *others = state.queues
        space = self._batch_size - len(queue)
        joining: _Intake = intake
        left: _Intake | None = None
        if len(intake.waiting) > space:
            joining, left = intake.part(0, space), intake.part(space, None)
        self._slots.enter(joining.images, joining.state, len(queue))
        self._state = state._replace(queues=[queue + joining.waiting, *others], intake=left)

    def _to_model(self, images: Tensor) -> Tensor:
        parameter = next(self._engine.model.parameters())
        dtype = parameter.dtype if images.is_floating_point() else images.dtype
        return images.to(parameter.device, dtype, non_blocking=True)

    def _launch(self, place: int, forced: bool = False) -> None:
        """Launch a run on what waits for a segment, at most a batch. Changes nothing if it fails."""
        state = self._state
        queue = state.queues[place]
        batch = queue[: self._batch_size]
        segments = self._engine.segments_for(len(batch))
        if segments is not self._running:
            if state.launched:
                self._collect()  # who leaves there is not on the way any more
                return
            self._take_up(segments)
        slots = [image.slot for image in batch]
        try:
            run = self._slots.launch(place, segments[place], slots, self._policy, self._answer())
        except CaptureError as error:
            self._graphs_off = self._engine.without_graphs(error)
            self._slots.renew(None)
            return
        launched = _Launched(run, place, segments[place], batch, forced)
        queues = list(state.queues)
        queues[place] = queue[self._batch_size :]
        self._state = state._replace(queues=queues, launched=(*state.launched, launched))
        if run.is_done:  # and so are those before it
            self._collect()

    def _collect(self) -> None:
        """End the run that was launched first; waits for it. Changes nothing if it fails."""
        state = self._state
        (run, place, segment, batch, forced), *others = state.launched
        stay, flags = run.outcome()
        if any(flags):
            marked = zip(batch, flags, strict=True)
            batch = [image._replace(nonfinite=True) if flag else image for image, flag in marked]
        gone = sorted(set(range(len(batch))).difference(stay))
        free = self._free_slots(len(stay))
        logits = self._slots.store(run, place + 1, free, gone)
        names = self._engine.model.class_names
        answers = [
            Answer(i.number, own, segment.index, segment.stop, i.nonfinite, i.target, names)
            for i, own in zip([batch[row] for row in gone], logits, strict=True)
        ]
        queues = list(state.queues)
        if stay:
            joining = zip([batch[row] for row in stay], free, strict=True)
            queues[place + 1] = queues[place + 1] + [i._replace(slot=slot) for i, slot in joining]
        finished = self._finish(state, answers)
        self._state = finished._replace(queues=queues, launched=tuple(others))
        self._tally.add(place, len(batch))
        self._tally.forced += forced

    def _free_slots(self, count: int) -> list[int]:
        """The lowest slots in which no image waits."""
        used = {image.slot for queue in self._state.queues[1:] for image in queue}
        return list(islice(filterfalse(used.__contains__, itertools.count()), count))

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

    def _take_up(self, segments: tuple[Segment, ...]) -> None:
        """Run these segments from now on. There is no run."""
        on_their_way = sum(map(len, self._state.queues[1:]))
        if on_their_way:
            raise RuntimeError(
                f"the model changed while {on_their_way} images were on their way through it"
            )
        self._slots.renew(None if self._graphs_off else self._engine.new_graphs())
        self._answers = []
        self._running = segments

    def _answer(self) -> Inference:
        """One of the answers that no run is writing to."""
        in_use = [id(launched.run.answer) for launched in self._state.launched]
        free = [answer for answer in self._answers if id(answer) not in in_use]
        if not free:
            model = self._engine.model
            device = next(model.parameters()).device
            free = [model.blank(answer_rows(self._batch_size), device)]
            self._answers += free
        return free[0]


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
    a runtime's outputs is overwritten by its next call. Where the engine replays CUDA graphs, a full
    batch is replayed, too, from the second run of a segment on; what is less than a full batch is
    launched kernel by kernel. On a GPU the loader is asked while a run is under way, so answers may
    come one of its batches later; take one CUDA stream for all calls.

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

"""Where the images of a stream wait between segments, and one segment's run on some of them.

Images that wait for the first segment are the first rows of one buffer. All others are in slots: rows
of one buffer for all segments whose tokens have one shape, which so holds no more rows than wait.

A run has two halves. `Slots.launch` gathers a batch, runs the segment and ends its exit with
`end_exit_`; on a GPU nobody waits for that. `Slots.store` needs the number of survivors, and puts
them into free slots. The first half changes nothing but memory of its own, the second nothing but
free slots: each may fail or be interrupted anywhere, and be done again.

With graphs, `launch` replays a full batch from a segment's second run on. A graph knows its memory by
address: there is one for each segment and each answer that runs write to in turns, and those of one
answer share the rest of what they write. When a buffer that they read is replaced, all are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.inference.graphs import Graphs
from lgvit_fast.ops.dispatch import chosen_backend
from lgvit_fast.ops.end_exit import Counts, end_exit_
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import Policy
from lgvit_fast.segments import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Run", "Slots", "answer_rows", "mark"]

_Kind = tuple[torch.Size, torch.dtype, torch.device]  # of rows: their shape


def mark(device: torch.device) -> Any:
    """An event behind all that was launched on a GPU; None where nothing is launched ahead."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def answer_rows(batch_size: int) -> int:
    """Rows of the answer that a run writes to: one more than images, as `end_exit_` asks; in eights."""
    return (batch_size // 8 + 1) * 8


class Run(NamedTuple):
    """A segment that was launched on a batch of n images.

    Attributes:
        images: n.
        tokens: `[n, ...]` after the segment; its first rows become those of the survivors.
        state: `[n, ...]` the policy's, in the same order.
        answer: row i becomes the answer of the batch's image i, if it leaves.
        ledger: on the host; written by the device until `event`. int64: the numbers of images before
            and after the exit, each one's row in `answer`, its slot, and, a byte an answer, whether its
            logits were no numbers. Goes to the device and back in one copy each.
        event: as `mark` gives it.
    """

    images: int
    tokens: Tensor
    state: Tensor
    answer: Inference
    ledger: NDArray[np.int64]
    event: Any

    @property
    def is_done(self) -> bool:
        """Whether `outcome` would not wait."""
        return self.event is None or bool(self.event.query())

    def outcome(self) -> tuple[list[int], list[bool]]:
        """Which of the batch stay, in the order of `tokens`, and `[n]` whose logits were no numbers.

        Waits for the device, if it is not done.
        """
        if self.event is not None:
            self.event.synchronize()
        ledger, count = self.ledger, self.images
        rows, flags = ledger[2 : 2 + ledger[1]], ledger[2 + 2 * count :].view(np.bool_)[:count]
        return rows.tolist(), flags.tolist()


class Slots:
    """The memory of a stream's images on the model's device. What is in use, the stream knows.

    Args:
        batch_size: images a segment runs, at most.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._images: Tensor | None = None  # what waits for the first segment
        self._first_state: Tensor | None = None
        self._tokens: dict[_Kind, Tensor] = {}
        self._state: Tensor | None = None
        self._before: dict[int, _Kind] = {}  # which of `_tokens` a segment reads
        self._scratch: Tensor | None = None
        self._graphs: Graphs | None = None
        self._after: dict[int, _Kind] = {}  # what each segment gave since graphs were dropped
        # Ledger, tokens and state that graphs write, for each answer and kind of tokens.
        self._written: dict[tuple[int, _Kind], tuple[Tensor, Tensor, Tensor]] = {}

    def renew(self, graphs: Graphs | None) -> None:
        """Drop all graphs, and record others with these; None: launch every kernel."""
        self._drop_graphs()
        self._graphs = graphs

    @property
    def graphs(self) -> tuple[int, int]:
        """How many there are, and the bytes of them and of what they write."""
        if self._graphs is None:
            return 0, 0
        written = sum(tensor.nbytes for own in self._written.values() for tensor in own)
        return len(self._graphs.steps), self._graphs.nbytes + written

    def fits(self, images: Tensor) -> bool:
        """Whether images can join those that wait: they have the same size and dtype."""
        return self._images is not None and _kind(images) == _kind(self._images)

    def enter(self, images: Tensor, state: Tensor, row: int) -> None:
        """Copy images before the first segment, to the rows from `row` on.

        Args:
            images: `[n, channels, height, width]`, those that `fits`, or any if nothing waits anywhere.
            state: `[n, ...]` a policy's.
            row: as many images wait for the first segment already; row + n <= the batch size.
        """
        if not self.fits(images):
            self._drop_graphs()
            self._tokens, self._state, self._before = {}, None, {}
            self._first_state = state.new_empty(self._batch_size, *state.shape[1:])
            self._scratch = torch.zeros(1, dtype=torch.int32, device=images.device)
            self._images = images.new_empty(self._batch_size, *images.shape[1:])
        assert self._images is not None and self._first_state is not None
        self._images[row : row + len(images)] = images
        self._first_state[row : row + len(images)] = state

    def launch(
        self,
        place: int,
        segment: Segment,
        slots: Sequence[int],
        policy: Policy,
        answer: Inference,
    ) -> Run:
        """Run a segment on some images, and end its exit.

        Args:
            place: of the segment, from 0.
            segment: what to run.
            slots: of the images; those before the first segment are its first rows.
            policy: who leaves.
            answer: made by `answer_rows`; no run may be using it.

        Raises:
            CaptureError: the segment cannot be captured as a graph.
        """
        assert self._images is not None and self._scratch is not None
        count, device = len(slots), self._images.device
        flags = [0] * (len(answer) // 8)
        ledger = np.array([count, 0, *range(count), *slots, *flags], np.int64)
        size = (self._images.shape[2], self._images.shape[3])
        source, scratch = self._waiting(place), self._scratch
        work = partial(_run, place, source, segment, policy, size, answer, scratch, count)
        replays = self._graphs is not None and count == self._batch_size and place in self._after
        if replays:
            sent, tokens, state = self._replay(place, answer, ledger, work)
        else:
            sent = _sent(ledger, device)
            tokens, state = work(sent)
            self._after[place] = _kind(tokens)
        # Else the host sees what was written: it is the same memory. From CUDA into pinned memory.
        if replays or device.type != "cpu":
            on_gpu = device.type == "cuda"
            ledger = sent.to("cpu", non_blocking=on_gpu, copy=True).numpy()
        return Run(count, tokens, state, answer, ledger, mark(device))

    def store(
        self, run: Run, place: int, slots: Sequence[int], leavers: Sequence[int]
    ) -> Sequence[Tensor]:
        """Put the survivors of a run into free slots, to wait for the segment at `place`.

        Returns:
            The logits `[K]` of the batch's images `leavers`, in memory of their own.
        """
        sent = _sent(np.array([*slots, *leavers], np.int64), run.tokens.device)
        at, rows = sent.split_with_sizes([len(slots), len(leavers)])
        if slots:
            kind, needed, count = _kind(run.tokens), max(slots) + 1, len(slots)
            self._tokens[kind] = self._with_room(self._tokens.get(kind), run.tokens, needed)
            self._state = self._with_room(self._state, run.state, needed)
            self._before[place] = kind
            self._tokens[kind].index_copy_(0, at, run.tokens[:count])
            self._state.index_copy_(0, at, run.state[:count])
        return run.answer.logits.index_select(0, rows).unbind() if leavers else ()

    def _waiting(self, place: int) -> tuple[Tensor, Tensor]:
        """Tokens and state of all that wait: in slots; before the first segment, in the first rows."""
        if place:
            assert self._state is not None
            return self._tokens[self._before[place]], self._state
        assert self._images is not None and self._first_state is not None
        return self._images, self._first_state

    def _replay(
        self, place: int, answer: Inference, ledger: NDArray[np.int64], work: Callable[..., Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A full batch from a graph: its ledger, tokens and state, in memory of the answer's own."""
        assert self._graphs is not None and self._first_state is not None
        kind = self._after[place]
        written = self._written.get((id(answer), kind))
        if written is None:
            shape, dtype, device = kind
            there = torch.empty(len(ledger), dtype=torch.int64, device=device)
            tokens = torch.empty(self._batch_size, *shape, dtype=dtype, device=device)
            written = there, tokens, torch.empty_like(self._first_state)
            self._written[id(answer), kind] = written
        there, *out = written
        key = place, id(answer), chosen_backend()
        with self._graphs:
            _sent(ledger, there.device, there)
            if key not in self._graphs.steps:
                self._graphs.record(key, partial(work, there, out))
                _sent(ledger, there.device, there)  # it ran
            self._graphs.steps[key]()
        return written

    def _drop_graphs(self) -> None:
        """And what they write; a run that is under way keeps its own."""
        if self._graphs is not None:
            self._graphs.clear()
        self._after, self._written = {}, {}

    def _with_room(self, buffer: Tensor | None, like: Tensor, rows: int) -> Tensor:
        """A buffer, or a larger one with the same content, in steps of a batch."""
        if buffer is not None and rows <= len(buffer):
            return buffer
        rows = -(-rows // self._batch_size) * self._batch_size
        larger = like.new_empty(rows, *like.shape[1:])
        if buffer is not None:
            self._drop_graphs()  # they read the other one
            larger[: len(buffer)] = buffer
        return larger


def _run(
    place: int,
    source: tuple[Tensor, Tensor],
    segment: Segment,
    policy: Policy,
    image_size: tuple[int, int],
    answer: Inference,
    scratch: Tensor,
    count: int,
    ledger: Tensor,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What `Slots.launch` launches: tokens and state of the survivors, in `out` if given."""
    parts = ledger.split_with_sizes([1, 1, count, count, len(ledger) - 2 - 2 * count])
    entering, survivors, rows, at, nonfinite = parts
    into, own = out or (None, None)
    tokens, state = _gather(place, source, at, own)
    tokens, step = segment(tokens, state, image_size, policy)
    end_exit_(
        step,
        tokens,
        rows,
        state,
        (*answer.tensors()[:3], nonfinite.view(torch.bool)),
        segment.index,
        segment.stop,
        into=into,
        counts=Counts(entering, survivors, None, scratch),
    )
    return tokens if into is None else into, state


def _gather(
    place: int, source: tuple[Tensor, Tensor], at: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and state of a batch; the state in memory of its own, `out` if given."""
    tokens, state = source
    if place:
        return tokens.index_select(0, at), torch.index_select(state, 0, at, out=out)
    first = state[: len(at)]
    return tokens[: len(at)], first.clone() if out is None else out.copy_(first)


def _kind(rows: Tensor) -> _Kind:
    return rows.shape[1:], rows.dtype, rows.device


def _sent(numbers: NDArray[np.int64], device: torch.device, to: Tensor | None = None) -> Tensor:
    """The numbers on a device, `to` if given. Through pinned memory, so that the host need not wait."""
    sent, on_gpu = torch.from_numpy(numbers), device.type == "cuda"
    if on_gpu:
        sent = sent.pin_memory()
    if to is not None:
        return to.copy_(sent, non_blocking=on_gpu)
    return sent if device.type == "cpu" else sent.to(device, non_blocking=on_gpu)

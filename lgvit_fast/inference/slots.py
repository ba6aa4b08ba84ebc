"""Where the images of a stream wait between segments, and one segment's run on some of them.

Images that wait for the first segment are the first rows of one buffer. All others are in slots: rows
of one buffer for all segments whose tokens have one shape, which so holds no more rows than wait.

A run has two halves. `Slots.launch` gathers a batch, runs the segment and ends its exit with
`end_exit_`; on a GPU nobody waits for that. `Slots.store` needs the number of survivors, and puts
them into free slots. The first half changes nothing but memory of its own, the second nothing but
free slots: each may fail or be interrupted anywhere, and be done again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.ops.end_exit import Counts, end_exit_
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import Policy
from lgvit_fast.segments import Segment

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Run", "Slots", "answer_rows", "mark"]


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
        self._tokens: dict[Hashable, Tensor] = {}  # by shape, dtype and device
        self._state: Tensor | None = None
        self._before: dict[int, Hashable] = {}  # which of `_tokens` a segment reads
        self._scratch: Tensor | None = None

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
        """
        assert self._images is not None and self._scratch is not None
        count, device = len(slots), self._images.device
        flags = [0] * (len(answer) // 8)
        ledger = np.array([count, 0, *range(count), *slots, *flags], np.int64)
        sent = _sent(ledger, device)
        parts = sent.split_with_sizes([1, 1, count, count, len(flags)])
        entering, survivors, rows, at, nonfinite = parts
        tokens, state = self._gather(place, at)
        size = (self._images.shape[2], self._images.shape[3])
        tokens, step = segment(tokens, state, size, policy)
        end_exit_(
            step,
            tokens,
            rows,
            state,
            (*answer.tensors()[:3], nonfinite.view(torch.bool)),
            segment.index,
            segment.stop,
            counts=Counts(entering, survivors, None, self._scratch),
        )
        if device.type != "cpu":  # where it is the same memory; from CUDA into pinned memory
            ledger = sent.to("cpu", non_blocking=device.type == "cuda").numpy()
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

    def _gather(self, place: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and state in the slots `at`; before the first segment, in as many first rows."""
        if place:
            assert self._state is not None
            tokens = self._tokens[self._before[place]].index_select(0, at)
            return tokens, self._state.index_select(0, at)
        assert self._images is not None and self._first_state is not None
        return self._images[: len(at)], self._first_state[: len(at)].clone()

    def _with_room(self, buffer: Tensor | None, like: Tensor, rows: int) -> Tensor:
        """A buffer, or a larger one with the same content, in steps of a batch."""
        if buffer is not None and rows <= len(buffer):
            return buffer
        rows = -(-rows // self._batch_size) * self._batch_size
        larger = like.new_empty(rows, *like.shape[1:])
        if buffer is not None:
            larger[: len(buffer)] = buffer
        return larger


def _kind(rows: Tensor) -> Hashable:
    return rows.shape[1:], rows.dtype, rows.device


def _sent(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """The numbers on a device. Through pinned memory, so that the host need not wait."""
    sent = torch.from_numpy(numbers)
    if device.type == "cuda":
        return sent.pin_memory().to(device, non_blocking=True)
    return sent if device.type == "cpu" else sent.to(device)

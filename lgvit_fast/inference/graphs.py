"""Segments at a few fixed batch sizes on static buffers: what a CUDA graph can replay.

All segments read their input from one set of buffers and leave the survivors in its first rows, so
any segment can follow at any batch size. Rows beyond the survivors are padding: they hold tokens
of images that left, are answered nowhere, and can meet no real row, since every operation of a
segment treats rows independently.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lgvit_fast.inference.report import Tally
from lgvit_fast.ops.end_exit import Counts, end_exit_
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import Learned, Policy, Replay
from lgvit_fast.segments import Segment

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BucketRunner",
    "CaptureError",
    "Graphs",
    "Program",
    "capture_eager",
    "capture_graph",
    "default_buckets",
]

Capture = Callable[[Callable[[], None], Any, Any], Callable[[], None]]
# What a segment does before the policy comes in: tokens in, what `Segment.advance` gives out.
Program = Callable[[Tensor], tuple[Tensor, Any]]


def default_buckets(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 12, 16, 24, 32, then a sixteenth of `max_batch` apart, in multiples of 8.

    Up to 32 at most a third of the rows is padding, beyond at most a sixteenth of `max_batch`.
    """
    step = max(8, -(-max_batch // 128) * 8)
    small = [size for size in (1, 2, 4, 8, 12, 16, 24, 32) if size < max_batch]
    return (*small, *(size for size in range(step, max_batch, step) if size > 32), max_batch)


class CaptureError(RuntimeError):
    """A segment ran, but could not be recorded as a CUDA graph."""


def capture_graph(work: Callable[[], None], pool: Any, side: Any) -> Callable[[], None]:
    """Record the kernels that `work` launches as a CUDA graph. Run `work` before, to warm it up.

    Other threads may use the device meanwhile.

    Args:
        work: what to record.
        pool: of memory, which graphs that do not run at the same time may share.
        side: the stream to record on; one for all graphs of a pool.

    Raises:
        CaptureError: `work` does what a graph cannot hold.
        Exception: any other that `work` raises, torch.OutOfMemoryError among them.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # the first error is the one that tells
                    graph.capture_end()
                raise
            graph.capture_end()
        except RuntimeError as error:
            if not is_of_capture(error):
                raise
            raise CaptureError(f"a segment cannot be captured as a CUDA graph: {error}") from error
    return graph.replay


def is_of_capture(error: RuntimeError) -> bool:
    """Whether CUDA or torch refused to record something; both say so of every such error."""
    return not isinstance(error, torch.OutOfMemoryError) and "captur" in str(error)


def capture_eager(work: Callable[[], None], pool: Any, side: Any) -> Callable[[], None]:
    """No graph: the same buffers and batch sizes, each kernel launched anew. Runs on any device."""
    return work


class Graphs:
    """Work recorded as CUDA graphs. They share memory, so they run one after another.

    What they read of the model stays in memory as long as this does, whatever becomes of the model.

    Args:
        capture: `capture_graph` or `capture_eager`.
        device: of all the work.
        model: whose weights it reads.

    Attributes:
        steps: what replays each, by the key it was recorded with.
        nbytes: what the device had less after each was recorded.
    """

    def __init__(self, capture: Capture, device: torch.device, model: nn.Module) -> None:
        on_gpu = device.type == "cuda"
        self.steps: dict[Hashable, Callable[[], None]] = {}
        self.nbytes = 0
        self._capture, self._device = capture, device
        self._pool: Any = None
        self._side = torch.cuda.Stream(device) if on_gpu else None
        self._done = torch.cuda.Event() if on_gpu else None  # the last replay
        weights = [*model.parameters(), *model.buffers()]
        self._weights = [weight.untyped_storage() for weight in weights if not weight.is_mkldnn]

    def record(self, key: Hashable, work: Callable[[], None]) -> None:
        """Record work; it also runs before, as compiling and tuning must not happen in a capture."""

        def launch() -> None:
            with _no_autocast_cache():
                work()

        if self._side is not None:
            current = torch.cuda.current_stream(self._device)
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                launch()
                launch()
            current.wait_stream(self._side)
            if not self.steps:  # a pool that no graph is left of takes no other
                self._pool = torch.cuda.graph_pool_handle()
        else:
            launch()
        free = self._free_bytes()
        step = self._capture(launch, self._pool, self._side)
        self.nbytes += max(0, free - self._free_bytes())
        self.steps[key] = step

    def __enter__(self) -> None:
        """For replays: they follow those before, on any CUDA stream, and `clear` waits for them."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def __exit__(self, *raised: object) -> None:
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(self._device))

    def clear(self) -> None:
        """Wait for the last replay, then drop what was recorded."""
        if self._done is not None:
            self._done.synchronize()
        self.steps.clear()
        self.nbytes = 0

    def _free_bytes(self) -> int:
        return 0 if self._side is None else torch.cuda.mem_get_info(self._device)[0]


class _Section(NamedTuple):
    """A tensor within a piece of memory."""

    start: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Where the next one may begin: CUDA copies 16 bytes at a time."""
        return self.start + -(-self.shape[0] * self.row_bytes // 16) * 16

    def of(self, memory: Tensor) -> Tensor:
        """The tensor, in memory `[n]` uint8."""
        stop = self.start + self.shape[0] * self.row_bytes
        return memory[self.start : stop].view(self.dtype).view(self.shape)


class _Ledger:
    """All that is known of the images on their way beside their tokens, side by side.

    What a batch begins with is its front, what it ends with its back: one copy from the host begins a
    batch, and one gives its answers.

    Args:
        rows: images, at most.
        segments: how many.
        state: `[rows, ...]` a policy's state at the start.
        answer: `[1]`, an answer.
        device: of the tensors.
    """

    def __init__(
        self, rows: int, segments: int, state: Tensor, answer: Inference, device: torch.device
    ) -> None:
        sections: list[_Section] = []

        def add(length: int, like: Tensor) -> _Section:
            start = sections[-1].stop if sections else 0
            sections.append(_Section(start, (length, *like.shape[1:]), like.dtype))
            return sections[-1]

        places = torch.arange(rows)
        entering, own, policy = add(segments + 1, places), add(rows, places), add(rows, state)
        # Of the answers, a last one may be written by padding.
        self._back = [add(rows + 1, like) for like in reversed(answer.tensors())]
        self._names = answer.class_names
        self.memory = torch.zeros(sections[-1].stop, dtype=torch.uint8, device=device)
        self.entering = entering.of(self.memory)  # images before each segment, and after the last
        self.rows = own.of(self.memory)  # each image's place in the answer
        self.state = policy.of(self.memory)
        self.answer = [section.of(self.memory) for section in reversed(self._back)]

        nonfinite = self._back[0]
        self._front = self.memory[: nonfinite.stop]
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(nonfinite.stop, dtype=torch.uint8, pin_memory=on_gpu)
        self._read = torch.cuda.Event() if on_gpu else None  # by the last copy
        own.of(self._host).copy_(places)
        self._first_state = policy.of(self._host)
        self._first_state.copy_(state)
        # The same memory to NumPy, which writes a few numbers in a tenth of torch's time.
        self._count = entering.of(self._host).numpy()
        self._script = self._first_state.numpy() if state.dtype == torch.int32 else None

    def begin(self, batch: int, state: Tensor | NDArray[np.int32] | None) -> None:
        """Take in a batch. Its policy's state `[B, ...]`; None: as it was made with."""
        if self._read is not None:
            self._read.synchronize()  # it was long ago
        self._count[0] = batch
        if isinstance(state, Tensor):
            self._first_state[:batch].copy_(state)
        elif state is not None and self._script is not None:
            self._script[:batch] = state
        self._front.copy_(self._host, non_blocking=True)
        if self._read is not None:
            self._read.record(torch.cuda.current_stream(self.memory.device))

    def answers(self, batch: int) -> Inference:
        """The answers of a batch, in memory of their own."""
        start, sizes = self._back[0].start, []
        for section in self._back:
            used = batch * section.row_bytes
            sizes += [used, section.stop - section.start - used]
        back = self.memory[start : start + sum(sizes[:-1])].clone()
        parts = back.split_with_sizes(sizes[:-1])[::2]
        nonfinite, layer, index, logits = (
            part.view(section.dtype) for part, section in zip(parts, self._back, strict=True)
        )
        return Inference(logits.view(batch, -1), index, layer, nonfinite, self._names)


class BucketRunner:
    """Runs batches through segments captured at the sizes in `buckets`.

    Args:
        segments: from shallow to deep; their heads are prepared.
        policy: its rules become part of what is captured; `run` may get another policy that has the
            same rules and reads only the state (see `policy_key`).
        buckets: increasing batch sizes; the last is the largest batch.
        sample: `[1, channels, height, width]`, an image like those to come.
        blank: makes an empty `Inference` of so many rows.
        program: what the segment at a place does at a batch size: `Segment.advance`, or that compiled.
        graphs: to record the segments with.
        speculate: launch the next segment before this one's survivors have been counted.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        policy: Policy,
        buckets: Sequence[int],
        sample: Tensor,
        blank: Callable[[int], Inference],
        program: Callable[[int, int], Program],
        graphs: Graphs,
        speculate: bool = False,
    ) -> None:
        device, rows = sample.device, buckets[-1]
        self._segments, self._policy, self._program = segments, policy, program
        self._buckets, self._graphs, self._speculate = tuple(buckets), graphs, speculate
        self._image_size = (sample.shape[2], sample.shape[3])
        self._start = _start_of(policy)
        state = policy.part(0, 1).start(1, device)
        self.images = sample.new_zeros(rows, *sample.shape[1:])
        self.tokens = self._buffers(sample, state.clone())
        beginning = state.expand(rows, *state.shape[1:])
        self.ledger = _Ledger(rows, len(segments), beginning, blank(1), device)
        self._on_gpu = on_gpu = device.type == "cuda"
        entering = self.ledger.entering
        # Where the host reads how many images each segment left.
        self.counts = entering[1:].cpu().pin_memory() if on_gpu else entering[1:]
        self._scratch = torch.zeros(1, dtype=torch.int32, device=device)
        self._events = [torch.cuda.Event() if on_gpu else None for _ in segments]

    def run(
        self,
        images: Tensor,
        policy: Policy,
        tally: Tally,
        unchanged: Callable[[], bool] | None = None,
    ) -> Inference | None:
        """Answer `[B, ...]` images, 1 <= B <= the largest bucket. Waits at most once per exit.

        Args:
            images: on the device of the sample.
            policy: see the class.
            tally: counts the rows run.
            unchanged: asked once, when the first segment was launched: whether that was right. If not
                the batch is dropped, and the result is None.
        """
        batch = images.shape[0]
        with self._graphs:  # an earlier run may still use the buffers
            self.images.narrow(0, 0, batch).copy_(images)
            self.ledger.begin(batch, self._start(policy, batch))
            known = arrived = batch  # what the host knows of, and what really entered a segment
            for place, segment in enumerate(self._segments):
                bucket = self._bucket(known)
                self._step(place, bucket)()
                self._mark(place)
                if unchanged is not None and not place and not unchanged():
                    return None
                launched = known
                if self._speculate and place:
                    known = arrived = self._count(place - 1)
                elif not self._speculate and not segment.is_last:
                    known = self._count(place)
                tally.add(place, arrived, padded=bucket - launched, wasted=launched - arrived)
                if not known:
                    break
                arrived = known
            return self.ledger.answers(batch)

    def warm_up(self) -> None:
        """Capture every segment at every size now instead of when it is first needed."""
        for bucket in reversed(self._buckets):  # smaller ones fit into the memory of larger ones
            for place in range(len(self._segments)):
                self._step(place, bucket)

    def release(self) -> None:
        """Wait for the last batch, then drop what was captured.

        The captured steps refer to this runner: without them it is freed when let go of.
        """
        self._graphs.clear()

    @property
    def captured(self) -> int:
        """How many pairs of a segment and a batch size are captured."""
        return len(self._graphs.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, and of what the device had less after each capture."""
        once = {id(buffer): buffer for buffer in (*self.tokens, self.ledger.memory)}
        return self._graphs.nbytes + sum(buffer.nbytes for buffer in once.values())

    def _buffers(self, sample: Tensor, state: Tensor) -> list[Tensor]:
        """What each segment reads; segments whose tokens have one shape share a buffer."""
        buffers = [self.images]
        shared: dict[Any, Tensor] = {}
        tokens = sample
        for segment in self._segments[:-1]:
            tokens, _ = segment(tokens, state, self._image_size, self._policy)
            kind = (tokens.shape[1:], tokens.dtype)
            if kind not in shared:
                shared[kind] = tokens.new_zeros(len(self.images), *tokens.shape[1:])
            buffers.append(shared[kind])
        return buffers

    def _bucket(self, count: int) -> int:
        return self._buckets[bisect_left(self._buckets, count)]

    def _step(self, place: int, bucket: int) -> Callable[[], None]:
        key = place, bucket
        if key not in self._graphs.steps:
            # Recording also runs the segment on what is in the buffers, so they are put back.
            once = {id(buffer): buffer for buffer in self.tokens[1:]}
            buffers = (*once.values(), self.ledger.memory)
            saved = [buffer.clone() for buffer in buffers]
            self.ledger.entering.fill_(bucket)  # of an earlier run there may be more
            self._graphs.record(key, self._work(place, bucket))
            for buffer, content in zip(buffers, saved, strict=True):
                buffer.copy_(content)
        return self._graphs.steps[key]

    def _work(self, place: int, bucket: int) -> Callable[[], None]:
        """One segment on the first `bucket` rows; its survivors end up in the first rows."""
        segment, program = self._segments[place], self._program(place, bucket)
        ledger, tokens = self.ledger, self.tokens[place][:bucket]
        state, rows = ledger.state[:bucket], ledger.rows[:bucket]
        into = None if segment.is_last else self.tokens[place + 1]
        # Nobody waits for the last one: it must not write to the host when the host has gone on.
        waited_for = self._on_gpu and not segment.is_last
        told = self.counts[place : place + 1] if waited_for else None
        counts = Counts(
            entering=ledger.entering[place : place + 1],
            survivors=ledger.entering[place + 1 : place + 2],
            told=told,
            scratch=self._scratch,
        )

        def work() -> None:
            after, read = program(tokens)
            step = segment.decide(read, after, state, self._policy)
            end_exit_(
                step,
                after,
                rows,
                state,
                ledger.answer,
                segment.index,
                segment.stop,
                into=into,
                counts=counts,
            )

        return work

    def _mark(self, place: int) -> None:
        event = self._events[place]
        if event is not None:
            event.record(torch.cuda.current_stream(self.images.device))

    def _count(self, place: int) -> int:
        """Survivors of a segment that was launched: the one wait."""
        event = self._events[place]
        if event is not None:
            event.synchronize()
        return int(self.counts[place])


def _start_of(policy: Policy) -> Callable[[Policy, int], Tensor | NDArray[np.int32] | None]:
    """How a batch's first state is made under policies like this one; None where all start alike."""
    start = type(policy).start
    if start in (Policy.start, Learned.start):
        return lambda policy, batch: None
    if start is Replay.start:
        return lambda policy, batch: policy.start_array(batch)
    host = torch.device("cpu")  # a user's own may start each image otherwise
    return lambda policy, batch: policy.start(batch, host)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Cast weights anew: a graph must not read casts that autocast frees when it ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)

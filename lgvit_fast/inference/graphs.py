"""Segments at a few fixed batch sizes on static buffers: what a CUDA graph can replay.

All segments read their input from one set of buffers and leave the survivors in its first rows, so
any segment can follow at any batch size. Rows beyond the survivors are padding: they hold tokens
of images that left, are answered nowhere, and can meet no real row, since every operation of a
segment treats rows independently.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.inference.report import Tally
from lgvit_fast.ops.end_exit import Counts, end_exit_
from lgvit_fast.outputs import Inference
from lgvit_fast.policies import Policy
from lgvit_fast.segments import Segment

__all__ = ["BucketRunner", "CaptureError", "capture_eager", "capture_graph", "default_buckets"]

Capture = Callable[[Callable[[], None], Any], Callable[[], None]]


def default_buckets(max_batch: int) -> tuple[int, ...]:
    """Powers of two to 8, then a sixteenth of `max_batch` apart: at most that many rows of padding.

    Steps are multiples of 8, which GEMM tiles like.
    """
    step = max(8, -(-max_batch // 128) * 8)
    small = [size for size in (1, 2, 4, 8) if size < max_batch]
    return (*small, *range(step * 2 if step == 8 else step, max_batch, step), max_batch)


class CaptureError(RuntimeError):
    """A segment ran, but could not be recorded as a CUDA graph."""


def capture_graph(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Record the kernels that `work` launches as a CUDA graph. Run `work` before, to warm it up.

    Raises:
        CaptureError: `work` does what a graph cannot hold.
        torch.OutOfMemoryError: no memory is left for the graph.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CaptureError(f"a segment cannot be captured as a CUDA graph: {error}") from error
    return graph.replay


def capture_eager(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """No graph: the same buffers and batch sizes, each kernel launched anew. Runs on any device."""
    return work


class BucketRunner:
    """Runs batches through segments captured at the sizes in `buckets`.

    Args:
        segments: from shallow to deep; their heads are prepared.
        policy: its rules become part of what is captured; `run` may get another policy that has the
            same rules and reads only the state (see `policy_key`).
        buckets: increasing batch sizes; the last is the largest batch.
        sample: `[1, channels, height, width]`, an image like those to come.
        blank: makes an empty `Inference` of so many rows.
        capture: `capture_graph` or `capture_eager`.
        speculate: launch the next segment before this one's survivors have been counted.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        policy: Policy,
        buckets: Sequence[int],
        sample: Tensor,
        blank: Callable[[int], Inference],
        capture: Capture,
        speculate: bool = False,
    ) -> None:
        device, rows = sample.device, buckets[-1]
        self._segments, self._policy = segments, policy
        self._buckets, self._capture, self._speculate = tuple(buckets), capture, speculate
        self._image_size = (sample.shape[2], sample.shape[3])
        state = policy.part(0, 1).start(1, device)
        self.images = sample.new_zeros(rows, *sample.shape[1:])
        self.tokens = self._buffers(sample, state.clone())
        self.state = state.new_zeros(rows, *state.shape[1:])
        self.rows = torch.arange(rows, device=device)
        self.answer = blank(rows + 1)  # the last may be written by padding
        self._all_rows = torch.arange(rows, device=device)
        on_gpu = device.type == "cuda"
        # Images before each segment and after the last, and where the host reads those after each.
        self._entering = torch.zeros(len(segments) + 1, dtype=torch.int64, device=device)
        self.counts = self._entering[1:].cpu().pin_memory() if on_gpu else self._entering[1:]
        self._scratch = torch.zeros(1, dtype=torch.int32, device=device)
        self._events = [torch.cuda.Event() if on_gpu else None for _ in segments]
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._done = torch.cuda.Event() if on_gpu else None
        self._steps: dict[tuple[int, int], Callable[[], None]] = {}

    def run(self, images: Tensor, policy: Policy, tally: Tally) -> Inference:
        """Answer `[B, ...]` images, 1 <= B <= the largest bucket. Waits at most once per exit."""
        batch = len(images)
        if self._done is not None:  # an earlier run on another stream may still use the buffers
            torch.cuda.current_stream(images.device).wait_event(self._done)
        self.images[:batch].copy_(images)
        self.state[:batch].copy_(policy.start(batch, images.device))
        self.rows[:batch].copy_(self._all_rows[:batch])
        self._entering[0].fill_(batch)
        self.answer.nonfinite.zero_()

        known = arrived = batch  # what the host knows of, and what really entered a segment
        for place, segment in enumerate(self._segments):
            bucket = self._bucket(known)
            self._step(place, bucket)()
            self._mark(place)
            launched = known
            if self._speculate and place:
                known = arrived = self._count(place - 1)
            elif not self._speculate and not segment.is_last:
                known = self._count(place)
            tally.add(place, arrived, padded=bucket - launched, wasted=launched - arrived)
            if not known:
                break
            arrived = known
        answer = self.answer.map(lambda t: t[:batch].clone())
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(images.device))
        return answer

    def warm_up(self) -> None:
        """Capture every segment at every size now instead of when it is first needed."""
        for place in range(len(self._segments)):
            for bucket in self._buckets:
                self._step(place, bucket)

    def release(self) -> None:
        """Drop the captured steps, which refer to this runner, so that it is freed when let go of."""
        self._steps.clear()

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
        if (place, bucket) not in self._steps:
            self._steps[place, bucket] = self._captured(place, bucket)
        return self._steps[place, bucket]

    def _captured(self, place: int, bucket: int) -> Callable[[], None]:
        work = self._work(place, bucket)

        # Warming up compiles kernels and picks algorithms, which a capture must not; it also runs
        # the segment on what is in the buffers, so they are put back.
        once = {id(buffer): buffer for buffer in self.tokens[1:]}
        buffers = (*once.values(), self.state, self.rows, self._entering, *self.answer.tensors())
        saved = [buffer.clone() for buffer in buffers]
        self._entering.fill_(bucket)  # of an earlier run there may be more
        if self._pool is not None:
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                work()
                work()
            current.wait_stream(side)
        else:
            work()
        step = self._capture(work, self._pool)
        for buffer, content in zip(buffers, saved, strict=True):
            buffer.copy_(content)
        return step

    def _work(self, place: int, bucket: int) -> Callable[[], None]:
        """One segment on the first `bucket` rows; its survivors end up in the first rows."""
        segment = self._segments[place]
        tokens, state, rows = self.tokens[place][:bucket], self.state[:bucket], self.rows[:bucket]
        into = None if segment.is_last else self.tokens[place + 1]
        answer = self.answer.tensors()
        told = self.counts[place : place + 1] if self._pool is not None else None
        counts = Counts(
            entering=self._entering[place : place + 1],
            survivors=self._entering[place + 1 : place + 2],
            told=told,
            scratch=self._scratch,
        )

        def work() -> None:
            with _no_autocast_cache():
                after, step = segment(tokens, state, self._image_size, self._policy)
                end_exit_(
                    step,
                    after,
                    rows,
                    state,
                    answer,
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


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Cast weights anew: a graph must not read casts that autocast frees when it ends."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)

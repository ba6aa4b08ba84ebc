"""What an engine or stream says of its work: batch sizes, padding, waste, runtimes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Report", "RuntimeTiming", "SegmentReport", "Tally"]


@dataclass(frozen=True)
class SegmentReport:
    """One segment's work.

    Attributes:
        layer: the block it ends with, from 1.
        runs: how often it ran.
        images: rows that were images still on their way.
        padded: rows added to fill a bucket.
        wasted: rows of images that had already left, run before survivors were counted.
    """

    layer: int
    runs: int
    images: int
    padded: int
    wasted: int

    @property
    def mean_batch(self) -> float:
        """Images a run."""
        return self.images / self.runs if self.runs else 0.0


@dataclass(frozen=True)
class RuntimeTiming:
    """What the runtimes took for batches of one size.

    Attributes:
        batch_size: images that entered together.
        image_size: `(height, width)` in pixels.
        milliseconds: an image, by runtime; images leave evenly over the exits and the end.
    """

    batch_size: int
    image_size: tuple[int, int]
    milliseconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """The runtime that took least."""
        return min(self.milliseconds, key=lambda name: self.milliseconds[name])

    def __str__(self) -> str:
        height, width = self.image_size
        times = ", ".join(f"{name} {ms:.2f}" for name, ms in self.milliseconds.items())
        return f"batch {self.batch_size} of {height}x{width}: {times} ms an image"


@dataclass(frozen=True)
class Report:
    """Work since an engine or stream was made, or since the last reset.

    Attributes:
        segments: shallow to deep.
        waiting: images of a stream that wait for each segment; 0 for an engine.
        forced: runs of a stream made with less than a full batch, because images had waited long
            enough or no more came; 0 for an engine.
        runtime: what the last batch ran on, "torch", "onnxruntime" or "openvino".
        timings: what `Engine.warm_up` measured or found in the user's cache, for each batch size.
        graphs: graphs that an engine holds, each of a segment at a batch size; a stream holds up to two
            of a segment.
        graph_bytes: memory of their buffers, and of the graphs themselves on a GPU.
        graphs_off: why kernels are launched one by one where graphs were tried; else empty.
    """

    segments: tuple[SegmentReport, ...]
    waiting: tuple[int, ...]
    forced: int = 0
    runtime: str = "torch"
    timings: tuple[RuntimeTiming, ...] = ()
    graphs: int = 0
    graph_bytes: int = 0
    graphs_off: str = ""

    @property
    def left(self) -> tuple[int, ...]:
        """Images that left at each exit, and that ran to the end: for `Certificate.check`."""
        entered = [s.images for s in self.segments]
        going_on = [n + w for n, w in zip(entered[1:], self.waiting[1:], strict=True)]
        return tuple(n - on for n, on in zip(entered, [*going_on, 0], strict=True))

    @property
    def padded_share(self) -> float:
        """Share of all rows run that were padding."""
        return self._share(sum(s.padded for s in self.segments))

    @property
    def wasted_share(self) -> float:
        """Share of all rows run that were images which had already left."""
        return self._share(sum(s.wasted for s in self.segments))

    def _share(self, rows: int) -> float:
        total = sum(s.images + s.padded + s.wasted for s in self.segments)
        return rows / total if total else 0.0

    def __str__(self) -> str:
        lines = [f"{'to layer':>8} {'runs':>7} {'images':>9} {'mean batch':>10}"]
        lines += [
            f"{s.layer:>8} {s.runs:>7} {s.images:>9} {s.mean_batch:>10.1f}" for s in self.segments
        ]
        lines.append(
            f"padded {self.padded_share:.1%}, wasted {self.wasted_share:.1%},"
            f" runs below a full batch {self.forced}"
        )
        lines.append(f"on {self.runtime}")
        if self.graphs:
            lines.append(f"{self.graphs} graphs, {self.graph_bytes / 2**20:.0f} MiB")
        if self.graphs_off:
            lines.append(f"no graphs: {self.graphs_off}")
        lines += [f"{timing.fastest} chosen for {timing}" for timing in self.timings]
        return "\n".join(lines)


class Tally:
    """Counts rows by segment."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self.forced = 0
        self._counts = [[0, 0, 0, 0] for _ in layers]

    def add(self, place: int, images: int, padded: int = 0, wasted: int = 0) -> None:
        """Count one run of the segment at `place`."""
        for i, number in enumerate((1, images, padded, wasted)):
            self._counts[place][i] += number

    def report(self, waiting: tuple[int, ...] | None = None) -> Report:
        """The counts so far, with the images that wait for each segment."""
        rows = zip(self._layers, self._counts, strict=True)
        segments = tuple(SegmentReport(layer, *counts) for layer, counts in rows)
        return Report(segments, waiting or (0,) * len(segments), self.forced)

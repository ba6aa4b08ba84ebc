"""Where a check runs: on the GPU, or for a rehearsal on a CPU that stands in for it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import lgvit_fast
from benchmarks.gpu_check.record import Skipped
from lgvit_fast import _extension
from lgvit_fast.clock import Spread, seconds, synchronize
from lgvit_fast.model import LGViT
from lgvit_fast.ops import compact_

_WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize")


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are ViT-B/16 at 224 pixels.

    Attributes:
        batches: the most important first.
        model: of `create_model`, as a name and arguments.
        image: pixels of a side.
        width: C of the heads measured alone.
        grid: of their tokens.
        classes: K.
        images: of a pass over a whole model, or one batch if that is more.
        matrix: rows and columns of the matrices multiplied.
        copied: bytes of the copy whose rate is measured.
        buffers: tensors that moves take in turn, so that a cache does not hold what the last one read.
        rounds: timed passes over a whole model.
    """

    batches: tuple[int, ...] = (256, 1, 64, 16)
    model: tuple[str, dict[str, Any]] = ("vit_base_patch16_224", {})
    image: int = 224
    width: int = 768
    grid: tuple[int, int] = (14, 14)
    classes: int = 100
    images: int = 64
    matrix: int = 8192
    copied: int = 2**30
    buffers: int = 8
    rounds: int = 15


TINY = Sizes(
    batches=(3, 1, 2),
    model=(
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2},
    ),
    image=32,
    width=32,
    grid=(4, 4),
    classes=5,
    images=4,
    matrix=32,
    copied=2**12,
    buffers=2,
    rounds=1,
)


@dataclass(frozen=True)
class Gpu:
    """The CUDA device: times are of CUDA graphs, or of the host where a call waits for the device."""

    sizes: Sizes = field(default_factory=Sizes)
    device: torch.device = field(default_factory=partial(torch.device, "cuda"))
    dtype: torch.dtype = torch.bfloat16
    graphs: Literal[True, "eager"] = True
    rehearsal: bool = False

    def time(self, *calls: Callable[[], Any]) -> Spread:
        """Microseconds of one of several equal calls that follow each other in a CUDA graph."""
        from triton.testing import do_bench_cudagraph

        def turn() -> None:
            for call in calls:
                call()

        turn()  # compiles and tunes, which a graph must not hold
        self.wait()
        taken = do_bench_cudagraph(turn, rep=10, return_mode="all")
        return Spread.of([1000 * milliseconds / len(calls) for milliseconds in taken])

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        """The call as a CUDA graph to replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def passes(self, run: Callable[[], Any]) -> Spread:
        """Seconds by the host's clock of a call, and of what it launches."""
        for _ in range(1 if self.rehearsal else 3):
            run()
        return Spread.of([seconds(run, self.device) for _ in range(self.sizes.rounds)])

    def wait(self) -> None:
        """Until the device has done what was launched."""
        synchronize(self.device)

    def waits(self, run: Callable[[], Any]) -> int:
        """How often the host waits for the device in a call."""
        kinds = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
            run()
        counts = {event.key: event.count for event in profile.key_averages()}
        if not any(name.startswith("cuda") for name in counts):
            raise Skipped("the profiler sees no calls of CUDA here")
        return sum(counts.get(name, 0) for name in _WAITS)

    def backend(self, name: str) -> str:
        """What a backend of an op is called here."""
        return name

    def compact(self, tensors: Sequence[Tensor], keep: Tensor, count: Tensor) -> None:
        """`compact_` without its wait."""
        problem = _extension.why_compact_missing(self.device)
        if problem:
            raise RuntimeError(problem)
        torch.ops.lgvit_fast.compact_(tensors, keep, count)

    def stance(self) -> AbstractContextManager[Any]:
        """Within it the check runs: here `torch.compile` compiles."""
        return nullcontext()

    def tidy(self) -> None:
        """Give back the memory of what is no longer used."""
        gc.collect()
        torch.cuda.empty_cache()

    def model(self) -> LGViT:
        """The model whose speed is measured; its weights are random."""
        torch.manual_seed(0)
        name, arguments = self.sizes.model
        model = lgvit_fast.create_model(name, num_classes=self.sizes.classes, **arguments)
        return model.to(self.device, self.dtype).eval()


@dataclass(frozen=True)
class StandIn(Gpu):
    """A CPU in the GPU's place: every row is filled, none is a measurement, nothing is compiled."""

    sizes: Sizes = TINY
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    graphs: Literal[True, "eager"] = "eager"
    rehearsal: bool = True

    def time(self, *calls: Callable[[], Any]) -> Spread:
        return Spread.of([1e6 * seconds(call, self.device) for call in calls * 2])

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        def replay() -> None:
            call()

        return replay

    def waits(self, run: Callable[[], Any]) -> int:
        run()
        return 0

    def backend(self, name: str) -> str:
        return "torch"

    def compact(self, tensors: Sequence[Tensor], keep: Tensor, count: Tensor) -> None:
        count.fill_(compact_(tensors[0], keep, *tensors[1:]))

    def stance(self) -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("force_eager")

    def tidy(self) -> None:
        pass

"""Passes over the same images: each way in a process of its own, in turns block by block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from lgvit_fast.bench.ways import Calls, LeftOut, Subject, Way, start_of
from lgvit_fast.clock import seconds as seconds_of
from lgvit_fast.isolated import Failure, Isolated
from lgvit_fast.ops.torch_private import profiled_allocations
from lgvit_fast.policies import Replay

__all__ = ["Measured", "Worker", "measure"]

_BLOCK = 16  # images of a turn: what the caches hold of others costs its first call


@dataclass
class Measured:
    """What was measured of one way.

    Attributes:
        passes: seconds of each call, a list for each round.
        working_mib: most memory held at once beyond the weights, while answering; None where the
            runtime does not tell.
    """

    passes: list[list[float]] = field(default_factory=list)
    working_mib: float | None = None


class Worker:
    """The process of a way. Requests: "begin" a pass, the next so many calls of it, "peak" memory.

    Args:
        way: what answers.
        subject: what it runs.
        shape: of the images, `(C, H, W)`.
        script: where each image leaves.
        batch_size: images a call.
        threads: of PyTorch and of the runtimes.
    """

    def __init__(
        self,
        way: Way,
        subject: Subject,
        shape: tuple[int, int, int],
        script: Sequence[int],
        batch_size: int,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.way, self.batch_size = way, batch_size
        self.device = torch.device("cpu" if way.runtime else subject.device)
        dtype = torch.float32 if way.runtime else subject.dtype
        images = torch.randn(len(script), *shape, generator=torch.Generator().manual_seed(0))
        self.images, self.policy = images.to(self.device, dtype), Replay(script)
        self.start = start_of(way, subject, batch_size)
        self.calls: Iterator[Callable[[], Any]] = iter(())

    @torch.no_grad()
    def __call__(self, request: str | int) -> Any:
        """ "begin": how many calls; n: seconds of the next n; "peak": MiB or None."""
        if isinstance(request, int):
            return [seconds_of(call, self.device) for call in islice(self.calls, request)]
        calls = self.start(self.images, self.policy, self.batch_size)
        if request == "begin":
            self.calls = iter(calls)
            return len(calls)
        if self.way.runtime:
            return None
        return _peak_mib(calls[:2] if self.way.in_batches else calls, self.device)


def measure(
    chosen: Sequence[Way],
    subject: Subject,
    shape: tuple[int, int, int],
    script: Sequence[int],
    batch_size: int,
    rounds: int,
    timeout: float,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Measured], list[LeftOut]]:
    """What each way took, by name, and why some could not be measured.

    Args:
        chosen: the ways.
        subject: what they run.
        shape: of an image, `(C, H, W)`.
        script: the exit, from 0, of each image.
        batch_size: images a call (or a segment waits for, in a stream).
        rounds: timed passes of each, after one to warm up.
        timeout: seconds that a process may take to begin, for the warm-up or for a block.
        progress: gets lines that say what is being done.
    """
    measured: dict[str, Measured] = {}
    failed: list[LeftOut] = []
    processes: dict[str, Isolated] = {}

    def begin(way: Way) -> Isolated:
        progress(f"batch {batch_size}: {way.name} warms up")
        arguments = (way, subject, shape, script, batch_size, torch.get_num_threads())
        processes[way.name] = Isolated(Worker, *arguments, timeout=timeout)
        return processes[way.name]

    def ask(way: Way, request: str | int) -> Any:
        """The answer; or None if there is none, and the way is out."""
        name = way.name
        try:
            return (processes.get(name) or begin(way)).ask(request)
        except Failure as failure:
            failed.append(LeftOut(name, str(failure)))
            measured.pop(name, None)
            if name in processes:
                processes.pop(name).close()
            return None

    block = max(1, _BLOCK // batch_size)
    turns = -(-len(script) // (block * batch_size))
    try:
        for way in chosen:
            calls = ask(way, "begin")
            # compile, capture, choose algorithms
            if calls is not None and ask(way, calls) is not None:
                found = measured[way.name] = Measured()
                found.working_mib = ask(way, "peak")
        for turn in range(rounds * turns):
            going = [way for way in chosen if way.name in measured]
            if turn % turns == 0:
                progress(f"batch {batch_size}: round {turn // turns + 1} of {rounds}")
                for way in going:
                    if ask(way, "begin") is not None:
                        measured[way.name].passes.append([])
            going = [way for way in chosen if way.name in measured]
            for place in range(len(going)):
                way = going[(place + turn) % len(going)]  # not always after the same way
                took = ask(way, block)
                if took is not None:
                    measured[way.name].passes[-1] += took
    finally:
        for process in processes.values():
            process.close()
    return measured, failed


def _peak_mib(calls: Calls, device: torch.device) -> float:
    """Most memory that torch held at once during the calls, beyond what it held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for call in calls:
            call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty where there is no GPU
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        for call in calls:
            call()
    sizes = [size for _, size in profiled_allocations(profile)]
    return float(np.cumsum([0, *sizes]).max()) / 2**20

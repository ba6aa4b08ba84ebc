"""Host time that a call of the graph engine takes beside its segments, on the CPU.

    python -m benchmarks.host_time

The model has the modules and tensors of ViT-B/16 with eight exits, at width 32. Its segments are
captured (`graphs="eager"`), then replaced by nothing: what is timed is the engine's own work, and
copies of tiny images stand for launches. Medians of microseconds, in one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import lgvit_fast
from lgvit_fast.inference import Engine
from lgvit_fast.machine import machine
from lgvit_fast.policies import Policy


class HostTime(NamedTuple):
    """Median microseconds of a call.

    Attributes:
        before: from the call to the launch of the first segment, copies at the start included.
        between: from there on, an exit.
        after: from the end of the last segment to the answer.
    """

    before: float
    between: float
    after: float

    @property
    def target_met(self) -> bool:
        """At most 30 us before the first segment."""
        return self.before <= 30


def host_time(policy: Policy, batch: int, calls: int) -> HostTime:
    """Of a call in which nobody leaves before the end."""
    model = lgvit_fast.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, num_heads=2, num_classes=10
    ).eval()
    engine = Engine(model, max_batch=batch, runtime="torch", graphs="eager", buckets=[batch])
    images = torch.randn(batch, 3, 32, 32)
    engine.warm_up(images, policy)
    (runner,) = engine._runners.values()
    last = 0
    gaps: list[int] = []

    def instead(place: int) -> Callable[[], None]:
        def step() -> None:
            nonlocal last
            gaps.append(time.perf_counter_ns() - last)
            runner.counts[place] = batch
            last = time.perf_counter_ns()

        return step

    for place, bucket in list(runner._graphs.steps):
        runner._graphs.steps[place, bucket] = instead(place)
    taken: list[tuple[float, float, float]] = []
    for _ in range(calls):
        gaps.clear()
        last = time.perf_counter_ns()
        engine(images, policy)
        gaps.append(time.perf_counter_ns() - last)
        first, *others, end = (gap / 1000 for gap in gaps)
        taken.append((first, sum(others) / len(others), end))
    return HostTime(*map(statistics.median, zip(*taken, strict=True)))


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = machine()
    print(f"{about['processor']} ({', '.join(about['instructions'])}), torch {about['torch']}")
    print(f"{'policy':<12} {'batch':>5} {'before':>8} {'an exit':>8} {'after':>8}  us")
    for batch in (1, 8):
        for policy in (lgvit_fast.Confidence(1.0), lgvit_fast.Replay([8] * batch)):
            found = host_time(policy, batch, options.calls)
            verdict = "" if found.target_met else "  above 30"
            name = type(policy).__name__
            print(f"{name:<12} {batch:>5}" + "".join(f" {us:>8.1f}" for us in found) + verdict)


if __name__ == "__main__":
    main()

"""Memory stays flat: the resident set over many batches of an engine and a stream."""

from __future__ import annotations

import gc
import random
from pathlib import Path

from lgvit_fast import Confidence, Engine, stream
from tests.helpers import images, tiny_model

MIB = 1 << 20
ALLOWED = 8 * MIB  # of growth over all batches: allocators keep some


def run(count: int, seed: int) -> dict[str, int]:
    """Answer `count` batches; AssertionError if the process has grown by more than `ALLOWED`."""
    draw = random.Random(seed)
    model, policy = tiny_model(exits=[2, 3, 5]), Confidence(0.5)
    engine = Engine(model, max_batch=8, graphs=draw.choice((False, "eager")))
    batches = [images(draw.randint(1, 12), seed=i) for i in range(16)]
    before = 0
    for place in range(-32, count):  # the first ones fill caches
        if place == 0:
            before = _resident()
        engine(batches[place % 16], policy)
        if place % 16 == 0:
            list(stream(engine, batches[:3], 4, policy=policy))
    grown = _resident() - before
    assert grown <= ALLOWED, f"{grown / MIB:.1f} MiB more after {count} batches"
    return {"cases": count, "bytes grown": max(grown, 0)}


def _resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

"""When few images leave, carrying them along can be cheaper than closing the gaps.

What compaction costs and what a carried image costs is measured once per machine and kind of model, and
kept in a file: `$XDG_CACHE_HOME/lgvit_fast/gate.json`, `~/.cache` by default.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lgvit_fast.checkpoints.files import load_json, save_json
from lgvit_fast.ops.compact import compact_
from lgvit_fast.segments import Segment

__all__ = ["cached_gate", "gate_file", "measure_gate"]

_logger = logging.getLogger("lgvit_fast")


def gate_file() -> Path:
    """Where measured gates are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lgvit_fast" / "gate.json"


def cached_gate(tokens: Tensor, segments: Sequence[Segment]) -> int:
    """The measured gate for tokens `[B, ...]` like these; 1, always compact, where there is none."""
    try:
        return max(1, int(load_json(gate_file()).get(_key(tokens, segments), 1)))
    except (OSError, ValueError, TypeError, AttributeError):
        return 1


@torch.no_grad()
def measure_gate(tokens: Tensor, segments: Sequence[Segment], grid: tuple[int, int]) -> int:
    """Measure how many must leave for compaction to pay, and keep the answer for `cached_gate`.

    Args:
        tokens: `[B, ...]` as they enter the second segment, B >= 2; not changed.
        segments: of the model; the second one stands for all after the first.
        grid: `(H, W)` after that segment.
    """
    segment = segments[min(1, len(segments) - 1)]
    batch, half = len(tokens), max(1, len(tokens) // 2)
    whole = _seconds(partial(segment.blocks, tokens, grid), tokens.device)
    part = _seconds(partial(segment.blocks, tokens[:half], grid), tokens.device)
    row = max(0.0, whole - part) / max(1, batch - half)
    scratch, keep = tokens.clone(), torch.ones(batch, dtype=torch.bool, device=tokens.device)
    keep[0] = False
    one = _seconds(partial(compact_, scratch, keep), tokens.device)
    # With r leavers at most r rows move: its cost grows slower than r times that of one.
    gate = 1 if one <= row else batch if row <= 0 else min(batch, int(one / row) + 1)
    try:
        known = load_json(gate_file()) if gate_file().exists() else {}
        save_json(gate_file(), {**known, _key(tokens, segments): gate})
    except (OSError, ValueError, TypeError) as error:
        _logger.info("the measured gate could not be kept: %s", error)
    return gate


def _key(tokens: Tensor, segments: Sequence[Segment]) -> str:
    device = tokens.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    shape = "x".join(map(str, tokens.shape[1:]))
    depth = segments[-1].stop
    return f"{name}|torch {torch.__version__}|{shape}|{tokens.dtype}|{depth} blocks"


def _processor() -> str:
    return f"cpu, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _seconds(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The least of a few calls, after one to warm up."""
    best = float("inf")
    for turn in range(1 + rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            best = min(best, time.perf_counter() - start)
    return best

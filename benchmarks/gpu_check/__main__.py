"""Measure what only a GPU can show, and judge each figure by its target.

    make gpu-check          (or: python -m benchmarks.gpu_check)

Rows are measured in order of importance until the time is up, and the json is written whole after
each, so that a run that is stopped leaves all it had. Exit code 0 unless a row failed; a missed
target is no failure.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.devices import Gpu, StandIn
from benchmarks.gpu_check.operators import float32_gemm, heads, moves, rates
from benchmarks.gpu_check.record import Record, Row
from benchmarks.gpu_check.whole_model import other_ways, whole_model
from lgvit_fast import _extension
from lgvit_fast.machine import machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def rows(gpu: Gpu) -> Iterator[Row]:
    """All rows: what the floors are made of, what has a target, then the rest."""
    first, *others = gpu.sizes.batches
    half, full = torch.bfloat16, torch.float32
    return chain(
        rates(gpu),
        moves(gpu),
        heads(gpu, first, half, compiled=True),
        whole_model(gpu),
        *(heads(gpu, batch, half, compiled=False) for batch in others),
        *(other_ways(gpu, batch) for batch in (first, others[0])),
        float32_gemm(gpu),
        heads(gpu, first, full, compiled=False),
    )


def about() -> dict[str, Any]:
    """What was measured, and on what."""
    built = _extension.facts()
    return {
        "commit": _commit(),
        "extension": built.summary if built else _extension.why_missing(),
        "machine": machine(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="json (default: benchmarks/results/gpu_NAME.json)")
    parser.add_argument("--seconds", type=float, default=400, help="time for all rows (400)")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run every row on the CPU at tiny sizes, to see that it runs;\n"
        "the json (default: build/gpu_rehearsal.json) says that nothing was measured",
    )
    options = parser.parse_args(arguments)
    if options.rehearse:
        gpu, out = StandIn(), options.out or ROOT / "build" / "gpu_rehearsal.json"
        if RESULTS in out.resolve().parents:
            parser.error(f"--rehearse measures nothing: its json has no place in {RESULTS}")
    elif not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here; see --rehearse", file=sys.stderr)
        return 1
    else:
        gpu, out = Gpu(), options.out or RESULTS / f"gpu_{_device_name()}.json"
    record = Record(out, options.seconds, about(), gpu.rehearsal)
    with gpu.stance():
        record.run(rows(gpu))
    states = ("pass", "miss", "measured", "failed", "skipped")
    print(f"wrote {out}: " + ", ".join(f"{record.count(state)} {state}" for state in states))
    return int(record.count("failed") > 0)


def _device_name() -> str:
    return re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()).strip("_")


def _commit() -> str | None:
    """The checkout's; None for a copy without its history."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())

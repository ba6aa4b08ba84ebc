"""The stress campaign: every random test for its share of the time, with counts at the end.

    python -m tests.fuzz --seconds 600 --json stress.json

A failure is printed with the seed that repeats it: `python -m tests.fuzz --only NAME --seed SEED`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path

# Module -> cases a step, and its share of the time.
CAMPAIGNS = {
    "compaction": (500, 1),
    "invariance": (5, 2),
    "ops": (200, 1),
    "files": (50, 1),
    "stream": (20, 1),
    "images": (20, 1),
    "threads": (40, 1),
    "kills": (1, 2),
    "memory": (500, 1),
    "candidates": (40, 1),
}


def campaign(name: str, seconds: float, seed: int) -> Counter[str]:
    """Run one campaign in steps until `seconds` are over, at least one step; counts by name."""
    step, _ = CAMPAIGNS[name]
    run = import_module(f"tests.fuzz.{name}_fuzz").run
    counts = Counter(failures=0)
    end = time.monotonic() + seconds
    while True:
        try:
            counts.update(run(step, seed))
        except Exception:
            counts["failures"] += 1
            print(f"\n{name}, seed {seed}:", file=sys.stderr)
            traceback.print_exc()
        seed += 1
        if time.monotonic() >= end:
            return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="for all of them (600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there, too")
    args = parser.parse_args()
    shares = {name: CAMPAIGNS[name][1] for name in args.only}
    results = {}
    for name, share in shares.items():
        start = time.monotonic()
        counts = campaign(name, args.seconds * share / sum(shares.values()), args.seed)
        results[name] = {**counts, "seconds": round(time.monotonic() - start, 1)}
        print(name, ", ".join(f"{key} {value}" for key, value in results[name].items()), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(counts["failures"] for counts in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Seconds from the first import to the first answer of an exported model, in fresh processes.

    lgvit-fast export MODEL exported
    python -m benchmarks.cold_start exported --runtime onnxruntime

Wall clock and processor time, medians. A process in which torch or timm was imported is an error.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

SCRIPT = """
import sys, time
began, used = time.perf_counter(), time.process_time()
import numpy as np
from lgvit_fast.deploy import Deployed
deployed = Deployed(sys.argv[1], sys.argv[2], int(sys.argv[3]))
spec = deployed.manifest.preprocessing
deployed(np.zeros((1, spec.channels, *spec.size), np.float32))
print(time.perf_counter() - began, time.process_time() - used)
assert not {"torch", "timm"} & set(sys.modules)
"""


def cold_start(folder: str, runtime: str, threads: int, rounds: int) -> tuple[float, float]:
    """Median seconds of the wall clock and of the processor."""
    command = [sys.executable, "-c", SCRIPT, folder, runtime, str(threads)]
    times = [subprocess.check_output(command, text=True).split() for _ in range(rounds)]
    wall, used = (statistics.median(map(float, taken)) for taken in zip(*times, strict=True))
    return wall, used


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="an exported model")
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    wall, used = cold_start(args.folder, args.runtime, args.threads, args.rounds)
    print(f"{args.runtime}: {wall:.2f} s, {used:.2f} s of processor time")


if __name__ == "__main__":
    main()

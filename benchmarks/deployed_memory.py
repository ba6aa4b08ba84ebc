"""Memory that a process holds which answers with an exported model, in MiB.

    lgvit-fast export MODEL exported
    python -m benchmarks.deployed_memory exported --runtime onnxruntime

Resident memory once the model is loaded, and after batches of 1 and of `--batch-size` images, all of
which run to the end. The images themselves are not counted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

SCRIPT = """
import sys
import numpy as np
from lgvit_fast import Replay
from lgvit_fast.deploy import Deployed

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024

folder, runtime, threads, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
deployed = Deployed(folder, runtime, threads)
spec = deployed.manifest.preprocessing
held = [resident()]
for rows in (1, size):
    images = np.zeros((rows, spec.channels, *spec.size), np.float32)
    deployed(images, Replay([len(deployed.exits)] * rows))
    held.append(resident() - images.nbytes / 2**20)
print(*held)
"""


def deployed_memory(
    folder: str, runtime: str, threads: int, batch_size: int
) -> tuple[float, float, float]:
    """MiB that are resident when the model is loaded, after one image, and after a batch."""
    command = [sys.executable, "-c", SCRIPT, folder, runtime, str(threads), str(batch_size)]
    loaded, one, batch = map(float, subprocess.check_output(command, text=True).split())
    return loaded, one, batch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="an exported model")
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    held = deployed_memory(args.folder, args.runtime, args.threads, args.batch_size)
    print(
        "{}: {:.0f} MiB loaded, {:.0f} after one image, {:.0f} after a batch of {}".format(
            args.runtime, *held, args.batch_size
        )
    )


if __name__ == "__main__":
    main()

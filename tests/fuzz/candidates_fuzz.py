"""Candidates of the Triton kernels' tuning at random sizes and dtypes, under the interpreter.

The interpreter must be chosen before Triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys


def run(count: int, seed: int) -> dict[str, int]:
    """Compare `count` candidates with the reference; AssertionError names the one that differs."""
    command = [sys.executable, "-m", "tests.kernels.candidates", str(count), str(seed * count)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"cases": count}

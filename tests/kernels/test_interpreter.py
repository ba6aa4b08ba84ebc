"""Runs the kernels' tests under Triton's interpreter, each file in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import COMPILED

FILES = sorted(
    path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in COMPILED
)


@pytest.mark.parametrize("name", FILES)
def test_under_the_interpreter(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name]
    run = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout

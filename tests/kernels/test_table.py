"""Every kernel compiles, each for one of six architectures, and keeps to the committed budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_keep_to_the_budget() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel_table", "--slice"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


def test_the_budget_asks_for_tensor_cores() -> None:
    """A budget that was rewritten from kernels gone wrong must not pass unseen."""
    budget = json.loads((ROOT / "benchmarks" / "kernel_budget.json").read_text())
    products = [name for name in budget if "project" in name and "bf16" in name]
    assert len(products) >= 4
    for name in products:
        assert budget[name]["90"]["matrix"] == "HGMMA"
        assert budget[name]["100"]["matrix"] == "UTCHMMA"
        assert all(budget[name][arch]["matrix"] == "HMMA" for arch in ("80", "86", "89", "120"))

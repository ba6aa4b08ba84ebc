"""Kernel tests run on the GPU, or on the CPU under Triton's interpreter; fresh memory is full of NaN.

The interpreter must be chosen before Triton is imported, so test_interpreter.py runs the other files
in processes of their own. To run one by hand: TRITON_INTERPRET=1 pytest tests/kernels/test_lph.py
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = ("test_device.py", "test_interpreter.py", "test_table.py", "test_tuning.py")
ON_GPU = torch.cuda.is_available() and not INTERPRETED
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode asks for it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        if ON_GPU and item.path.name not in COMPILED:
            item.add_marker(pytest.mark.gpu)
        elif (item.path.name in COMPILED) == INTERPRETED:
            reason = "not under the interpreter" if INTERPRETED else "run by test_interpreter.py"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Deterministic mode fills what `torch.empty` returns with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("cuda" if ON_GPU else "cpu"):  # where tests make their tensors
            assert torch.empty(3).isnan().all()
            yield
    finally:
        torch.use_deterministic_algorithms(False)

"""Shared by all suites: what the json says of the machine, and warm, grouped measurements."""

from typing import Any

import pytest
import torch

from lgvit_fast.machine import machine


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info["lgvit_fast"] = machine()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield

"""A slice of every campaign that has no test file of its own; `make stress` runs them for minutes."""

from importlib import import_module

import pytest

SLICES = {"compaction": 400, "images": 30, "invariance": 6, "kills": 1, "memory": 64, "threads": 24}


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_finds_nothing(name):
    counts = import_module(f"tests.fuzz.{name}_fuzz").run(SLICES[name], seed=1)
    assert counts["cases"] == SLICES[name]
    assert not counts.get("failures")

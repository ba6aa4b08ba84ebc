"""A larger batch needs more memory, and a fresh process tells how much."""

from importlib.util import find_spec

import pytest

from benchmarks.deployed_memory import deployed_memory
from tests.deploy import exports


@pytest.mark.skipif(not find_spec("onnx") or not find_spec("onnxruntime"), reason="not installed")
def test_memory_is_told():
    loaded, one, batch = deployed_memory(str(exports.folder()), "onnxruntime", 1, 256)
    assert 0 < loaded < batch and one < batch

"""A fresh process answers with an exported model, and imports neither torch nor timm for it."""

import subprocess
from importlib.util import find_spec

import pytest

import lgvit_fast
from benchmarks import cold_start
from tests.helpers import tiny_model


@pytest.mark.skipif(not find_spec("onnx") or not find_spec("onnxruntime"), reason="not installed")
def test_a_fresh_process_answers(tmp_path, monkeypatch):
    lgvit_fast.export(tiny_model(exits=1, depth=2), tmp_path / "exported")
    wall, used = cold_start.cold_start(str(tmp_path / "exported"), "onnxruntime", 1, 1)
    assert used > 0 and wall > 0
    monkeypatch.setattr(cold_start, "SCRIPT", "import timm\n" + cold_start.SCRIPT)
    with pytest.raises(subprocess.CalledProcessError):
        cold_start.cold_start(str(tmp_path / "exported"), "onnxruntime", 1, 1)

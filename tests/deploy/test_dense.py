"""A dense model as one graph answers as the model does, and what is missing is named."""

import importlib.util

import pytest
import torch

from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.deploy import dense
from lgvit_fast.runtimes.loaders import RUNTIMES
from tests.helpers import images, tiny_model


def installed(*names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, and its backbone as one graph."""
    model = tiny_model(exits=2, depth=3, embed_dim=64)
    path = tmp_path_factory.mktemp("dense") / "dense.onnx"
    dense.export_dense(model.backbone, InputSpec.of(model.backbone), path)
    return model, path


@pytest.mark.parametrize("runtime", [pytest.param(r, marks=installed("onnx", r)) for r in RUNTIMES])
def test_a_dense_graph_answers_as_the_backbone(exported, runtime):
    model, path = exported
    run = dense.load_dense(path, runtime, 1)
    for count in (1, 5):
        with torch.no_grad():
            expected = model.backbone(images(count))
        logits = torch.from_numpy(run(images(count).numpy()).copy())
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@installed("onnx", "onnxruntime", "openvino")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_int8_is_smaller_and_answers(exported, tmp_path, runtime):
    model, path = exported
    small = tmp_path / "int8.onnx"
    dense.quantize(path, small, runtime)
    assert small.stat().st_size < 0.6 * path.stat().st_size
    predicted = dense.load_dense(small, runtime, 1)(images(40).numpy()).argmax(-1)
    with torch.no_grad():
        expected = model.backbone(images(40)).argmax(-1)
    assert (torch.from_numpy(predicted) == expected).double().mean() > 0.6


def test_what_is_missing_is_named(monkeypatch):
    def only(*names):
        monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: name in names or None)

    only("onnx", "onnxscript")
    assert dense.why_not("openvino", "float32") == "not installed: pip install openvino"
    assert dense.why_not("openvino", "int8") == "not installed: pip install openvino"
    only("onnx", "onnxscript", "openvino")
    assert dense.why_not("openvino", "float32") is None

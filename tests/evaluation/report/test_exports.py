"""What the runtimes are given, and that it answers as the model does."""

import importlib.util

import pytest
import torch

from lgvit_fast.data.batches import Batch
from lgvit_fast.data.transforms import InputSpec
from lgvit_fast.evaluation.report import Way, exports
from lgvit_fast.evaluation.report.worker import Task, _make
from tests.helpers import images, tiny_model


def installed(*names):
    names = ("lgvit_fast.deploy", *names)
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


class Source:
    """The images of a task; these tests pass theirs themselves."""

    class_names = ()

    def __len__(self):
        return 0

    def __getitems__(self, keys):
        return Batch(images(len(keys)), torch.zeros(len(keys), dtype=torch.long), [])


def answer(way, path):
    """What a way's process would answer with."""
    return _make(Task(way, str(path), 7, "cpu", Source(), 8, ()))


RUNTIME = installed("onnx", "onnxscript", "onnxruntime")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model, and its backbone as one graph."""
    model = tiny_model(exits=2, depth=3, embed_dim=64)
    path = tmp_path_factory.mktemp("dense") / "dense.onnx"
    exports.export_dense(model.backbone, InputSpec.of(model.backbone), path)
    return model, path


@RUNTIME
def test_a_dense_graph_answers_as_the_backbone(dense):
    model, path = dense
    run = answer(Way("onnxruntime"), path)
    for count in (1, 5):
        with torch.no_grad():
            expected = model.backbone(images(count)).argmax(-1)
        predicted, layers = run(images(count))
        assert predicted.tolist() == expected.tolist() and layers is None


@RUNTIME
def test_int8_is_smaller_and_answers(dense, tmp_path):
    model, path = dense
    small = tmp_path / "int8.onnx"
    exports.quantize(path, small)
    assert small.stat().st_size < 0.6 * path.stat().st_size
    predicted, _ = answer(Way("onnxruntime", "int8"), small)(images(40))
    with torch.no_grad():
        expected = model.backbone(images(40)).argmax(-1)
    assert (predicted == expected).double().mean() > 0.6


@RUNTIME
def test_an_early_exit_export_answers_as_the_model(tmp_path):
    model = tiny_model(exits=2, depth=3)
    exports.export_early(model, tmp_path / "early", "float32", images(2))
    predicted, layers = answer(Way("onnxruntime", early=True), tmp_path / "early")(images(9))
    expected = model.infer(images(9))
    assert predicted.tolist() == expected.prediction.tolist()
    assert layers.tolist() == expected.exit_layer.tolist()


@installed("onnx", "onnxscript", "onnxruntime", "openvino")
def test_an_int8_early_exit_export_answers_or_says_why_not(tmp_path, monkeypatch):
    from lgvit_fast.deploy import int8_export

    model = tiny_model(exits=2, depth=3)
    times = {"float32": {"openvino": {1: 2.0, 16: 2.0}}, "int8": {"openvino": {1: 1.0, 16: 3.0}}}
    monkeypatch.setattr(int8_export, "measure_times", lambda *arguments: times)
    monkeypatch.setattr(int8_export, "LEAST_AGREEMENT", 0.0)
    exports.export_early(model, tmp_path / "early", "int8", images(100))
    for engine in ("onnxruntime", "openvino"):
        found, layers = answer(Way(engine, "int8", early=True), tmp_path / "early")(images(9))
        assert found.shape == layers.shape == (9,)
    monkeypatch.setattr(int8_export, "LEAST_AGREEMENT", 101.0)
    with pytest.raises(ValueError, match="int8 is refused: at full depth it gives"):
        exports.export_early(model, tmp_path / "refused", "int8", images(100))


def test_what_is_missing_is_named(monkeypatch):
    def only(*names):
        monkeypatch.setattr(exports.importlib.util, "find_spec", lambda name: name in names or None)

    only("lgvit_fast.deploy", "onnx", "onnxscript")
    assert exports.why_not("openvino", "float32") == "not installed: pip install openvino"
    assert exports.why_not("openvino", "int8") == "not installed: pip install openvino onnxruntime"
    only("lgvit_fast.deploy", "onnx", "onnxscript", "openvino")
    assert exports.why_not("openvino", "float32") is None
    only("onnx")
    assert exports.why_not("openvino", "float32") == "this installation cannot export models"

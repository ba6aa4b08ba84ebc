"""Export: every family and head, what the files hold, and what is refused."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

import lgvit_fast
from lgvit_fast.deploy import Deployed
from lgvit_fast.deploy.manifest import Manifest
from lgvit_fast.runtimes import segment_graph
from tests.backbones.test_families import FAMILIES
from tests.deploy import exports
from tests.helpers import images, randomize, tiny_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

QUICK = ("deit-distilled", "rope-mixed")
HEADS = ("linear", "vit_ee", "conv", "attention", "mlp", "gah_2")


def assert_exported(model, folder, size):
    """An exported model answers as the model does, at every exit and for any batch."""
    deployed = Deployed(lgvit_fast.export(model, folder), "onnxruntime", threads=1)
    for batch in (1, 3):
        x = images(batch, size)
        with torch.no_grad():
            out = model.forward_exits(x)
        expected = torch.stack((*out.exits, out.final)).numpy()
        np.testing.assert_allclose(deployed.forward_exits(x.numpy()), expected, atol=1e-4)
        script = lgvit_fast.Replay([1, 0, 1][:batch])
        answers, expected = deployed(x.numpy(), script), model.infer(x, script)
        np.testing.assert_allclose(answers.logits, expected.logits.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in FAMILIES
        if name != "swin-any-size"  # an export has one size
    ],
)
def test_every_family(family, tmp_path):
    name, options, _ = FAMILIES[family]
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    depth = {"depths": (1, 1), "num_heads": (1, 2)} if "depths" in options else {"depth": 2}
    torch.manual_seed(0)
    model = lgvit_fast.create_model(
        name, exits=[1], **{"num_classes": 7, "img_size": 32, **options, **depth}
    )
    randomize(model)
    assert_exported(model.eval(), tmp_path / "exported", (32, 32))


def test_the_heads_of_other_methods(tmp_path):
    model = tiny_model(exits=[1, 2, 3, 4, 5, 6], heads=HEADS, depth=7, pool="average", seed=3)
    assert_exported(model, tmp_path / "exported", (32, 32))


def test_no_weight_is_written_twice(tmp_path):
    exports.model().save_pretrained(tmp_path)
    whole = 1.05 * (tmp_path / "model.safetensors").stat().st_size
    written = sum(file.stat().st_size for file in exports.folder().iterdir())
    assert written <= whole


def test_heads_are_in_their_inference_form():
    """A local head's first matrix alone; a global one's queries and keys, its values in the exit's."""
    shapes = []
    for file in sorted(exports.folder().glob("*.onnx")):
        weights = onnx.load(file).graph.initializer
        shapes.append([tuple(w.dims) for w in weights if "backbone" not in w.name])
    square, width = (128, 128), 128
    blocks = 1  # of each segment; the output projection of its attention
    for index in (0, 1):
        assert shapes[index].count(square) == blocks + 1
        assert (7, 3 * width) in shapes[index]  # mean hidden vector, mean token and class token
    for index in (2, 3):
        assert shapes[index].count(square) == blocks
        assert {(width, 2 * width), (7, 9 * width)} <= set(shapes[index])  # 8 heads, class token
        assert (3 * width, width) not in shapes[index]


def test_many_classes_leave_a_global_heads_values_apart():
    model = tiny_model(exits=[1], heads=["gah_2"], depth=2, embed_dim=32, num_classes=40)
    _, proto = next(segment_graph.segment_graphs(model, (32, 32)))
    shapes = [tuple(w.dims) for w in proto.graph.initializer]
    assert {(32, 64), (8, 32, 4), (40, 64)} <= set(shapes)  # queries and keys, values, the exit's
    assert shapes.count((32, 96)) == 1  # the block's own; the head's is not kept beside its parts


def test_files_say_nothing_of_the_machine():
    for file in exports.folder().iterdir():
        data = file.read_bytes()
        assert b".py" not in data and os.fsencode(os.path.dirname(timm.__file__)) not in data


def test_graphs_are_plain_onnx_with_any_batch():
    for index, file in enumerate(sorted(exports.folder().glob("*.onnx"))):
        proto = onnx.load(file)
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", segment_graph.OPSET)]
        names = [output.name for output in proto.graph.output]
        wanted = ["logits", "confidence", "entropy", "prediction", "valid", "tokens"]
        assert names == (wanted if index < 4 else wanted[:-1])
        for value in (*proto.graph.input, *proto.graph.output):
            assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_manifest():
    manifest = Manifest.load(exports.folder())
    assert manifest.layers == (1, 2, 3, 4, 5) and manifest.heads == exports.HEADS
    assert manifest.class_names == tuple(exports.model().class_names)
    assert manifest.policy == lgvit_fast.Entropy(0.7)
    assert (manifest.precision, manifest.opset) == ("float32", segment_graph.OPSET)
    assert manifest.preprocessing.size == (32, 32)
    content = json.loads((exports.folder() / "manifest.json").read_text())
    assert content["made_with"]["torch"] == torch.__version__


def test_the_model_stays_as_it_was():
    """Its heads keep what they prepared for this machine, and its answers."""
    model = tiny_model(exits=[1], depth=2)
    x = images(2)
    expected, folded = model.infer(x).logits, model.exit_heads[0].folded
    assert segment_graph._folded(model.exit_heads[0]).folded is not folded
    assert model.exit_heads[0].folded is folded
    assert torch.equal(model.infer(x).logits, expected)


class Empty(torch.nn.Module):
    """A head of somebody's own."""

    def forward(self, patches, patch_grid):
        return patches


def with_own_head(model):
    model.exit_heads[1].perception = Empty()
    return model


def packed(model):
    return lgvit_fast.pack_(model)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda m: m.train(), {}, RuntimeError, "call model.eval"),
        (lambda m: m.double(), {}, ValueError, r"float64 on cpu.*model\.float\(\)\.cpu\(\)"),
        (lambda m: m.backbone, {}, ValueError, "VisionTransformer, expected an LGViT"),
        (packed, {}, ValueError, "packed.*before `pack_`"),
        (with_own_head, {}, ValueError, "exit 2 has a head of type Empty.*LocalPerceptionHead"),
        (lambda m: m, {"precision": "int4"}, ValueError, "precision='int4', expected"),
        (lambda m: m, {"format": "tflite"}, ValueError, "format='tflite', expected"),
    ],
    ids=["training", "float64", "no exits", "packed", "own head", "precision", "format"],
)
def test_what_cannot_be_exported(change, options, error, message, tmp_path):
    model = change(tiny_model(exits=[1, 2], depth=3))
    with pytest.raises(error, match=message):
        lgvit_fast.export(model, tmp_path / "exported", **options)
    assert not list(tmp_path.iterdir())


def test_onnx_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(RuntimeError, match=r"onnxscript is not installed.*pip install onnx"):
        lgvit_fast.export(tiny_model(exits=[1], depth=2), tmp_path / "exported")


@pytest.fixture
def instant(monkeypatch):
    """Stands in for torch's exporter: an empty graph at once."""
    made = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    monkeypatch.setattr(segment_graph, "to_onnx", lambda graph, example: made)
    return made


def test_an_export_replaces_an_export_and_nothing_else(instant, tmp_path):
    model, folder = tiny_model(exits=[1], depth=2), tmp_path / "deep" / "exported"
    assert lgvit_fast.export(model, folder) == folder
    (folder / "old").touch()
    lgvit_fast.export(model, folder)
    assert sorted(f.name for f in folder.iterdir()) == [
        "manifest.json", "segment_0.onnx", "segment_1.onnx",
    ]  # fmt: skip
    mine = tmp_path / "mine"
    mine.mkdir()
    lgvit_fast.export(model, mine)  # empty
    for other in (tmp_path, tmp_path / "file"):
        other.exists() or other.touch()
        with pytest.raises(FileExistsError, match="no exported model: name another folder"):
            lgvit_fast.export(model, other)


def test_an_export_that_fails_leaves_what_was_there(instant, monkeypatch, tmp_path):
    model = tiny_model(exits=[1], depth=2)
    lgvit_fast.export(model, tmp_path / "exported")
    before = (tmp_path / "exported" / "manifest.json").read_text()

    def fail(graph, example):
        if not graph.segment.is_first:
            raise OSError("disk full")
        return instant

    monkeypatch.setattr(segment_graph, "to_onnx", fail)
    for folder in ("exported", "another"):
        with pytest.raises(OSError, match="disk full"):
            lgvit_fast.export(model, tmp_path / folder)
    assert [f.name for f in tmp_path.iterdir()] == ["exported"]
    assert (tmp_path / "exported" / "manifest.json").read_text() == before


KILLED = """
import os, signal, sys
import onnx
import lgvit_fast
from lgvit_fast.runtimes import segment_graph
from tests.helpers import tiny_model

made = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
segment_graph.to_onnx = lambda graph, example: (
    made if graph.segment.is_first else os.kill(os.getpid(), signal.SIGKILL)
)
lgvit_fast.export(tiny_model(exits=[1], depth=2), sys.argv[1])
"""


def test_a_killed_export_leaves_no_half_folder(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "exported")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "exported").exists()

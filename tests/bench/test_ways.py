"""Every way answers, and answers what the model does; what is missing is named."""

import copy

import pytest
import torch

import lgvit_fast
from lgvit_fast.bench import ways as module
from lgvit_fast.bench.model import exported
from lgvit_fast.bench.ways import Subject, Way, in_torch, start_of, ways
from lgvit_fast.runtimes.loaders import RUNTIMES
from tests.helpers import images, tiny_model

SCRIPT = lgvit_fast.Replay([0, 0, 1, 2, 0])


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A model, and what all ways load."""
    folder = tmp_path_factory.mktemp("subject")
    model = tiny_model(exits=[2, 3])
    model.save_pretrained(folder / "model")
    chosen, _ = ways("cpu", compiled=False)
    dense, early, failed = exported(model, chosen, folder)
    assert not failed
    return model, Subject(str(folder / "model"), exits=(3,), dense=dense, exported=early)


def answers(way, subject, batch_size=2):
    """What the calls of one pass over five images return, before the next call overwrites it."""
    with torch.no_grad():
        calls = start_of(way, subject, batch_size)(images(5), SCRIPT, batch_size)
        return [copy.deepcopy(call()) for call in calls]


@pytest.mark.parametrize("way", ways("cpu", compiled=False)[0], ids=lambda way: way.name)
def test_every_way_answers_as_the_model(subject, way):
    model, given = subject
    found = answers(way, given)
    with torch.no_grad():
        expected = model.backbone(images(5)) if way.dense else model.infer(images(5), SCRIPT).logits
    if not way.in_batches:
        assert sum(len(part) for part in found) == 5
        return
    assert len(found) == 3
    got = torch.cat([torch.as_tensor(getattr(part, "logits", part)) for part in found])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_planned_exits_are_asked_alone(subject):
    _, given = subject
    assert module.PLANNED in [way.name for way in ways("cpu", planned=True)[0]]
    (found,) = answers(Way(module.PLANNED, module.DENSE), given, 5)
    assert set(found.exit_layer.tolist()) <= {3, 6}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_planned_exits_on_a_runtime(subject, runtime):
    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    _, given = subject
    name = f"{module.PLANNED}, {module.TITLES[runtime]}"
    (way,) = [way for way in ways("cpu", planned=True)[0] if way.name == name]
    assert not way.exported
    (found,) = answers(way, given, 5)
    assert set(found.exit_layer.tolist()) <= {3, 6}


def test_every_way_is_compared_with_a_dense_one_of_its_precision():
    for device in ("cpu", "cuda"):
        found, _ = ways(device, torch.bfloat16, precisions=("float32", "int8"))
        by_name = {way.name: way for way in found}
        assert len(by_name) == len(found) and found[0].name == "dense timm"
        for way in found:
            assert by_name[way.like].dense
            assert by_name[way.like].runtime == way.runtime
            if way.name != "published scheme, float32":
                assert by_name[way.like].precision == way.precision


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(
        module, "why_not", lambda runtime, precision: "not installed: pip install x"
    )
    found, left_out = ways("cpu", compiled=False, precisions=("float32", "int8"))
    assert not any(way.runtime for way in found)
    assert [way for way, _ in left_out] == [
        "ONNX Runtime", "OpenVINO", "ONNX Runtime, int8", "OpenVINO, int8",
    ]  # fmt: skip
    assert {reason for _, reason in left_out} == {"not installed: pip install x"}
    assert all("runs on the CPU" in reason for _, reason in ways("cuda")[1])


def test_the_published_scheme_is_measured_in_float32():
    model = tiny_model(exits=[2, 3]).to(torch.bfloat16)
    names = [way.name for way in ways("cpu", torch.bfloat16, compiled=False)[0]]
    assert "published scheme, float32" in names and "published scheme" not in names
    (call,) = in_torch("published scheme, float32", model, 5)(images(5).bfloat16(), SCRIPT, 5)
    assert call().dtype == torch.float32

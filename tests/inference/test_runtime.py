"""The engine on ONNX Runtime and OpenVINO: answers, the choice, what follows the weights."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lgvit_fast
from lgvit_fast import Engine
from lgvit_fast.cli import main
from lgvit_fast.deploy.manifest import Manifest
from lgvit_fast.inference import RuntimeTiming, exports, runtime_choice
from lgvit_fast.inference import engine as engine_module
from lgvit_fast.policies import Policy
from lgvit_fast.runtimes.loaders import RUNTIMES
from tests.deploy import exports as shared
from tests.helpers import images, tiny_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The user's cache folder, an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lgvit_fast" / "runtimes.json"


# Answers


@pytest.fixture(scope="module")
def engines():
    """Engines of `shared.model` on each runtime, its graphs from the folder that tests share."""
    manifest = Manifest.load(shared.folder())

    def graphs(model, image_size, asked):
        for index, layer in enumerate(manifest.layers):
            data = manifest.read(shared.folder(), index)
            proto = SimpleNamespace(SerializeToString=lambda data=data: data)
            yield SimpleNamespace(index=index, stop=layer), proto

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exports, "segment_graphs", graphs)
        made = {name: Engine(shared.model(), 8, runtime=name) for name in RUNTIMES}
        for engine in made.values():
            engine(images(1))
    return made


class LeaveByTensor(Policy):
    """Leaves at the second exit where the image's first logit is positive; written for torch alone."""

    def decide(self, step, state, exit_index):
        positive = step.logits[:, 0].gt(0).logical_and(step.valid)
        return step._replace(leave=positive & (exit_index == 1))


POLICIES = {
    "own": None,
    "confidence": lgvit_fast.Confidence(0.4),
    "an exit each": lgvit_fast.Confidence([0.9, 0.3, 0.9, 0.2]),
    "entropy": lgvit_fast.Entropy(1.2),
    "patience": lgvit_fast.Patience(2),
    "patient": lgvit_fast.PatientConfident(1.5, 2),
    "script": lgvit_fast.Replay(np.arange(21) % 5),
    "for tensors": LeaveByTensor(),
}


def assert_same(got, expected):
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-4, rtol=0, equal_nan=True)
    assert got.exit_index.tolist() == expected.exit_index.tolist()
    assert got.exit_layer.tolist() == expected.exit_layer.tolist()
    assert got.nonfinite.tolist() == expected.nonfinite.tolist()
    assert got.class_names == expected.class_names


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_answers_are_those_of_the_model(engines, runtime, policy):
    x = images(21)  # three parts of a batch of 8
    engine = engines[runtime]
    engine.reset_report()
    got = engine(x, policy)
    assert_same(got, shared.model().infer(x, policy))
    report = engine.report()
    assert list(report.left) == torch.bincount(got.exit_index, minlength=5).tolist()
    assert report.runtime == runtime and f"on {runtime}" in str(report)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_any_batch(engines, runtime):
    x = images(5)
    whole = engines[runtime](x)
    for row in range(5):
        assert_same(engines[runtime](x[row : row + 1]), whole[row])
    assert len(engines[runtime](x[:0])) == 0
    turned = x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2).requires_grad_()
    assert_same(engines[runtime](turned), whole)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_broken_images_are_flagged_alone(engines, runtime):
    x = images(5)
    x[1, 0, 3, 4], x[3, 2, 0, 0] = float("nan"), float("inf")
    got = engines[runtime](x)
    assert got.nonfinite.tolist() == [False, True, False, True, False]
    assert_same(got, shared.model().infer(x))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_autocast_is_refused_where_a_runtime_was_asked_for(engines, runtime):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=rf"{runtime}.*computes in float32.*torch\.bfloat16"),
    ):
        engines[runtime](images(2))


def test_planned_exits_and_their_thresholds():
    """From the model to the answer, with nothing in between replaced."""
    model = tiny_model(exits=[1, 2], depth=3)
    engine = Engine(model, 4, runtime="onnxruntime", exits=[2])
    policy = lgvit_fast.Confidence([0.6])
    expected = Engine(model, 4, runtime="torch", exits=[2])
    assert_same(engine(images(6), policy), expected(images(6), policy))
    assert [s.layer for s in engine.report().segments] == [2, 3]


# The choice


def graph_of(model, last):
    """An instant stand-in for an exported segment: pixel mean plus the classifier's bias."""
    bias = ", ".join(map(str, model.backbone.head.bias.tolist()))
    tokens = "" if last else ", float[N,3,32,32] tokens"
    copy = "" if last else "tokens = Identity(input)"
    text = f"""agraph (float[N,3,32,32] input) => (
        float[N,7] logits, float[N] confidence, float[N] entropy, int64[N] prediction,
        bool[N] valid{tokens}) <float[7] bias = {{{bias}}}, int64[3] axes = {{1, 2, 3}},
        int64[1] ahead = {{1}}, int64[1] classes = {{1}}> {{
        mean = ReduceMean<keepdims=0>(input, axes)
        column = Unsqueeze(mean, ahead)
        logits = Add(column, bias)
        confidence = ReduceMax<keepdims=0>(logits, classes)
        entropy = ReduceMin<keepdims=0>(logits, classes)
        prediction = ArgMax<axis=1, keepdims=0>(logits)
        nan = IsNaN(confidence)
        valid = Not(nan)
        {copy}
    }}"""
    return onnx.helper.make_model(
        onnx.parser.parse_graph(text),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=8,
    )


@pytest.fixture
def exported(monkeypatch):
    """A list of the exports made; each is instant and answers with the classifier's bias."""
    made = []

    def graphs(model, image_size, asked):
        made.append(image_size)
        ends = [*(model.exits[i].layer for i in asked), model.num_blocks]
        for index, layer in enumerate(ends):
            last = layer == model.num_blocks
            yield SimpleNamespace(index=index, stop=layer), graph_of(model, last)

    monkeypatch.setattr(exports, "segment_graphs", graphs)
    return made


@pytest.fixture
def speeds(monkeypatch):
    """What measuring gives, ms by batch size and runtime, and `calls`, the batches measured."""
    table = SimpleNamespace(calls=[])
    table.by_batch = {2: (3.0, 2.0, 1.0), 8: (1.0, 2.0, 3.0)}

    def measure(ways, x, exits):
        table.calls.append(len(x))
        times = table.by_batch[len(x)]
        return RuntimeTiming(len(x), tuple(x.shape[2:]), dict(zip(ways, times, strict=True)))

    monkeypatch.setattr(engine_module, "measure", measure)
    return table


def runs_on(engine, batch, size=(32, 32)):
    engine(images(batch, size), lgvit_fast.Replay([0] * batch))
    return engine.report().runtime


def test_auto_is_torch_until_it_is_warmed_up(exported):
    engine = Engine(tiny_model(exits=[1, 2], depth=3), 4)
    assert runs_on(engine, 2) == "torch" and not exported


def test_the_fastest_is_taken_for_the_nearest_batch_size(exported, speeds):
    engine = Engine(tiny_model(exits=[1, 2], depth=3), 16)
    engine.warm_up(images(2))
    assert engine.report().runtime == "openvino"
    assert [runs_on(engine, batch) for batch in (1, 2, 16)] == ["openvino"] * 3
    engine.warm_up(images(8))
    assert [runs_on(engine, n) for n in (1, 5, 6, 40)] == ["openvino", "openvino", "torch", "torch"]
    first, second = engine.report().timings
    assert first.milliseconds == {"torch": 3.0, "onnxruntime": 2.0, "openvino": 1.0}
    assert (first.batch_size, first.fastest) == (2, "openvino")
    assert (second.batch_size, second.fastest) == (8, "torch")
    assert "openvino chosen for batch 2 of 32x32: torch 3.00" in str(engine.report())


def test_another_image_size_runs_on_torch(exported, speeds):
    engine = Engine(tiny_model(exits=[1], depth=2, dynamic_img_size=True), 4)
    engine.warm_up(images(2))
    assert runs_on(engine, 2) == "openvino" and runs_on(engine, 2, (40, 32)) == "torch"


def test_a_choice_is_remembered(exported, speeds, cache):
    for _ in range(2):
        engine = Engine(tiny_model(exits=[1, 2], depth=3), 4)
        engine.warm_up(images(2))
        assert engine.report().runtime == "openvino"
    assert speeds.calls == [2] and len(exported) == 2  # the second only for the runtime chosen
    Engine(tiny_model(exits=[1], depth=3), 4).warm_up(images(2))  # another model
    Engine(tiny_model(exits=[1, 2], depth=3), 4, exits=[2]).warm_up(images(2))  # other exits
    Engine(tiny_model(exits=[1, 2], depth=3, num_heads=4), 4).warm_up(images(2))
    assert speeds.calls == [2] * 4
    assert len(json.loads(cache.read_text())) == 4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        Engine(tiny_model(exits=[1, 2], depth=3), 4).warm_up(images(2))
    finally:
        torch.set_num_threads(threads)
    assert speeds.calls == [2] * 5


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "{}", '[{"facts": {}, "milliseconds": []}]', "\x00"]
)
def test_a_corrupt_cache_is_ignored_and_replaced(exported, speeds, cache, content, capsys):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    assert main(["info"]) == 0
    engine = Engine(tiny_model(exits=[1], depth=2), 4)
    engine.warm_up(images(2))
    assert engine.report().runtime == "openvino"
    assert len(runtime_choice.remembered()) == 1


def test_an_unwritable_cache_is_ignored(exported, speeds, cache):
    cache.parent.parent.mkdir()
    cache.parent.write_text("a file where the folder should be")
    engine = Engine(tiny_model(exits=[1], depth=2), 4)
    engine.warm_up(images(2))
    assert engine.report().runtime == "openvino"


def test_info_says_what_was_chosen(exported, speeds, capsys):
    Engine(tiny_model(exits=[1], depth=2), 4).warm_up(images(2))
    assert main(["info"]) == 0
    text = capsys.readouterr().out.partition("runtimes (CPU)\n")[2]
    assert "onnxruntime" in text and "openvino (torch 3.00, onnxruntime 2.00" in text
    assert main(["info", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["runtimes"]["chosen"]
    assert (row["fastest"], row["batch_size"], row["image_size"]) == ("openvino", 2, [32, 32])


def test_measuring_runs_every_runtime(exported):
    engine = Engine(tiny_model(exits=[1, 2], depth=3), 4)
    engine.warm_up(images(3))
    (timing,) = engine.report().timings
    assert set(timing.milliseconds) == {"torch", *RUNTIMES}
    assert all(ms > 0 for ms in timing.milliseconds.values())
    assert engine.report().segments[0].runs == 0


def test_what_is_not_chosen_is_let_go(exported, speeds):
    engine = Engine(tiny_model(exits=[1], depth=2), 4)
    engine.warm_up(images(2))
    assert [runtime for runtime, _ in engine._exports._sets] == ["openvino"]
    assert not engine._segments and engine._adapter is None
    engine.release()
    assert not engine._exports._sets
    assert runs_on(engine, 2) == "openvino"


@pytest.mark.parametrize("write", ["in place", "replaced", "through data"])
def test_weights_that_change_are_exported_anew(exported, speeds, write):
    model = tiny_model(exits=[1], depth=2)
    engine = Engine(model, 32)
    engine.warm_up(images(2))
    x, script = torch.zeros(32, 3, 32, 32), lgvit_fast.Replay([1] * 32)
    before, count = engine(x, script).logits, len(exported)
    torch.testing.assert_close(before[0], model.backbone.head.bias.detach())
    assert len(exported) == count
    with torch.no_grad():
        if write == "in place":
            model.backbone.head.bias.add_(1)
        elif write == "replaced":
            model.backbone.head.bias = torch.nn.Parameter(model.backbone.head.bias + 1)
        else:
            model.backbone.head.bias.data.add_(1)
    torch.testing.assert_close(engine(x, script).logits, before + 1)
    assert len(exported) == count + 1


def test_refresh_exports_now(exported, speeds):
    model = tiny_model(exits=[1], depth=2)
    engine = Engine(model, 4)
    engine.warm_up(images(2))
    count = len(exported)
    engine.refresh()
    assert len(exported) == count + 1 and runs_on(engine, 2) == "openvino"
    assert len(exported) == count + 1


def test_autocast_takes_torch_and_goes_back(exported, speeds):
    engine = Engine(tiny_model(exits=[1], depth=2), 4)
    engine.warm_up(images(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert runs_on(engine, 2) == "torch"
    assert runs_on(engine, 2) == "openvino"


@pytest.mark.parametrize("options", [{"graphs": "eager"}, {"runtime": "torch"}], ids=str)
def test_no_choice_where_torch_is_meant(exported, options):
    engine = Engine(tiny_model(exits=[1], depth=2), 4, **options)
    engine.warm_up(images(2))
    assert runs_on(engine, 2) == "torch" and not exported
    assert not Engine(engine.model, compile=True)._may_choose()


def test_an_export_that_fails_leaves_torch(monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("no such operator")
        yield

    monkeypatch.setattr(exports, "segment_graphs", fail)
    engine = Engine(tiny_model(exits=[1], depth=2), 4)
    engine.warm_up(images(2))
    assert runs_on(engine, 2) == "torch" and "no such operator" in caplog.text
    with pytest.raises(RuntimeError, match="no such operator"):
        Engine(tiny_model(exits=[1], depth=2), 4, runtime="openvino")(images(2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_threads_it_lacks(exported, speeds):
    model = tiny_model(exits=[1], depth=2)
    auto, asked = Engine(model, 4), Engine(model, 4, runtime="onnxruntime")
    auto.warm_up(images(2))
    runs_on(asked, 2)
    child = os.fork()
    if not child:
        signal.alarm(20)  # ends the child if it waits for ever
        torch.set_num_threads(1)
        try:
            asked(images(2))
        except RuntimeError as error:
            os._exit(0 if runs_on(auto, 2) == "torch" and "survive the fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


SIGNALLED = """
import faulthandler, gc, signal
import onnx
from onnx import TensorProto, helper
from lgvit_fast.runtimes.loaders import load_runtime

faulthandler.enable()
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "logits")]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["logits"])], "g", ends[:1], ends[1:])
data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
first, second = (load_runtime("openvino", 1)[1](data.SerializeToString()) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no signals")
def test_a_signal_after_openvino_was_let_go():
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


# What is refused


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda m: m,
            {"runtime": "tensorrt"},
            "runtime='tensorrt', expected one of 'auto', 'torch'",
        ),
        (lambda m: m.bfloat16(), {}, r"runtime='openvino': .*bfloat16.*model\.float\(\)\.cpu\(\)"),
        (lambda m: m.to("meta"), {}, "runtime='openvino': .*on meta"),
        (lgvit_fast.inference.pack_, {}, "runtime='openvino': the model is packed"),
        (lambda m: m, {"compile": True}, "runtime='openvino' with graphs or compile"),
        (lambda m: m, {"graphs": "eager"}, "runtime='openvino' with graphs or compile"),
    ],
    ids=["unknown", "bfloat16", "device", "packed", "compile", "graphs"],
)
def test_what_a_runtime_cannot_do(change, options, message):
    model = change(tiny_model(exits=[1], depth=2))
    with pytest.raises(ValueError, match=message):
        Engine(model, **{"runtime": "openvino", **options})


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_missing_runtime_is_said_with_its_cure(monkeypatch, exported, runtime):
    from lgvit_fast.runtimes import loaders

    find = loaders.importlib.util.find_spec
    monkeypatch.setattr(
        loaders.importlib.util, "find_spec", lambda name: None if name == runtime else find(name)
    )
    model = tiny_model(exits=[1], depth=2)
    with pytest.raises(RuntimeError, match=f"{runtime} is not installed: pip install {runtime}"):
        Engine(model, runtime=runtime)
    engine = Engine(model, 4)
    engine.warm_up(images(2))
    (timing,) = engine.report().timings
    assert set(timing.milliseconds) == {"torch", *RUNTIMES} - {runtime}


def test_a_missing_exporter_is_said_with_its_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model = tiny_model(exits=[1], depth=2)
    with pytest.raises(RuntimeError, match=r"onnxscript is not installed.*pip install onnx"):
        Engine(model, runtime="openvino")
    engine = Engine(model, 4)
    engine.warm_up(images(2))
    assert engine.report().runtime == "torch" and not engine.report().timings


@pytest.mark.gpu
def test_on_a_gpu_auto_is_torch(exported):
    model = tiny_model(exits=[1], depth=2).cuda()
    engine = Engine(model, 4, graphs=False)
    engine.warm_up(images(2).cuda())
    assert engine.report().runtime == "torch" and not exported
    with pytest.raises(ValueError, match=r"runtime='openvino': .*on cuda:0"):
        Engine(model, runtime="openvino")

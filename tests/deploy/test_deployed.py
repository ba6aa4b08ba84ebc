"""The runtime side: `infer`'s answers, without torch."""

import copy
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lgvit_fast
from lgvit_fast.data.transforms import InputSpec, eval_transform
from lgvit_fast.deploy import Deployed
from lgvit_fast.evaluation import record
from lgvit_fast.evaluation.learning import fit_learned
from lgvit_fast.runtimes.loaders import RUNTIMES, why_missing
from tests.deploy import exports
from tests.helpers import images

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

POLICIES = {
    "confidence": lgvit_fast.Confidence(0.6),
    "confidence an exit": lgvit_fast.Confidence([0.9, 0.8, 0.5, 0.7]),
    "entropy": lgvit_fast.Entropy(0.9),
    "patience 1": lgvit_fast.Patience(1),
    "patience 2": lgvit_fast.Patience(2),
    "patient confident": lgvit_fast.PatientConfident(1.2, 2),
    "nobody": lgvit_fast.Policy(),
    "everybody": lgvit_fast.Confidence(0.0),
    "none given": None,
}


def open_export(runtime, folder=None):
    if reason := why_missing(runtime):
        pytest.skip(reason)
    return Deployed(folder or exports.folder(), runtime)


@pytest.fixture(scope="module", params=RUNTIMES)
def deployed(request):
    return open_export(request.param)


def assert_same(answers, expected):
    """The answers of `infer`, whose random logits have no score within 1e-5 of a threshold."""
    np.testing.assert_allclose(answers.logits, expected.logits.numpy(), atol=1e-4)
    for name in ("exit_index", "exit_layer", "nonfinite"):
        assert getattr(answers, name).tolist() == getattr(expected, name).tolist()
    finite = ~answers.nonfinite
    assert answers.prediction[finite].tolist() == expected.prediction[finite].tolist()
    np.testing.assert_allclose(answers.confidence, expected.confidence.numpy(), atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [0, 1, 2, 13])
def test_answers_are_those_of_infer(deployed, policy, batch):
    x = images(batch, seed=batch)
    expected = exports.model().infer(x, POLICIES[policy])
    answers = deployed(x.numpy(), POLICIES[policy])
    assert_same(answers, expected)
    assert answers.logits.dtype == answers.confidence.dtype == np.float32
    assert answers.exit_index.dtype == answers.prediction.dtype == np.int64


def test_the_policies_differ(deployed):
    """Else the test above would say little."""
    x = images(13, seed=13).numpy()
    left = {tuple(deployed(x, policy).exit_index.tolist()) for policy in POLICIES.values()}
    assert len(left) >= 7
    assert len(set(deployed(x, POLICIES["confidence"]).exit_index.tolist())) >= 3


def test_scripted_exits(deployed):
    script = [4, 0, 3, 3, 1, 2, 0, 4, 1]
    policy = lgvit_fast.Replay(script)
    x = images(len(script))
    answers = deployed(x.numpy(), policy)
    assert answers.exit_index.tolist() == script
    assert answers.exit_layer.tolist() == [i + 1 for i in script]
    assert_same(answers, exports.model().infer(x, policy))


def test_an_answer_does_not_depend_on_the_batch(deployed):
    x = images(9).numpy()
    together = deployed(x, POLICIES["patient confident"])
    for row in range(9):
        alone = deployed(x[row : row + 1], POLICIES["patient confident"])
        np.testing.assert_allclose(alone.logits[0], together.logits[row], atol=1e-5)
        assert alone.exit_index[0] == together.exit_index[row]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("policy", ["confidence", "entropy", "patience 1", "everybody"])
def test_a_broken_image_runs_to_the_end_and_is_flagged(deployed, broken, policy):
    x = images(5)
    whole = deployed(x.numpy(), POLICIES[policy])
    x[2, 1, 3, 4] = float(broken)
    answers = deployed(x.numpy(), POLICIES[policy])
    assert answers.nonfinite.tolist() == [False, False, True, False, False]
    assert answers.exit_index[2] == 4 and np.isnan(answers.logits[2]).all()
    assert np.isnan(answers.confidence[2])
    others = [0, 1, 3, 4]  # as if it were not there
    np.testing.assert_allclose(answers.logits[others], whole.logits[others], atol=1e-5)
    assert answers.exit_index[others].tolist() == whole.exit_index[others].tolist()
    if np.isnan(broken):
        assert_same(answers, exports.model().infer(x, POLICIES[policy]))


def test_large_finite_pixels_are_not_flagged(deployed):
    x = images(2).numpy()
    x[0] = 3e38 / x[0].size
    x[0, 0] *= 2000  # the sum overflows, no pixel does
    assert np.isfinite(x).all()
    assert not deployed(x, lgvit_fast.Policy()).nonfinite[1]


def test_tokens_are_not_copied(deployed):
    """What a graph gives is the runtime's own memory, which compaction may write to."""
    tokens = deployed._segments[0].graph.run(images(3).numpy()).tokens
    assert not tokens.flags.owndata and tokens.flags.writeable and tokens.flags.c_contiguous


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_head_that_meets_infinity(runtime):
    """Logits of one exit overflow: nobody leaves there, all are flagged, the next exit answers."""
    deployed = open_export(runtime)
    segment = deployed._segments[1]

    def overflow(x):
        out = segment.graph.run(x)
        logits = out.logits.copy()
        logits[:, 2] = np.inf
        return out._replace(logits=logits, valid=np.zeros(len(x), bool))

    broken = segment.graph._replace(run=overflow)
    deployed._segments[1] = segment._replace(graph=broken)
    answers = deployed(images(4).numpy(), lgvit_fast.Confidence([1.0, 0.0, 0.0, 0.0]))
    assert answers.exit_index.tolist() == [2] * 4
    assert answers.nonfinite.all() and np.isfinite(answers.logits).all()


def test_every_exit(deployed):
    x = images(3)
    with torch.no_grad():
        out = exports.model().forward_exits(x)
    expected = torch.stack((*out.exits, out.final)).numpy()
    np.testing.assert_allclose(deployed.forward_exits(x.numpy()), expected, atol=1e-4)
    assert deployed.forward_exits(x[:0].numpy()).shape == (5, 0, 7)


def test_facts_of_the_model(deployed):
    model = exports.model()
    assert [(e.layer, e.head) for e in deployed.exits] == [(e.layer, e.head) for e in model.exits]
    assert (deployed.num_blocks, deployed.num_classes) == (5, 7)
    assert list(deployed.class_names) == model.class_names
    assert deployed.policy == lgvit_fast.Entropy(0.7)
    deployed.policy = lgvit_fast.Patience(2)
    assert deployed.policy == lgvit_fast.Patience(2)
    deployed.policy = lgvit_fast.Entropy(0.7)


def test_files(deployed, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    transform = eval_transform(InputSpec.of(exports.model().backbone))
    x = torch.stack([transform(Image.open(path)) for path in paths])
    script = lgvit_fast.Replay([4, 0, 1, 2, 3])
    for policy in (None, script):
        assert_same(deployed.predict(paths, policy, batch_size=2), exports.model().infer(x, policy))
    assert deployed.predict([]).logits.shape == (0, 7)
    with pytest.raises(ValueError, match="expected a list of files"):
        deployed.predict(str(paths[0]))
    with pytest.raises(FileNotFoundError):
        deployed.predict([tmp_path / "none.png"])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_swin(runtime):
    deployed = open_export(runtime, exports.swin_folder())
    x = images(6, (48, 48))
    for policy in (lgvit_fast.Confidence(0.4), lgvit_fast.Replay([0, 1, 2, 2, 1, 0])):
        assert_same(deployed(x.numpy(), policy), exports.swin().infer(x, policy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: torch.from_numpy(x), "images is a Tensor, expected a NumPy array"),
        (lambda x: x.astype(np.float64), r"float64, expected float32"),
        (lambda x: x[0], r"shape \(3, 32, 32\), expected \[B, 3, 32, 32\]"),
        (lambda x: x[:, :1], r"shape \(2, 1, 32, 32\), expected \[B, 3, 32, 32\]"),
        (lambda x: x[:, :, :31], r"shape \(2, 3, 31, 32\), expected \[B, 3, 32, 32\]"),
    ],
)
def test_other_images(deployed, change, message):
    x = images(2).numpy()
    for call in (deployed, deployed.forward_exits):
        with pytest.raises(ValueError, match=message):
            call(change(x))


def test_images_that_may_not_be_written(deployed):
    x = images(2).numpy()
    expected = deployed(x).logits
    x.flags.writeable = False
    assert np.array_equal(deployed(x).logits, expected)


def test_strided_images(deployed):
    x = images(3)
    strided = np.asfortranarray(x.numpy())
    assert_same(deployed(strided), exports.model().infer(x))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lgvit_fast.Confidence([0.5] * 3), "3 entries, the model has 4 exits"),
        (0.8, "policy=0.8, expected a lgvit_fast policy"),
        (lgvit_fast.Replay([0]), "scripts 1 images, the batch has 2"),
    ],
)
def test_other_policies(deployed, policy, message):
    with pytest.raises(ValueError, match=message):
        deployed(images(2).numpy(), policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, "runtime='tensorrt', expected auto, onnxruntime or openvino"),
        ({"threads": 0}, "threads=0, expected at least 1"),
    ],
)
def test_other_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Deployed(exports.folder(), **options)


def test_a_runtime_that_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="openvino is not installed: pip install openvino"):
        Deployed(exports.folder(), "openvino")
    with pytest.raises(RuntimeError, match=r"pip install onnxruntime or .* pip install openvino"):
        Deployed(exports.folder())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_graph_of_something_else(runtime, tmp_path):
    """Whole, of the right hash, and no graph of a segment."""
    folder = shutil.copytree(exports.folder(), tmp_path / "copy")
    content = json.loads((folder / "manifest.json").read_text())
    swin = json.loads((exports.swin_folder() / "manifest.json").read_text())
    shutil.copy(exports.swin_folder() / "segment_0.onnx", folder)
    content["segments"][0] = swin["segments"][0]
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"takes images \(3, 48, 48\), the manifest says"):
        open_export(runtime, folder)


def test_threads_take_turns(deployed):
    x = images(8)
    script = lgvit_fast.Replay([0, 1, 2, 3, 4, 0, 1, 2])
    expected = exports.model().infer(x, script)
    found = []

    def work():
        found.extend(deployed(x.numpy(), script) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for answers in found:
        assert_same(answers, expected)


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "torchvision", "safetensors", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import numpy as np
import lgvit_fast
from lgvit_fast.deploy import Deployed

folder, picture, runtime = sys.argv[1:]
deployed = Deployed(folder, runtime)
images = np.load(picture.replace(".png", ".npy"))
for policy in (
    None, lgvit_fast.Confidence(0.6), lgvit_fast.Entropy(0.9), lgvit_fast.Patience(2),
    lgvit_fast.PatientConfident(1.2, 2), lgvit_fast.Replay([0, 1, 2, 3, 4, 4]),
):
    print(deployed(images, policy).exit_index.tolist())
print(deployed.predict([picture]).prediction.tolist())
from lgvit_fast.cli import main
assert main(["predict", folder, picture, "--policy", "confidence", "--threshold", "0.5"]) == 0
assert not {"torch", "timm"} & set(sys.modules)
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_where_torch_and_timm_cannot_be_imported(runtime, tmp_path):
    deployed = open_export(runtime)
    x = images(6).numpy()
    picture = tmp_path / "picture.png"
    np.save(tmp_path / "picture.npy", x)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(picture)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(exports.folder()), str(picture), runtime]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, prediction, row = done.stdout.splitlines()
    policies = (
        *(None, lgvit_fast.Confidence(0.6), lgvit_fast.Entropy(0.9), lgvit_fast.Patience(2)),
        *(lgvit_fast.PatientConfident(1.2, 2), lgvit_fast.Replay([0, 1, 2, 3, 4, 4])),
    )
    assert lines == [str(deployed(x, policy).exit_index.tolist()) for policy in policies]
    expected = deployed.predict([picture]).prediction.tolist()
    assert prediction == str(expected)
    assert json.loads(row)["path"] == str(picture)


MEMORY = """
import sys

import numpy as np

from lgvit_fast import Replay
from lgvit_fast.deploy import Deployed

def resident():
    return int(open("/proc/self/statm").read().split()[1])

deployed = Deployed(sys.argv[1], "onnxruntime", threads=1)
images = np.zeros((512, 3, 32, 32), np.float32)
begun = resident()
deployed(images, Replay([0] * 512))
first = resident() - begun
deployed(images, Replay([4] * 512))
print(first, resident() - begun)
"""


def test_graphs_share_the_memory_of_activations():
    command = [sys.executable, "-c", MEMORY, str(exports.folder())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, all_five = map(int, done.stdout.split())
    assert all_five < 2 * first


@pytest.mark.parametrize(
    ("version", "setting"), [("1.24.1", "allow_spinning"), ("1.32.0", "spin_dur")]
)
def test_threads_do_not_spin_while_another_graph_works(monkeypatch, version, setting):
    onnxruntime = pytest.importorskip("onnxruntime")
    given = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            given.append(key)
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    open_export("onnxruntime")
    assert any(setting in key for key in given)


def test_the_loop_of_the_document(tmp_path, monkeypatch):
    """docs/deploy.md has a host loop for other languages: it is run as it stands."""
    open_export("onnxruntime")
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    *_, loop = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "exported").symlink_to(exports.folder())
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(loop, "docs/deploy.md", "exec"), names)
    x = images(13)
    for threshold in (0.0, 0.6, 0.9, 1.0):
        expected = exports.model().infer(x, lgvit_fast.Confidence(threshold))
        logits, layer = names["classify"](x.numpy(), threshold)
        assert layer.tolist() == expected.exit_layer.tolist()
        np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4)


def test_the_learned_rule_answers_as_in_torch(deployed):
    model = exports.model()
    recording = record(model, images(120, seed=5).split(40))
    fitted = fit_learned(recording)
    counts = set()
    for threshold in (-2.0, -0.5, 0.5):
        policy = dataclasses.replace(fitted, threshold=threshold)
        expected = model.infer(images(40), policy)
        answers = deployed(images(40).numpy(), policy)
        counts |= set(expected.exit_index.tolist())
        assert answers.exit_index.tolist() == expected.exit_index.tolist()
        np.testing.assert_allclose(answers.logits, expected.logits.numpy(), atol=2e-4)
        assert answers.prediction.tolist() == expected.prediction.tolist()
        np.testing.assert_allclose(answers.confidence, expected.confidence.numpy(), atol=1e-4)
    assert len(counts) > 1


def test_images_are_counted_where_they_leave(deployed):
    deployed.reset_left()
    deployed(images(3).numpy(), lgvit_fast.Replay([0, 4, 1]))
    deployed(images(2).numpy(), lgvit_fast.Replay([1, 1]))
    assert deployed.left == (1, 3, 0, 0, 1)
    deployed.reset_left()
    assert sum(deployed.left) == 0


def test_the_likeliest_classes(deployed):
    x = images(4)
    answers, expected = deployed(x.numpy()), exports.model().infer(x)
    assert answers.topk(3).classes.tolist() == expected.topk(3).classes.tolist()
    np.testing.assert_allclose(
        answers.topk(3).probabilities, expected.topk(3).probabilities.numpy(), atol=1e-5
    )


def test_policy_and_certificate_travel_with_the_export(tmp_path):
    model = copy.deepcopy(exports.model())
    found = lgvit_fast.calibrate(
        model, [images(60, seed=n) for n in range(10)], min_agreement=60, confidence=0.8
    )
    model.policy, model.certificate = found.policy, found.certificate
    lgvit_fast.export(model, tmp_path / "exported")
    deployed = open_export("onnxruntime", tmp_path / "exported")
    assert deployed.policy == found.policy
    assert deployed.certificate == found.certificate
    deployed(images(20).numpy())
    assert deployed.certificate.check(deployed.left).alike

"""int8 exports: the same answers but for few, for each image alone, refused where they do not pay."""

import dataclasses
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lgvit_fast
from lgvit_fast.data import Batch, Digits, InputSpec
from lgvit_fast.deploy import Deployed, int8_export
from lgvit_fast.deploy.calibration_images import calibration_images
from lgvit_fast.deploy.int8 import quantize
from lgvit_fast.deploy.int8_export import Int8Refused
from lgvit_fast.deploy.manifest import Manifest
from lgvit_fast.evaluation import record
from lgvit_fast.evaluation.exported import ExportedModel
from lgvit_fast.runtimes.loaders import RUNTIMES, _row_scales, openvino_core
from tests.deploy import exports
from tests.helpers import images, tiny_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

FAST = {"float32": {"onnxruntime": {1: 3.0, 16: 2.0}}, "int8": {"openvino": {1: 1.0, 16: 1.0}}}
SLOW = {"float32": {"onnxruntime": {1: 3.0, 16: 2.0}}, "int8": {"openvino": {1: 3.25, 16: 2.5}}}
EXPORTS = {
    "vit, every head": (exports.model, exports.folder),
    "swin": (exports.swin, exports.swin_folder),
}


@pytest.fixture(autouse=True)
def a_machine_that_gains(monkeypatch):
    """Times are no matter of these tests: they get figures, not a stopwatch."""
    monkeypatch.setattr(int8_export, "measure_times", lambda *arguments: FAST)


def digits(split):
    model = trained()
    source = Digits(split, InputSpec.of(model.backbone))
    batch = source.__getitems__([(0, place) for place in range(len(source))])
    return batch.images, batch.targets


@cache
def trained() -> lgvit_fast.LGViT:
    """Two blocks with an exit between, trained on the digits for a few seconds."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = lgvit_fast.create_model(
        "vit_tiny_patch16_224", num_classes=10, exits=[1], heads=["gah_1"], **size
    )
    source = Digits("train", InputSpec.of(model.backbone))
    batch = source.__getitems__([(0, place) for place in range(len(source))])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    model.train()
    for _ in range(18):
        for chosen in torch.randperm(len(source)).split(96):
            outputs = model(batch.images[chosen])
            loss = sum(
                torch.nn.functional.cross_entropy(logits, batch.targets[chosen])
                for logits in (*outputs.exits, outputs.final)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.policy = lgvit_fast.Confidence(0.8)
    return model.eval()


@cache
def float32() -> Path:
    """`trained` in float32; an export takes seconds, making one int8 does not."""
    return lgvit_fast.export(trained(), exports._temporary() / "digits")


def converted(float32, name, calibration, force=False) -> Path:
    """A float32 export in int8."""
    output = exports._temporary() / name
    output.mkdir()
    int8_export.convert(float32, output, calibration.numpy(), force)
    return output


@cache
def folder() -> Path:
    """`trained` in int8."""
    return converted(float32(), "digits int8", digits("train")[0][:300])


@cache
def in_int8(name) -> Path:
    """One of `EXPORTS`; weights are random, so classes may well change."""
    model, full = EXPORTS[name]
    calibration = images(100, InputSpec.of(model().backbone).size)
    return converted(full(), f"{name} int8", calibration, force=True)


class TestQuantize:
    def graph(self, **weights):
        """`x @ first @ second^T`."""
        tensors = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
        nodes = [
            onnx.helper.make_node("MatMul", ["x", "first"], ["y"]),
            onnx.helper.make_node("Gemm", ["y", "second"], ["z"], transB=1),
        ]
        value = onnx.helper.make_tensor_value_info
        ends = [value("x", 1, ["n", 32])], [value("z", 1, ["n", 3])]
        graph = onnx.helper.make_graph(nodes, "graph", *ends, tensors)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])

    def weights(self):
        random = np.random.default_rng(0)
        first = random.standard_normal((32, 8), np.float32) * np.logspace(-3, 3, 8, dtype="f")
        first[:, 2] = 0
        return {"first": first, "second": random.standard_normal((3, 8), np.float32)}

    def test_each_column_within_half_a_step(self):
        weights = self.weights()
        given = self.graph(**weights)
        before = given.SerializeToString()
        made = quantize(given)
        onnx.checker.check_model(made, full_check=True)
        assert given.SerializeToString() == before
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
        assert sorted(stored) == ["first.int8", "first.scale", "second.int8", "second.scale"]
        for name, axis in (("first", 1), ("second", 0)):
            values, scale = stored[f"{name}.int8"], stored[f"{name}.scale"]
            assert values.dtype == np.int8 and np.abs(values.astype(int)).max() == 127
            scale = np.expand_dims(scale, 1 - axis)
            error = np.abs(values * scale - weights[name])
            assert (error <= 0.5001 * scale).all()
        assert (stored["first.int8"][:, 2] == 0).all()

    def test_what_cannot_be(self):
        weights = self.weights()
        weights["first"][3, 4] = np.nan
        with pytest.raises(ValueError, match="the weight first holds NaN"):
            quantize(self.graph(**weights))
        bare = self.graph(**self.weights())
        del bare.graph.node[:]
        with pytest.raises(ValueError, match="nothing to quantize"):
            quantize(bare)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_accuracy_and_agreement_on_held_out_images(runtime):
    x, targets = digits("validation")
    deployed = Deployed(folder(), runtime)
    int8 = deployed.forward_exits(x.numpy()).argmax(-1)
    outputs = trained().forward_exits(x)
    float32 = torch.stack((*outputs.exits, outputs.final)).argmax(-1).numpy()
    right = (float32[-1] == targets.numpy()).mean()
    assert right > 0.85  # else the rest says little
    assert (int8[-1] == targets.numpy()).mean() > right - 0.01
    assert (int8 == float32).mean(-1).min() >= 0.97
    # under the fitted policy as many leave as did
    left = np.bincount(deployed(x.numpy()).exit_index, minlength=2)
    expected = trained().infer(x).exit_index.bincount(minlength=2).numpy()
    assert np.abs(left - expected).max() <= 0.03 * len(x)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", EXPORTS)
def test_an_image_does_not_depend_on_its_batch(name, runtime):
    deployed = Deployed(in_int8(name), runtime)
    x = images(7, deployed.manifest.preprocessing.size).numpy()
    together = deployed.forward_exits(x)
    outliers = x.copy()
    outliers[1:4] *= 1000
    outliers[4] = np.nan
    scale = np.abs(together).max()
    assert np.abs(deployed.forward_exits(outliers)[:, 0] - together[:, 0]).max() < 1e-5 * scale
    for place in range(7):
        alone = deployed.forward_exits(x[place : place + 1])[:, 0]
        assert np.abs(alone - together[:, place]).max() < 1e-5 * scale
    every = lgvit_fast.Replay([0, 1, 2, 2, 1, 0, 2])
    whole = deployed(x, every)
    for place in range(7):
        alone = deployed(x[place : place + 1], lgvit_fast.Replay([every.exit_index[place]]))
        assert np.abs(alone.logits[0] - whole.logits[place]).max() < 1e-5 * scale


@pytest.mark.parametrize("name", EXPORTS)
def test_every_exit_is_near_float32(name):
    model, full = EXPORTS[name]
    x = images(12, InputSpec.of(model().backbone).size)
    expected = Deployed(full()).forward_exits(x.numpy())
    for runtime in RUNTIMES:
        found = Deployed(in_int8(name), runtime).forward_exits(x.numpy())
        for exit in range(len(expected)):
            spread = expected[exit].std()
            assert np.abs(found[exit] - expected[exit]).mean() < 0.1 * spread, (runtime, exit)
            assert np.abs(found[exit] - expected[exit]).max() > 0  # it is not float32


def test_int8_weights_stand_in_every_graph():
    for index, segment in enumerate(Deployed(in_int8("vit, every head")).manifest.segments):
        graph = onnx.load(in_int8("vit, every head") / segment.file).graph
        kinds = {t.data_type for t in graph.initializer if len(t.dims) == 2}
        assert onnx.TensorProto.INT8 in kinds, index
        large = [t.name for t in graph.initializer if len(t.dims) == 2 and t.data_type == 1]
        assert not large
    sizes = [
        sum(file.stat().st_size for file in place.glob("*.onnx"))
        for place in (in_int8("vit, every head"), exports.folder())
    ]
    assert sizes[0] < 0.5 * sizes[1]


def test_auto_takes_the_runtime_that_multiplies_in_int8(monkeypatch):
    from lgvit_fast.runtimes import loaders as runtimes

    assert Deployed(folder()).runtime == "openvino"
    assert Deployed(exports.folder()).runtime == "onnxruntime"
    monkeypatch.setattr(runtimes, "why_missing", lambda name: "no" if name == "openvino" else None)
    assert Deployed(folder()).runtime == "onnxruntime"


def test_int8_weights_set_how_many_values_share_a_scale():
    core = openvino_core()
    for place, expected in ((folder(), [64]), (exports.folder(), [])):
        model = core.read_model(model=(place / "segment_1.onnx").read_bytes())
        assert list(_row_scales(model).values()) == expected


class TestRefusal:
    def test_no_gain(self, tmp_path, monkeypatch):
        model = tiny_model(exits=[1], heads=["linear"], depth=2)
        monkeypatch.setattr(int8_export, "measure_times", lambda *arguments: SLOW)

        def export(**options):
            return lgvit_fast.export(
                model, tmp_path / "out", precision="int8", calibration=images(120), **options
            )

        with pytest.raises(Int8Refused) as caught:
            export()
        text = str(caught.value)
        assert "gains no time" in text and "force=True" in text and "--force" in text
        assert "3.25 ms an image in batches of 1 (float32 3.00)" in text
        assert caught.value.measured.images == 120
        assert not list(tmp_path.iterdir())

        made = export(force=True)
        assert [file.name for file in tmp_path.iterdir()] == ["out"]
        manifest = (made / "manifest.json").read_bytes()
        figures = json.loads(manifest)["int8"]
        assert figures["forced"] is True
        assert figures["milliseconds"]["int8"]["openvino"] == {"1": 3.25, "16": 2.5}
        assert len(figures["agreement"]) == 2 and figures["images"] == 120
        assert Deployed(made)(images(3).numpy()).logits.shape == (3, 7)
        with pytest.raises(Int8Refused):  # and leaves what was there
            export()
        assert (made / "manifest.json").read_bytes() == manifest

    def test_a_gain_at_one_batch_size_is_a_gain(self):
        times = {"float32": SLOW["float32"], "int8": {"openvino": {1: 3.5, 16: 1.5}}}
        assert not int8_export.Measured(100, (99.0,), 0.1, times, "openvino").faults

    def test_lost_answers(self, monkeypatch):
        def coarse(proto):
            """Weights of 0 and +-1: what no model survives."""
            made = quantize(proto)
            for tensor in made.graph.initializer:
                if tensor.data_type == onnx.TensorProto.INT8:
                    values = onnx.numpy_helper.to_array(tensor)
                    coarser = np.where(np.abs(values) > 126, np.sign(values), 0).astype(np.int8)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(coarser, tensor.name))
            return made

        monkeypatch.setattr(int8_export, "quantize", coarse)
        x = digits("train")[0][:120]
        with pytest.raises(Int8Refused, match=r"at full depth it gives .* % of 120 images .* 97 %"):
            converted(float32(), "coarse", x)
        made = converted(float32(), "forced", x, force=True)
        assert json.loads((made / "manifest.json").read_text())["int8"]["agreement"][-1] < 97


def test_times_of_every_runtime(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(int8_export, "_ROUNDS", {1: 1, 16: 1})
    times = int8_export.measure_times(folder(), folder(), digits("train")[0][:16].numpy())
    assert {name: set(found) for name, found in times.items()} == {
        "float32": set(RUNTIMES),
        "int8": {"openvino"},
    }
    assert all(
        ms > 0 for found in times.values() for sizes in found.values() for ms in sizes.values()
    )


class TestCalibrationImages:
    SPEC = InputSpec(3, (32, 32), (0.5,) * 3, (0.5,) * 3)

    def test_what_is_wrong_is_said(self, tmp_path):
        model = tiny_model(exits=[2], heads=["linear"], depth=3)

        def refused(match, calibration=None, **options):
            options = {"precision": "int8", **options}
            with pytest.raises(ValueError, match=match):
                lgvit_fast.export(model, tmp_path / "out", calibration=calibration, **options)

        refused("needs calibration images: a folder, a tar")
        refused("99 images, expected at least 100", images(99))
        refused(
            r"images \(100, 3, 40, 32\), expected \[n, 3, 32, 32\]", images(100, (40, 32)).numpy()
        )
        refused("NaN or infinite", images(100) / 0)
        refused("is a int, expected a folder", 3)
        refused("for precision='int8', which was not", images(100), precision="float32")
        refused("for precision='int8', which was not", precision="float32", force=True)
        with pytest.raises(FileNotFoundError, match="does not exist"):
            lgvit_fast.export(
                model, tmp_path / "out", precision="int8", calibration=str(tmp_path / "nowhere")
            )
        assert not list(tmp_path.iterdir())

    def test_sources_of_the_same_images_are_equal(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), np.uint8)
        for number, image in enumerate(pixels):
            place = tmp_path / f"class {number // 50}"
            place.mkdir(exist_ok=True)
            Image.fromarray(image).save(place / f"{number:03d}.png")
        expected = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
        expected = np.ascontiguousarray(expected.transpose(0, 3, 1, 2))
        tensor = torch.from_numpy(expected)
        targets = torch.zeros(50)
        for source in (
            tmp_path,
            str(tmp_path),
            expected,
            tensor,
            [tensor[:50], tensor[50:]],
            [(tensor[:50], targets), [tensor[50:], targets]],
            [Batch(tensor, torch.zeros(100), [])],
        ):
            found = calibration_images(source, self.SPEC)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=1e-6)
        (tmp_path / "class 0" / "000.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"calibration: cannot read .*000.png"):
            calibration_images(tmp_path, self.SPEC)

    def test_at_most_a_thousand(self):
        many = np.zeros((2500, 3, 32, 32), np.float32)
        many[:, 0, 0, 0] = np.arange(2500)
        found = calibration_images(many, self.SPEC)
        assert len(found) == 1000 and found[-1, 0, 0, 0] == 2499
        assert len(calibration_images((many[:400] for _ in range(99)), self.SPEC)) == 1000


class TestRefit:
    def logits(self, seed, count=200):
        return np.random.default_rng(seed).standard_normal((2, count, 5)).astype(np.float32) * 2

    @pytest.mark.parametrize(
        "policy",
        [
            *(lgvit_fast.Confidence(0.7), lgvit_fast.Confidence((0.5, 0.9))),
            *(lgvit_fast.Entropy(0.6), lgvit_fast.PatientConfident((0.9, 0.6), 2)),
        ],
        ids=str,
    )
    def test_as_many_pass_each_exit(self, policy):
        before, after = self.logits(0), 0.6 * self.logits(1)
        fitted = int8_export.refit(policy, before, after)
        assert type(fitted) is type(policy) and fitted != policy
        given = np.broadcast_to(policy.threshold, 2)

        def passing(logits, threshold):
            distribution = torch.distributions.Categorical(logits=torch.from_numpy(logits))
            if isinstance(policy, lgvit_fast.Confidence):
                return int((distribution.probs.amax(-1) > threshold).sum())
            return int((distribution.entropy() < threshold).sum())

        for exit in range(2):
            count = passing(before[exit], given[exit])
            assert 0 < count < 200
            assert passing(after[exit], given[exit]) != count
            assert passing(after[exit], fitted.threshold[exit]) == count

    def test_none_and_all(self):
        before, after = self.logits(0), self.logits(1)
        for threshold in (0.0, 1.0):
            fitted = int8_export.refit(lgvit_fast.Confidence(threshold), before, after)
            assert fitted == lgvit_fast.Confidence(threshold)
        before[:] = 0  # nobody is surer than 0.2
        fitted = int8_export.refit(lgvit_fast.Confidence(0.5), before, after)
        confidence = torch.from_numpy(after).softmax(-1).amax(-1).amax(-1)
        assert all(t >= c for t, c in zip(fitted.threshold, confidence, strict=True))

    def test_what_stays(self):
        before, after = self.logits(0), self.logits(1)
        for policy in (lgvit_fast.Patience(2), lgvit_fast.Policy()):
            assert int8_export.refit(policy, before, after) is policy
        assert int8_export.refit(lgvit_fast.Entropy(0.6), before, before) == lgvit_fast.Entropy(0.6)


def test_a_certificate_is_left_out(tmp_path):
    recording = record(trained(), [digits("validation")[0]], labelled=False)
    found = lgvit_fast.calibrate(recording, min_agreement=20, confidence=0.6)
    certified = shutil.copytree(float32(), tmp_path / "certified")
    manifest = Manifest.load(certified)
    certificate = found.certificate.to_dict()
    dataclasses.replace(manifest, policy=found.policy, certificate=certificate).save(certified)
    assert Deployed(certified).certificate == found.certificate
    made = Deployed(converted(certified, "certified int8", digits("train")[0][:100]))
    assert made.certificate is None and type(made.policy) is type(found.policy)
    assert made.manifest.precision == "int8"
    assert made.manifest.int8["certificate"].startswith("left out")


WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "timm", "onnx"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import numpy as np
from lgvit_fast.deploy import Deployed
found = Deployed(sys.argv[1], sys.argv[3])(np.load(sys.argv[2]))
np.save(sys.argv[2], found.logits)
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_without_torch(runtime, tmp_path):
    x = digits("validation")[0][:9].numpy()
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", WITHOUT_TORCH, folder(), tmp_path / "x.npy", runtime]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = Deployed(folder(), runtime)(x).logits
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-4)


def test_the_evaluation_takes_it():
    x, _ = digits("validation")
    model = ExportedModel(Deployed(folder()))
    assert (
        model.infer(x[:50]).prediction == trained().infer(x[:50]).prediction
    ).float().mean() > 0.9

"""An export for ExecuTorch: one program, run by executorch's own Python and C++ runtimes."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import lgvit_fast
from lgvit_fast.deploy import Deployed
from lgvit_fast.deploy.executorch_file import MAX_BATCH
from lgvit_fast.deploy.manifest import Manifest, SegmentFile
from lgvit_fast.runtimes.loaders import why_missing
from tests.deploy.test_manifest import manifest
from tests.helpers import images, tiny_model

HEADS = ("lph_full", "gah_2")
POLICIES = {
    "confidence": lgvit_fast.Confidence([0.4, 0.5]),
    "entropy": lgvit_fast.Entropy(1.5),
    "patience": lgvit_fast.Patience(2),
    "patient confident": lgvit_fast.PatientConfident(1.6, 2),
    "nobody": lgvit_fast.Policy(),
    "everybody": lgvit_fast.Confidence(0.0),
    "scripted": lgvit_fast.Replay([2, 0, 1, 1, 0, 2, 0, 1, 2, 0, 2]),
}
needs_executorch = pytest.mark.skipif(
    why_missing("executorch") is not None, reason=f"{why_missing('executorch')}"
)


@pytest.fixture(scope="module")
def model():
    """Three blocks wide enough that weights are nearly all of a file."""
    made = tiny_model(exits=[1, 2], heads=HEADS, depth=3, embed_dim=192)
    with torch.no_grad():  # else logits are so large that every score is 0 or 1
        for name, weight in made.named_parameters():
            weight.mul_(0.05 if "classifiers" in name or name.startswith("backbone.head.") else 1)
    made.policy = lgvit_fast.Entropy(1.5)
    return made


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return lgvit_fast.export(
        model, tmp_path_factory.mktemp("exports") / "exported", format="executorch"
    )


@pytest.fixture(scope="module")
def deployed(folder):
    return Deployed(folder, threads=1)


def assert_same(answers, expected):
    np.testing.assert_allclose(answers.logits, expected.logits.numpy(), atol=1e-4)
    for name in ("exit_index", "exit_layer", "nonfinite"):
        assert getattr(answers, name).tolist() == getattr(expected, name).tolist()


@needs_executorch
@pytest.mark.slow  # lowering three segments takes half a minute, on a loaded machine much more
@pytest.mark.timeout(900)
class TestProgram:
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("batch", [0, 1, MAX_BATCH + 3])
    def test_answers_are_those_of_infer(self, model, deployed, policy, batch):
        policy, x = POLICIES[policy].part(0, batch), images(batch, seed=batch)
        assert_same(deployed(x.numpy(), policy), model.infer(x, policy))

    def test_the_policies_differ(self, deployed):
        x = images(MAX_BATCH + 3, seed=MAX_BATCH + 3).numpy()
        left = {tuple(deployed(x, policy).exit_index.tolist()) for policy in POLICIES.values()}
        assert len(left) >= 5
        assert len(set(deployed(x, POLICIES["confidence"]).exit_index.tolist())) == 3

    def test_a_broken_image_is_flagged_and_harms_no_other(self, model, deployed):
        x = images(3)
        x[1, 0, 2, 3] = float("nan")
        answers = deployed(x.numpy(), POLICIES["everybody"])
        assert_same(answers, model.infer(x, POLICIES["everybody"]))
        assert answers.nonfinite.tolist() == [False, True, False]

    def test_no_weight_is_written_twice(self, model, folder, tmp_path):
        model.save_pretrained(tmp_path)
        whole = 1.05 * (tmp_path / "model.safetensors").stat().st_size
        assert (folder / "segments.pte").stat().st_size <= whole

    def test_the_folder(self, model, folder, deployed):
        assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "segments.pte"]
        manifest = Manifest.load(folder)
        assert (manifest.file_format, manifest.opset) == ("executorch", None)
        assert manifest.layers == (1, 2, 3) and manifest.heads == HEADS
        assert "executorch" in manifest.made_with and "onnx" not in manifest.made_with
        assert deployed.runtime == "executorch" and deployed.policy == model.policy

    def test_a_program_with_another_number_of_methods(self, folder, tmp_path):
        other = shutil.copytree(folder, tmp_path / "copy")
        content = json.loads((other / "manifest.json").read_text())
        content.update(layers=[1, 2, 3, 4], heads=["lph_full", "gah_2", "gah_2"])
        (other / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="the export has 3 graphs, its manifest says 4"):
            Deployed(other)

    def test_the_cpp_loop_of_the_document(self, model, folder, tmp_path):
        """Compiled against the headers and libraries of the package, and run as it stands."""
        import executorch

        if shutil.which("g++") is None:
            pytest.skip("there is no g++")
        package = Path(executorch.__path__[0])
        if not (package / "lib" / "libexecutorch.so").is_file():
            pytest.skip("this executorch has no C++ libraries")
        page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
        (loop,) = re.findall(r"^```cpp\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        (tmp_path / "loop.cpp").write_text(loop + CPP_MAIN)
        libraries = ("backend_xnnpack", "kernels_optimized", "threadpool")
        include = package / "include"
        subprocess.run(
            [
                *("g++", "-std=c++17", "-w", "loop.cpp", "-o", "loop", f"-I{include}"),
                f"-I{include}/executorch/runtime/core/portable_type/c10",
                "-DC10_USING_CUSTOM_GENERATED_MACROS",
                *(f"-L{package}/lib", f"-Wl,-rpath,{package}/lib", "-lexecutorch"),
                *("-Wl,--no-as-needed", *(f"-lexecutorch_{name}" for name in libraries)),
            ],
            cwd=tmp_path,
            check=True,
        )
        x = images(7)
        x.numpy().tofile(tmp_path / "images")
        command = ["./loop", folder / "segments.pte", "images", "7", "0.5"]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        found = np.array([line.split() for line in done.stdout.splitlines()], np.float64)
        expected = model.infer(x, lgvit_fast.Confidence(0.5))
        assert set(expected.exit_layer.tolist()) == {1, 2, 3}
        assert found[:, 0].tolist() == expected.exit_layer.tolist()
        np.testing.assert_allclose(found[:, 1:], expected.logits.numpy(), atol=1e-4)


CPP_MAIN = """
#include <cstdio>

int main(int, char** arguments) {  // PROGRAM IMAGES COUNT THRESHOLD
  executorch::extension::Module module(arguments[1]);
  const int count = std::stoi(arguments[3]);
  std::vector<float> images(count * 3 * 32 * 32);
  std::FILE* file = std::fopen(arguments[2], "rb");
  if (std::fread(images.data(), 4, images.size(), file) != images.size()) return 1;
  const float threshold = std::stof(arguments[4]);
  for (const Answer& answer : classify(module, images, {count, 3, 32, 32}, {1, 2, 3}, threshold)) {
    std::printf("%d", answer.layer);
    for (float logit : answer.logits) std::printf(" %.9g", logit);
    std::puts("");
  }
}
"""


@pytest.fixture
def foreign(tmp_path):
    """A folder whose program is none; its hash is right."""
    data = b"no program" * 10
    (tmp_path / "segments.pte").write_bytes(data)
    file = SegmentFile("segments.pte", hashlib.sha256(data).hexdigest(), len(data))
    manifest(segments=(file,), certificate=None, file_format="executorch", opset=None).save(
        tmp_path
    )
    return tmp_path


@needs_executorch
def test_a_file_that_is_no_program(foreign):
    with pytest.raises(ValueError, match=r"segments\.pte is no graph that executorch can run"):
        Deployed(foreign)


def test_other_runtimes_do_not_run_it(foreign):
    with pytest.raises(ValueError, match=r"'openvino', expected auto or executorch: .*format is"):
        Deployed(foreign, "openvino")


def test_a_format_that_is_unknown(foreign):
    content = json.loads((foreign / "manifest.json").read_text())
    for value in ("tflite", 3, None):
        content["file_format"] = value
        (foreign / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"file_format = .*expected one of onnx, executorch"):
            Deployed(foreign)


def test_executorch_is_missing(foreign, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "executorch" else 1
    )
    missing = "executorch is not installed: pip install executorch"
    with pytest.raises(RuntimeError, match=missing):
        lgvit_fast.export(tiny_model(exits=[1], depth=2), tmp_path / "new", format="executorch")
    assert not (tmp_path / "new").exists()
    with pytest.raises(RuntimeError, match=missing):
        Deployed(foreign)


def test_its_python_package_needs_torch(foreign, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else 1)
    with pytest.raises(RuntimeError, match="torch is not installed: pip install torch"):
        Deployed(foreign)


def test_other_precisions(tmp_path):
    with pytest.raises(ValueError, match="precision='int8', expected float32: format='executorch'"):
        lgvit_fast.export(
            tiny_model(exits=[1], depth=2), tmp_path / "new", format="executorch", precision="int8"
        )

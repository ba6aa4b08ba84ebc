"""`lgvit-fast export`, and the commands that take what it wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lgvit_fast
from lgvit_fast.cli import main
from tests.deploy import exports
from tests.helpers import tiny_model

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture
def photos(tmp_path):
    """Two class folders of pictures, one of which is no picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 50, 3), np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "photos" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    return tmp_path / "photos"


def run(*arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code


def test_export(tmp_path, capsys, monkeypatch):
    """The command hands on what it is given; what exporting does is tested where it is done."""
    exports.model().save_pretrained(tmp_path / "model")
    made, given = exports.folder(), {}

    def export(model, folder, **options):
        given.update(options, policy=model.policy)
        return Path(shutil.copytree(made, folder))

    monkeypatch.setattr(lgvit_fast, "export", export, raising=False)
    run("export", tmp_path / "model", tmp_path / "exported")
    assert given == {
        "precision": "float32",
        "format": "onnx",
        "policy": lgvit_fast.Entropy(0.7),
        "calibration": None,
        "force": False,
    }
    out = capsys.readouterr().out
    assert "5 graphs" in out and "Entropy(threshold=0.7)" in out
    run("export", tmp_path / "model", tmp_path / "phone", "--format", "executorch")
    assert given["format"] == "executorch"


def test_export_onto_the_model(tmp_path, capsys):
    run("export", tmp_path, tmp_path, code=2)
    assert "where the model is" in capsys.readouterr().err


def test_predict_is_that_of_the_model(photos, tmp_path, capsys):
    exports.model().save_pretrained(tmp_path / "model")
    (photos / "class 1" / "no.png").write_bytes(b"no picture")
    rows = []
    for folder in (tmp_path / "model", exports.folder()):
        run("predict", folder, photos, "--batch-size", 4, "--policy", "entropy", code=1)
        rows.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert len(rows[0]) == 7
    for expected, got in zip(*rows, strict=True):
        assert got.pop("milliseconds", 0) >= 0 and expected.pop("milliseconds", 0) >= 0
        assert got.pop("confidence", 0) == pytest.approx(expected.pop("confidence", 0), abs=1e-4)
        assert got == expected


def test_exported_models_have_no_device(photos, capsys):
    for option in (("--device", "cuda"), ("--precision", "bf16")):
        run("predict", exports.folder(), photos, *option, code=2)
        assert "leave out --device and --precision" in capsys.readouterr().err


def test_a_damaged_export_is_one_line(photos, tmp_path, capsys):
    folder = shutil.copytree(exports.folder(), tmp_path / "copy")
    (folder / "segment_2.onnx").unlink()
    run("predict", folder, photos, code=1)
    assert "segment_2.onnx is missing: copy the folder again" in capsys.readouterr().err


def test_eval_is_that_of_the_model(photos, tmp_path, capsys):
    exports.model().save_pretrained(tmp_path / "model")
    folder = shutil.copytree(exports.folder(), tmp_path / "exported")
    reports = []
    for model in (tmp_path / "model", folder):
        out = tmp_path / f"{model.name}-report"
        run("eval", model, "--data", photos, "--policy", "patience", "--save-policy",
            "--out", out, "--timing-rounds", 1)  # fmt: skip
        reports.append(json.loads((out / "report.json").read_text()))
    for key in ("images", "layers", "classifier_accuracy", "chosen", "points"):
        assert reports[0][key] == reports[1][key]
    assert reports[1]["timings"][0]["images"] == 6
    saved = json.loads((folder / "manifest.json").read_text())["policy"]
    assert saved["name"] == "Patience"
    assert lgvit_fast.LGViT.from_pretrained(tmp_path / "model").policy == lgvit_fast.Patience(
        saved["patience"]
    )


@pytest.fixture
def calibration(tmp_path):
    """A hundred pictures in one class folder."""
    pixels = np.random.default_rng(1).integers(0, 256, (100, 32, 32, 3), np.uint8)
    (tmp_path / "calibration" / "any").mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "calibration" / "any" / f"{number}.png")
    return tmp_path / "calibration"


def test_int8(tmp_path, photos, calibration, capsys, monkeypatch):
    """Refused with the figures, forced, and then taken by every command that takes an export."""
    pytest.importorskip("openvino")
    slow = {"float32": {"onnxruntime": {1: 3.0, 16: 2.0}}, "int8": {"openvino": {1: 3.25, 16: 2.5}}}
    monkeypatch.setattr("lgvit_fast.deploy.int8_export.measure_times", lambda *arguments: slow)
    model = tiny_model(exits=[1, 2], heads=["lph_full", "gah_2"], depth=3)
    model.save_pretrained(tmp_path / "model")
    folder = tmp_path / "int8"
    command = ["export", tmp_path / "model", folder, "--precision", "int8"]
    run(*command, code=2)
    assert "needs --calibration DIR" in capsys.readouterr().err
    run("export", tmp_path / "model", folder, "--force", code=2)
    assert "go with --precision int8" in capsys.readouterr().err
    command += ["--calibration", calibration]
    run(*command, code=1)
    assert "3.25 ms an image in batches of 1 (float32 3.00)" in capsys.readouterr().err
    assert not folder.exists()
    run(*command, "--force")
    out = capsys.readouterr().out
    assert "percent of 100 images that keep their class" in out and "3 graphs" in out
    assert "int8 on openvino, milliseconds an image: 3.25 in batches of 1" in out

    run("predict", folder, photos)
    assert len(capsys.readouterr().out.splitlines()) == 6
    run("eval", folder, "--data", photos, "--no-timing", "--out", tmp_path / "report")
    goal = ["--data", calibration, "--unlabelled", "--min-agreement", "5", "--confidence", "60"]
    run("calibrate", folder, *goal)
    certificate = lgvit_fast.deploy.Deployed(folder).certificate
    assert certificate.goal == "min_agreement" and certificate.model
    assert str(certificate) in capsys.readouterr().out
    run("calibrate", folder, *goal, "--output", tmp_path / "other", code=2)
    assert "need a saved model" in capsys.readouterr().err
    run("eval", folder, "--data", photos, "--no-timing", "--out", tmp_path / "report",
        "--policy", "patience", "--save-policy")  # fmt: skip
    assert lgvit_fast.deploy.Deployed(folder).certificate is None  # it was of another policy

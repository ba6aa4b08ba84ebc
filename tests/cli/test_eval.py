"""`lgvit-fast eval`: report, pictures, the choice of a threshold, bad files."""

import json
import shutil

import pytest
import torch

import lgvit_fast
from lgvit_fast.cli import main
from lgvit_fast.evaluation import Recording
from tests.cli.conftest import CLASSES, save_image
from tests.helpers import tiny_model

FEW = ["--timing-images", "8", "--timing-rounds", "1"]


@pytest.fixture
def labelled(tmp_path):
    """Class folders, four images each."""
    for place, name in enumerate(CLASSES):
        for number in range(4):
            save_image(tmp_path / "data" / name / f"{number}.png", 10 * place + number)
    return tmp_path / "data"


def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_the_report_holds_what_was_printed(saved, labelled, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["eval", saved, "--data", str(labelled), "--out", str(out), *FEW]
    assert main([*command, "--timing-batch", "1", "4"]) == 0
    text = capsys.readouterr().out
    found = report(out)
    assert found["images"] == 14
    assert [timing["batch_size"] for timing in found["timings"]] == [1, 4]
    assert f"{found['chosen']['layer_ratio']:.2f}x" in text
    assert f"{100 * found['final_accuracy']:.1f} %" in text
    assert (out / "tradeoff.png").exists() and (out / "exits.png").exists()


def test_the_recording_is_saved(saved, labelled, tmp_path, capsys):
    file = tmp_path / "recording.safetensors"
    command = ["eval", saved, "--data", str(labelled), "--out", str(tmp_path), "--no-timing"]
    assert main([*command, "--save-recording", str(file)]) == 0
    found = Recording.load(file)
    assert f"{len(found)} images are recorded in {file}" in capsys.readouterr().out
    assert len(found) == 4 * len(CLASSES) > report(tmp_path)["images"]  # both halves
    assert found.labels.unique().tolist() == list(range(len(CLASSES)))
    model = lgvit_fast.LGViT.from_pretrained(saved)
    assert found.layers == (*(exit.layer for exit in model.exits), model.num_blocks)


def test_a_given_threshold_is_used(saved, labelled, tmp_path):
    out = tmp_path / "out"
    options = ["--policy", "entropy", "--threshold", "1.3", "--no-timing"]
    assert main(["eval", saved, "--data", str(labelled), "--out", str(out), *options]) == 0
    found = report(out)
    assert found["chosen"]["policy"] == {"name": "Entropy", "threshold": 1.3}
    assert {point["policy"]["name"] for point in found["points"]} == {"Entropy"}
    assert found["timings"] == []


def test_all_policies_and_saving_the_best(saved, labelled, tmp_path, capsys):
    copy, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(saved, copy)
    command = ["eval", str(copy), "--data", str(labelled), "--out", str(out), "--no-timing"]
    assert main([*command, "--policy", "all", "--tolerance", "100", "--save-policy"]) == 0
    found = report(out)
    assert {point["policy"]["name"] for point in found["points"]} == {
        "Confidence",
        "Entropy",
        "Patience",
        "PatientConfident",
    }
    ratios = [point["layer_ratio"] for point in found["points"]]
    assert ratios == sorted(ratios)
    again = tmp_path / "again"
    command = [*command[:-3], "--out", str(again), "--no-timing", "--tolerance", "100"]
    assert main([*command, "--policy", "saved"]) == 0
    assert report(again)["chosen"]["policy"] == found["chosen"]["policy"]
    assert (report(again)["images"], report(again)["selection_images"]) == (28, 0)


def test_bad_files_are_reported_and_the_rest_evaluated(saved, labelled, tmp_path, capsys):
    (labelled / "cat" / "text.png").write_text("not an image")
    torn = labelled / "dog" / "torn.jpg"
    save_image(torn, 5)
    torn.write_bytes(torn.read_bytes()[:300])
    out = tmp_path / "out"
    assert main(["eval", saved, "--data", str(labelled), "--out", str(out), "--no-timing"]) == 1
    error = capsys.readouterr().err
    assert "text.png" in error and "torn.jpg" in error
    found = report(out)
    assert found["images"] == 14
    assert len(found["unreadable"]) == 2


def test_classes_are_matched_by_name(saved, labelled, tmp_path):
    for name in ("ant", "cat"):
        shutil.rmtree(labelled / name)
    accuracy = []
    model = lgvit_fast.LGViT.from_pretrained(saved)
    for order in (CLASSES, CLASSES[::-1]):
        # the same model under another order of its classes answers the same
        places = torch.tensor([CLASSES.index(name) for name in order])
        with torch.no_grad():
            model.backbone.head.weight.copy_(
                lgvit_fast.LGViT.from_pretrained(saved).backbone.head.weight[places]
            )
            model.backbone.head.bias.copy_(
                lgvit_fast.LGViT.from_pretrained(saved).backbone.head.bias[places]
            )
        model.class_names = list(order)
        model.save_pretrained(tmp_path / "m")
        out = tmp_path / "out"
        command = ["eval", str(tmp_path / "m"), "--data", str(labelled), "--out", str(out)]
        assert main([*command, "--no-timing"]) == 0
        accuracy.append(report(out)["final_accuracy"])
    assert accuracy[0] == accuracy[1]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data: (data / "cat").rename(data / "cow"), "does not know: cow"),
        (shutil.rmtree, "does not exist"),
    ],
    ids=["unknown class", "no such folder"],
)
def test_data_that_does_not_fit_is_one_line_and_1(saved, labelled, capsys, break_it, message):
    break_it(labelled)
    assert main(["eval", saved, "--data", str(labelled)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_all_takes_no_threshold(saved, labelled):
    command = ["eval", saved, "--data", str(labelled), "--policy", "all", "--threshold", "0.5"]
    assert main(command) == 2


def test_the_bundled_digits(tmp_path):
    tiny_model(exits=2, num_classes=10).save_pretrained(tmp_path / "m")
    out = tmp_path / "out"
    command = ["eval", str(tmp_path / "m"), "--data", "digits", "--out", str(out), *FEW]
    assert main([*command, "--precision", "bf16"]) == 0
    assert report(out)["images"] == 180
    assert report(out)["selection_images"] == 179

"""`lgvit-fast calibrate`: policy and certificate in the model's folder, and in words."""

import json
import shutil

import pytest

import lgvit_fast
from lgvit_fast.cli import main
from tests.cli.conftest import CLASSES, save_image


@pytest.fixture
def labelled(tmp_path):
    """Class folders, six images each."""
    for place, name in enumerate(CLASSES):
        for number in range(6):
            save_image(tmp_path / "data" / name / f"{number}.png", 10 * place + number)
    return str(tmp_path / "data")


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "model")
    return str(tmp_path / "model")


AGREEMENT = ["--unlabelled", "--min-agreement", "60", "--confidence", "70"]


def test_policy_and_certificate_go_into_the_folder(copy, labelled, capsys):
    weights = (lgvit_fast.LGViT.from_pretrained(copy)).state_dict()
    assert main(["calibrate", copy, "--data", labelled, *AGREEMENT]) == 0
    text = capsys.readouterr().out
    model = lgvit_fast.LGViT.from_pretrained(copy)
    assert str(model.certificate) in text and str(model.policy) in text
    assert model.certificate.confidence == pytest.approx(0.7)
    assert model.certificate.model is not None
    assert model.state_dict().keys() == weights.keys()
    assert main(["info", copy]) == 0
    assert str(model.certificate) in capsys.readouterr().out
    assert main(["info", copy, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["certificate"]["goal"] == "min_agreement"
    assert main(["predict", copy, labelled]) == 0
    assert str(model.certificate) in capsys.readouterr().err


def test_dry_run_and_output(copy, labelled, tmp_path, capsys):
    command = ["calibrate", copy, "--data", labelled, *AGREEMENT, "--kind", "learned"]
    assert main([*command, "--dry-run"]) == 0
    assert lgvit_fast.LGViT.from_pretrained(copy).certificate is None
    assert main([*command, "--output", str(tmp_path / "new")]) == 0
    assert lgvit_fast.LGViT.from_pretrained(copy).certificate is None
    assert lgvit_fast.LGViT.from_pretrained(tmp_path / "new").certificate is not None


def test_a_labelled_goal_and_budgets(copy, labelled, capsys):
    command = ["calibrate", copy, "--data", labelled, "--dry-run"]
    assert main([*command, "--max-drop", "30", "--confidence", "60"]) == 0
    assert "loses at most" in capsys.readouterr().out
    assert main([*command, "--budget-layers", "5"]) == 0
    assert "nothing is certified" in capsys.readouterr().out
    assert main([*command, "--budget-ms", "10000", "--batch-size", "4"]) == 0
    assert "ms an image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--max-drop", "0.1"], 1, "about"),
        (["--max-drop", "1", "--unlabelled"], 2, "--max-drop needs classes"),
        (["--max-drop", "300"], 1, "between 0 and 100"),
        (["--max-drop", "30", "--kind", "replay"], 1, "cannot be certified"),
        (["--max-drop", "30", "--confidence", "100"], 1, "confidence=1.0"),
    ],
    ids=["too few images", "unlabelled", "range", "kind", "confidence"],
)
def test_what_cannot_be_done_is_one_line(copy, labelled, capsys, options, code, message):
    before = (lgvit_fast.LGViT.from_pretrained(copy)).get_config()
    assert main(["calibrate", copy, "--data", labelled, *options]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lgvit-fast calibrate: error:") and message in error
    assert lgvit_fast.LGViT.from_pretrained(copy).get_config() == before

"""Arguments that cannot be meant are refused before anything is computed, and say so in words."""

import json
import re

import pytest

from lgvit_fast.cli import main
from tests.cli.conftest import CLASSES, save_image


@pytest.fixture
def labelled(tmp_path):
    for place, name in enumerate(CLASSES):
        save_image(tmp_path / "data" / name / "0.png", place)
    return str(tmp_path / "data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["eval", "m", "--data", "d", "--tolerance", "-1"], "not a number of at least 0"),
        (["eval", "m", "--data", "d", "--workers", "-1"], "not at least 0"),
        (["eval", "m", "--data", "d", "--threshold", "high"], "'high' is not a number"),
        (["predict", "m", "x.png", "--patience", "0"], "not at least 1"),
        (["predict", "m", "x.png", "--batch-size", "x"], "'x' is not an integer"),
        (["bench", "model", "--images", "0"], "not at least 1"),
        (["bench", "model", "--rounds", "0"], "not at least 1"),
        (["bench", "heads", "--batch-size", "0"], "not at least 1"),
        (["train", "--exits", "4,six"], "blocks with commas"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_numbers_out_of_range_are_2(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert not re.search(r"invalid \w+ value", error)  # argparse's words for a bare ValueError


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_more_patience_than_exits_is_2(saved, labelled, capsys, command):
    where = ["--data", labelled] if command == "eval" else [labelled]
    given = ["--policy", "patience", "--patience", "99"]
    assert main([command, saved, *where, *given]) == 2
    error = capsys.readouterr().err
    assert "--patience 99: the model has 4 exits, so no image would leave early" in error


def test_bench_names_the_ways_it_knows(capsys):
    small = ["--model", "vit_tiny_patch16_224", "--no-compile", "--batch-size", "1"]
    assert main(["bench", "model", *small, "--only", "nonsense", "infer"]) == 2
    error = capsys.readouterr().err
    assert "--only 'nonsense': expected ways out of dense timm" in error


@pytest.mark.parametrize(
    ("numbers", "policy"),
    [
        (["--threshold", "0.4"], {"name": "Confidence", "threshold": 0.4}),
        (["--patience", "2"], {"name": "Patience", "patience": 2}),
        (
            ["--patience", "2", "--threshold", "0.4"],
            {"name": "PatientConfident", "threshold": 0.4, "patience": 2},
        ),
    ],
    ids=" ".join,
)
def test_eval_takes_numbers_without_the_policy_they_imply(
    saved, labelled, tmp_path, numbers, policy
):
    out = tmp_path / "out"
    assert (
        main(["eval", saved, "--data", labelled, "--out", str(out), "--no-timing", *numbers]) == 0
    )
    assert json.loads((out / "report.json").read_text())["chosen"]["policy"] == policy


def test_metavars_are_words_not_types(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert not re.findall(r"--\S+ (?:STR|INT|FLOAT)\b", text)
    for option in ("--output FOLDER", "--model NAME", "--seed N", "--val-fraction X"):
        assert option in text


def test_eval_shows_no_progress_bar_in_a_file(saved, labelled, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["eval", saved, "--data", labelled, "--out", out, "--no-timing"]) == 0
    assert "evaluate" not in capsys.readouterr().err

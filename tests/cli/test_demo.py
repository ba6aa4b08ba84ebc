"""`lgvit-fast demo`, with the smallest model and the shortest training."""

import json

import pytest

import lgvit_fast
from lgvit_fast.cli import main
from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig
from tests.cli.conftest import save_image
from tests.helpers import tiny_vit


def tiny_recipe(output):
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}
    return TrainConfig(
        output=output,
        model="vit_tiny_patch16_224",
        model_kwargs=shape,
        data="digits",
        batch_size=128,
        workers=0,
        stage1=Stage1Config(epochs=1, lr=1e-3),
        stage2=Stage2Config(epochs=1, lr=1e-3),
    )


def test_demo_leaves_model_report_and_pictures_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lgvit_fast.training.digits_recipe", tiny_recipe)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "by the clock" in text
    report = json.loads((out / "report.json").read_text())
    assert report["images"] == 359
    assert set(report["training"]) == {"stage1", "stage2"}
    assert (out / "tradeoff.png").exists() and (out / "exits.png").exists()
    assert not list(out.glob(".training-*"))

    program, *command = text.strip().splitlines()[-1].split()
    assert program == "lgvit-fast"
    assert main(command) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 20
    assert all(row["label"] in "0123456789" for row in rows)


@pytest.fixture
def pictures(tmp_path):
    """110 pictures of noise: as few as can be calibrated on."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(110):
        save_image(folder / f"{number}.png", number)
    return folder


def test_a_pretrained_model_on_pictures_of_ones_own(pictures, tmp_path, monkeypatch, capsys):
    saved = tmp_path / "trained"
    lgvit_fast.LGViT(tiny_vit(), exits=[1, 3]).eval().save_pretrained(saved)
    monkeypatch.setattr("lgvit_fast.cli.demo._PRETRAINED", str(saved))
    monkeypatch.setattr("lgvit_fast.inference.engine.usable_runtimes", lambda model: [])
    out = tmp_path / "demo"
    command = ["demo", "--pretrained", "--fast", "--data", str(pictures), "--out", str(out)]
    assert main([*command, "--min-agreement", "20"]) == 0
    text = capsys.readouterr().out
    assert "of its answers are the full model's; by the clock it is" in text
    model = lgvit_fast.LGViT.from_pretrained(out / "model")
    assert model.certificate is not None
    assert model.certificate.limit == 20
    assert not model.untrained_exits
    program, *command = text.strip().splitlines()[-1].split()
    assert program == "lgvit-fast"
    assert main(command) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pretrained"], "--pretrained needs --data"),
        (["--data", "photos"], "--data goes with --pretrained"),
        (["--min-agreement", "90"], "--min-agreement goes with --pretrained"),
    ],
)
def test_options_that_need_each_other(options, message, capsys):
    assert main(["demo", *options]) == 2
    assert message in capsys.readouterr().err


def test_too_few_pictures_to_certify(pictures, tmp_path, capsys):
    command = ["demo", "--pretrained", "--data", str(pictures), "--out", str(tmp_path / "demo")]
    assert main([*command, "--min-agreement", "99"]) == 1
    assert "it takes about" in capsys.readouterr().err

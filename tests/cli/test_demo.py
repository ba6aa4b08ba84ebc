"""`lgvit-fast demo`, with the smallest model and the shortest training."""

import json

from lgvit_fast.cli import main
from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig


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

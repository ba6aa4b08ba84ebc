"""`lgvit-fast distill`: options, what it prints, what it leaves."""

from pathlib import Path

import pytest

import lgvit_fast
from lgvit_fast.cli import main
from lgvit_fast.training import DistillConfig
from tests.cli.conftest import save_image
from tests.helpers import tiny_vit


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """60 pictures of noise, without classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(60):
        save_image(folder / f"{number}.png", number)
    return folder


def model(**options):
    """One whose exits were never trained."""
    return lgvit_fast.LGViT(tiny_vit(), **options).eval()


def test_the_command(pictures, tmp_path, capsys):
    """A saved model in, a saved model out, on which every exit was taught; and what comes next."""
    model(exits=[1, 3]).save_pretrained(tmp_path / "model")
    out = str(tmp_path / "out")
    command = ["distill", str(tmp_path / "model"), "--data", str(pictures), "--output", out]
    options = [
        "--epochs",
        "1",
        "--batch-size",
        "16",
        "--workers",
        "0",
        "--cache",
        "1G",
        "--no-augment",
    ]
    assert main([*command, *options]) == 0
    text = capsys.readouterr().out
    assert "Agreement with the full model on 6 held-out images, %" in text
    assert f"lgvit-fast predict {out} IMAGES" in text
    saved = lgvit_fast.LGViT.from_pretrained(out)
    assert not saved.untrained_exits
    made = DistillConfig.load(Path(out) / "run" / "config.json")
    assert (made.cache, made.augment, made.stage2.lr) == (10**9, False, 1e-3)
    assert main([*command, *options]) == 1
    assert "resume it (--resume)" in capsys.readouterr().err
    assert main([*command, *options, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--cache", "much"], 2, "'much' is not a number of bytes, such as 500M or 20G"),
        (["--cache-folder", "x"], 2, "--cache-folder is given, but not cache"),
        (["--min-agreement", "99"], 1, "--min-agreement=99 cannot be shown"),
        (["--weights", "none.safetensors"], 1, "'none.safetensors' is neither a file nor a folder"),
    ],
    ids=["bytes", "cache folder", "too few images", "weights"],
)
def test_options_that_make_no_sense(options, code, message, pictures, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = [
        "distill",
        "vit_tiny_patch16_224",
        "--data",
        str(pictures),
        "--output",
        out,
        *options,
    ]
    assert exit_code(command) == code
    assert message in capsys.readouterr().err


def exit_code(command):
    """Of the command line, whether its parser ends the process or it returns."""
    try:
        return main(command)
    except SystemExit as stop:
        return stop.code

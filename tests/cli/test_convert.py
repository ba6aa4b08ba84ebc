"""`lgvit-fast convert`: in and out again, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import lgvit_fast
from lgvit_fast.cli import main
from tests.helpers import GOLDEN, golden, images


@pytest.fixture
def published(tmp_path):
    """A folder as the published code saves one."""
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(golden("vit")[0]["config"]))
    weights = load_file(GOLDEN / "vit_weights_fp16.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def test_a_published_checkpoint_there_and_back(published, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(published), str(ours)]) == 0
    assert "lph_full after block 4" in capsys.readouterr().out
    arrays = golden("vit")[1]
    with torch.no_grad():
        out = lgvit_fast.LGViT.from_pretrained(ours).forward_exits(torch.tensor(arrays["images"]))
    torch.testing.assert_close(
        out.final, torch.as_tensor(arrays["eval/final_logits"]), atol=1e-4, rtol=0
    )
    assert main(["convert", str(ours), str(back), "--to", "published"]) == 0
    theirs, original = (
        load_file(back / "model.safetensors"),
        torch.load(published / "pytorch_model.bin"),
    )
    assert all(torch.equal(t, original[k].to(t.dtype)) for k, t in theirs.items())


def test_a_single_file_with_its_config(published, tmp_path):
    shutil.move(published / "config.json", tmp_path / "elsewhere.json")
    weights, config = str(published / "pytorch_model.bin"), str(tmp_path / "elsewhere.json")
    assert main(["convert", weights, str(tmp_path / "out"), "--config", config]) == 0


def test_torchvision_gets_the_heads_asked_for(tmp_path):
    from torchvision.models import SwinTransformer

    theirs = SwinTransformer([4, 4], 16, [2, 2, 2], [1, 2, 4], [4, 4], num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    out = str(tmp_path / "out")
    assert main(["convert", str(tmp_path / "swin.pth"), out, "--heads", "linear"]) == 0
    model = lgvit_fast.LGViT.from_pretrained(out)
    assert {spec.head for spec in model.exits} == {"linear"}
    batch = images(2, (64, 64))
    with torch.no_grad():
        torch.testing.assert_close(model.forward_exits(batch).final, theirs(batch))


def test_files_that_are_no_checkpoints_are_one_plain_line(tmp_path, capsys):
    text, pickled = tmp_path / "notes.pth", tmp_path / "objects.bin"
    text.write_text("a text, not a checkpoint\n")
    torch.save({"weights": torch.ones(2), "where": tmp_path}, pickled)
    for source, message in (
        (text, "notes.pth is not a whole file of plain tensors"),
        (pickled, "pathlib PosixPath"),
    ):
        assert main(["convert", str(source), str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert len(error) < 400
        assert "\x1b" not in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["{saved}", "{out}"], 2, "saved model already", id="ours"),
        pytest.param(
            ["{saved}", "{saved}", "--to", "published"], 2, "another folder", id="in-place"
        ),
        pytest.param(
            ["{published}", "{out}", "--heads", "linear"], 2, "exits of its own", id="heads"
        ),
        pytest.param(
            ["{saved}", "{out}", "--to", "published", "--from", "torchvision"],
            2,
            "none of --from",
            id="mixed",
        ),
        pytest.param(
            ["{published}", "{out}", "--from", "torchvision"], 1, "torchvision", id="wrong-origin"
        ),
        pytest.param(["nowhere", "{out}"], 1, "nowhere", id="missing"),
        pytest.param(
            ["{published}", "{out}", "--to", "published"], 1, "model.safetensors", id="not-ours"
        ),
    ],
)
def test_mistakes_are_one_line(saved, published, tmp_path, capsys, arguments, code, message):
    places = {"saved": saved, "published": published, "out": tmp_path / "out"}
    assert main(["convert", *(a.format(**places) for a in arguments)]) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()

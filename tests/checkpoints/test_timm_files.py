"""timm's models and checkpoints, given exits: the same final logits, names and normalisation."""

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import lgvit_fast
from lgvit_fast.checkpoints import from_timm, is_timm
from lgvit_fast.cli import main
from lgvit_fast.data import InputSpec
from tests.helpers import images, tiny_vit

NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}
NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def same_logits(model, theirs):
    with torch.no_grad():
        got = model.forward_exits(images(3)).final
        torch.testing.assert_close(got, theirs.eval()(images(3)))


def folder_of_timm(folder, theirs):
    """As timm's `save_for_hf` writes it."""
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "model.safetensors")
    cfg = {"label_names": NAMES, "num_classes": 7, "interpolation": "bilinear", **IMAGENET}
    config = {"architecture": NAME, "num_classes": 7, "model_args": SIZES, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def checkpoint_of_timm(file, theirs):
    """As timm's training script writes it."""
    said = argparse.Namespace(model=NAME, model_kwargs=SIZES, mean=None, std=None, lr=0.1)
    weights = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    wrong = {name: torch.zeros_like(value) for name, value in weights.items()}
    torch.save(
        {"epoch": 3, "arch": NAME, "args": said, "state_dict": wrong, "state_dict_ema": weights},
        file,
    )
    return file


def test_a_folder_keeps_names_sizes_and_normalisation(tmp_path):
    theirs = tiny_vit()
    folder = folder_of_timm(tmp_path / "timm", theirs)
    assert is_timm(folder) and is_timm(folder / "model.safetensors")
    model = from_timm(folder, exits=[2, 4])
    same_logits(model, theirs)
    model.save_pretrained(tmp_path / "ours")
    for found in (model, lgvit_fast.LGViT.from_pretrained(tmp_path / "ours")):
        assert found.class_names == NAMES
        spec = InputSpec.of(found.backbone)
        assert (spec.mean, spec.std) == (IMAGENET["mean"], IMAGENET["std"])
        assert spec.interpolation == "bilinear"
    same_logits(found, theirs)
    assert "state_dict" not in model.backbone.pretrained_cfg


def test_the_normalisation_of_a_tag_is_saved(tmp_path):
    # the default weights of this name want a mean of 0.5, those of the tag ImageNet's
    model = lgvit_fast.create_model(
        "vit_base_patch16_224.dino", num_classes=7, depth=2, embed_dim=24, num_heads=2
    )
    assert InputSpec.of(model.backbone).mean == IMAGENET["mean"]
    model.save_pretrained(tmp_path)
    again = lgvit_fast.LGViT.from_pretrained(tmp_path)
    assert InputSpec.of(again.backbone) == InputSpec.of(model.backbone)
    assert again.get_config() == model.get_config()


def test_a_training_checkpoint_gives_its_averaged_weights(tmp_path):
    theirs = tiny_vit()
    file = checkpoint_of_timm(tmp_path / "model_best.pth.tar", theirs)
    assert is_timm(file)
    same_logits(from_timm(file), theirs)


def test_a_state_dict_needs_the_name(tmp_path):
    theirs = tiny_vit()
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="does not say which timm model it is of"):
        from_timm(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=f"does not fit timm's {NAME}"):
        from_timm(tmp_path / "weights.safetensors", NAME)
    model = from_timm(tmp_path / "weights.safetensors", NAME, model_kwargs=SIZES, num_classes=4)
    assert model.num_classes == 4
    assert from_timm(tmp_path / "weights.safetensors", NAME, model_kwargs=SIZES).num_classes == 7


def test_the_name_of_a_model_takes_its_pretrained_weights(monkeypatch):
    asked = []

    def create(name, pretrained, **kwargs):
        asked.append((name, pretrained))
        backbone = tiny_vit()
        backbone.pretrained_cfg = {**backbone.pretrained_cfg, "label_names": NAMES}
        return backbone

    monkeypatch.setattr("lgvit_fast.checkpoints.timm_files.make_backbone", create)
    assert from_timm(NAME).class_names == NAMES
    assert asked == [(NAME, True)]
    with pytest.raises(FileNotFoundError, match="nor the name of a timm model"):
        from_timm("no_such_model")


def test_convert_from_timm(tmp_path, capsys):
    theirs = tiny_vit()
    folder = str(folder_of_timm(tmp_path / "timm", theirs))
    checkpoint = str(checkpoint_of_timm(tmp_path / "last.pth.tar", theirs))
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    bare = str(tmp_path / "weights.safetensors")
    sizes = [f"{key}={value}" for key, value in SIZES.items()]
    for number, arguments in enumerate(
        (
            [folder, "--heads", "linear"],
            [folder, "--from", "timm"],
            [checkpoint],
            [bare, "--from", "timm", "--model", NAME, "--model-kwargs", *sizes],
        )
    ):
        out = tmp_path / f"out-{number}"
        assert main(["convert", arguments[0], str(out), *arguments[1:]]) == 0
        same_logits(lgvit_fast.LGViT.from_pretrained(out), theirs)
    capsys.readouterr()
    assert main(["convert", bare, str(tmp_path / "x"), "--from", "timm"]) == 1
    assert "does not say which timm model" in capsys.readouterr().err
    assert main(["convert", "no_such_model", str(tmp_path / "x"), "--from", "timm"]) == 1
    assert timm.is_model(NAME) and is_timm(NAME)

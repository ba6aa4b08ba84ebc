"""timm knows our models by name, and its tools work on them."""

import subprocess
import sys

import pytest
import timm
import torch

import lgvit_fast
from lgvit_fast.registry import MODELS
from tests.helpers import images, tiny_model, tiny_swin

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("order", ["import lgvit_fast, timm", "import timm, lgvit_fast"])
def test_names_are_there_whatever_is_imported_first(order):
    assert "True" in run(f"{order}; print(timm.is_model('lgvit_base_patch16_224'))")


def test_importing_the_package_alone_stays_light():
    code = "import sys, lgvit_fast; print([m for m in ('torch', 'timm') if m in sys.modules])"
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("name", MODELS)
def test_every_name_makes_its_model(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=11, exits=4)
    assert isinstance(model, lgvit_fast.LGViT)
    assert len(model.exits) == 4
    assert model.num_classes == 11
    assert model.pretrained_cfg["architecture"] == MODELS[name]
    assert timm.get_pretrained_cfg(name).input_size == (3, 224, 224)


def test_a_model_made_by_timm_saves_and_loads(tmp_path):
    model = timm.create_model(
        "lgvit_tiny_patch16_224", num_classes=5, heads="linear", **TINY
    ).eval()
    model.save_pretrained(tmp_path)
    again = lgvit_fast.LGViT.from_pretrained(tmp_path)
    assert torch.equal(again.infer(images(2)).logits, model.infer(images(2)).logits)


def test_data_config_is_that_of_the_backbone():
    model = timm.create_model("lgvit_tiny_patch16_224", num_classes=5, **TINY)
    assert timm.data.resolve_data_config(model=model)["mean"] == (0.5, 0.5, 0.5)


@torch.no_grad()
def test_features_only_gives_those_of_the_blocks():
    features = timm.create_model("lgvit_tiny_patch16_224", features_only=True, **TINY).eval()
    assert [f.shape for f in features(images(2))] == [(2, 32, 4, 4)] * len(features(images(2)))


@pytest.mark.parametrize("build", [tiny_model, tiny_swin], ids=["vit", "swin"])
@torch.no_grad()
def test_feature_extraction(build):
    model = build()
    batch = images(2, model.backbone.patch_embed.img_size)
    features = model.forward_features(batch)
    assert features.shape[-1] == model.num_features
    logits = model.forward_head(features)
    torch.testing.assert_close(logits, model.forward_exits(batch).final)
    last, inner = model.forward_intermediates(batch)
    torch.testing.assert_close(last, features)
    assert all(
        torch.equal(a, b)
        for a, b in zip(inner, model.backbone.forward_intermediates(batch)[1], strict=True)
    )


@pytest.mark.parametrize("build", [tiny_model, tiny_swin], ids=["vit", "swin"])
def test_reset_classifier_is_for_every_exit(build, tmp_path):
    model = build(exits=2)
    model.class_names = list("abcdefg")
    batch = images(3, model.backbone.patch_embed.img_size)
    model.infer(batch)
    model.reset_classifier(4)
    assert model.infer(batch).logits.shape == (3, 4)
    assert {x.shape for x in model.forward_exits(batch).exits} == {(3, 4)}
    assert model.get_classifier().out_features == 4
    assert model.class_names is None
    held = {id(p) for segment in model.segments for p in segment.parameters()}
    assert id(model.get_classifier().weight) in held
    model.save_pretrained(tmp_path)
    assert lgvit_fast.LGViT.from_pretrained(tmp_path).num_classes == 4
    with pytest.raises(ValueError, match="num_classes=0"):
        model.reset_classifier(0)


def test_gradient_checkpointing_is_passed_on():
    model = tiny_model()
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing

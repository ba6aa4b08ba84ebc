"""What a model refuses, each in a sentence that says what to do."""

import json

import pytest
import torch

import lgvit_fast
from tests.helpers import images, tiny_model, tiny_swin


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b"], "class_names has 2 entries, the model has 7 classes"),
        ("abcdefg", "expected a list of strings"),
        (list(range(7)), "expected a list of strings"),
    ],
    ids=["too few", "a string", "numbers"],
)
def test_class_names_that_do_not_fit(names, message):
    model = tiny_model(exits=2)
    with pytest.raises(ValueError, match=message):
        model.class_names = names
    assert model.class_names is None
    model.class_names = tuple("abcdefg")
    assert model.class_names == list("abcdefg")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("class_names", ["a"], "class_names has 1 entries, the model has 7 classes"),
        ("policy", {"name": "Oracle", "threshold": 0.5}, "expected a name out of Confidence"),
        ("policy", {"name": "Confidence", "patience": 2}, "unexpected keyword argument"),
    ],
    ids=["class names", "policy", "argument"],
)
def test_a_saved_config_that_does_not_fit(tmp_path, field, value, message):
    tiny_model(exits=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=message):
        lgvit_fast.LGViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("pool", ["avg", "token", "max", None])
def test_reset_classifier_takes_the_pooling_as_timm_does(tmp_path, pool):
    model = tiny_model(exits=2)
    model.reset_classifier(5, pool)
    assert model.backbone.global_pool == (pool or "token")
    model.save_pretrained(tmp_path)
    again = lgvit_fast.LGViT.from_pretrained(tmp_path)
    assert again.backbone.global_pool == model.backbone.global_pool
    with torch.no_grad():
        expected, got = model.forward_exits(images(2)), again.forward_exits(images(2))
    torch.testing.assert_close(got.final, expected.final)
    assert got.final.shape == got.exits[0].shape == (2, 5)


def test_reset_classifier_with_the_pooling_of_a_swin(tmp_path):
    model = tiny_swin(exits=2)
    model.reset_classifier(5, "avg")
    model.save_pretrained(tmp_path)
    batch = images(2, (48, 48))
    with torch.no_grad():
        got = lgvit_fast.LGViT.from_pretrained(tmp_path).forward_exits(batch).final
        torch.testing.assert_close(got, model.forward_exits(batch).final)


def test_exporting_the_whole_model_says_to_export_segments():
    with pytest.raises(RuntimeError, match=r"Export model\.segments one by one"):
        torch.export.export(tiny_model(exits=2), (images(2),), strict=False)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("vit_base_patch16_242", "vit_base_patch16_224"),
        ("deit_tny_patch16", "deit_tiny_patch16_224"),
        ("swin_base_patch4_window7", "swin_base_patch4_window7_224"),
    ],
)
def test_the_nearest_name_comes_first(asked, meant):
    with pytest.raises(ValueError, match=f"no model named '{asked}'; similar: {meant},"):
        lgvit_fast.create_model(asked)

"""Hugging Face classifiers: the same logits, from the model, its files or its state dict."""

import pytest
import torch

import lgvit_fast
from lgvit_fast.checkpoints import from_huggingface
from tests.helpers import images, randomize

transformers = pytest.importorskip("transformers")

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 7,
}
SWIN = {
    "embed_dim": 16,
    "depths": [2, 2, 2],
    "num_heads": [1, 2, 4],
    "window_size": 4,
    "image_size": 64,
    "patch_size": 4,
    "num_labels": 7,
}
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", VIT),
    "vit-without-qkv-bias": ("ViTForImageClassification", "ViTConfig", {**VIT, "qkv_bias": False}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", VIT),
    "deit-with-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT),
    "swin": ("SwinForImageClassification", "SwinConfig", SWIN),
}


def make(name, **changes):
    kind, config, options = MODELS[name]
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**{**options, **changes})
    model = getattr(transformers, kind)(settings)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def theirs(request):
    return make(request.param)


def check(model, theirs):
    batch = images(3, (theirs.config.image_size,) * 2)
    with torch.no_grad():
        out = model.forward_exits(batch)
        torch.testing.assert_close(out.final, theirs(batch).logits, atol=1e-5, rtol=1e-5)
    assert len(out.exits) == len(model.exits)


def test_logits_equal_those_of_the_model(theirs):
    check(from_huggingface(theirs), theirs)


def test_logits_equal_those_of_the_saved_model(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    model = from_huggingface(tmp_path, exits=[1, 2], heads="linear")
    assert [spec.head for spec in model.exits] == ["linear", "linear"]
    check(model, theirs)


def test_a_pickled_state_dict_will_do(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    check(from_huggingface(tmp_path / "pytorch_model.bin", theirs.config.to_dict()), theirs)


def test_it_becomes_a_saved_model_of_ours(theirs, tmp_path):
    from_huggingface(theirs).save_pretrained(tmp_path)
    check(lgvit_fast.LGViT.from_pretrained(tmp_path), theirs)


def test_names_of_the_classes_come_along():
    names = [f"animal {i}" for i in range(7)]
    model = from_huggingface(make("vit", id2label=dict(enumerate(names))))
    assert model.class_names == names
    assert from_huggingface(make("vit")).class_names is None


def test_another_number_of_classes_gets_a_new_classifier():
    assert from_huggingface(make("swin"), num_classes=3).num_classes == 3


def test_bad_input():
    with pytest.raises(ValueError, match="from_huggingface"):
        lgvit_fast.LGViT(make("vit"))
    with pytest.raises(ValueError, match="with a classifier"):
        from_huggingface(make("vit").vit)
    with pytest.raises(ValueError, match="hidden_act='relu'"):
        from_huggingface(make("vit", hidden_act="relu"))
    with pytest.raises(ValueError, match=r"unknown: swin\.embeddings\.position_embeddings"):
        from_huggingface(make("swin", use_absolute_embeddings=True))
    weights = make("vit").state_dict()
    del weights["vit.layernorm.weight"]
    with pytest.raises(ValueError, match=r"missing: vit\.layernorm\.weight"):
        from_huggingface(weights, make("vit").config.to_dict())

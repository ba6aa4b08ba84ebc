"""What may be named as a rival, and what is said of one that cannot be compared."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

from lgvit_fast import LGViT
from lgvit_fast.evaluation.report.rivals import input_spec, load_rival
from tests.helpers import images, tiny_model, tiny_vit

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}


def same(rival, model, size=(32, 32)):
    batch = images(3, size)
    with torch.no_grad():
        torch.testing.assert_close(rival(batch), model(batch))
    assert not rival.training


def test_a_folder_of_ours(tmp_path):
    model = tiny_model(exits=4)
    model.save_pretrained(tmp_path)
    rival = load_rival(str(tmp_path), 7)
    assert isinstance(rival, LGViT)
    same(rival, model)


def test_a_folder_of_timms(tmp_path):
    model = tiny_vit().eval()
    config = {"num_classes": 7, "label_names": list("abcdefg")}
    save_for_hf(model, tmp_path, model_config=config, model_args=SMALL, safe_serialization=True)
    same(load_rival(str(tmp_path), 7), model)
    same(load_rival(str(tmp_path), 7, list("abcdefg")), model)
    with pytest.raises(ValueError, match="class 6 is 'g', the model's is 'z'"):
        load_rival(str(tmp_path), 7, list("abcdefz"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A convolutional network's file, and the network."""
    model = timm.create_model("test_resnet", num_classes=7).eval()
    file = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(model.state_dict(), file)
    return file, model


def test_a_file_for_any_timm_model(weights):
    file, model = weights
    rival = load_rival(f"test_resnet={file}", 7)
    same(rival, model, (64, 64))
    spec = input_spec(rival)
    assert spec.channels == 3 and spec.size == (160, 160)


def test_classes_that_do_not_match(weights, tmp_path):
    with pytest.raises(ValueError, match="has 7 classes, expected the model's 10"):
        load_rival(f"test_resnet={weights[0]}", 10)
    model = tiny_model(exits=4)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 7 classes, expected the model's 3"):
        load_rival(str(tmp_path), 3)


def test_weights_of_another_model(weights):
    with pytest.raises(ValueError, match="the weights do not fit"):
        load_rival(f"test_vit={weights[0]}", 7)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("no_such_model", ValueError, "timm has no 'no_such_model'"),
        ("no/such/folder", ValueError, "expected a folder with model.safetensors"),
        ("test_vit=no-such.safetensors", FileNotFoundError, "no-such"),
    ],
    ids=["name", "folder", "file"],
)
def test_what_is_not_there(name, error, message):
    with pytest.raises(error, match=message):
        load_rival(name, 7)


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json and model.safetensors not found"):
        load_rival(str(tmp_path), 7)


def test_pretrained_weights_out_of_reach(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(FileNotFoundError, match="pretrained weights are not at hand"):
        load_rival("vit_tiny_patch16_224", 7)

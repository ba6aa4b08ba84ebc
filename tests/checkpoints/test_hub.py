"""The hub's interface, without a hub: uploads and downloads are intercepted."""

import shutil

import huggingface_hub
import pytest
import timm
import torch

import lgvit_fast
from lgvit_fast.backbones.timm_models import describe_backbone
from lgvit_fast.checkpoints import hub as hub_module
from tests.helpers import images, tiny_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that plays the hub."""
    folder = tmp_path / "hub"

    def create_repo(self, repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, folder / repo_id)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def download(name, file, **options):
        assert set(options) == {
            "revision", "token", "cache_dir", "force_download", "local_files_only"
        }  # fmt: skip
        return str(folder / name / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub_module, "hf_hub_download", download)
    return folder


def same(one, other):
    return torch.equal(one.infer(images(2)).logits, other.infer(images(2)).logits)


def test_push_and_load_by_name(hub):
    model = tiny_model()
    url = model.push_to_hub("someone/digits")
    assert "someone/digits" in str(url)
    assert sorted(p.name for p in (hub / "someone" / "digits").iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip
    assert same(lgvit_fast.LGViT.from_pretrained("someone/digits"), model)


def test_push_while_saving(hub, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "kept", push_to_hub=True, repo_id="someone/kept")
    for place in (tmp_path / "kept", "someone/kept"):
        assert same(lgvit_fast.LGViT.from_pretrained(place), model)


def test_the_card_says_what_the_model_is(tmp_path):
    model = tiny_model(exits=[2, 4], heads=["lph_full", "gah_2"])
    model.policy = lgvit_fast.Entropy(0.4)
    model.save_pretrained(tmp_path, model_card_kwargs={"repo_id": "someone/it"})
    card = (tmp_path / "README.md").read_text()
    metadata, _, text = card.removeprefix("---\n").partition("---")
    assert "library_name: lgvit_fast" in metadata and "image-classification" in metadata
    assert "| 2 | lph_full |\n| 4 | gah_2 |" in text
    assert "Entropy(threshold=0.4)" in text and "someone/it" in text and "7 classes" in text
    # the weights are the user's: what they may be used for is not for this package to say
    assert "license" not in card.lower() and "apache" not in card.lower()


def test_a_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_folder_is_preferred_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save_pretrained("someone/here")
    assert same(lgvit_fast.LGViT.from_pretrained("someone/here"), model)


def test_a_hub_name_while_offline_says_what_works(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'someone/nothing' is no folder.*save_pretrained"):
        lgvit_fast.LGViT.from_pretrained(
            "someone/nothing", cache_dir=tmp_path, local_files_only=True
        )


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, True),
        ({"img_size": 96}, True),
        ({"class_token": False, "global_pool": "avg"}, False),
        ({"act_layer": "relu"}, False),
        ({"proj_drop_rate": 0.1}, False),
    ],
    ids=str,
)
def test_a_model_of_a_timm_that_does_not_note_its_arguments(options, known):
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=7, **options).eval()
    if hasattr(backbone, "_model_args"):
        del backbone._model_args
    described = describe_backbone(backbone)
    assert (described is not None) == known
    if described is not None:
        assert described["args"].keys() == {"num_classes", *options}

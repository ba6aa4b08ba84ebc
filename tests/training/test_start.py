"""What a run begins with, and that classes are matched by name."""

import json
import shutil

import pytest
import torch
from PIL import Image

import lgvit_fast
from lgvit_fast.checkpoints.files import save_weights
from lgvit_fast.cli import main
from lgvit_fast.data import ImageSource, open_dataset
from lgvit_fast.data.classes import Relabelled, match_classes
from lgvit_fast.training import train
from lgvit_fast.training.checkpoint import Checkpoint
from lgvit_fast.training.fingerprint import fingerprint
from tests.checkpoints.test_timm_files import NAME, folder_of_timm
from tests.helpers import randomize, tiny_vit

GREYS = {"black": 10, "grey": 120, "white": 245}
ONE_EPOCH = {"stage1": {"epochs": 1, "warmup_epochs": 0}, "stage2": {"epochs": 1}}
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2}


def folder_of(path, names, count=6):
    """Class folders of plain images, each class of one brightness."""
    for name in names:
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (16, 16), (GREYS[name] + number,) * 3).save(
                path / name / f"{number}.png"
            )
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that tells the three brightnesses apart, its classes in another order than sorted."""
    names = ["white", "black", "grey"]
    torch.manual_seed(0)
    model = lgvit_fast.create_model("vit_tiny_patch16_224", num_classes=3, exits=[1, 2, 3], **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    targets = torch.arange(3).repeat(8)
    for _ in range(30):
        values = torch.tensor([GREYS[name] for name in names]).float()[targets] + torch.rand(24) * 6
        batch = ((values / 255 - 0.5) / 0.5).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
        out = model.train()(batch)
        loss = sum(torch.nn.functional.cross_entropy(x, targets) for x in (*out.exits, out.final))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.class_names = names
    model.policy = lgvit_fast.Entropy(0.25)
    folder = tmp_path_factory.mktemp("trained")
    model.eval().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def plain(small_config):
    """A config that changes next to nothing, for what was there before to be seen."""

    def build(output="run", **fields):
        stages = {s: {"epochs": 1, "warmup_epochs": 0, "lr": 1e-9} for s in ("stage1", "stage2")}
        usual = {"model_kwargs": {}, "exits": None, "batch_size": 4, "augment": False}
        return small_config(output, **{**usual, **stages, **fields})

    return build


def test_match_classes():
    assert match_classes(["a", "b"], ["a", "b"], "x") is None
    assert match_classes([], ["a", "b"], "x") is match_classes(["a"], None, "x") is None
    assert match_classes(["a", "c"], ["c", "b", "a"], "x").tolist() == [2, 0]
    with pytest.raises(ValueError, match="photos has classes that the model does not know: d, e"):
        match_classes(["a", "d", "e"], ["a", "b"], "photos")


@pytest.mark.parametrize("stage", ["1", "2", "both"])
@pytest.mark.parametrize("names", [["black", "grey", "white"], ["black", "white"]], ids=str)
def test_init_keeps_what_the_model_is_and_matches_classes_by_name(
    trained, plain, tmp_path, stage, names
):
    data = folder_of(tmp_path / "data", names)
    result = train(plain(init=trained, stage=stage, data=data, val_data=data))
    for accuracy in (stage.accuracy for stage in result.stages.values()):
        assert accuracy.final == 1.0  # by position it would be none, or a third
        assert min(accuracy.exits) > 0.7
    best = lgvit_fast.LGViT.from_pretrained(list(result.stages.values())[-1].best)
    for model in (result.model, best):
        assert model.class_names == ["white", "black", "grey"]
        assert model.policy == lgvit_fast.Entropy(0.25)
        assert [spec.layer for spec in model.exits] == [1, 2, 3]


def test_a_model_given_begins_with_stage_2_and_keeps_names_and_policy(trained, plain, tmp_path):
    data = folder_of(tmp_path / "data", GREYS)
    model = lgvit_fast.LGViT.from_pretrained(trained)
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    result = train(plain(stage="2", data=data, val_data=data), model)
    assert result.stages["stage2"].accuracy.final == 1.0
    assert result.model.class_names == ["white", "black", "grey"]
    assert result.model.policy == lgvit_fast.Entropy(0.25)
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


def test_stage_2_takes_names_and_policy_from_stage_1(trained, plain, tmp_path):
    data = folder_of(tmp_path / "data", GREYS)
    layout = {"model_kwargs": SIZES, "exits": [1, 2, 3]}
    first = train(plain("first", init=trained, stage="1", data=data, val_data=data)).output
    for place in (trained, first / "stage1" / "checkpoint.safetensors"):
        shutil.rmtree(tmp_path / "second", ignore_errors=True)
        config = plain(
            "second", stage="2", stage1_from=str(place), data=data, val_data=data, **layout
        )
        result = train(config)
        assert result.stages["stage2"].accuracy.final == 1.0
        assert result.model.class_names == ["white", "black", "grey"]
        assert result.model.policy == lgvit_fast.Entropy(0.25)


def test_unknown_classes_are_named_or_get_new_classifiers(trained, plain, tmp_path):
    data = folder_of(tmp_path / "data", GREYS)
    (tmp_path / "data" / "grey").rename(tmp_path / "data" / "beige")
    with pytest.raises(ValueError, match=r"does not know: beige; give it new classifiers"):
        train(plain(init=trained, data=data))
    assert not (tmp_path / "run" / "stage1").exists()
    with pytest.raises(ValueError, match="begin with stage 1"):
        train(plain(init=trained, data=data, new_classes=True, stage="2"))
    model = train(plain(init=trained, data=data, new_classes=True)).model
    assert model.class_names == ["beige", "black", "white"]


def test_more_classes_than_the_model_has_are_named(plain, tmp_path):
    model = lgvit_fast.create_model("vit_tiny_patch16_224", num_classes=2, exits=[1, 2], **SIZES)
    with pytest.raises(ValueError, match="has 2 classes, the images 3: black, grey, white"):
        train(plain(data=folder_of(tmp_path / "data", GREYS)), model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exits": [1, 2]}, "the model in init has .* after block 1"),
        ({"heads": "linear"}, "the model in init has"),
        ({"model_kwargs": {"depth": 3}}, "init is a saved model, which has its own"),
        ({"num_classes": 5}, "new_classes=True gives it new classifiers"),
    ],
    ids=["exits", "heads", "model_kwargs", "num_classes"],
)
def test_what_contradicts_a_saved_model_is_refused(trained, plain, fields, message):
    with pytest.raises(ValueError, match=message):
        train(plain(init=trained, **fields))


def test_new_classes_need_a_model(plain):
    with pytest.raises(ValueError, match="no model in init"):
        plain(new_classes=True)


def test_init_with_a_timm_checkpoint(plain, tmp_path):
    theirs = tiny_vit()
    randomize(theirs)
    source = folder_of_timm(tmp_path / "timm", theirs)
    data = folder_of(tmp_path / "data", GREYS)
    config = plain(init=str(source), data=data, exits=[2, 4], heads="linear", recipe="pabee")
    model = train(config).model
    assert model.class_names == ["black", "grey", "white"]  # not timm's: new classifiers
    assert [(spec.layer, spec.head) for spec in model.exits] == [(2, "linear"), (4, "linear")]
    assert isinstance(model.policy, lgvit_fast.Patience)
    block = "blocks.5.mlp.fc1.weight"
    torch.testing.assert_close(
        model.backbone.state_dict()[block], theirs.state_dict()[block], atol=1e-5, rtol=0
    )
    save_weights(tmp_path / "bare.safetensors", theirs.state_dict())
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2}
    bare = {"init": str(tmp_path / "bare.safetensors"), "model": NAME, "model_kwargs": sizes}
    assert train(plain("bare", data=data, **bare)).model.num_blocks == 6


def test_resuming_on_other_classes_is_refused(plain, tmp_path):
    data = folder_of(tmp_path / "data", GREYS)
    layout = {"model_kwargs": SIZES, "exits": [1, 2, 3]}
    train(plain(data=data, **layout))
    model = lgvit_fast.create_model("vit_tiny_patch16_224", num_classes=3, exits=[1, 2, 3], **SIZES)
    model.class_names = ["white", "grey", "black"]
    with pytest.raises(ValueError, match="its classes are black, grey, white, now they are white"):
        train(plain(data=data, resume=True, **layout), model)
    # a checkpoint from before names were kept resumes as before
    file = tmp_path / "run" / "stage1" / "checkpoint.safetensors"
    old = Checkpoint.load(file)
    del old.state["class_names"], old.state["policy"]
    old.save(file)
    train(plain(data=data, resume=True, **layout))


def test_relabelled_batches():
    class Source:
        def __init__(self):
            self.class_names = ["x", "y"]

        def __len__(self):
            return 2

        def __getitems__(self, keys):
            from lgvit_fast.data import Batch

            return Batch(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), [])

    source = Relabelled(Source(), torch.tensor([2, 0]), ["y", "z", "x"])
    assert len(source) == 2
    assert source.__getitems__([(0, 0), (0, 1)]).targets.tolist() == [2, 0]


def test_relabelled_images_are_known_again_when_resuming(tmp_path):
    source = ImageSource(open_dataset(folder_of(tmp_path, GREYS)), lambda image: image)
    relabelled = Relabelled(source, torch.tensor([2, 1, 0]), list("abc"))
    assert fingerprint(relabelled) == fingerprint(source)
    assert len(fingerprint(source)) == 3


def test_the_command_takes_init_and_retypes_nothing(trained, tmp_path, capsys):
    data = folder_of(tmp_path / "data", GREYS)
    run = tmp_path / "run"
    command = ["train", "--init", trained, "--data", data, "--output", str(run), "--stage", "2"]
    small = ["--stage2.epochs", "1", "--batch-size", "4", "--workers", "0", "--no-tensorboard"]
    assert main([*command, *small, "--no-progress", "--device", "cpu"]) == 0
    config = json.loads((run / "stage2" / "best" / "config.json").read_text())
    assert config["class_names"] == ["white", "black", "grey"]
    (tmp_path / "data" / "grey").rename(tmp_path / "data" / "beige")
    assert main(["train", "--init", trained, "--data", data, "--output", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert "does not know: beige" in error and "--new-classes beside init" in error

"""`lgvit-fast train`: options to config, a tiny run, resuming it, and what comes after."""

import dataclasses
import json

import pytest

import lgvit_fast
from lgvit_fast.cli import main, train
from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig
from tests.cli.conftest import save_image

TINY = [
    *("--model", "vit_tiny_patch16_224", "--exits", "1,2", "--workers", "0", "--no-progress"),
    *("--model-kwargs", "img_size=16", "patch_size=8", "embed_dim=16", "depth=3", "num_heads=2"),
    *("--stage1.epochs", "1", "--stage2.epochs", "1", "--batch-size", "4", "--no-tensorboard"),
    *("--device", "cpu"),
]


@pytest.fixture
def seen(monkeypatch):
    """The configs that training is called with, instead of training."""
    configs = []

    def stop(config):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("lgvit_fast.training.train", stop)
    return configs


@pytest.fixture
def labelled(tmp_path):
    for place, name in enumerate(("cat", "dog")):
        for number in range(8):
            save_image(tmp_path / "data" / name / f"{number}.png", 10 * place + number)
    return tmp_path / "data"


def test_no_options_are_the_defaults(seen):
    assert main(["train"]) == 130
    assert seen == [TrainConfig()]


def test_options_reach_their_fields(seen):
    options = [
        *("--stage", "2", "--stage1-from", "m", "--exits", "4,6,8", "--seed", "3"),
        *("--heads", "lph_full", "gah_2", "gah_3", "--crop-scale", "0.5", "1"),
        *("--model-kwargs", "img_size=32", "global_pool=avg", "class_token=false"),
        *("--no-augment", "--precision", "bf16", "--stage2.layer-decay", "0.8"),
        *("--stage1.strategy", "weighted", "--stage2.published"),
    ]
    assert main(["train", *options]) == 130
    assert seen[0] == TrainConfig(
        stage="2",
        stage1_from="m",
        exits=[4, 6, 8],
        seed=3,
        heads=["lph_full", "gah_2", "gah_3"],
        crop_scale=(0.5, 1.0),
        model_kwargs={"img_size": 32, "global_pool": "avg", "class_token": False},
        augment=False,
        precision="bf16",
        stage1=Stage1Config(strategy="weighted"),
        stage2=Stage2Config(layer_decay=0.8, published=True),
    )


def test_every_field_is_an_option_with_help(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for prefix, config in (
        ("", TrainConfig),
        ("stage1.", Stage1Config),
        ("stage2.", Stage2Config),
    ):
        for field in dataclasses.fields(config):
            if field.name not in ("stage1", "stage2"):
                assert f"--{prefix}{field.name.replace('_', '-')} " in text


def test_an_undocumented_field_is_noticed():
    @dataclasses.dataclass
    class Config:
        """Attributes:
        known: what it is.
        """

        known: int = 1
        unknown: int = 2

    with pytest.raises(LookupError, match="unknown"):
        train._help(Config, dataclasses.fields(Config)[1])


def test_a_saved_config_is_the_base(seen, tmp_path):
    TrainConfig(seed=5, batch_size=8).save(tmp_path / "c.json")
    assert main(["train", "--config", str(tmp_path / "c.json"), "--batch-size", "16"]) == 130
    assert seen[0] == TrainConfig(seed=5, batch_size=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage1.epochs", "0"], "epochs is 0, expected at least 1"),
        (["--val-fraction", "2"], "--val-fraction is 2.0"),
        (["--mixup", "0.2", "--batch-size", "7"], "expected an even one"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_2(capsys, options, message):
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err


def test_train_then_resume_then_eval_and_predict(labelled, tmp_path, capsys, monkeypatch):
    run = str(tmp_path / "run")
    command = ["train", "--data", str(labelled), "--output", run, *TINY]
    assert main(command) == 0
    text = capsys.readouterr().out
    best = f"{run}/stage2/best"
    assert f"lgvit-fast eval {best} --data FOLDER\nwith a folder of other images" in text
    assert lgvit_fast.LGViT.from_pretrained(best).class_names == ["cat", "dog"]

    assert main(command) == 1  # a run is there
    error = capsys.readouterr().err
    assert "resume it (--resume)" in error
    assert "=True" not in error
    assert main(["train", "--config", f"{run}/config.json", "--resume"]) == 0

    out = str(tmp_path / "out")
    assert main(["eval", best, "--data", str(labelled), "--out", out, "--no-timing"]) == 0
    capsys.readouterr()
    assert main(["predict", best, str(labelled)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 16
    assert {row["label"] for row in rows} <= {"cat", "dog"}


def test_what_comes_next_is_never_the_training_images(tmp_path):
    def options(**fields):
        return train._to_evaluate(TrainConfig(**fields))

    data = str(tmp_path)
    assert options(data=data, val_data="other") == "--data other"
    assert options() == "--data digits"  # of which eval takes the part held out
    named = options(data="d", dataset="torch/cifar10", val_split="test")
    assert named == "--data d --dataset torch/cifar10 --split test"
    assert options(data=data).startswith("--data FOLDER\n")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert options(data=data) == f"--data {data}/val"


def test_a_bad_file_stops_training_with_its_name_or_is_skipped(labelled, tmp_path, capsys):
    (labelled / "cat" / "text.png").write_text("not an image")
    run = str(tmp_path / "run")
    command = ["train", "--data", str(labelled), "--output", run, "--stage", "1", *TINY]
    assert main(command) == 1
    assert "text.png" in capsys.readouterr().err
    assert main([*command, "--skip-bad-images", "--resume"]) == 0
    assert "unreadable" in capsys.readouterr().out

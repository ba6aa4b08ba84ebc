"""The training config: to JSON and back, and what it refuses."""

import json

import pytest

from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig, digits_recipe


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        digits_recipe("somewhere"),
        TrainConfig(exits=[2, 5], heads=["lph_full", "gah_2"], crop_scale=(0.5, 1.0)),
        TrainConfig(stage1=Stage1Config(strategy="normal"), stage2=Stage2Config(published=True)),
    ],
    ids=["defaults", "digits", "layout", "stages"],
)
def test_json_round_trip(config, tmp_path):
    config.save(tmp_path / "config.json")
    assert TrainConfig.load(tmp_path / "config.json") == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_part_of_a_dict_is_enough():
    config = TrainConfig.from_dict({"seed": 3, "stage2": {"epochs": 2}})
    assert config.seed == 3
    assert config.stage2 == Stage2Config(epochs=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bach_size": 3}, "no field bach_size; did you mean batch_size?"),
        (
            {"stage1": {"stratgy": "normal"}},
            "no field stage1.stratgy; did you mean stage1.strategy?",
        ),
        ({"stage": "3"}, "stage is '3', expected one of 1, 2, both"),
        ({"precision": "fp8"}, "precision is 'fp8', expected one of fp32, bf16, fp16"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": 7, "mixup": 0.8}, "batch_size is 7, expected an even one"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0, expected in"),
        ({"stage1": {"strategy": "none"}}, "strategy is 'none', expected one of normal"),
        ({"stage1": {"sched": "plateau"}}, "plateau"),
        ({"stage1": {"epochs": 3, "warmup_epochs": 3}}, "warmup_epochs is 3, expected in"),
        ({"stage2": {"alpha": 1.5}}, "alpha is 1.5, expected in"),
        ({"stage2": {"ema_decay": 1.0}}, "ema_decay is 1.0, expected in"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_values_are_named(values, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        TrainConfig.from_dict(values)

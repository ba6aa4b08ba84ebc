"""A run small enough to be repeated in every test."""

import json

import pytest

from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig


@pytest.fixture
def small_config(tmp_path):
    """Builds configs of a tiny model on the digits; keywords override fields."""

    def build(output="run", stage1=None, stage2=None, **fields):
        defaults = {
            "output": str(tmp_path / output),
            "model": "vit_tiny_patch16_224",
            "model_kwargs": {
                "img_size": 16,
                "patch_size": 8,
                "embed_dim": 16,
                "depth": 4,
                "num_heads": 2,
                "in_chans": 1,
                "proj_drop_rate": 0.1,
                "drop_path_rate": 0.1,
            },
            "exits": [1, 2, 3],
            "batch_size": 256,  # 5 updates an epoch
            "val_batch_size": 512,
            "workers": 0,
            "log_every": 1,
            "save_every": 2,
            "tensorboard": False,
            "progress": False,
            "device": "cpu",
            "stage": "1",
        }
        return TrainConfig(
            **{**defaults, **fields},
            stage1=Stage1Config(
                **{"epochs": 2, "lr": 1e-3, "warmup_epochs": 0.5, **(stage1 or {})}
            ),
            stage2=Stage2Config(**{"epochs": 2, "lr": 1e-3, **(stage2 or {})}),
        )

    return build


@pytest.fixture
def metrics():
    """Reads a stage's metrics.jsonl, without what depends on the clock."""

    def read(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            row.pop("images_per_second", None)
        return rows

    return read

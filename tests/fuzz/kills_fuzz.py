"""A training that is killed at any moment resumes to the same weights as one that was not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from lgvit_fast.checkpoints.files import load_weights
from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig, train

PROGRAM = """
import json, sys
from lgvit_fast.training import TrainConfig, train
train(TrainConfig.from_dict(json.loads(sys.argv[1])))
"""
SECONDS = 12.0  # within which a run is killed: import, training, saving


def run(count: int, seed: int) -> dict[str, int]:
    """Kill and resume `count` trainings; AssertionError where the weights differ."""
    draw = random.Random(seed)
    kills = 0
    for _ in range(count):
        kills += _case(draw)
    return {"cases": count, "kills": kills}


def _case(draw: random.Random) -> int:
    """One training, killed up to three times, then resumed to its end."""
    expected, kills = _uninterrupted(), 0
    with tempfile.TemporaryDirectory() as folder:
        config = replace(_config(folder), resume=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        for _ in range(3):
            arguments = [sys.executable, "-c", PROGRAM, json.dumps(config.to_dict())]
            process = subprocess.Popen(
                arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(draw.uniform(1.0, SECONDS))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
        _train(config)
        for stage, weights in expected.items():
            found = load_weights(Path(folder) / stage / "best" / "model.safetensors")
            assert found.keys() == weights.keys()
            assert all(torch.equal(found[name], weights[name]) for name in weights)
    return kills


@cache
def _uninterrupted() -> dict[str, dict[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        _train(_config(folder))
        return {
            stage: load_weights(Path(folder) / stage / "best" / "model.safetensors")
            for stage in ("stage1", "stage2")
        }


def _train(config: TrainConfig) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(config)


def _config(folder: str) -> TrainConfig:
    return TrainConfig(
        output=folder,
        model="vit_tiny_patch16_224",
        model_kwargs={
            "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2
        },
        exits=[1, 3],
        data="digits",
        batch_size=128,
        val_batch_size=360,
        workers=0,
        device="cpu",
        stage1=Stage1Config(epochs=2, lr=1e-3),
        stage2=Stage2Config(epochs=2, lr=1e-3),
    )  # fmt: skip

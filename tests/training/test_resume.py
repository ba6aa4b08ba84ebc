"""A run that is stopped anywhere and resumed goes on bit by bit as if it had not been."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgvit_fast.checkpoints.files import load_weights
from lgvit_fast.training import TrainConfig, loop, train
from lgvit_fast.training.checkpoint import Checkpoint


class Interrupted(Exception):
    pass


@pytest.fixture
def stop_at(monkeypatch):
    """Makes a stage fail when it is about to do a given update."""
    original = loop._StageRun._update

    def arm(stage, update):
        def run_update(self, batches, count):
            if self.name == stage and self.progress.update == update:
                raise Interrupted
            return original(self, batches, count)

        monkeypatch.setattr(loop._StageRun, "_update", run_update)

    def disarm():
        monkeypatch.setattr(loop._StageRun, "_update", original)

    arm.disarm = disarm
    return arm


def assert_same_run(one, other, stage, metrics):
    one, other = Path(one) / stage, Path(other) / stage
    assert metrics(one) == metrics(other)
    left, right = (load_weights(folder / loop.CHECKPOINT) for folder in (one, other))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert (
        Checkpoint.load(one / loop.CHECKPOINT).facts
        == Checkpoint.load(other / loop.CHECKPOINT).facts
    )


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return str(tmp_path / "images")


# name -> update at which the run is stopped (an epoch has 5, every second is saved), config
CASES = {
    "plain": (3, {}),
    "next epoch, alternating": (8, {"stage1": {"strategy": "alternating"}}),
    "ema, layer decay, adaptive clip": (
        9,
        {"stage1": {"ema_decay": 0.99, "layer_decay": 0.8, "clip_grad": 0.1, "clip_mode": "agc"}},
    ),
    "accumulate": (4, {"stage1": {"accumulate": 2, "opt": "sgd"}, "batch_size": 120}),
    "mixup and cutmix": (7, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}),
    "bf16": (3, {"precision": "bf16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_stage1_resumes_bit_identically(case, small_config, stop_at, metrics):
    update, fields = CASES[case]
    whole = small_config("whole", **fields)
    train(whole)
    stopped = replace(whole, output=small_config("stopped").output)
    stop_at("stage1", update)
    with pytest.raises(Interrupted):
        train(stopped)
    stop_at.disarm()
    train(replace(stopped, resume=True))
    assert_same_run(whole.output, stopped.output, "stage1", metrics)


def test_the_alternation_survives(small_config, stop_at, metrics):
    config = small_config(save_every=3)  # an odd update, so a forgotten counter would show
    stop_at("stage1", 4)
    with pytest.raises(Interrupted):
        train(config)
    stop_at.disarm()
    train(replace(config, resume=True))
    rows = [row for row in metrics(Path(config.output) / "stage1") if row["kind"] == "train"]
    assert [row["update"] for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        final_alone = row["loss"] == row["ce_final"]
        assert final_alone == (row["update"] % 2 == 1)  # rows count updates done, from 1


def test_stage2_resumes_bit_identically(small_config, stop_at, metrics):
    whole = small_config("whole", stage="both")
    train(whole)
    stopped = replace(whole, output=small_config("stopped").output)
    stop_at("stage2", 8)
    with pytest.raises(Interrupted):
        train(stopped)
    stop_at.disarm()
    train(replace(stopped, resume=True))
    for stage in ("stage1", "stage2"):
        assert_same_run(whole.output, stopped.output, stage, metrics)


@pytest.mark.parametrize("workers", [0, 2])
def test_image_files_resume_bit_identically(workers, image_folder, small_config, stop_at, metrics):
    fields = {"data": image_folder, "batch_size": 16, "mixup": 0.2, "random_erasing": 0.5}
    whole = small_config("whole", **fields)
    train(whole)
    stopped = small_config("stopped", workers=workers, **fields)
    stop_at("stage1", 8)
    with pytest.raises(Interrupted):
        train(stopped)
    stop_at.disarm()
    train(replace(stopped, resume=True))
    assert_same_run(whole.output, stopped.output, "stage1", metrics)


KILLED = """
import json, sys
from lgvit_fast.training import TrainConfig, train
train(TrainConfig.from_dict(json.loads(sys.argv[1])))
"""


def test_a_killed_process_resumes_bit_identically(small_config, metrics):
    whole, killed = small_config("whole"), small_config("killed")
    train(whole)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(killed.to_dict())], env=environment
    )
    rows = Path(killed.output) / "stage1" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count("\n") >= 4):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(replace(killed, resume=True))
    assert_same_run(whole.output, killed.output, "stage1", metrics)


# ---------------------------------------------------------------------------------- refusals


def test_a_run_in_use_is_not_overwritten(small_config):
    config = small_config(stage1={"epochs": 1})
    train(config)
    with pytest.raises(FileExistsError, match="holds a run; resume it"):
        train(config)


def test_resuming_a_finished_run_trains_no_more(small_config, metrics):
    config = small_config(stage1={"epochs": 1})
    first = train(config)
    again = train(replace(config, resume=True))
    assert again.stages == first.stages


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 4}, r"config.seed: 0 in the checkpoint, now 4"),
        ({"batch_size": 64}, r"config.batch_size: 256 in the checkpoint, now 64"),
        ({"stage1": {"lr": 0.5, "epochs": 1}}, r"stage1.lr: 0.001 in the checkpoint, now 0.5"),
        ({"exits": [1, 3]}, r"exits: .* in the checkpoint, now \['lph_full after block 1', .*3'\]"),
    ],
    ids=["seed", "batch size", "learning rate", "exits"],
)
def test_resuming_another_run_names_the_difference(fields, message, small_config):
    config = small_config(stage1={"epochs": 1})
    train(config)
    with pytest.raises(ValueError, match=message):
        train(small_config(resume=True, **{"stage1": {"epochs": 1}, **fields}))
    kept = TrainConfig.load(Path(config.output) / "config.json")
    assert kept == config  # the refused run has left no trace


@pytest.mark.parametrize("damage", ["truncated", "pickle", "weights alone"])
def test_damaged_checkpoints_are_refused(damage, small_config):
    config = small_config(stage1={"epochs": 1})
    train(config)
    path = Path(config.output) / "stage1" / loop.CHECKPOINT
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "pickle":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes((path.parent / loop.BEST / "model.safetensors").read_bytes())
    message = {"truncated": "not a whole", "pickle": "pickle", "weights alone": "not a training"}
    with pytest.raises(ValueError, match=message[damage]):
        train(replace(config, resume=True))

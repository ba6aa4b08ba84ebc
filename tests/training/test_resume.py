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
from lgvit_fast.training.lock import locked


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


@pytest.mark.parametrize("change", ["renamed", "resized", "moved", "contents"])
def test_resuming_with_other_images_names_the_folder(change, image_folder, small_config):
    contents = change == "contents"
    fields = {"data": image_folder, "stage1": {"epochs": 1}, "check_contents": contents}
    config = small_config(**fields)
    train(config)
    file = Path(image_folder) / "b" / "7.png"
    if change == "renamed":
        file.rename(file.with_name("x.png"))
    elif change == "resized":
        Image.new("L", (17, 16)).save(file)
    elif change == "moved":
        file.rename(Path(image_folder) / "c" / "b7.png")
    else:
        data = bytearray(file.read_bytes())
        data[-20] ^= 1
        file.write_bytes(data)
    with pytest.raises(ValueError, match=r"images in\.b: '30 images, .*' in the checkpoint, now '"):
        train(replace(config, resume=True))


def test_a_data_set_elsewhere_is_the_same_one(image_folder, small_config, tmp_path):
    config = small_config(data=image_folder, stage1={"epochs": 1})
    train(config)
    Path(image_folder).rename(tmp_path / "moved")
    train(replace(config, resume=True, data=str(tmp_path / "moved")))


def test_a_checkpoint_from_before_there_were_fingerprints_resumes(image_folder, small_config):
    config = small_config(data=image_folder, stage1={"epochs": 1})
    train(config)
    path = Path(config.output) / "stage1" / loop.CHECKPOINT
    old = Checkpoint.load(path)
    del old.facts["images in"], old.facts["config"]["check_contents"]
    old.save(path)
    train(replace(config, resume=True))


def test_what_a_kill_left_is_removed_at_resume(small_config):
    config = small_config(stage1={"epochs": 1})
    train(config)
    stage = Path(config.output) / "stage1"
    left = [
        stage / ".checkpoint.safetensors.abc_12x9",
        stage / ".tmpA1b2C3",
        stage / ".metrics.jsonl.abcdefgh",
        stage / loop.BEST / ".model.safetensors.abcdefgh",
        stage / loop.BEST / ".tmpZZZZZZ",
        Path(config.output) / ".config.json.abcdefgh",
    ]
    kept = [stage / ".notes", stage / ".mine.abcdefgh", stage / "x.tmpA1b2C3"]
    for path in (*left, *kept):
        path.write_text("half a file")
    train(replace(config, resume=True))
    assert not [path for path in left if path.exists()]
    assert all(path.exists() for path in kept)


# ------------------------------------------------------------------------------------- the lock

HOLDS = """
import sys, time
from lgvit_fast.training.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("resume", [True, False])
def test_two_runs_in_one_folder(resume, small_config, holder):
    config = small_config("run", resume=resume)
    with pytest.raises(FileExistsError, match=rf"in use by process {holder.pid} on .* since 20"):
        train(config)
    assert [path.name for path in Path(config.output).iterdir()] == [".lock"]
    holder.kill()
    holder.wait()
    train(replace(config, stage1=replace(config.stage1, epochs=1)))
    assert not (Path(config.output) / ".lock").exists()


def test_two_runs_of_one_process(tmp_path):
    with locked(tmp_path), pytest.raises(FileExistsError, match="in use"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    context = locked(tmp_path)
    context.__enter__()
    child = os.fork()
    if not child:
        time.sleep(600)
        os._exit(0)
    try:
        context.__exit__(None, None, None)
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

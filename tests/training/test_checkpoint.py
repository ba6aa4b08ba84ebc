"""Checkpoint files: what they hold comes back exactly, and a failed save harms nothing."""

import errno
import subprocess
import sys

import pytest
import torch

from lgvit_fast.checkpoints import files
from lgvit_fast.training.checkpoint import Checkpoint, differences

STATE = {
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 7: {"step": 2}},
        "param_groups": [
            {"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "amsgrad": False, "params": [0, 7]}
        ],
    },
    "half": torch.randn(4).bfloat16(),
    "none": None,
    "text": "ä",
}
FACTS = {"exits": [1, 2], "config": {"seed": 1}}


def test_state_comes_back_exactly(tmp_path):
    Checkpoint(STATE, FACTS).save(tmp_path / "c")
    loaded = Checkpoint.load(tmp_path / "c")
    assert loaded.facts == FACTS
    slots = loaded.state["optimizer"]["state"]
    assert set(slots) == {0, 7}
    assert slots[7] == {"step": 2}
    assert torch.equal(slots[0]["exp_avg"], STATE["optimizer"]["state"][0]["exp_avg"])
    assert slots[0]["step"].shape == ()
    assert loaded.state["optimizer"]["param_groups"][0]["lr"] == 0.1 + 0.2
    assert torch.equal(loaded.state["half"], STATE["half"])
    assert (loaded.state["none"], loaded.state["text"]) == (None, "ä")


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adafactor", "lion", "nadamw"])
def test_optimizers_go_through(name, tmp_path):
    from timm.optim import create_optimizer_v2

    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, create_optimizer_v2(model, name, lr=0.1, weight_decay=0.01)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    Checkpoint(state, {}).save(tmp_path / "c")
    state = Checkpoint.load(tmp_path / "c").state
    other_model, other = make()
    other_model.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    for _ in range(2):
        step(model, optimizer)
        step(other_model, other)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True)
    )


def test_what_cannot_be_held_is_named(tmp_path):
    with pytest.raises(TypeError, match="a/1 is a object"):
        Checkpoint({"a": [1, object()]}, {}).save(tmp_path / "c")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "c"
    Checkpoint(STATE, FACTS).save(path)
    before = path.read_bytes()

    def full(tensors, file, metadata):
        file.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        Checkpoint({"a": torch.zeros(3)}, {}).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


KILLED_IN_SAVE = """
import os, signal, sys, torch
from lgvit_fast.checkpoints import files
from lgvit_fast.training.checkpoint import Checkpoint

def killed(tensors, file, metadata):
    file.write_bytes(b"half a file")
    os.kill(os.getpid(), signal.SIGKILL)

files.save_file = killed
Checkpoint({"a": torch.zeros(3)}, {}).save(sys.argv[1])
"""


def test_a_kill_during_a_save_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "c"
    Checkpoint(STATE, FACTS).save(path)
    before = path.read_bytes()
    ended = subprocess.run([sys.executable, "-c", KILLED_IN_SAVE, str(path)], check=False)
    assert ended.returncode == -9
    assert path.read_bytes() == before


def test_differences_name_the_place():
    saved = {"a": {"b": 1, "gone": 2}, "same": [1]}
    current = {"a": {"b": 3, "new": 4}, "same": [1]}
    assert differences(saved, current) == [
        "a.b: 1 in the checkpoint, now 3",
        "a.gone: 2 in the checkpoint, now absent",
        "a.new: absent from the checkpoint, now 4",
    ]
    assert differences(saved, saved) == []

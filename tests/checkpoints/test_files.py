"""Weight files: whole or not at all, and never a pickle."""

import pickle
from pathlib import Path

import pytest
import torch

from lgvit_fast.checkpoints import files


def test_round_trip_with_shared_storage(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tensors = {"a": base, "b": base.t(), "c": torch.ones(2, dtype=torch.bfloat16)}
    files.save_weights(tmp_path / "w.safetensors", tensors)
    again = files.load_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(again[name], value) for name, value in tensors.items())


def test_failure_leaves_the_previous_file(tmp_path):
    path = tmp_path / "w.json"
    files.save_json(path, {"good": 1})

    def full(file: Path) -> None:
        file.write_text('{"half')
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, full)
    assert files.load_json(path) == {"good": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("legacy", [True, False], ids=["pickle", "zip"])
def test_pickles_are_refused(tmp_path, legacy):
    path = tmp_path / "w.safetensors"
    if legacy:
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is a pickle"):
        files.load_weights(path)


@pytest.mark.parametrize("length", [0x0280, 0x4B50], ids=["like-a-pickle", "like-a-zip"])
def test_a_header_whose_length_reads_like_a_pickle_is_none(tmp_path, length):
    path = tmp_path / "w.safetensors"
    tensors = {"a": torch.ones(2)}
    files.save_weights(path, tensors, {"pad": ""})
    short = int.from_bytes(path.read_bytes()[:8], "little")
    files.save_weights(path, tensors, {"pad": " " * (length - short)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert torch.equal(files.load_weights(path)["a"], tensors["a"])


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    files.save_weights(path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        files.load_weights(path)


def test_broken_json_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not json"):
        files.load_json(path)

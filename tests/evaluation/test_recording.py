"""A recording comes back from its file as it was."""

import pytest
import torch

from lgvit_fast.checkpoints.files import save_weights
from lgvit_fast.data.batches import BadImage
from lgvit_fast.evaluation import Recording


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("labelled", [True, False])
def test_saved_and_loaded(tmp_path, labelled, dtype):
    logits = torch.randn(3, 8, 4, dtype=dtype)
    logits[0, 0, 0] = torch.nan
    targets = torch.arange(8) % 4 if labelled else None
    bad = [BadImage("a ünusual\n.png", "not an image"), BadImage("b.png", "empty")]
    kept = Recording(logits, targets, (2, 4, 6), bad)
    kept.save(tmp_path / "kept.safetensors")
    found = Recording.load(tmp_path / "kept.safetensors")
    torch.testing.assert_close(found.logits, logits, equal_nan=True, atol=0, rtol=0)
    assert found.layers == (2, 4, 6) and found.bad == bad and found.digest == kept.digest
    assert (found.targets is None) if targets is None else torch.equal(found.labels, targets)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"weight": torch.zeros(3)}, {}),
        ({"logits": torch.zeros(2, 3, 4), "layers": torch.tensor([1, 2])}, {}),
        ({"logits": torch.zeros(2, 3, 4)}, {"unreadable": "[]"}),
        ({"logits": torch.zeros(2, 3, 4), "layers": torch.tensor([1, 2])}, {"unreadable": "[3]"}),
    ],
    ids=["a model", "no metadata", "no layers", "odd metadata"],
)
def test_other_files_are_refused(tmp_path, tensors, metadata):
    save_weights(tmp_path / "file", tensors, metadata)
    with pytest.raises(ValueError, match="is no recording"):
        Recording.load(tmp_path / "file")


def test_what_does_not_fit_together_is_refused(tmp_path):
    tensors = {"logits": torch.zeros(2, 3, 4), "layers": torch.tensor([2, 1])}
    save_weights(tmp_path / "file", tensors, {"unreadable": "[]"})
    with pytest.raises(ValueError, match="increasing block numbers"):
        Recording.load(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        Recording.load(tmp_path / "none")

"""Linear exits on a frozen backbone: features where they should be, and maps that learn."""

import torch

from benchmarks.linear_exits import features, fit_exits, fit_linear
from lgvit_fast.data.batches import Batch
from tests.helpers import images, tiny_vit


class Images:
    def __len__(self):
        return 9

    def __getitems__(self, keys):
        places = torch.tensor([place for _, place in keys])
        return Batch(images(9)[places], places % 3, [])


def test_features_are_class_token_and_mean_after_each_layer():
    backbone = tiny_vit().eval()
    found, targets = features(backbone, Images(), (2, 6), count=5, seed=0)
    assert found.shape == (2, 5, 64) and targets.shape == (5,)
    places = torch.randperm(9, generator=torch.Generator().manual_seed(0))[:5]
    with torch.no_grad():
        tokens = backbone.patch_embed(images(9)[places])
        tokens = backbone.norm_pre(backbone._pos_embed(tokens))
        tokens = backbone.blocks[:2](tokens)
    expected = torch.cat((tokens[:, 1:].mean(1), tokens[:, 0]), -1)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)
    assert targets.tolist() == (places % 3).tolist()


def test_linear_maps_learn_each_their_own():
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (300,), generator=draw)
    inputs = torch.randn(2, 300, 8, generator=draw)
    inputs[1, :, :3] += 6 * torch.nn.functional.one_hot(targets, 3)
    accuracy = (fit_linear(inputs, targets, 3)(inputs).argmax(-1) == targets).double().mean(1)
    assert accuracy[0] < 0.6 and accuracy[1] > 0.98
    logits = fit_exits(inputs, targets, 3)(inputs)
    assert logits.shape == (2, 300, 3) and not logits.requires_grad
    assert (logits[1].argmax(-1) == targets).double().mean() > 0.98  # reads both

"""The method on real images: LGViT in two stages against linear exits, from the same backbone."""

import copy

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from lgvit_fast import LGViT
from lgvit_fast.training import Stage1Config, Stage2Config, TrainConfig, train

BACKBONE = {
    "img_size": 16,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 32,
    "depth": 9,
    "num_heads": 2,
    "num_classes": 10,
}
SHALLOW = 4
EPOCHS, STAGE2_EPOCHS = 4, 2  # of the heads; linear exits get as many in their one stage


def train_backbone():
    """Stage 0: a backbone that knows digits a little, without exits."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **BACKBONE)
    digits = load_digits()
    images = torch.tensor(digits.images[:1400], dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    labels = torch.tensor(digits.target[:1400])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(10):
        for rows in torch.randperm(1400).split(128):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def shallow_accuracy(backbone, recipe, seed, output):
    """Mean validation accuracy of the four shallow exits, after as many epochs for either recipe."""
    two_stages = recipe == "lgvit"
    config = TrainConfig(
        output=str(output / f"{recipe}-{seed}"),
        recipe=recipe,
        seed=seed,
        batch_size=128,
        val_batch_size=512,
        val_fraction=0.2,
        workers=0,
        augment=False,
        device="cpu",
        save_every=0,
        tensorboard=False,
        progress=False,
        stage1=Stage1Config(epochs=EPOCHS + (0 if two_stages else STAGE2_EPOCHS), lr=2e-3),
        stage2=Stage2Config(epochs=STAGE2_EPOCHS, lr=2e-3),
    )
    model = LGViT(copy.deepcopy(backbone), range(1, 9), heads="lgvit" if two_stages else "linear")
    result = train(config, model)
    exits = list(result.stages.values())[-1].accuracy.exits
    return sum(exits[:SHALLOW]) / SHALLOW


@pytest.mark.slow
def test_lgvit_beats_linear_exits_where_they_are_shallow(tmp_path, capsys):
    margins = []
    backbone = train_backbone()
    for seed in range(3):
        ours = shallow_accuracy(backbone, "lgvit", seed, tmp_path)
        linear = shallow_accuracy(backbone, "sdn", seed, tmp_path)
        margins.append(ours - linear)
        with capsys.disabled():
            print(
                f"\nseed {seed}: LGViT {ours:.3f}, linear {linear:.3f}, margin {ours - linear:+.3f}"
            )
    assert min(margins) > 0

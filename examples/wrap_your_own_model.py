"""Give your own timm model exits, train them on your own loop, and see who leaves where.

    python examples/wrap_your_own_model.py

Uses the digits that come with scikit-learn; a minute or less on two CPU cores. The loop is plain
PyTorch, any optimizer, data or trainer will do. `lgvit_fast.training.train` is ready made, with both
stages.
"""

from __future__ import annotations

import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import lgvit_fast


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 scans as `[n, 1, 16, 16]` in -1 to 1, shuffled, and their classes."""
    scans, labels = load_digits(return_X_y=True)
    images = torch.tensor(scans, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, scale_factor=2.0, mode="bilinear")
    return images[order], torch.tensor(labels)[order]


def main(epochs: int = 15) -> None:
    """Train, then answer the held-out scans under a few thresholds."""
    torch.manual_seed(0)
    yours = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16, patch_size=4, in_chans=1, embed_dim=64, depth=6, num_heads=4, num_classes=10,
    )  # fmt: skip
    model = lgvit_fast.LGViT(yours, exits=[1, 2, 3, 5])
    print([f"{spec.head} after block {spec.layer}" for spec in model.exits])

    images, labels = digits()
    train, held_out = slice(0, 1437), slice(1437, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    layers = [spec.layer for spec in model.exits]
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(1437).split(128):
            out = model(images[train][rows])
            target = labels[train][rows]
            losses = [F.cross_entropy(logits, target) for logits in (*out.exits, out.final)]
            weights = [*layers, model.num_blocks]  # deeper exits count more
            loss = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model.eval()
    for threshold in (0.5, 0.8, 0.95, 1.0):
        result = model.infer(images[held_out], lgvit_fast.Confidence(threshold))
        correct = (result.prediction == labels[held_out]).float().mean()
        depth = result.exit_layer.float().mean()
        print(f"threshold {threshold}: {correct:.1%} correct after {depth:.2f} of 6 blocks")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    main(parser.parse_args().epochs)

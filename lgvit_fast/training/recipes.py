"""Configurations known to work."""

from __future__ import annotations

from lgvit_fast.training.config import Stage1Config, Stage2Config, TrainConfig


def digits(output: str = "runs/digits") -> TrainConfig:
    """Both stages on the bundled digits: a ViT of 12 blocks, width 96, with 8 exits.

    A few minutes on two CPU cores. Digits are easy, so the exits sit from the first block on; those of
    the default layout would let nearly every image leave at its first exit.
    """
    return TrainConfig(
        output=output,
        model="vit_tiny_patch16_224",
        model_kwargs={
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 96,
            "depth": 12,
            "num_heads": 4,
        },
        exits=[1, 2, 3, 4, 5, 6, 8, 10],
        data="digits",
        batch_size=64,
        val_batch_size=360,
        workers=0,
        stage1=Stage1Config(epochs=40, lr=1.5e-3, warmup_epochs=8),
        stage2=Stage2Config(epochs=10, lr=1.5e-3, warmup_epochs=1),
    )

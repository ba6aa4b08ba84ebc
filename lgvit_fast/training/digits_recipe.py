"""The configuration that the demo trains with."""

from lgvit_fast.training.config import Stage1Config, Stage2Config, TrainConfig

__all__ = ["digits_recipe"]


def digits_recipe(output: str = "runs/digits") -> TrainConfig:
    """Both stages on the digits: a ViT of 12 blocks, width 96, with the published 8 exits.

    A few minutes on two CPU cores.
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
        data="digits",
        batch_size=64,
        val_batch_size=360,
        workers=0,
        stage1=Stage1Config(epochs=40, lr=1.5e-3, warmup_epochs=8),
        stage2=Stage2Config(epochs=10, lr=1.5e-3, warmup_epochs=1),
    )

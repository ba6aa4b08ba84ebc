"""timm's VisionTransformer class: ViT, DeiT (distilled too), DeiT III, CLIP, SigLIP, DINOv2."""

from __future__ import annotations

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lgvit_fast.backbones.base import Backbone
from lgvit_fast.backbones.timm_private import add_positions

__all__ = ["PlainBackbone", "ViTBackbone"]


class PlainBackbone(Backbone):
    """What the columnar models share: one width and grid from the first block to the last.

    Raises:
        ValueError: the model drops patches at random in training (`patch_drop_rate`), so that no patch
            grid is left for the heads.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        if not isinstance(self.model.patch_drop, nn.Identity | None):
            raise ValueError("patch_drop_rate must be 0: exit heads need the whole patch grid")
        self.num_blocks = len(self.model.blocks)
        self.depths = (self.num_blocks,)
        self.num_classes = self.model.num_classes
        self.in_chans = self.model.patch_embed.proj.in_channels

    @override
    def width(self, layer: int) -> int:
        return int(self.model.embed_dim)

    @property
    @override
    def num_prefix_tokens(self) -> int:
        return int(self.model.num_prefix_tokens)

    @property
    @override
    def num_class_tokens(self) -> int:
        return 1 if self.model.cls_token is not None else 0

    @override
    def patch_grid(self, image_size: tuple[int, int], layer: int) -> tuple[int, int]:
        embed = self.model.patch_embed
        if not self.model.dynamic_img_size:
            if image_size != tuple(embed.img_size):
                raise ValueError(
                    f"images are {image_size[0]} x {image_size[1]} pixels, the model wants"
                    f" {embed.img_size[0]} x {embed.img_size[1]}"
                    " (dynamic_img_size=True in create_model takes other sizes)"
                )
            return (int(embed.grid_size[0]), int(embed.grid_size[1]))
        patch = embed.patch_size
        fits = embed.dynamic_img_pad or not (image_size[0] % patch[0] or image_size[1] % patch[1])
        if not fits or image_size[0] < 1 or image_size[1] < 1:
            raise ValueError(
                f"images are {image_size[0]} x {image_size[1]} pixels, the model wants multiples of"
                f" its {patch[0]} x {patch[1]} patches"
            )
        height, width = embed.dynamic_feat_size(image_size)
        return int(height), int(width)

    @override
    def classify(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(self.model.norm(tokens))
        return logits

    @override
    def parts(self, start: int, stop: int) -> nn.ModuleList:
        modules = [*self.model.blocks[start:stop]]
        if stop == self.num_blocks:
            outside = ("patch_embed", "pos_drop", "patch_drop", "norm_pre", "rope", "blocks")
            modules += [m for name, m in self.model.named_children() if name not in outside]
        return nn.ModuleList(modules)


class ViTBackbone(PlainBackbone):
    """Any `timm.models.vision_transformer.VisionTransformer`."""

    @staticmethod
    @override
    def supports(model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    @property
    @override
    def num_class_tokens(self) -> int:
        return 2 if isinstance(self.model, VisionTransformerDistilled) else super().num_class_tokens

    @override
    def embed(self, images: Tensor) -> Tensor:
        tokens = add_positions(self.model, self.model.patch_embed(images))
        # Without prefix tokens timm gives a transposed view, whose strides the blocks would keep.
        normed: Tensor = self.model.norm_pre(tokens).contiguous()
        return normed

    @override
    def blocks(self, tokens: Tensor, start: int, stop: int, patch_grid: tuple[int, int]) -> Tensor:
        recompute = self.model.grad_checkpointing and self.model.training
        for block in self.model.blocks[start:stop]:
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        return tokens

    @override
    def classify(self, tokens: Tensor) -> Tensor:
        logits = self.model.forward_head(self.model.norm(tokens))
        # In its own training mode a distilled DeiT gives the logits of both classifiers.
        mean: Tensor = (logits[0] + logits[1]) / 2 if isinstance(logits, tuple) else logits
        return mean

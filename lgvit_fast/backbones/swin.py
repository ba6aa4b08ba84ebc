"""timm's Swin family, V1 and V2: windowed blocks in stages of half the grid and twice the width.

A stage merges patches before its first block, so the tokens after a stage's last block, which an exit
there reads, have that stage's own grid and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lgvit_fast.backbones.base import Backbone

__all__ = ["SwinBackbone"]


class SwinBackbone(Backbone):
    """A `timm` SwinTransformer or SwinTransformerV2. Between blocks its tokens are `[B, H, W, C]`."""

    exit_norm = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.depths = tuple(len(stage.blocks) for stage in self.model.layers)
        self.num_blocks = sum(self.depths)
        self.num_classes = self.model.num_classes
        self.in_chans = self.model.patch_embed.proj.in_channels

    @staticmethod
    @override
    def supports(model: nn.Module) -> bool:
        return isinstance(model, SwinTransformer | SwinTransformerV2)

    @override
    def width(self, layer: int) -> int:
        return int(self.model.feature_info[self._stage(layer)]["num_chs"])

    @property
    @override
    def num_prefix_tokens(self) -> int:
        return 0

    @property
    @override
    def num_class_tokens(self) -> int:
        return 0

    @override
    def patch_grid(self, image_size: tuple[int, int], layer: int) -> tuple[int, int]:
        embed = self.model.patch_embed
        patch = embed.patch_size
        if embed.strict_img_size and image_size != tuple(embed.img_size):
            raise ValueError(
                f"images are {image_size[0]} x {image_size[1]} pixels, the model wants"
                f" {embed.img_size[0]} x {embed.img_size[1]}"
                " (strict_img_size=False in create_model takes other sizes)"
            )
        if image_size[0] % patch[0] or image_size[1] % patch[1] or min(image_size) < 1:
            raise ValueError(
                f"images are {image_size[0]} x {image_size[1]} pixels, the model wants multiples of"
                f" its {patch[0]} x {patch[1]} patches"
            )
        merged = 2 ** self._stage(layer)  # an odd row or column is padded, at each merge
        return -(-image_size[0] // (patch[0] * merged)), -(-image_size[1] // (patch[1] * merged))

    @override
    def embed(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.model.patch_embed(images)
        return tokens.contiguous()

    @override
    def blocks(self, tokens: Tensor, start: int, stop: int, patch_grid: tuple[int, int]) -> Tensor:
        for stage, index in self._places(start, stop):
            if index == 0:
                tokens = stage.downsample(tokens)
            block = stage.blocks[index]
            recompute = stage.grad_checkpointing and stage.training
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
        return tokens

    @override
    def to_tokens(self, tokens: Tensor) -> Tensor:
        return tokens.flatten(1, 2)

    @override
    def classify(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model.forward_head(self.model.norm(tokens))
        return logits

    @override
    def parts(self, start: int, stop: int) -> nn.ModuleList:
        modules: list[nn.Module] = []
        for stage, index in self._places(start, stop):
            modules += [stage.downsample] * (index == 0) + [stage.blocks[index]]
        if stop == self.num_blocks:
            modules += [self.model.norm, self.model.head]
        return nn.ModuleList(modules)

    def _places(self, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """The stage of each of the blocks `start + 1` to `stop`, and its index in there."""
        first = 0
        for stage, depth in zip(self.model.layers, self.depths, strict=True):
            for index in range(max(start - first, 0), min(stop - first, depth)):
                yield stage, index
            first += depth

    def _stage(self, layer: int) -> int:
        """The stage, from 0, of block `layer`."""
        return next(s for s in range(len(self.depths)) if layer <= sum(self.depths[: s + 1]))

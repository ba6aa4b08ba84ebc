"""timm's Eva class: EVA, EVA-02, ViTs with rotary position embedding, DINOv3, Perception Encoder."""

from __future__ import annotations

from timm.models.eva import Eva
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lgvit_fast.backbones.timm_private import add_positions
from lgvit_fast.backbones.vit import PlainBackbone

__all__ = ["EvaBackbone"]


class EvaBackbone(PlainBackbone):
    """Any `timm.models.eva.Eva`; the rotary embedding is made anew for every run of blocks.

    Raises:
        ValueError: the model drops patches or moves the rotary coordinates at random in training: then
            no patch grid is left for the heads, or the blocks of one pass would not agree on it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for option in ("shift_coords", "jitter_coords", "rescale_coords"):
            if getattr(self.model.rope, option, None) is not None:
                raise ValueError(f"rope_{option} must be None: it would differ between exits")

    @staticmethod
    @override
    def supports(model: nn.Module) -> bool:
        return isinstance(model, Eva)

    @override
    def embed(self, images: Tensor) -> Tensor:
        tokens, _ = add_positions(self.model, self.model.patch_embed(images))
        normed: Tensor = self.model.norm_pre(tokens)
        return normed.contiguous()

    @override
    def blocks(self, tokens: Tensor, start: int, stop: int, patch_grid: tuple[int, int]) -> Tensor:
        rope = self._rope(patch_grid)
        for index in range(start, stop):
            block = self.model.blocks[index]
            own = rope[index] if rope is not None and self._rope_per_block else rope
            if self.model.grad_checkpointing and self.model.training:
                tokens = checkpoint(block, tokens, rope=own, use_reentrant=False)
            else:
                tokens = block(tokens, rope=own)
        return tokens

    @override
    def parts(self, start: int, stop: int) -> nn.ModuleList:
        parts = super().parts(start, stop)
        if self.model.rope is not None:
            parts.append(self.model.rope)
        return parts

    @property
    def _rope_per_block(self) -> bool:
        return bool(getattr(self.model, "rope_mixed", False))

    def _rope(self, patch_grid: tuple[int, int]) -> Tensor | None:
        rope = self.model.rope
        if rope is None:
            return None
        if self.model.dynamic_img_size or not hasattr(rope, "feat_shape"):
            embedding: Tensor = rope.get_embed(shape=patch_grid)
        else:
            embedding = rope.get_embed()
        return embedding

"""What a frozen backbone makes of images: all that its exits read, kept apart from what they answer.

`ask_exits(model, run_backbone(model, images))` is what `model.forward_exits(images, features=True)`
gives; the first half need not be done again while the backbone stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lgvit_fast.model import LGViT
from lgvit_fast.outputs import ExitOutputs

__all__ = ["Tokens", "all_exits", "ask_exits", "run_backbone"]


@dataclass(frozen=True)
class Tokens:
    """What the exits read of B images.

    Attributes:
        exits: E tensors `[B, P + n_e, C_e]`, reduced to what the exit's head reads (`ExitHead.reduce`).
        last: `[B, N, C]`, the last block's patch tokens before the final norm; None if not kept.
        final: `[B, K]`, the model's own logits.
        image_size: (height, width) of the images, in pixels.
    """

    exits: tuple[Tensor, ...]
    last: Tensor | None
    final: Tensor
    image_size: tuple[int, int]

    def __len__(self) -> int:
        """How many images."""
        return len(self.final)

    def to(self, device: torch.device, non_blocking: bool = False) -> Tokens:
        """On another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return Tokens(
            tuple(move(tokens) for tokens in self.exits),
            None if self.last is None else move(self.last),
            move(self.final),
            self.image_size,
        )


@torch.no_grad()
def run_backbone(model: LGViT, images: Tensor, last: bool = True) -> Tokens:
    """Run every image to the end and keep what the exits read.

    Args:
        model: its backbone in eval mode.
        images: `[B, channels, height, width]`.
        last: keep the last block's patch tokens, too.

    Raises:
        ValueError: images of another shape, size, dtype or device than the model wants.
    """
    adapter = model.adapter
    adapter.check_images(images)
    size = (images.shape[2], images.shape[3])
    tokens, kept = images, []
    for segment in model.segments:
        tokens = segment.blocks(tokens, size)
        if segment.head is not None:
            grid = adapter.patch_grid(size, segment.stop)
            kept.append(segment.head.reduce(adapter.to_tokens(tokens), grid))
    patches = adapter.to_tokens(tokens)[:, adapter.num_prefix_tokens :] if last else None
    return Tokens(tuple(kept), patches, adapter.classify(tokens), size)


def ask_exits(model: LGViT, tokens: Tokens) -> ExitOutputs:
    """The answers of every exit, in training form, with their features. Differentiable."""
    adapter, size = model.adapter, tokens.image_size
    answers, dtype = [], model.compute_dtype
    for segment, kept in zip(model.segments, tokens.exits, strict=False):
        assert segment.head is not None  # only the last has none
        grid = adapter.patch_grid(size, segment.stop)
        answers.append(segment.head.answer(kept.to(dtype), grid))
    return ExitOutputs(
        exits=tuple(logits for logits, _ in answers),
        final=tokens.final,
        features=tuple(feature for _, feature in answers),
        last_tokens=tokens.last,
        patch_grid=adapter.patch_grid(size, model.num_blocks),
    )


def all_exits(model: LGViT, images: Tensor | Tokens, features: bool = False) -> ExitOutputs:
    """`model.forward_exits`, of images `[B, channels, height, width]` or of what was kept of them."""
    if isinstance(images, Tokens):
        return ask_exits(model, images)
    return model.forward_exits(images, features=features)

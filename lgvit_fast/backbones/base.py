"""What the model asks of a backbone: embed images, run some blocks, classify."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Backbone"]


class Backbone(ABC):
    """A timm model cut into the pieces early exits need. Holds no parameters of its own.

    Attributes:
        model: the timm model.
        num_blocks: L.
        depths: blocks of each stage, summing to L; a single entry for a model without stages.
        exit_norm: whether exits normalise each token before the mean, as hierarchical models do.
        num_classes: K.
        in_chans: channels of an input image.
    """

    model: Any  # typed, its submodules would be no more than modules
    num_blocks: int
    depths: tuple[int, ...]
    exit_norm: bool = False
    num_classes: int
    in_chans: int

    @staticmethod
    @abstractmethod
    def supports(model: nn.Module) -> bool:
        """Whether this adapter knows the model."""

    @abstractmethod
    def width(self, layer: int) -> int:
        """C of the tokens after block `layer` (from 1)."""

    @property
    @abstractmethod
    def num_prefix_tokens(self) -> int:
        """P, tokens before the patches."""

    @property
    @abstractmethod
    def num_class_tokens(self) -> int:
        """T, how many of the prefix tokens an exit's classifiers read: 0, 1 (cls) or 2 (cls, dist)."""

    @abstractmethod
    def patch_grid(self, image_size: tuple[int, int], layer: int) -> tuple[int, int]:
        """Patch grid `(H, W)` after block `layer` for images of this size.

        Raises:
            ValueError: the model does not take images of this size.
        """

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Images `[B, channels, height, width]` to tokens before the first block.

        Tokens travel between blocks in the model's own layout, images first; see `to_tokens`.
        """

    @abstractmethod
    def blocks(self, tokens: Tensor, start: int, stop: int, patch_grid: tuple[int, int]) -> Tensor:
        """Run blocks `start + 1` to `stop` (that is, `blocks[start:stop]`).

        Args:
            tokens: in the model's own layout.
            start: blocks already run.
            stop: the last block to run, from 1.
            patch_grid: `(H, W)` after block `stop`.
        """

    def to_tokens(self, tokens: Tensor) -> Tensor:
        """A view `[B, P + N, C]`, patches row-major, of tokens in the model's own layout."""
        return tokens

    @abstractmethod
    def classify(self, tokens: Tensor) -> Tensor:
        """Final norm, pooling and the model's own classifier: tokens to logits `[B, K]`."""

    @abstractmethod
    def parts(self, start: int, stop: int) -> nn.ModuleList:
        """The modules that `blocks(_, start, stop, _)` runs, and `classify` where `stop` is the end."""

    def check_images(self, images: Tensor) -> None:
        """Raise ValueError unless `images` fits: dimensions, channels, size, dtype and device."""
        if not isinstance(images, Tensor):
            raise ValueError(f"images is a {type(images).__name__}, expected a torch.Tensor")
        if images.dim() != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"images has shape {tuple(images.shape)}, expected [B, {self.in_chans}, height, width]"
            )
        self.patch_grid((images.shape[2], images.shape[3]), self.num_blocks)
        parameter: Tensor = self.model.patch_embed.proj.weight  # which the images meet first
        if images.device != parameter.device:
            raise ValueError(f"images is on {images.device}, the model on {parameter.device}")
        device_type = images.device.type
        if images.dtype == parameter.dtype:
            return
        autocast = torch.is_autocast_enabled(device_type)
        if not (autocast and images.dtype in (torch.float32, torch.bfloat16, torch.float16)):
            raise ValueError(f"images is {images.dtype}, the model {parameter.dtype}; convert one")

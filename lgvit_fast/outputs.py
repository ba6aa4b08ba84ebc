"""What a model gives back: every exit's logits, or one answer an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ExitOutputs", "Inference", "TopK", "top_classes"]


@dataclass
class ExitOutputs:
    """The logits of every exit for every image.

    Attributes:
        exits: logits `[B, K]` of each of the E exits, shallow to deep.
        final: logits `[B, K]` of the backbone's own classifier.
        features: the heads' features `[B, n, C]` before the mean, or None if not asked for.
        last_tokens: patch tokens `[B, N, C]` of the last block before the final norm, or None likewise.
        patch_grid: `(H, W)` of `last_tokens`.
    """

    exits: tuple[Tensor, ...]
    final: Tensor
    features: tuple[Tensor, ...] | None
    last_tokens: Tensor | None
    patch_grid: tuple[int, int]


class TopK(NamedTuple):
    """The k likeliest classes of each image.

    Attributes:
        probabilities: `[B, k]` float32, softmax probabilities, descending.
        classes: `[B, k]` int64.
    """

    probabilities: Tensor
    classes: Tensor


@dataclass(repr=False)
class Inference:
    """One answer an image, in input order. `len`, indexing and slicing go by image.

    Attributes:
        logits: `[B, K]` of the exit each image left at.
        exit_index: `[B]` int64, 0 to E - 1, E for the final classifier.
        exit_layer: `[B]` int64, the block after which it left, from 1.
        nonfinite: `[B]` bool, an exit or the final classifier met a NaN or +inf logit. No policy lets
            such an image leave at the exit where that happened.
        class_names: what the K classes are called, or None.
    """

    logits: Tensor
    exit_index: Tensor
    exit_layer: Tensor
    nonfinite: Tensor
    class_names: Sequence[str] | None = None

    @classmethod
    def blank(
        cls,
        batch: int,
        num_classes: int,
        dtype: torch.dtype,
        device: torch.device,
        class_names: Sequence[str] | None = None,
    ) -> Inference:
        """Zeros, to be filled as images leave."""
        return cls(
            logits=torch.zeros(batch, num_classes, dtype=dtype, device=device),
            exit_index=torch.zeros(batch, dtype=torch.int64, device=device),
            exit_layer=torch.zeros(batch, dtype=torch.int64, device=device),
            nonfinite=torch.zeros(batch, dtype=torch.bool, device=device),
            class_names=class_names,
        )

    @classmethod
    def cat(cls, parts: Sequence[Inference]) -> Inference:
        """The answers of several batches, one after the other; at least one batch."""
        logits, index, layer, nonfinite = (
            torch.cat(field) for field in zip(*(part.tensors() for part in parts), strict=True)
        )
        return cls(logits, index, layer, nonfinite, parts[0].class_names)

    def map(self, function: Callable[[Tensor], Tensor]) -> Inference:
        """Apply a function to every tensor."""
        logits, index, layer, nonfinite = map(function, self.tensors())
        return Inference(logits, index, layer, nonfinite, self.class_names)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Inference:
        """Every tensor on another device, the logits in another dtype; None leaves either."""
        moved = self if device is None else self.map(lambda tensor: tensor.to(device))
        if dtype is None:
            return moved
        return dataclasses.replace(moved, logits=moved.logits.to(dtype))

    def cpu(self) -> Inference:
        """Every tensor on the CPU."""
        return self.map(Tensor.cpu)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All tensors, as listed above."""
        return self.logits, self.exit_index, self.exit_layer, self.nonfinite

    @property
    def prediction(self) -> Tensor:
        """`[B]` int64, the class with the largest logit."""
        return self.logits.argmax(dim=-1)

    @property
    def confidence(self) -> Tensor:
        """`[B]` float32, the largest softmax probability."""
        return torch.softmax(self.logits.float(), dim=-1).amax(dim=-1)

    @property
    def names(self) -> list[str]:
        """The name of each image's predicted class; its number where the model has no names."""
        classes: list[int] = self.prediction.tolist()
        if self.class_names is None:
            return [str(number) for number in classes]
        return [self.class_names[number] for number in classes]

    def topk(self, k: int = 5) -> TopK:
        """The k likeliest classes of each image.

        Args:
            k: at least 1; at most K are given.

        Raises:
            ValueError: k is no positive integer.
        """
        return top_classes(self.logits, k)

    def __len__(self) -> int:
        return self.logits.shape[0]

    def __getitem__(self, images: Any) -> Inference:
        """The answers of some images: an index, a slice, a list or a tensor of indices or of bools.

        An index keeps the batch dimension: the result has one answer.
        """
        if isinstance(images, int):
            if not -len(self) <= images < len(self):
                raise IndexError(f"image {images}, expected one of {len(self)}")
            images = slice(images, images + 1 or None)
        return self.map(lambda tensor: tensor[images])

    def __repr__(self) -> str:
        if not len(self):
            return "Inference(0 images)"
        layers, counts = self.exit_layer.unique(return_counts=True)
        left = ", ".join(
            f"{count} after block {layer}"
            for layer, count in zip(layers.tolist(), counts.tolist(), strict=True)
        )
        flagged = int(self.nonfinite.sum())
        rest = f"; {flagged} nonfinite" if flagged else ""
        return f"Inference({len(self)} images: {left}{rest})"


def top_classes(logits: Tensor, k: int) -> TopK:
    """The k likeliest classes of logits `[..., K]`; at most K are given.

    Raises:
        ValueError: k is no positive integer.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r}, expected an integer of at least 1")
    probabilities = torch.softmax(logits.float(), dim=-1)
    return TopK(*probabilities.topk(min(k, logits.shape[-1]), dim=-1))

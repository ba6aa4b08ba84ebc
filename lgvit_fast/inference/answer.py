"""What a stream gives: one image's answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.outputs import TopK, top_classes

__all__ = ["Answer"]


@dataclass(frozen=True, slots=True, repr=False)
class Answer:
    """One image's answer.

    Attributes:
        index: the image's place in the loader's order, from 0.
        logits: `[K]`.
        exit_index: 0 to E - 1, E for the final classifier.
        exit_layer: the block after which it left, from 1.
        nonfinite: as `Inference.nonfinite`.
        target: what came with the image in the loader's batch, or None.
        class_names: what the K classes are called, or None.
    """

    index: int
    logits: Tensor
    exit_index: int
    exit_layer: int
    nonfinite: bool
    target: Any
    class_names: Sequence[str] | None = None

    @property
    def prediction(self) -> int:
        """The class with the largest logit."""
        return int(self.logits.argmax())

    @property
    def confidence(self) -> float:
        """The largest softmax probability."""
        return float(torch.softmax(self.logits.float(), dim=-1).amax())

    @property
    def name(self) -> str:
        """The name of the predicted class; its number where the model has no names."""
        return (
            str(self.prediction) if self.class_names is None else self.class_names[self.prediction]
        )

    def topk(self, k: int = 5) -> TopK:
        """The k likeliest classes: probabilities `[k]` float32, descending, and classes `[k]` int64.

        Raises:
            ValueError: k is no positive integer.
        """
        return top_classes(self.logits, k)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Answer:
        """The same with its logits on another device or in another dtype."""
        return dataclasses.replace(self, logits=self.logits.to(device=device, dtype=dtype))

    def cpu(self) -> Answer:
        """The same with its logits on the CPU."""
        return self.to("cpu")

    def __repr__(self) -> str:
        flagged = ", nonfinite" if self.nonfinite else ""
        return f"Answer(image {self.index}: {self.name!r} after block {self.exit_layer}{flagged})"

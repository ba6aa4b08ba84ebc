"""What every exit says of every image, kept, so that any policy can be tried afterwards."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.checkpoints.files import read_weights, save_weights
from lgvit_fast.data.batches import BadImage, Batch
from lgvit_fast.data.seeds import generator
from lgvit_fast.model import LGViT

__all__ = ["Recording", "record"]

_BAD = "unreadable"  # metadata of a file: names and reasons


@dataclass(frozen=True)
class Recording:
    """Logits of all classifiers for a set of images, no image having left early.

    Attributes:
        logits: `[E + 1, n, K]` on the CPU, the exits' from shallow to deep, then the final ones.
        targets: `[n]` int64, or None: images without labels.
        layers: blocks after which the classifiers sit, from 1; the last entry is L.
        bad: files that could not be read; they are not among the n images.

    Raises:
        ValueError: shapes that do not belong together, layers that do not increase, class numbers
            beyond K, or no images.
    """

    logits: Tensor
    targets: Tensor | None
    layers: tuple[int, ...]
    bad: list[BadImage] = field(default_factory=list)

    def __post_init__(self) -> None:
        logits, layers = torch.as_tensor(self.logits), tuple(int(layer) for layer in self.layers)
        object.__setattr__(self, "logits", logits)
        object.__setattr__(self, "layers", layers)
        if logits.dim() != 3 or not logits.is_floating_point() or not logits.numel():
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and dtype {logits.dtype}, expected"
                " [E + 1, n, K] of floating point, with at least one image"
            )
        if len(layers) != len(logits) or list(layers) != sorted(set(layers)) or layers[0] < 1:
            raise ValueError(
                f"layers={layers}, expected {len(logits)} increasing block numbers from 1, as many as"
                " there are classifiers in logits"
            )
        if self.targets is None:
            return
        targets = torch.as_tensor(self.targets)
        object.__setattr__(self, "targets", targets)
        if targets.shape != logits.shape[1:2] or targets.is_floating_point():
            raise ValueError(
                f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}, expected"
                f" [{logits.shape[1]}] integers, one for each image in logits"
            )
        if int(targets.min()) < 0 or int(targets.max()) >= self.num_classes:
            strange = int(targets.min()) if int(targets.min()) < 0 else int(targets.max())
            raise ValueError(
                f"the images have a class number {strange}, the model has"
                f" {self.num_classes} classes, 0 to {self.num_classes - 1}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: logits, targets if there are any, layers, unreadable files.

        Raises:
            OSError: it cannot be written; what stood there before is intact.
        """
        tensors = {"logits": self.logits, "layers": torch.tensor(self.layers)}
        if self.targets is not None:
            tensors["targets"] = self.targets
        save_weights(path, tensors, {_BAD: json.dumps(self.bad)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: a damaged file, or one that is no recording.
        """
        tensors, metadata = read_weights(path)
        try:
            bad = [BadImage(str(name), str(reason)) for name, reason in json.loads(metadata[_BAD])]
            logits, layers = tensors["logits"], tuple(tensors["layers"].tolist())
        except (KeyError, TypeError, ValueError):
            expected = "expected a file that `Recording.save` wrote"
            raise ValueError(f"{path} is no recording: {expected}") from None
        return cls(logits, tensors.get("targets"), layers, bad)

    def __len__(self) -> int:
        """How many images."""
        return self.logits.shape[1]

    @property
    def num_exits(self) -> int:
        """E, the final classifier not counted."""
        return len(self.layers) - 1

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[2]

    @property
    def labels(self) -> Tensor:
        """The targets; ValueError where there are none."""
        if self.targets is None:
            raise ValueError("the recording has no targets, and accuracy needs them")
        return self.targets

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Top-1 accuracy in [0, 1] of each exit on all images, and of the final classifier."""
        right = self.logits.argmax(-1) == self.labels
        return tuple(right.double().mean(1).tolist())

    @property
    def final_accuracy(self) -> float:
        """Top-1 accuracy in [0, 1] of the final classifier."""
        return float((self.logits[-1].argmax(-1) == self.labels).double().mean())

    @property
    def digest(self) -> str:
        """SHA-256 of logits (as float32) and targets, in hexadecimal."""
        parts = [self.logits.float()] + ([] if self.targets is None else [self.targets.long()])
        found = hashlib.sha256(repr((tuple(self.logits.shape), self.layers)).encode())
        for part in parts:
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()

    def split(self, seed: int) -> tuple[Recording, Recording]:
        """Two halves at random: one to choose on, one to report on. The first is the smaller one."""
        first, second = self.halves(seed)
        return self._part(first), self._part(second)

    def halves(self, seed: int) -> tuple[Tensor, Tensor]:
        """Which images `split` puts where: the places here of either half's, increasing."""
        order = torch.randperm(len(self), generator=generator(seed, "halves"))
        half = len(self) // 2
        return order[:half].sort().values, order[half:].sort().values

    def _part(self, images: Tensor) -> Recording:
        targets = None if self.targets is None else self.targets[images]
        return Recording(self.logits[:, images], targets, self.layers, self.bad)


@torch.inference_mode()
def record(
    model: LGViT,
    batches: Iterable[Batch | Tensor | Sequence[Any]],
    autocast: AbstractContextManager[Any] | None = None,
    labelled: bool = True,
) -> Recording:
    """Run all images to the end once and keep what every exit said.

    Args:
        model: in eval mode; runs where its parameters are.
        batches: images and classes: `Batch`es, whose unreadable files are passed on in
            `Recording.bad`, or what a loader gives: pairs of images and targets, or images alone.
        autocast: a re-enterable `torch.autocast`, or None.
        labelled: False leaves the targets out.

    Raises:
        RuntimeError: the model is in train mode.
        ValueError: no image could be read, or a class number is beyond the model's classes.
    """
    if model.training:
        raise RuntimeError("record needs eval mode: call model.eval() first")
    device = next(model.parameters()).device
    logits, targets, bad = [], [], []
    for item in batches:
        batch = _as_batch(item)
        bad += batch.bad
        if not len(batch.images):
            continue
        with autocast or nullcontext():
            outputs = model.forward_exits(batch.images.to(device))
        stacked = torch.stack((*outputs.exits, outputs.final))
        logits.append(stacked.to(torch.promote_types(stacked.dtype, torch.float32)).cpu())
        targets.append(batch.targets)
    if not logits:
        reason = f"; the first: {bad[0].name}: {bad[0].reason}" if bad else ""
        raise ValueError(f"none of the images could be read{reason}")
    layers = (*(spec.layer for spec in model.exits), model.num_blocks)
    labelled = labelled and all(part is not None for part in targets)
    classes = torch.cat([part.cpu() for part in targets]) if labelled else None
    return Recording(torch.cat(logits, dim=1), classes, layers, bad)


def _as_batch(item: Any) -> Batch:
    """One of a loader's items as a `Batch`, its targets None where it has none."""
    if isinstance(item, Batch):
        return item
    images, *rest = item if isinstance(item, tuple | list) else (item,)
    return Batch(images, rest[0] if rest else None, [])  # type: ignore[arg-type]

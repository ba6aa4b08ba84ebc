"""The digits bundled with scikit-learn: 1,797 real 8 x 8 scans, enlarged, augmented by the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lgvit_fast.data.batches import Batch, Key
from lgvit_fast.data.seeds import generator
from lgvit_fast.data.transforms import InputSpec

# one split for every run, so that what is held out in training is what evaluation reads
HELD_OUT = 0.2
SPLIT_SEED = 0


class Digits:
    """One part of the digits as normalised images `[b, C, H, W]` of any size.

    Augmentation is a mild affine map (rotation, scale, shear, shift), drawn per epoch for every
    image and applied to the whole batch in one resampling, which also does the enlarging.

    Args:
        split: `train`, or the held-out fifth, `validation`.
        spec: the images the model wants.
        augment: move the training images about.
        seed: of the augmentation; the split never changes.
    """

    def __init__(
        self,
        split: Literal["train", "validation"],
        spec: InputSpec,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        from sklearn.datasets import load_digits

        if split not in ("train", "validation"):
            raise ValueError(f"split is {split!r}, expected 'train' or 'validation'")
        scans, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(scans).float().view(-1, 1, 8, 8) / 16
        order = torch.randperm(len(images), generator=generator(SPLIT_SEED, "digits"))
        held_out = round(HELD_OUT * len(images))
        chosen = order[:held_out] if split == "validation" else order[held_out:]
        self.images = images[chosen]
        self.targets = torch.from_numpy(labels)[chosen].long()
        self.class_names = [str(digit) for digit in range(10)]
        self.spec, self.augment, self.seed = spec, augment, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        epoch = keys[0][0]
        positions = torch.tensor([position for _, position in keys])
        maps = self._maps(epoch)[positions]
        return Batch(self._render(self.images[positions], maps), self.targets[positions], [])

    def _maps(self, epoch: int) -> Tensor:
        """Every image's inverse affine map in this epoch, `[n, 2, 3]`."""
        count = len(self)
        if not self.augment:
            return torch.eye(2, 3).expand(count, 2, 3)
        draws = torch.rand(count, 5, generator=generator(self.seed, "digits", epoch)) * 2 - 1
        angle, scale, shear = draws[:, 0] * math.radians(12), 1 + draws[:, 1] * 0.12, draws[:, 2]
        cos, sin, slant = angle.cos() / scale, angle.sin() / scale, shear * 0.12
        shift = draws[:, 3:] * 0.12
        rows = (
            torch.stack([cos, slant * cos - sin, shift[:, 0]], dim=1),
            torch.stack([sin, slant * sin + cos, shift[:, 1]], dim=1),
        )
        return torch.stack(rows, dim=1)

    def _render(self, scans: Tensor, maps: Tensor) -> Tensor:
        spec = self.spec
        grid = F.affine_grid(maps, [len(scans), 1, *spec.size], align_corners=False)
        images = F.grid_sample(scans, grid, padding_mode="border", align_corners=False)
        mean = torch.tensor(spec.mean).view(1, -1, 1, 1)
        std = torch.tensor(spec.std).view(1, -1, 1, 1)
        return (images.expand(-1, spec.channels, -1, -1) - mean) / std

"""Image files to input arrays with Pillow and NumPy alone, as timm's evaluation transform does it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from lgvit_fast.data.images import open_image, upright

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["INTERPOLATIONS", "Preprocessing"]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # Pillow's filters


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its images; see `lgvit_fast.data.transforms.InputSpec`.

    Attributes:
        channels: 1 (grey) or 3 (RGB) for files; any number for arrays.
        size: `(H, W)` in pixels.
        mean: of each channel, in units of the largest pixel value.
        std: likewise.
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: side of the centre crop over that of the resized image.
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    def read(self, path: str | os.PathLike[str] | IO[bytes], **limits: Any) -> NDArray[np.float32]:
        """An image file as an input `[channels, H, W]`.

        Args:
            path: a path, or an open binary file.
            limits: `max_pixels` and `formats` of `lgvit_fast.data.images.open_image`.

        Raises:
            Exception: as `lgvit_fast.data.images.open_image`, for what is no readable image.
            ValueError: the model wants neither 1 nor 3 channels.
        """
        return self(open_image(path, self._mode, **limits))

    def __call__(self, image: Image) -> NDArray[np.float32]:
        """A Pillow image as an input `[channels, H, W]`."""
        if self.channels not in (1, 3):
            raise ValueError(f"the model wants {self.channels} channels, image files have 1 or 3")
        image = _centre_crop(self._resize(upright(image, self._mode)), self.size)
        pixels = np.asarray(image, np.float32).reshape(*self.size, self.channels) / np.float32(255)
        normed = (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return np.ascontiguousarray(normed.transpose(2, 0, 1))

    @property
    def _mode(self) -> str:
        return "L" if self.channels == 1 else "RGB"

    def _resize(self, image: Image) -> Image:
        """The shorter side to the crop's size / `crop_pct`, the shape kept."""
        from PIL.Image import Resampling

        height, width = (math.floor(side / self.crop_pct) for side in self.size)
        if height == width:  # torchvision's Resize, which rounds down
            short, long = sorted(image.size)
            longest = int(height * long / short)
            target = (height, longest) if image.width <= image.height else (longest, height)
        else:  # timm's ResizeKeepRatio, which rounds to the nearest
            ratio = min(image.height / height, image.width / width)
            target = (round(image.width / ratio), round(image.height / ratio))
        if target == image.size:
            return image
        return image.resize(target, Resampling[self.interpolation.upper()])


def _centre_crop(image: Image, size: tuple[int, int]) -> Image:
    """The middle `(H, W)` pixels; black where the image has none."""
    height, width = size
    # a missing odd pixel is added at the bottom and the right, as torchvision does
    left, top = (
        -((wanted - have) // 2) if wanted > have else round((have - wanted) / 2)
        for wanted, have in ((width, image.width), (height, image.height))
    )
    return image.crop((left, top, left + width, top + height))

"""The images that an int8 export is compared on, from any of the places people keep them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lgvit_fast.data.batches import Batch, Batches, Loader
from lgvit_fast.data.sources import ImageSource, open_dataset
from lgvit_fast.data.transforms import InputSpec, eval_transform

__all__ = ["FEWEST_IMAGES", "MOST_IMAGES", "calibration_images"]

FEWEST_IMAGES = 100  # of fewer, one answer is more than a point of agreement
MOST_IMAGES = 1000


def calibration_images(source: Any, spec: InputSpec) -> NDArray[np.float32]:
    """Inputs of a model, from images without labels.

    Args:
        source: a folder or tar of class folders, whose names are not used; preprocessed inputs
            `[n, C, H, W]`; or batches of such inputs, `Batch`es or what a loader gives. At most
            `MOST_IMAGES` are taken: evenly spread of a folder or an array, the first of batches.
        spec: the inputs that the model wants.

    Returns:
        `[n, C, H, W]` float32.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: none given, fewer than `FEWEST_IMAGES`, inputs of another shape or not finite, or
            a file that cannot be read.
    """
    if source is None:
        raise ValueError(
            "precision='int8' needs calibration images: a folder, a tar, an array or a loader. They"
            " are what int8 and float32 answers are compared on and exit thresholds are fitted to"
        )
    parts, count = [], 0
    for part in _batches(source, spec):
        parts.append(_checked(part, spec))
        count += len(part)
        if count >= MOST_IMAGES:
            break
    if count < FEWEST_IMAGES:
        raise ValueError(f"calibration has {count} images, expected at least {FEWEST_IMAGES}")
    return np.concatenate(parts)[:MOST_IMAGES]


def _batches(source: Any, spec: InputSpec) -> Iterable[Any]:
    if isinstance(source, str | os.PathLike):
        dataset = open_dataset(os.fspath(source))
        mode = "L" if spec.channels == 1 else "RGB"
        places = _spread(len(dataset))
        images = ImageSource(dataset, eval_transform(spec), mode, positions=places.tolist())
        for batch in Loader(images, Batches(len(images), 32, training=False)).epoch():
            if batch.bad:
                raise ValueError(
                    f"calibration: cannot read {batch.bad[0].name}: {batch.bad[0].reason}"
                )
            yield batch.images
    elif isinstance(source, np.ndarray | torch.Tensor):
        yield source[_spread(len(source))] if source.ndim else source
    elif isinstance(source, Iterable):
        for item in source:
            if isinstance(item, Batch):
                yield item.images
            else:
                yield item[0] if isinstance(item, tuple | list) else item
    else:
        raise ValueError(
            f"calibration is a {type(source).__name__}, expected a folder, a tar, an array or a loader"
        )


def _spread(count: int) -> NDArray[np.int64]:
    """Places of at most `MOST_IMAGES` of `count` images, evenly spread."""
    return np.linspace(0, count - 1, min(count, MOST_IMAGES)).round().astype(np.int64)


def _checked(images: Any, spec: InputSpec) -> NDArray[np.float32]:
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu().numpy()
    shape = (spec.channels, *spec.size)
    if not isinstance(images, np.ndarray) or images.ndim != 4 or images.shape[1:] != shape:
        given = getattr(images, "shape", None) or type(images).__name__
        expected = ", ".join(map(str, shape))
        raise ValueError(f"calibration has images {given}, expected [n, {expected}]")
    checked: NDArray[np.float32] = np.ascontiguousarray(images, np.float32)
    if not np.isfinite(checked).all():
        raise ValueError("calibration has NaN or infinite pixels")
    return checked

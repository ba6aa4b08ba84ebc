"""What a stream's loader may give: images, alone, in a tuple or in a dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["split_item"]

_IMAGE_KEYS = ("image", "images", "pixel_values")
_TARGET_KEYS = ("label", "labels", "target", "targets")


def split_item(item: Any) -> tuple[Tensor, Any]:
    """A loader's item as images, and what can be indexed for each one's target.

    Raises:
        ValueError: it is none of what `stream` takes.
    """
    if isinstance(item, Mapping):
        images, rest = _named(item)
    elif isinstance(item, tuple | list) and item:
        images, *rest = item
    else:
        images, rest = item, []
    if not isinstance(images, Tensor) or not images.dim():
        raise ValueError(
            f"the loader gave {_kind(item)}, expected images [B, channels, height, width] as a tensor,"
            " a tuple that begins with them, or a dict with them under one of "
            + ", ".join(map(repr, _IMAGE_KEYS))
        )
    sizes = [len(part) if hasattr(part, "__len__") else _kind(part) for part in rest]
    if any(size != len(images) for size in sizes):
        raise ValueError(f"{len(images)} images came with {sizes} targets")
    if not rest:
        return images, _Nothing()
    return images, rest[0] if len(rest) == 1 else list(zip(*rest, strict=True))


def _named(batch: Mapping[Any, Any]) -> tuple[Any, list[Any]]:
    """Images and targets of a dict."""
    unknown = [key for key in batch if key not in _IMAGE_KEYS + _TARGET_KEYS]
    images = [batch[key] for key in _IMAGE_KEYS if key in batch]
    targets = [batch[key] for key in _TARGET_KEYS if key in batch]
    if unknown or len(images) != 1 or len(targets) > 1:
        raise ValueError(
            f"the loader gave a dict with the keys {list(batch)}, expected one of"
            f" {', '.join(map(repr, _IMAGE_KEYS))}, at most one of"
            f" {', '.join(map(repr, _TARGET_KEYS))}, and no others"
        )
    return images[0], targets


def _kind(item: Any) -> str:
    """What an item is, in a few words."""
    if isinstance(item, tuple | list):
        return f"{type(item).__name__} of {', '.join(map(_kind, item[:3])) or 'nothing'}"
    return "None" if item is None else type(item).__name__


class _Nothing:
    """The targets of images that have none."""

    def __getitem__(self, index: int) -> None:
        return None

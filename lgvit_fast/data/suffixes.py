"""Which files are images, by the ends of their names: the same wherever folders are searched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["IMAGE_SUFFIXES", "image_files", "is_image", "timm_reads_all"]

# In small letters; capitals are the same.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def image_files(folder: str | os.PathLike[str]) -> list[str]:
    """The image files in a folder and below, sorted.

    Raises:
        FileNotFoundError: there are none.
    """
    path = os.fspath(folder)
    found = sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(path)
        for name in names
        if is_image(name)
    )
    if not found:
        raise FileNotFoundError(f"no images in the folder {path!r}")
    return found


@contextmanager
def timm_reads_all() -> Iterator[None]:
    """Inside the block timm's readers list all these files, rather than JPEG and PNG alone."""
    import timm.data  # the names serve exported models, too, where timm is not installed

    before = timm.data.get_img_extensions()
    timm.data.set_img_extensions(IMAGE_SUFFIXES)
    try:
        yield
    finally:
        timm.data.set_img_extensions(before)

"""Opening untrusted image files: the one way from a file to pixels.

Training, evaluation and prediction all read images here, so that the same file gives the same pixels.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from PIL import Image

__all__ = ["TooManyPixels", "check_file", "open_image", "upright"]

MAX_BYTES = 2**30
MAX_SCANS = 100  # of a JPEG; encoders write about ten, and each takes a pass over all pixels
MAX_RATIO = 250  # of the sides; scaled to a short side of 224, more would take gigabytes
_EPS = "EPS"  # a program for Ghostscript to run
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # the EXIF tag
_TILE = (322, 323)  # TIFF's tags of a tile's width and height
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]", re.DOTALL)  # of a JPEG's segment


class TooManyPixels(ValueError):
    """An image larger than the caller allows."""


def check_file(path: str | os.PathLike[str]) -> None:
    """Look, without opening it, whether a path (or what it links to) is a file of sensible size.

    Raises:
        OSError: nothing there, or not allowed.
        ValueError: a folder, FIFO, socket or device, or more than 1 GiB.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS.items() if test(found.st_mode)), "no file")
        raise ValueError(f"{kind}, expected an image file")
    if found.st_size > MAX_BYTES:
        raise ValueError(f"a file of {found.st_size} bytes, expected at most {MAX_BYTES}")


def open_image(
    source: str | os.PathLike[str] | IO[bytes],
    mode: str = "RGB",
    *,
    max_pixels: int | None = None,
    formats: Sequence[str] | None = None,
) -> Image.Image:
    """The first picture of an image file, decoded, upright, in `mode`.

    Args:
        source: a path, or an open binary file.
        mode: "RGB" or "L".
        max_pixels: width times height; None leaves it to Pillow, which warns of 89 million and
            refuses twice as many.
        formats: Pillow's names of those to read; None reads all. PostScript is never read.

    Raises:
        TooManyPixels: more than `max_pixels`, in the image or in a TIFF's tile; nothing has been
            decoded.
        Exception: whatever the decoder raises (`OSError`, `SyntaxError`, `RuntimeError`, ...), and
            `ValueError` for what `check_file` refuses, PostScript, pixels that are no numbers, one
            side more than 250 times the other, or a JPEG of over 100 scans.
    """
    if isinstance(source, str | os.PathLike):
        check_file(source)
    Image.init()
    taken = [name for name in Image.ID if name != _EPS and (formats is None or name in formats)]
    with Image.open(source, formats=taken) as image:
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise TooManyPixels(f"{width} x {height} pixels, at most {max_pixels} are taken")
        if max(width, height) > MAX_RATIO * min(width, height):
            raise ValueError(
                f"{width} x {height} pixels: one side is over {MAX_RATIO} times the other"
            )
        if image.format == "TIFF":
            _check_tile(image, max_pixels)
        if image.format in ("JPEG", "MPO"):
            _check_scans(image)
        image.load()
        return upright(image, mode)


def _check_tile(image: Any, max_pixels: int | None) -> None:
    """A tile is decoded whole, however small the image is."""
    width, height = (image.tag_v2.get(tag, 0) for tag in _TILE)
    if max_pixels is not None and width * height > max_pixels:
        raise TooManyPixels(f"a tile of {width} x {height} pixels, at most {max_pixels} are taken")


def _check_scans(image: Any) -> None:
    """A scan of some bytes may take as long as one of all pixels: a small file takes hours."""
    place = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(place)
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) and data[found.end() - 1] != 0xD9:  # its end
        scans += data[found.end() - 1] == 0xDA
        if scans > MAX_SCANS:
            raise ValueError(f"a JPEG of over {MAX_SCANS} scans")
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])


def upright(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """A decoded picture as its EXIF data says it is to be seen, in 8 bits, without that data.

    Transparent pixels lie on white. 16 bits are scaled to 8; other integers and floats (but those in
    0 to 1, or 0 to 255) are stretched from their smallest to their largest value.

    Args:
        image: of any mode.
        mode: "RGB" or "L".
    """
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bits(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")  # a copy at least, which has no EXIF data of its own
    if mode != "RGB":
        image = image.convert(mode)
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}
    return image


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data; the pixels may be whole
        return None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 or 32 bits, or floats, as mode L."""
    levels = np.asarray(image)
    low, high = float(levels.min()), float(levels.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("pixels that are not finite")
    if image.mode == "F":
        top = 1.0 if high <= 1 else 255.0
    else:
        top = 65535.0
    offset = 0.0
    if low < 0 or high > top:
        offset, top = low, (high - low) or 1.0
    made = np.empty(levels.shape, np.uint8)
    for row, out in zip(levels, made, strict=True):  # by rows: float64 of a whole image is large
        out[:] = np.rint((row.astype(np.float64) - offset) * (255 / top))
    return Image.fromarray(made)

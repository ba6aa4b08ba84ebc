"""A request's body to image files, within limits, and these to arrays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from PIL.Image import DecompressionBombError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from lgvit_fast.data.images import TooManyPixels
from lgvit_fast.deploy.preprocess import Preprocessing
from lgvit_fast.serve.settings import Settings

__all__ = ["FIELD", "Budget", "Upload", "read_image", "uploads"]

FIELD = "image"  # of a multipart body
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names
_IN_MEMORY = 2**20  # bytes; longer bodies go to a temporary file
_CHUNKED = "transfer-encoding"


@dataclass(frozen=True, slots=True)
class Upload:
    """An image file of a request: what the client calls it, and its bytes."""

    name: str | None
    file: IO[bytes]


class Budget:
    """Bytes of bodies that are held at once, over all requests.

    Args:
        most: no more than these.
    """

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> bool:
        """Take so many bytes, if they are left."""
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        """What `take` took."""
        self._left += size


async def uploads(request: Request, settings: Settings) -> list[Upload]:
    """The image files of a request. The caller closes them.

    Raises:
        HTTPException: 400 no body, no image or a broken form; 408 it takes too long; 413 too large, or
            too many images; 415 neither a form nor an image.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    declared(request, settings)
    try:
        async with asyncio.timeout(settings.timeout):
            if kind == "multipart/form-data":
                return await _form(request, settings)
            if kind in ("", "application/octet-stream") or kind.startswith("image/"):
                return [await _raw(request, settings)]
    except TimeoutError:
        raise HTTPException(408, f"the body took more than {settings.timeout:g} s") from None
    raise HTTPException(
        415,
        f"content type {kind!r}, expected multipart/form-data with the field {FIELD!r}, image/* or"
        " application/octet-stream",
    )


def declared(request: Request, settings: Settings) -> int:
    """Bytes that a request's body may have: what it says, or the most there may be.

    Raises:
        HTTPException: 413 too many; 400 no number.
    """
    text = request.headers.get("content-length")
    if text is None:
        return settings.max_upload if _CHUNKED in request.headers else 0
    if not (text.isascii() and text.isdecimal()):
        raise HTTPException(400, f"content-length is {text!r}, expected a number")
    if int(text) > settings.max_upload:
        raise _too_large(settings)
    return int(text)


async def _raw(request: Request, settings: Settings) -> Upload:
    file = SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 (the caller closes it)
    try:
        async for part in _limited(request, settings):
            file.write(part)
        if not file.tell():
            raise HTTPException(400, "the body is empty, expected an image")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return Upload(None, file)


async def _form(request: Request, settings: Settings) -> list[Upload]:
    parser = MultiPartParser(
        request.headers,
        _limited(request, settings),
        max_files=settings.max_images,
        max_fields=settings.max_images,
        max_part_size=settings.max_upload,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        status = 413 if error.message.startswith("Too many") else 400
        raise HTTPException(status, error.message) from None
    except KeyError:
        raise HTTPException(400, "the form has no boundary") from None
    files = [part for part in form.getlist(FIELD) if isinstance(part, UploadFile)]
    others = [name for name, part in form.multi_items() if name != FIELD or part not in files]
    if not files or others:
        await form.close()
        what = f"the form's fields {sorted(set(others))}" if others else "a form without an image"
        raise HTTPException(400, f"{what}, expected files under {FIELD!r} and nothing else")
    return [Upload(part.filename or None, part.file) for part in files]


async def _limited(request: Request, settings: Settings) -> AsyncGenerator[bytes]:
    """The body's parts; what it says of its length is not relied on."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > settings.max_upload:
            raise _too_large(settings)
        yield part


def _too_large(settings: Settings) -> HTTPException:
    return HTTPException(413, f"the body is larger than {settings.max_upload_mb:g} MiB")


def read_image(
    upload: Upload, preprocessing: Preprocessing, settings: Settings
) -> NDArray[np.float32]:
    """An uploaded file as an input `[channels, H, W]`.

    Raises:
        HTTPException: 413 too many pixels; 400 no readable image.
    """
    try:
        return preprocessing.read(upload.file, max_pixels=settings.max_pixels, formats=FORMATS)
    except (TooManyPixels, DecompressionBombError):
        raise HTTPException(413, f"an image of more than {settings.max_pixels} pixels") from None
    except Exception as error:  # whatever a decoder raises is a bad image
        text = str(error) if isinstance(error, ValueError) else "cut short, or no image"
        raise HTTPException(400, f"not a readable image: {text}") from None

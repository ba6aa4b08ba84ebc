"""A request's body to image files, within limits, and these to arrays."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import IO

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from PIL.Image import DecompressionBombError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from lgvit_fast.data.images import TooManyPixels
from lgvit_fast.deploy.preprocess import Preprocessing
from lgvit_fast.serve.settings import Settings

__all__ = ["FIELD", "Budget", "NoRoom", "Upload", "declared", "read_image", "uploads"]

FIELD = "image"  # of a multipart body
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names
_IN_MEMORY = 2**20  # bytes; longer bodies go to a temporary file
_TEXT = 1024  # bytes of a form's field that is no file, which is refused in the end


@dataclass(frozen=True, slots=True)
class Upload:
    """An image file of a request: what the client calls it, and its bytes."""

    name: str | None
    file: IO[bytes]


warnings.filterwarnings("ignore", module=r"PIL\.")  # uploads would fill the log with them


class NoRoom(Exception):
    """As many bytes of bodies are held as may be."""


class Budget:
    """Bytes of bodies that are held at once, over all requests.

    They are taken as they come: what a body says of its length would let a few slow clients hold all.

    Args:
        most: no more than these.
    """

    def __init__(self, most: int) -> None:
        self._left = most

    @contextmanager
    def share(self, declared: int) -> Iterator[Callable[[int], None]]:
        """A function that takes so many more bytes, which are given back in the end.

        Args:
            declared: bytes of the body, as far as is known. They are not taken.

        Raises:
            NoRoom: there are not enough, now or in the function.
        """
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if size > self._left:
                raise NoRoom
            self._left -= size
            taken += size

        if declared > self._left:
            raise NoRoom
        try:
            yield take
        finally:
            self._left += taken


async def uploads(
    request: Request, settings: Settings, take: Callable[[int], None]
) -> list[Upload]:
    """The image files of a request. The caller closes them, and has looked at `declared`.

    Args:
        request: whose body has not been read.
        settings: limits.
        take: called with the bytes of each part of the body that comes; see `Budget.share`.

    Raises:
        NoRoom: from `take`.
        HTTPException: 400 no body, no image or a broken form; 413 too large, or too many images; 415
            neither a form nor an image.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request, settings, take)
    if kind in ("", "application/octet-stream") or kind.startswith("image/"):
        return [await _raw(request, settings, take)]
    raise HTTPException(
        415,
        f"content type {kind!r}, expected multipart/form-data with the field {FIELD!r}, image/* or"
        " application/octet-stream",
    )


def declared(request: Request, settings: Settings) -> int:
    """Bytes that a request's body has, as it says; 0 if it does not.

    Raises:
        HTTPException: 413 too many; 400 no number.
    """
    text = request.headers.get("content-length")
    if text is None:
        return 0
    if not (text.isascii() and text.isdecimal()):
        raise HTTPException(400, f"content-length is {text!r}, expected a number")
    if int(text) > settings.max_upload:
        raise _too_large(settings)
    return int(text)


async def _raw(request: Request, settings: Settings, take: Callable[[int], None]) -> Upload:
    file = SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 (the caller closes it)
    try:
        async for part in _limited(request, settings, take):
            file.write(part)
        if not file.tell():
            raise HTTPException(400, "the body is empty, expected an image")
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return Upload(None, file)


async def _form(request: Request, settings: Settings, take: Callable[[int], None]) -> list[Upload]:
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":  # Python has strange ones
        raise HTTPException(400, "the form's charset is not utf-8")
    parser = MultiPartParser(
        request.headers,
        _limited(request, settings, take),
        max_files=settings.max_images,
        max_fields=settings.max_images,
        max_part_size=_TEXT,
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


async def _limited(
    request: Request, settings: Settings, take: Callable[[int], None]
) -> AsyncGenerator[bytes]:
    """The body's parts; what it says of its length is not relied on."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > settings.max_upload:
            raise _too_large(settings)
        take(len(part))
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

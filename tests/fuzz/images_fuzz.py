"""Damaged image files: each is read or is a bad image; none stops a run, hangs or gives no numbers."""

from __future__ import annotations

import io
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lgvit_fast.data import ImageSource, InputSpec, eval_transform

SPEC = InputSpec(3, (16, 16), (0.5,) * 3, (0.25,) * 3)
FORMATS = {
    "png": ("L", "LA", "P", "RGB", "RGBA", "I;16", "1"),
    "jpeg": ("L", "RGB", "CMYK"),
    "gif": ("P", "RGB"),
    "tiff": ("L", "RGB", "RGBA", "CMYK", "I;16", "F", "I"),
    "bmp": ("L", "RGB"),
    "webp": ("RGB", "RGBA"),
    "avif": ("RGB", "RGBA"),
    "ppm": ("L", "RGB"),
}


class Files:
    """Paths as a data set of (image, 0), as `predict` reads them."""

    def __init__(self, paths: list[str]) -> None:
        self.samples = [(path, 0) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        from lgvit_fast.data import open_image

        return open_image(self.samples[place][0]), 0


def encode(form: str, mode: str, draw: random.Random) -> bytes:
    """A picture of noise in a format and mode."""
    size = (draw.randint(1, 40), draw.randint(1, 40))
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (size[1], size[0], 4))
    picture = Image.fromarray(pixels.astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray((pixels[..., 0] * 257).astype(np.uint16))
    else:
        picture = picture.convert(mode if mode in ("RGBA", "LA") else "RGB").convert(mode)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = draw.randint(1, 8)
    options: dict[str, Any] = {"exif": exif.tobytes()} if form in ("jpeg", "png", "webp") else {}
    picture.save(file, form, **options)
    return file.getvalue()


def damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut off, doubled or put in; or the whole left as it is."""
    kind, place = draw.randrange(5), draw.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + draw.randbytes(draw.randint(1, 8)) + data[place:]
    if kind == 2:
        return data[:place] + data[place // 2 :]
    if kind == 3:
        changed = bytearray(data)
        for _ in range(draw.randint(1, 12)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    return data


def run(count: int, seed: int) -> dict[str, int]:
    """Read `count` files, most of them damaged; `failures` is to be 0."""
    draw = random.Random(seed)
    found = {"cases": 0, "read": 0, "bad": 0, "failures": 0}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            form = draw.choice(list(FORMATS))
            mode = draw.choice(FORMATS[form])
            path = Path(folder) / os.fsdecode(f"{number}".encode() + b"\xff.png")
            path.write_bytes(damage(encode(form, mode, draw), draw))
            source = ImageSource(Files([str(path)]), eval_transform(SPEC))
            try:
                batch = source.__getitems__([(0, 0)])
                assert len(batch.targets) + len(batch.bad) == 1
                if batch.bad:
                    assert batch.bad[0].name == str(path)
                else:
                    assert batch.images.shape == (1, 3, 16, 16)
                    assert torch.isfinite(batch.images).all()
                found["bad" if batch.bad else "read"] += 1
            except Exception as error:
                found["failures"] += 1
                print(
                    f"images fuzz: seed {seed}, file {number}, {form} {mode}: {error!r}",
                    file=sys.stderr,
                )
            found["cases"] += 1
            path.unlink()
    return found

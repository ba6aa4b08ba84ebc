"""Which images a run trains on, in few words: what a resumed run must find again."""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import PurePath
from typing import Any

import numpy as np

from lgvit_fast.data.batches import Source

__all__ = ["fingerprint"]


def fingerprint(source: Source, contents: bool = False) -> dict[str, str]:
    """Number, names and sizes of the images, folder by folder.

    Args:
        source: an `ImageSource` of files, in a folder or a tar; of any other there is nothing to say.
        contents: read every file and take what is in it, too.

    Returns:
        For each folder (a class, as a rule), below the root of the data: how many images, their bytes,
        and a digest of names, sizes and perhaps contents in their order.
    """
    groups: dict[str, tuple[int, int, Any]] = {}
    for name, size, data in _files(getattr(source, "dataset", None), contents):
        folder = PurePath(name).parent.as_posix()
        count, total, digest = groups.get(folder, (0, 0, hashlib.blake2b(digest_size=8)))
        digest.update(f"{PurePath(name).name}\0{size}\0".encode(errors="surrogateescape") + data)
        groups[folder] = count + 1, total + size, digest
    return {
        folder: f"{count} images, {total} bytes, {digest.hexdigest()}"
        for folder, (count, total, digest) in groups.items()
    }


def _files(dataset: Any, contents: bool) -> Iterator[tuple[str, int, bytes]]:
    """Name below the root, size, and digest of the content (empty unless asked for) of each file."""
    reader = getattr(dataset, "reader", dataset)  # timm's, or a torchvision dataset itself
    samples = getattr(reader, "samples", None)
    if not isinstance(samples, list | np.ndarray):
        return
    for index, (entry, *_) in enumerate(samples):
        if isinstance(entry, tarfile.TarInfo):
            with reader[index][0] if contents else nullcontext() as file:
                yield entry.name, entry.size, _digest(file) if contents else b""
        else:  # nothing is opened to learn its size: it may be a pipe
            found = os.stat(entry) if os.path.exists(entry) else None
            regular = found is not None and stat.S_ISREG(found.st_mode)
            with open(entry, "rb") if contents and regular else nullcontext() as file:
                data = _digest(file) if file is not None else b""
            name = os.path.relpath(entry, getattr(reader, "root", "."))
            yield name, found.st_size if found is not None else -1, data


def _digest(file: Any) -> bytes:
    return hashlib.file_digest(file, "blake2b").digest()

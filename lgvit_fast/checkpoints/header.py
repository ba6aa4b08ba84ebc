"""The header of a safetensors file: what it holds, read before any tensor, and its checksums."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["CHECKSUMS", "Header", "checksums", "damaged", "open_file", "read_header"]

# Of the metadata: json, the checksum of each tensor, and under "" that of names and metadata.
CHECKSUMS = "crc32"
# A checkpoint of 24 blocks with optimizer and EMA has 1,500 tensors and a header of half a megabyte.
_MOST_BYTES, _MOST_TENSORS = 32 << 20, 200_000
_FLOATS = ("F", "BF")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds.

    Attributes:
        shapes: of each tensor, by name.
        floats: names of the tensors of a floating point type.
        metadata: strings by name.
    """

    shapes: dict[str, tuple[int, ...]]
    floats: frozenset[str]
    metadata: dict[str, str]


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; pipes and devices are refused before they are opened.

    Raises:
        FileNotFoundError: nothing there.
        IsADirectoryError: a folder.
        ValueError: neither.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{path} is no regular file")
    return open(path, "rb")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header alone of a safetensors file.

    Raises:
        FileNotFoundError: nothing there.
        IsADirectoryError: a folder.
        ValueError: a pickle (which is never loaded), a truncated or another kind of file, or a header
            of more than 32 MiB or 200,000 tensors.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise _no_safetensors(path, start, "its header is longer than the file")
        if length > _MOST_BYTES:
            raise ValueError(
                f"{path} has a header of {length} bytes, expected at most {_MOST_BYTES}"
            )
        text = file.read(length)
    try:
        entries = json.loads(text)
        return _header(Path(path), entries)
    except RecursionError:
        raise ValueError(f"{path} is not a whole safetensors file: its header is nested") from None
    except ValueError as error:
        raise _no_safetensors(path, start, str(error)) from None


def checksums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """A CRC-32 of each tensor with its name, type and shape, and under "" one of names and metadata.

    It finds damage (every flip of one or two bits in a tensor of less than 512 MB, any run of flips
    within 32 bits), not intent: a file that is changed on purpose can have its checksums changed too.
    """
    rest = {key: value for key, value in metadata.items() if key != CHECKSUMS}
    whole = json.dumps([sorted(tensors), sorted(rest.items())])
    return {"": f"{zlib.crc32(whole.encode()):08x}"} | {
        name: f"{_checksum(name, tensor):08x}" for name, tensor in tensors.items()
    }


def damaged(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[str]:
    """What does not match the checksums in the metadata: names of tensors, or "the header".

    A file without checksums, as others and older versions write it, is taken as it is.

    Raises:
        ValueError: the checksums cannot be read.
    """
    if CHECKSUMS not in metadata:
        return []
    saved = json.loads(metadata[CHECKSUMS])
    if not isinstance(saved, dict):
        raise ValueError("its checksums are no table")
    found = checksums(tensors, metadata)
    odd = [name for name in {**found, **saved} if found.get(name) != saved.get(name)]
    return [name or "the header" for name in odd]


def _checksum(name: str, tensor: Tensor) -> int:
    seed = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy().data, seed)


def _header(path: Path, entries: Any) -> Header:
    if not isinstance(entries, dict):
        raise ValueError("its header is no table")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not strings by name")
    if len(entries) > _MOST_TENSORS:
        raise ValueError(f"it lists {len(entries)} tensors, expected at most {_MOST_TENSORS}")
    shapes, floats = {}, set()
    for name, entry in entries.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        kind = entry.get("dtype") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or not isinstance(kind, str) or not _are_sizes(shape):
            raise ValueError(f"its entry {name[:80]!r} is no tensor")
        shapes[name] = tuple(shape)
        if kind.startswith(_FLOATS):
            floats.add(name)
    return Header(shapes, frozenset(floats), metadata)


def _are_sizes(shape: list[Any]) -> bool:
    return all(type(size) is int and 0 <= size < 2**63 for size in shape)


def _no_safetensors(path: str | os.PathLike[str], start: bytes, reason: str) -> ValueError:
    # Only now: a safetensors file starts with its header's length, which can be any two bytes.
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return ValueError(
            f"{path} is a pickle, which can run code when loaded and is not read here;"
            " convert it to safetensors"
        )
    return ValueError(f"{path} is not a whole safetensors file: {reason}")

"""State dicts that `torch.save` wrote, read without running code and without growing.

A few hundred bytes of such a file can stand for gigabytes: compressed entries, storages that are
declared but not there, tensors that repeat one element. So its pickle is scanned first, then read with
storages that take no memory, and only what the file really holds is loaded.
"""

from __future__ import annotations

import argparse
import io
import os
import pickletools
import zipfile
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.checkpoints.header import open_file
from lgvit_fast.ops.torch_private import fake_tensors

__all__ = ["load_checkpoint", "load_state_dict"]

_MOST_PICKLE = (
    32 << 20
)  # bytes of a pickle in an archive; that of a large model has half a megabyte
# All that a state dict is made of, beside the storages.
_KNOWN = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
_ARGUMENTS = "argparse Namespace"
_OTHER_WAYS = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX"}


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a file of plain tensors by name, `weights_only`.

    Raises:
        FileNotFoundError: nothing there.
        IsADirectoryError: a folder.
        ValueError: a damaged file, one with more than plain tensors in it, or one that declares more
            than it holds.
    """
    return _read(path, _load, _KNOWN, _OTHER_WAYS)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read state dicts, plain values and parsed arguments in a dict, as timm's training script saves.

    A state dict is one, too. Errors as of `load_state_dict`.
    """
    return _read(path, _load_parts, {*_KNOWN, _ARGUMENTS}, _OTHER_WAYS - {"NEWOBJ"})


def _read(
    path: str | os.PathLike[str],
    load: Callable[[bytes], dict[str, Any]],
    known: Set[str],
    refused: Set[str],
) -> dict[str, Any]:
    path = Path(path)
    with open_file(path) as file:
        data = file.read()
    try:
        _scan(data, known, refused)
        with fake_tensors():
            _check_sizes(_tensors_in(load(data)), len(data))
        return load(data)
    except Exception as error:  # whatever a damaged archive or pickle leads to
        raise ValueError(f"{path} is not a whole file of plain tensors: {error}") from error


def _load(data: bytes) -> dict[str, Any]:
    tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items()
    ):
        raise ValueError("it does not hold a state dict")
    return tensors


def _load_parts(data: bytes) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        parts = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(parts, dict):
        raise ValueError("it does not hold a state dict")
    return parts


def _tensors_in(value: Any, name: str = "") -> dict[str, Any]:
    """All tensors in nested dicts and lists, by their place."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)  # type: ignore[assignment]
    else:
        return {}
    found: dict[str, Any] = {}
    for key, part in parts:
        found.update(_tensors_in(part, f"{name}.{key}" if name else str(key)))
    return found


def _scan(data: bytes, known: Set[str], refused: Set[str]) -> None:
    """Refuse compressed archives, and pickles that name anything but what is known."""
    if not data.startswith(b"PK"):
        _scan_pickles(data, known, refused)
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("its entries are larger than the file")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                if entry.file_size > _MOST_PICKLE:
                    raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
                _scan_pickles(archive.read(entry), known, refused)


def _scan_pickles(data: bytes, known: Set[str], refused: Set[str]) -> None:
    """Look through the pickles that stand one after the other at the start of the data."""
    stream = io.BytesIO(data)
    for _ in range(5):  # before there were archives: three of a preamble, the tensors, the storages
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in refused:
                raise ValueError(f"its pickle uses {opcode.name}, which a state dict never needs")
            if opcode.name == "GLOBAL" and not _is_known(str(argument), known):
                raise ValueError(f"its pickle names {argument!r}; a state dict is plain tensors")
        if stream.tell() == len(data):
            return


def _is_known(name: str, known: Set[str]) -> bool:
    module, _, kind = name.partition(" ")
    return name in known or (
        module in ("torch", "torch.storage") and kind.endswith("Storage") and kind.isalnum()
    )


def _check_sizes(tensors: dict[str, Any], size: int) -> None:
    """Refuse tensors that would take more memory than the file has bytes."""
    storages = {}  # kept alive, so that each has an id of its own
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} is {tensor.layout}, expected a dense tensor")
        storage = tensor.untyped_storage()
        storages[id(storage)] = storage
        if tensor.nbytes > storage.nbytes():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, more than is stored of it")
        total += tensor.nbytes
    # Tied weights are stored once and named twice.
    stored = sum(storage.nbytes() for storage in storages.values())
    if stored > size or total > 2 * size:
        raise ValueError("its tensors are larger than the file")

"""Files of weights and settings: safetensors and json, written atomically, never a pickle."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from lgvit_fast.checkpoints.header import (
    CHECKSUMS,
    Header,
    checksums,
    damaged,
    open_file,
    read_header,
)
from lgvit_fast.parameter_names import BACKBONE, file_names

if TYPE_CHECKING:
    from lgvit_fast.model import LGViT

__all__ = [
    "load_json",
    "load_strictly",
    "load_weights",
    "read_weights",
    "remove_leftovers",
    "require_fit",
    "save_json",
    "save_text",
    "save_weights",
    "shortened",
    "write_atomic",
]

# Ours, of `tempfile.mkstemp`, and those of safetensors, which makes its own beside the file.
_LEFTOVER = re.compile(r"\.(?:tmp[A-Za-z0-9]{6}|(.+)\.[a-z0-9_]{8})")
_MOST_JSON = 32 << 20  # bytes


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Make a file appear whole or not at all.

    `write` gets a temporary path beside `path`; the result is synced to disk and renamed over
    `path`. When anything fails (disk full, a kill) what stood at `path` before is intact.

    Raises:
        OSError: naming `path`, whatever temporary file the system complained of.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, f"cannot write: {reason}", str(path)) from error


def remove_leftovers(folder: str | os.PathLike[str], names: Collection[str]) -> None:
    """Remove the temporary files that a killed process left when it was writing one of `names`.

    Only for a folder that no other process writes to.
    """
    for path in Path(folder).glob(".*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match and (match[1] is None or match[1] in names) and path.is_file():
            path.unlink(missing_ok=True)


def save_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, atomically, with checksums of them and of the metadata.

    Shared storage is written once per name.

    Raises:
        OSError: a full disk or the like, naming the file.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    given = dict(metadata or {})
    given[CHECKSUMS] = json.dumps(checksums(plain, given), separators=(",", ":"))
    write_atomic(path, lambda file: _save(plain, file, given))


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file; see `read_weights`."""
    return read_weights(path)[0]


def read_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, which must match its checksums if it has them.

    Raises:
        FileNotFoundError: nothing there.
        IsADirectoryError: a folder.
        ValueError: a pickle (which is never loaded), a truncated, damaged or another kind of file.
    """
    header = read_header(path)
    with open_file(path) as file:
        data = file.read()
    try:
        tensors = load_bytes(data)
        odd = damaged(tensors, header.metadata)
    except (
        SafetensorError,
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        raise ValueError(f"{path} is not a whole safetensors file: {e}") from e
    if odd:
        raise ValueError(f"{path} is damaged: {shortened(odd)} does not match its checksum")
    return tensors, header.metadata


def save_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a json file, atomically."""
    save_text(path, json.dumps(value, indent=2) + "\n")


def save_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    write_atomic(path, lambda file: _write_text(file, text))


def load_json(path: str | os.PathLike[str]) -> Any:
    """Read a json file.

    Raises:
        FileNotFoundError: nothing there.
        IsADirectoryError: a folder.
        ValueError: not json, or more than 32 MiB of it.
    """
    with open_file(path) as file:
        data = file.read(_MOST_JSON + 1)
    if len(data) > _MOST_JSON:
        raise ValueError(f"{path} has more than {_MOST_JSON} bytes, too many for json")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not json: {error}") from error


def load_strictly(model: LGViT, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict, under the names of either kind, that must fit a model with exits exactly.

    Nothing is loaded of one that does not.

    Raises:
        ValueError: naming the keys that are missing, unknown or of another shape, as files name them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    floats = frozenset(name for name, tensor in tensors.items() if tensor.is_floating_point())
    require_fit(model, Header(shapes, floats, {}), source)
    model.load_state_dict(dict(tensors))


def require_fit(model: LGViT, held: Header, source: str) -> None:
    """Check that tensors fit a model exactly; it may be one without storage.

    Args:
        model: that they are for.
        held: what there is.
        source: what to call it in an error.

    Raises:
        ValueError: naming the keys that are missing, unknown, of another shape or another type.
    """
    own, theirs = file_names(model.state_dict()), file_names(held.shapes)
    floats = {name.removeprefix(BACKBONE) for name in held.floats}
    both = [key for key in own if key in theirs]
    problems = {
        "missing": [key for key in own if key not in theirs],
        "unknown": [key for key in theirs if key not in own],
        "of another shape": [
            f"{key} {theirs[key]}, expected {tuple(own[key].shape)}"
            for key in both
            if theirs[key] != tuple(own[key].shape)
        ],
        "of another type": [
            f"{key}, expected {own[key].dtype}"
            for key in both
            if own[key].is_floating_point() != (key in floats)
        ],
    }
    found = [f"{title}: {shortened(keys)}" for title, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{source} does not fit the model; {'; '.join(found)}")


def shortened(keys: Sequence[str], limit: int = 6) -> str:
    """The first few of many names, and how many more there are."""
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + rest


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, file, metadata=metadata)
    except SafetensorError as error:  # which is no OSError, but quotes one
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error

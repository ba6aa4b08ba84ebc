"""Files of weights and settings: safetensors and json, written atomically, never a pickle."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "load_json",
    "load_strictly",
    "load_weights",
    "save_json",
    "save_text",
    "save_weights",
    "shortened",
    "write_atomic",
]


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Make a file appear whole or not at all.

    `write` gets a temporary path beside `path`; the result is synced to disk and renamed over
    `path`. When anything fails (disk full, a kill) what stood at `path` before is intact.
    """
    path = Path(path)
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


def save_weights(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, atomically. Shared storage is written once per name."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(path, lambda file: save_file(plain, file, metadata=dict(metadata or {})))


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a pickle (which is never loaded), a truncated or another kind of file.
    """
    data = Path(path).read_bytes()
    try:
        return load_bytes(data)
    except SafetensorError as error:
        # Only now: a safetensors file starts with its header's length, which can be any two bytes.
        if data[:2] == b"PK" or data[:1] == b"\x80":
            raise ValueError(
                f"{path} is a pickle, which can run code when loaded and is not read here;"
                " convert it to safetensors"
            ) from None
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


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
        ValueError: not json.
    """
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not json: {error}") from error


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        ValueError: naming the keys that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    problems = []
    for title, keys in (
        ("missing", [k for k in own if k not in tensors]),
        ("unknown", [k for k in tensors if k not in own]),
        (
            "of another shape",
            [
                f"{k} {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
                for k in own
                if k in tensors and tensors[k].shape != own[k].shape
            ],
        ),
    ):
        if keys:
            problems.append(f"{title}: {shortened(keys)}")
    if problems:
        raise ValueError(f"{source} does not fit the model; {'; '.join(problems)}")
    model.load_state_dict(dict(tensors))


def shortened(keys: Sequence[str], limit: int = 6) -> str:
    """The first few of many names, and how many more there are."""
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + rest


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""A training run's state in one safetensors file: tensors, and everything else as json metadata.

One file makes a save atomic: it is written beside the old one, synced and renamed over it. Nothing is
pickled, so a checkpoint from anywhere can be read without running its code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lgvit_fast.checkpoints.files import read_weights, save_weights
from lgvit_fast.checkpoints.fit import malformed

FORMAT = "lgvit-fast training checkpoint 1"
_TENSOR = "__tensor__"
_PAIRS = "__pairs__"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        state: nested dicts and lists of tensors and plain values, by part (`model`, `optimizer`, ...).
        facts: plain values that say what the state belongs to, read before any tensor is used.
    """

    state: dict[str, Any]
    facts: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write atomically; when that fails (disk full, a kill) the file that was there is intact."""
        tensors: dict[str, Tensor] = {}
        plain = _pack(self.state, "", tensors)
        header = {"format": FORMAT, "state": json.dumps(plain), "facts": json.dumps(self.facts)}
        save_weights(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Checkpoint:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is truncated, damaged, a pickle, or not a training checkpoint.
        """
        tensors, header = read_weights(path)
        if header.get("format") != FORMAT:
            found = header.get("format", "no format entry")
            raise ValueError(f"{path} is not a training checkpoint ({found}, expected {FORMAT!r})")
        with malformed(path):
            state = _unpack(json.loads(header["state"]), tensors)
            facts = json.loads(header["facts"])
        if not isinstance(state, dict) or not isinstance(facts, dict):
            raise ValueError(f"{path} is malformed: its state and facts are no tables")
        return cls(state, facts)


def differences(saved: Any, current: Any, name: str = "", limit: int = 8) -> list[str]:
    """Where two nested plain values differ, one `name: saved ..., now ...` per place."""
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        found = []
        for key in dict.fromkeys([*saved, *current]):
            inner = f"{name}.{key}" if name else str(key)
            if key not in saved:
                found.append(f"{inner}: absent from the checkpoint, now {current[key]!r}")
            elif key not in current:
                found.append(f"{inner}: {saved[key]!r} in the checkpoint, now absent")
            else:
                found += differences(saved[key], current[key], inner, limit)
        return found[:limit]
    return [] if saved == current else [f"{name}: {saved!r} in the checkpoint, now {current!r}"]


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors in a nested value by references, and collect them under their path."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        # json keys are strings, an optimizer's are integers
        return {
            _PAIRS: [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]
        }
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{name.lstrip('/')} is a {type(value).__name__}, which a checkpoint cannot hold"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _unpack(item, tensors) for key, item in value[_PAIRS]}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value

"""Which runtime is fastest here: measured once, remembered in a small file of the user's."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lgvit_fast.clock import take_turns
from lgvit_fast.inference.report import RuntimeTiming
from lgvit_fast.machine import machine
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Policy, Replay

__all__ = ["cache_file", "facts_of", "measure", "recall", "remember", "remembered"]

_SECONDS, _LEAST_ROUNDS, _MOST_ROUNDS = 2.0, 3, 15
_MOST_ENTRIES = 200  # in the file
# What decides the speed of a runtime, out of `machine()`.
_MACHINE = (
    *("processor", "instructions", "threads"),
    *("lgvit_fast", "torch", "timm", "onnxruntime", "openvino"),
)
_logger = logging.getLogger("lgvit_fast")


def measure(
    ways: Mapping[str, Callable[[Tensor, Policy], Any]], images: Tensor, exits: int
) -> RuntimeTiming:
    """Time the same work on several runtimes against each other, in turns.

    Args:
        ways: what answers images under a policy, by runtime.
        images: `[B, channels, height, width]`, B at least 1. Which exits they leave at is scripted: as
            many at each, the last image at the end, so that it does not depend on their content.
        exits: of the model.
    """
    batch = len(images)
    script = Replay(np.arange(1, batch + 1) * exits // batch)
    work = {name: partial(answer, images, script) for name, answer in ways.items()}
    trial = take_turns(work, images.device, 1, warmup=1)
    turn = sum(float(taken.sum()) for taken in trial.values())
    rounds = int(np.clip(_SECONDS / turn, _LEAST_ROUNDS, _MOST_ROUNDS))
    times = take_turns(work, images.device, rounds, warmup=0)
    return RuntimeTiming(
        batch,
        (images.shape[2], images.shape[3]),
        {name: round(1000 * float(np.median(taken)) / batch, 4) for name, taken in times.items()},
    )


def facts_of(
    model: LGViT, exits: Sequence[int], batch_size: int, image_size: tuple[int, int]
) -> dict[str, Any]:
    """What decides which runtime is fastest, as json types: the machine, versions, and the task.

    The weights' values are not among it. The model is known by a hash of its structure.
    """
    here = machine()
    config = {**model.get_config(), "policy": None, "certificate": None, "class_names": None}
    structure = json.dumps([config, repr(model)], default=str)
    return {
        **{name: here[name] for name in _MACHINE},
        "model": (model.backbone_config or {}).get("name") or type(model.backbone).__name__,
        "structure": hashlib.sha256(structure.encode()).hexdigest(),
        "exits": list(exits),
        "batch_size": batch_size,
        "image_size": list(image_size),
    }


def cache_file() -> Path | None:
    """Where choices are remembered: `lgvit_fast/runtimes.json` in the user's cache folder.

    That is `$XDG_CACHE_HOME` or `~/.cache`; None where there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "lgvit_fast" / "runtimes.json"


def remembered(here: Mapping[str, Any] | None = None) -> list[tuple[dict[str, Any], RuntimeTiming]]:
    """What is remembered, oldest first, as facts and timings; nothing where the file is no good.

    Args:
        here: from `machine`: only of this machine, at these versions and threads. None: all.
    """
    file = cache_file()
    try:
        entries = json.loads(file.read_text()) if file else []
        found = [_read(entry) for entry in entries]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        if not isinstance(error, FileNotFoundError):
            _logger.debug("%s is not read: %s", file, error)
        return []
    if here is None:
        return found
    return [
        (facts, timing)
        for facts, timing in found
        if all(facts.get(name) == here[name] for name in _MACHINE)
    ]


def recall(facts: Mapping[str, Any], runtimes: Sequence[str]) -> RuntimeTiming | None:
    """What was measured under the same facts for all of these runtimes, or None."""
    timing: RuntimeTiming
    for known, timing in reversed(remembered()):
        if dict(facts) == known and set(timing.milliseconds) == set(runtimes):
            return timing
    return None


def remember(facts: Mapping[str, Any], timing: RuntimeTiming) -> None:
    """Write a measurement into the file, which is replaced whole; no matter if it cannot be written."""
    file = cache_file()
    if file is None:
        return
    kept = [(known, old) for known, old in remembered() if known != facts]
    kept = [*kept, (dict(facts), timing)][-_MOST_ENTRIES:]
    text = json.dumps(
        [{"facts": known, "milliseconds": old.milliseconds} for known, old in kept], indent=1
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            fresh = Path(folder, file.name)
            fresh.write_text(text)
            os.replace(fresh, file)
    except OSError as error:
        _logger.debug("%s is not written: %s", file, error)


def _read(entry: Any) -> tuple[dict[str, Any], RuntimeTiming]:
    """An entry of the file; raises unless it is one."""
    facts = entry["facts"]
    height, width = map(int, facts["image_size"])
    times = {str(name): float(ms) for name, ms in entry["milliseconds"].items()}
    whole = {"model", "exits", "threads"} <= set(facts)
    if not whole or not times or not all(ms > 0 for ms in times.values()):
        raise ValueError(f"no measurement: {entry!r}")
    return facts, RuntimeTiming(int(facts["batch_size"]), (height, width), times)

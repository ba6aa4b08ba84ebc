"""A model's segments on ONNX Runtime and OpenVINO, exported in memory, and anew when weights change."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lgvit_fast.exit_rules import ExitRule, ExitStep
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Policy
from lgvit_fast.runtimes.loaders import RUNTIMES, load_runtime, why_missing
from lgvit_fast.runtimes.loop import GraphSegment
from lgvit_fast.runtimes.segment_graph import check_model, require_onnx, segment_graphs
from lgvit_fast.watch import Watch

__all__ = ["Exports", "check_runtime", "on_arrays", "usable_runtimes"]

_MOST = 4  # sets kept at once: runtimes and image sizes
_Size = tuple[int, int]  # (height, width) of the images, in pixels


class Exports:
    """Sets of segments by runtime and image size. Each set holds the model's weights once more.

    Args:
        model: one that `check_runtime` lets pass, in eval mode when segments are asked for.
        asked: numbers (from 0, increasing) of the exits to ask.
    """

    def __init__(self, model: LGViT, asked: Sequence[int]) -> None:
        self._model, self._asked = model, tuple(asked)
        self._sets: OrderedDict[tuple[str, _Size], tuple[GraphSegment, ...]] = OrderedDict()
        self._watch: Watch | None = None
        self._process = os.getpid()

    def segments(
        self, runtime: str, image_size: _Size, share: float = 1.0
    ) -> tuple[GraphSegment, ...]:
        """The segments for the weights as they are now, made if they are missing.

        Args:
            runtime: one of `RUNTIMES`.
            image_size: of the images.
            share: of the weights' bytes to look at for changes (see `Watch.changed`).

        Raises:
            RuntimeError: in a forked child of the process that loaded some.
        """
        if self._sets and self._process != os.getpid():
            raise RuntimeError(
                f"the threads of {runtime} did not survive the fork: make the engine in the child, or"
                " start processes with spawn"
            )
        if self._watch is not None and self._watch.changed(share):
            self.clear()
        key = (runtime, image_size)
        if key not in self._sets:
            self.load([runtime], image_size)
        self._sets.move_to_end(key)
        return self._sets[key]

    def load(
        self, runtimes: Iterable[str], image_size: _Size
    ) -> Mapping[str, tuple[GraphSegment, ...]]:
        """Make the segments on each of some runtimes from one export, in place of what was there.

        Each graph is made once, and dropped when every runtime has loaded it.
        """
        check_model(self._model)
        if self._watch is None:
            self._watch = Watch(self._model)
        self._process = os.getpid()
        threads = torch.get_num_threads()
        load = {runtime: load_runtime(runtime, threads)[1] for runtime in runtimes}
        made: dict[str, list[GraphSegment]] = {runtime: [] for runtime in load}
        for segment, proto in segment_graphs(self._model, image_size, self._asked):
            data = proto.SerializeToString()
            del proto
            for runtime, segments in made.items():
                (graph,) = load[runtime](data)
                segments.append(GraphSegment(graph, segment.index, segment.stop))
        sets = {runtime: tuple(segments) for runtime, segments in made.items()}
        for runtime, ready in sets.items():
            self._sets[runtime, image_size] = ready
            self._sets.move_to_end((runtime, image_size))
        while len(self._sets) > _MOST:
            self._sets.popitem(last=False)
        return sets

    def keep(self, runtimes: Collection[str]) -> None:
        """Drop the sets on any other runtime."""
        for runtime, size in list(self._sets):
            if runtime not in runtimes:
                del self._sets[runtime, size]

    def renew(self) -> None:
        """Make every set anew from the weights as they are now."""
        sizes: dict[_Size, list[str]] = {}
        for runtime, size in self._sets:
            sizes.setdefault(size, []).append(runtime)
        self.clear()
        for size, runtimes in sizes.items():
            self.load(runtimes, size)

    def clear(self) -> None:
        """Drop everything."""
        self._sets.clear()
        self._watch = None


def check_runtime(model: LGViT, runtime: str) -> None:
    """Raise unless a model can run on one of `RUNTIMES`, here and now.

    Raises:
        RuntimeError: the runtime or what exports to it is not installed; says what to install.
        ValueError: the model is not float32 on the CPU, is packed, or has a head of the user's own.
    """
    missing = why_missing(runtime)
    if missing is not None:
        raise RuntimeError(missing)
    require_onnx()
    try:
        check_model(model)
    except ValueError as error:
        raise ValueError(f"runtime={runtime!r}: {error}") from None


def usable_runtimes(model: LGViT) -> list[str]:
    """Those of `RUNTIMES` that a model can run on, here and now."""
    found = []
    for runtime in RUNTIMES:
        try:
            check_runtime(model, runtime)
        except (RuntimeError, ValueError):
            continue
        found.append(runtime)
    return found


def on_arrays(policy: Policy) -> Policy:
    """A policy whose `decide` the loop over graphs may call with NumPy arrays.

    Those of this package take arrays; any other gets tensors, as in torch, which share their memory.
    """
    own = type(policy).__module__ == Policy.__module__
    return policy if own else _OnTensors(policy)


class _OnTensors(Policy):
    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def start_array(self, batch: int) -> NDArray[np.int32]:
        state: NDArray[np.int32] = self._policy.start(batch, torch.device("cpu")).numpy()
        return state

    def rule(self, exit_index: int) -> ExitRule:
        return self._policy.rule(exit_index)

    def decide(self, step: Any, state: Any, exit_index: int) -> Any:
        given = ExitStep(*map(torch.from_numpy, (step.logits, step.leave, step.valid)))
        made: Any = self._policy.decide(given, torch.from_numpy(state), exit_index)
        logits: Any = step.logits if made.logits is given.logits else made.logits.numpy()
        return ExitStep(logits, made.leave.numpy(), made.valid.numpy())

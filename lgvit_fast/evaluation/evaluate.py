"""A whole evaluation: record, sweep, choose, time. What `lgvit-fast eval` and the demo report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.bench.machine import machine
from lgvit_fast.data.batches import Batch, Batches, Loader, Source
from lgvit_fast.evaluation.recording import Recording, record
from lgvit_fast.evaluation.timing import Timing, compare
from lgvit_fast.evaluation.tradeoff import Point, candidates, choose, sweep
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Policy

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """A model's early exits on a set of images.

    Attributes:
        recording: what every classifier said.
        points: the swept policies, ordered by layer ratio.
        chosen: the policy in use, given or chosen.
        within: whether `chosen` costs no more accuracy than was tolerated.
        tolerance: percentage points of accuracy.
        timings: one per batch size asked for.
        sample: some images at random with their classes, those that were timed.
    """

    recording: Recording
    points: list[Point]
    chosen: Point
    within: bool
    tolerance: float
    timings: list[Timing]
    sample: Batch

    def to_dict(self) -> dict[str, Any]:
        """As json types, with the machine that made the numbers."""
        return {
            "images": len(self.recording.targets),
            "layers": list(self.recording.layers),
            "classifier_accuracy": list(self.recording.accuracies),
            "final_accuracy": self.recording.final_accuracy,
            "tolerance": self.tolerance,
            "chosen": {**self.chosen.to_dict(), "within_tolerance": self.within},
            "timings": [dataclasses.asdict(timing) for timing in self.timings],
            "points": [point.to_dict() for point in self.points],
            "unreadable": [image._asdict() for image in self.recording.bad],
            "machine": machine(),
        }


def evaluate(
    model: LGViT,
    source: Source,
    *,
    kinds: Sequence[str] = ("confidence",),
    policy: Policy | None = None,
    tolerance: float = 1.0,
    batch_size: int = 64,
    workers: int = 0,
    timing_batches: Sequence[int] = (32,),
    timing_images: int = 256,
    timing_rounds: int = 9,
    autocast: AbstractContextManager[Any] | None = None,
    relabel: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, count: batches,
) -> Evaluation:
    """Everything there is to say about a model's exits on labelled images.

    Args:
        model: in eval mode.
        source: the images.
        kinds: which kinds of policy to sweep, see `tradeoff.KINDS`.
        policy: the one to report; None chooses the swept one with the largest layer ratio that
            loses at most `tolerance` percentage points on these images.
        tolerance: percentage points of accuracy.
        batch_size: of the pass that records.
        workers: loader processes.
        timing_batches: batch sizes to time at; empty: none.
        timing_images: how many images to time, drawn at random.
        timing_rounds: passes over them, per side.
        autocast: a re-enterable `torch.autocast`, or None.
        relabel: maps the images' class numbers to the model's.
        progress: wraps the batches (and their number), to show a bar.

    Raises:
        ValueError: none of the images can be read, or their classes are not the model's.
    """
    loader = Loader(source, Batches(len(source), batch_size, training=False), workers)
    batches: Iterable[Batch] = progress(loader.epoch(), len(loader))
    if relabel is not None:
        batches = (batch._replace(targets=relabel(batch.targets)) for batch in batches)
    recording = record(model, batches, autocast)
    tried = [c for kind in kinds for c in candidates(kind, len(model.exits), model.num_classes)]
    if policy is not None and policy not in tried:
        tried.append(policy)
    points = sweep(recording, tried)
    if policy is not None:
        chosen = next(point for point in points if point.policy == policy)
    else:
        most_accurate = max(points, key=lambda point: (point.accuracy, point.layer_ratio))
        chosen = choose(points, recording.final_accuracy, tolerance) or most_accurate
    within = choose([chosen], recording.final_accuracy, tolerance) is not None

    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    sample = source.__getitems__([(0, position) for position in order[:timing_images]])
    if relabel is not None:
        sample = sample._replace(targets=relabel(sample.targets))
    timings = [
        compare(
            model,
            sample.images,
            chosen.policy,
            batch_size=size,
            rounds=timing_rounds,
            autocast=autocast,
        )
        for size in timing_batches
        if len(sample.targets)
    ]
    return Evaluation(recording, points, chosen, within, tolerance, timings, sample)

"""A whole evaluation: record, choose on one half, report on the other, time. For `eval` and `demo`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.data.batches import Batch, Batches, Loader, Source
from lgvit_fast.evaluation.examples import Examples, pick_examples
from lgvit_fast.evaluation.recording import Recording, record
from lgvit_fast.evaluation.timing import Timing, compare
from lgvit_fast.evaluation.tradeoff import Point, candidates, choose, sweep
from lgvit_fast.inference.planner import plan_exits
from lgvit_fast.machine import machine
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Policy

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """A model's early exits on a set of images.

    Attributes:
        recording: what every classifier said of the images reported on.
        everything: likewise of all images, those to choose on, too.
        selection_images: other images, on which the policy was chosen; 0 if it was given.
        points: the swept policies, ordered by layer ratio.
        chosen: the policy in use, given or chosen.
        within: whether `chosen` costs no more accuracy than was tolerated, on the images reported on.
        tolerance: percentage points of accuracy.
        timings: one per batch size asked for.
        sample: some images at random with their classes, those that were timed.
        examples: some images of each exit at which `chosen` lets any leave.
    """

    recording: Recording
    everything: Recording
    selection_images: int
    points: list[Point]
    chosen: Point
    within: bool
    tolerance: float
    timings: list[Timing]
    sample: Batch
    examples: Examples

    def to_dict(self) -> dict[str, Any]:
        """As json types, with the machine that made the numbers."""
        return {
            "images": len(self.recording),
            "selection_images": self.selection_images,
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
    runtime: str = "torch",
    plan: bool = False,
    autocast: AbstractContextManager[Any] | None = None,
    relabel: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, count: batches,
) -> Evaluation:
    """Everything there is to say about a model's exits on labelled images.

    A policy that is to be chosen is chosen on one half of the images and everything is reported on the
    other; a given one is reported on all.

    Args:
        model: in eval mode.
        source: the images.
        kinds: which kinds of policy to sweep, see `tradeoff.KINDS`.
        policy: the one to report; None chooses the swept one with the largest layer ratio that
            loses at most `tolerance` percentage points on the half to choose on.
        tolerance: percentage points of accuracy.
        batch_size: of the pass that records.
        workers: loader processes.
        timing_batches: batch sizes to time at; empty: none.
        timing_images: how many images to time, drawn at random.
        timing_rounds: passes over them, per side.
        runtime: of the engines that are timed, see `Engine`; "auto" measures what is installed.
        plan: time the exits that `plan_exits` keeps at each batch size, by where images left.
        autocast: a re-enterable `torch.autocast`, or None.
        relabel: maps the images' class numbers to the model's.
        seed: of the halves.
        progress: wraps the batches (and their number), to show a bar.

    Raises:
        ValueError: none of the images can be read, their classes are not the model's, or there is only
            one and a policy is to be chosen.
    """
    loader = Loader(source, Batches(len(source), batch_size, training=False), workers)
    batches: Iterable[Batch] = progress(loader.epoch(), len(loader))
    if relabel is not None:
        batches = (batch._replace(targets=relabel(batch.targets)) for batch in batches)
    everything = recording = record(model, batches, autocast)
    selection, rows = recording, torch.arange(len(recording))
    selection_images = 0
    if policy is None:
        if len(recording) < 2:
            raise ValueError(
                "one image, expected at least 2: one to choose on and one to report on"
            )
        rows = recording.halves(seed)[1]
        selection, recording = recording.split(seed)
        selection_images = len(selection)
    tried = [
        candidate
        for kind in kinds
        for candidate in candidates(kind, len(model.exits), model.num_classes, selection)
    ]
    if policy is None:
        policy = _chosen(selection, tried, tolerance)
    elif policy not in tried:
        tried.append(policy)
    points = sweep(recording, tried)
    chosen = next(point for point in points if point.policy == policy)
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
            runtime=runtime,
            exits=plan_exits(model, chosen.shares, size).exits if plan else None,
        )
        for size in timing_batches
        if len(sample.targets)
    ]
    return Evaluation(
        recording,
        everything,
        selection_images,
        points,
        chosen,
        within,
        tolerance,
        timings,
        sample,
        pick_examples(recording, chosen.policy, source, rows),
    )


def _chosen(selection: Recording, tried: Sequence[Policy], tolerance: float) -> Policy:
    """The largest layer ratio within the tolerance, or the most accurate one."""
    points = sweep(selection, tried)
    most_accurate = max(points, key=lambda point: (point.accuracy or 0.0, point.layer_ratio))
    return (choose(points, selection.final_accuracy, tolerance) or most_accurate).policy

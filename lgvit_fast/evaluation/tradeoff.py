"""Accuracy against depth: policies replayed on recorded logits, and the best of them chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lgvit_fast.evaluation.bounds import drop_interval, rate_interval
from lgvit_fast.evaluation.recording import Recording
from lgvit_fast.ops.exit_step import ExitStep, apply_rule
from lgvit_fast.policies import KINDS, Confidence, Entropy, Patience, PatientConfident, Policy

__all__ = [
    "KINDS",
    "Point",
    "answers",
    "candidates",
    "choose",
    "curves",
    "describe",
    "measure",
    "replay",
    "summarise",
    "sweep",
]

_CONFIDENCES = (
    *(0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95),
    *(0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999),
)
_ENTROPIES = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8),
    *(1.0, 1.25, 1.5, 2.0, 3.0, 4.0),
)


@dataclass(frozen=True)
class Point:
    """What one policy does to one set of images.

    Attributes:
        policy: the policy.
        accuracy: top-1 in [0, 1] of the early-exit answers; None without labels.
        layer_ratio: L / mean exit layer, the published "speed-up". It leaves out what heads cost.
        shares: part of the images in [0, 1] that left at each exit, and that ran to the end.
        exit_accuracy: top-1 among the images that left at each exit, None where none did.
        images: n.
        agreed: images answered as the full model answers them.
        losses: images that only the full model answers rightly; None without labels.
        gains: images that only the early-exit answer has right; None without labels.
    """

    policy: Policy
    accuracy: float | None
    layer_ratio: float
    shares: tuple[float, ...]
    exit_accuracy: tuple[float | None, ...]
    images: int
    agreed: int
    losses: int | None
    gains: int | None

    @property
    def drop(self) -> float | None:
        """Accuracy lost to the full model on the same images, in [-1, 1]; None without labels."""
        if self.losses is None or self.gains is None:
            return None
        return (self.losses - self.gains) / self.images

    @property
    def agreement(self) -> float:
        """Share in [0, 1] of the answers that are the full model's."""
        return self.agreed / self.images

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """95 % interval of the accuracy (Clopper-Pearson), if the policy was chosen on other images."""
        if self.accuracy is None:
            return None
        return rate_interval(round(self.accuracy * self.images), self.images)

    @property
    def agreement_interval(self) -> tuple[float, float]:
        """95 % interval of the agreement, likewise."""
        return rate_interval(self.agreed, self.images)

    @property
    def drop_interval(self) -> tuple[float, float] | None:
        """95 % interval of the drop (`bounds.drop_interval`), likewise."""
        if self.losses is None or self.gains is None:
            return None
        return drop_interval(self.losses, self.gains, self.images)

    def to_dict(self) -> dict[str, Any]:
        """As json types."""
        return {
            **dataclasses.asdict(self),
            "policy": describe(self.policy),
            "accuracy_interval": self.accuracy_interval,
            "drop_interval": self.drop_interval,
        }


def replay(recording: Recording, policy: Policy) -> Tensor:
    """Where each image leaves under a policy: `[n]` int64, E for the final classifier.

    The same rules on the same state as in `LGViT.infer`, on logits recorded once.

    Raises:
        ValueError: the policy is for another number of exits.
    """
    return answers(recording, policy)[0]


def answers(recording: Recording, policy: Policy) -> tuple[Tensor, Tensor]:
    """Where each image leaves and what it is answered: `[n]` int64 exits and `[n]` int64 classes."""
    policy.check(recording.num_exits)
    exit_index = torch.full((len(recording),), recording.num_exits)
    predictions = recording.logits[-1].argmax(-1)
    rows, state = torch.arange(len(recording)), policy.start(len(recording), torch.device("cpu"))
    for index in range(recording.num_exits):
        logits = recording.logits[index, rows]
        step = ExitStep(logits, *apply_rule(policy.rule(index), logits, state[:, :2]))
        step = policy.decide(step, state, index)
        exit_index[rows[step.leave]] = index
        predictions[rows[step.leave]] = step.logits[step.leave].argmax(-1)
        rows, state = rows[~step.leave], state[~step.leave]
    return exit_index, predictions


def measure(recording: Recording, policy: Policy) -> Point:
    """Accuracy, agreement, layer ratio, and where the images left under a policy."""
    return summarise(recording, policy, *answers(recording, policy))


def summarise(
    recording: Recording, policy: Policy, exit_index: Tensor, predictions: Tensor
) -> Point:
    """`measure` from what `answers` gives."""
    count, final = len(recording), recording.logits[-1].argmax(-1)
    left = torch.bincount(exit_index, minlength=recording.num_exits + 1).tolist()
    mean_layer = torch.tensor(recording.layers)[exit_index].double().mean()
    accuracy = losses = gains = None
    exit_accuracy: tuple[float | None, ...] = (None,) * len(left)
    if recording.targets is not None:
        right, right_in_full = predictions == recording.targets, final == recording.targets
        hits = torch.bincount(exit_index[right], minlength=len(left)).tolist()
        exit_accuracy = tuple(h / n if n else None for h, n in zip(hits, left, strict=True))
        accuracy = float(right.double().mean())
        losses, gains = int((right_in_full & ~right).sum()), int((right & ~right_in_full).sum())
    return Point(
        policy=policy,
        accuracy=accuracy,
        layer_ratio=float(recording.layers[-1] / mean_layer),
        shares=tuple(n / count for n in left),
        exit_accuracy=exit_accuracy,
        images=count,
        agreed=int((predictions == final).sum()),
        losses=losses,
        gains=gains,
    )


def sweep(recording: Recording, policies: Iterable[Policy]) -> list[Point]:
    """`measure` of each policy, ordered by layer ratio."""
    points = [measure(recording, policy) for policy in policies]
    return sorted(points, key=lambda point: point.layer_ratio)


def candidates(
    kind: str, num_exits: int, num_classes: int, recording: Recording | None = None
) -> list[Policy]:
    """The policies of one kind that are worth a try, from cautious to bold.

    Args:
        kind: a key of `KINDS`.
        num_exits: E; no policy can wait for more exits.
        num_classes: K; an entropy cannot exceed log K nats.
        recording: thresholds between what its exits say are tried, too: a model's confidences may all
            lie between two of the fixed ones.
    """
    seen = [] if recording is None else _quantiles(kind, recording.logits[:-1])
    entropies = sorted({*(t for t in _ENTROPIES if t < math.log(num_classes)), *seen})
    entropies = entropies or [_ENTROPIES[0]]
    if kind == "confidence":
        confidences = {*(t for t in _CONFIDENCES if t * num_classes > 1), *seen}
        return [Confidence(t) for t in sorted(confidences, reverse=True)]
    if kind == "entropy":
        return [Entropy(t) for t in entropies]
    if kind == "patience":
        return [Patience(c) for c in range(num_exits, 0, -1)]
    if kind == "patient_confident":
        counts = [c for c in (3, 2) if c <= num_exits] or [1]
        return [PatientConfident(t, c) for c in counts for t in entropies]
    raise ValueError(f"kind={kind!r}, expected one of {', '.join(KINDS)}")


def _quantiles(kind: str, logits: Tensor, count: int = 19) -> list[float]:
    """Thresholds that a twentieth, two twentieths, ... of the exits' answers `[E, n, K]` pass."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    scores = logs.amax(-1).exp() if kind == "confidence" else -(logs.exp() * logs).nansum(-1)
    scores = scores[scores.isfinite()].sort().values
    if not len(scores):
        return []
    places = torch.linspace(0, len(scores) - 1, count + 2)[1:-1].long()
    found = scores[places].double().clamp(min=0).tolist()
    if kind == "confidence":  # four digits of how far from certain
        return [1 - float(f"{1 - min(score, 1.0):.4g}") for score in found]
    return [float(f"{score:.4g}") for score in found]


def curves(points: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each kind of policy (and patience), one number varying along each, by name."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        name = _words(point.policy)
        groups.setdefault(name, []).append(point)
    return groups


def choose(points: Sequence[Point], final_accuracy: float, tolerance: float) -> Point | None:
    """The largest layer ratio that costs at most `tolerance` percentage points of accuracy.

    Args:
        points: what to choose from; of equal ratios the more accurate one is taken.
        final_accuracy: in [0, 1], of the final classifier.
        tolerance: percentage points.

    Returns:
        None if every point costs more.
    """
    floor = final_accuracy - tolerance / 100 - 1e-9
    good = [point for point in points if (point.accuracy or 0.0) >= floor]
    return max(good, key=lambda point: (point.layer_ratio, point.accuracy or 0.0), default=None)


def describe(policy: Policy) -> dict[str, Any]:
    """A policy as json types: its name and its numbers."""
    numbers: dict[str, Any] = {}
    if dataclasses.is_dataclass(policy):
        numbers = dataclasses.asdict(policy)
    return {"name": type(policy).__name__, **numbers}


def _words(policy: Policy) -> str:
    if isinstance(policy, PatientConfident):
        return f"patient and confident, {policy.patience} exits"
    return type(policy).__name__.lower()

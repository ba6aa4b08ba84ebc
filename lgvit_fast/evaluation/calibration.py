"""Thresholds with a guarantee: candidates from one half of the images, a test on the other.

Learn then test (Angelopoulos, Bates, Candes, Jordan & Lei 2021, arXiv 2110.01052) with fixed-sequence
testing: candidates are ordered from cautious to bold, each is tested at the full level, and the walk
ends at the first that is not shown to keep the goal. The last one that passed breaks the goal with
probability at most 1 - confidence over draws of the images, whatever their distribution and number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lgvit_fast import policies
from lgvit_fast.certificate import Certificate
from lgvit_fast.checkpoints.fingerprint import fingerprint
from lgvit_fast.data.batches import Batches, Loader
from lgvit_fast.evaluation.bounds import drop_p_value, rate_p_value
from lgvit_fast.evaluation.families import Family, Scores, family
from lgvit_fast.evaluation.recording import Recording, record
from lgvit_fast.evaluation.tradeoff import Point, measure, summarise
from lgvit_fast.inference.planner import Costs, measure_costs
from lgvit_fast.model import LGViT
from lgvit_fast.policies import Confidence, Patience, Policy

__all__ = ["Calibration", "Estimate", "Expected", "Outcomes", "calibrate", "require_enough", "walk"]

FEWEST_IMAGES = 20
_METHODS = {
    "max_drop": "fixed-sequence tests of the paired drop in accuracy, exact with the rate of gains"
    " bounded first (Berger & Boos 1994)",
    "min_agreement": "fixed-sequence exact binomial tests of the disagreement",
    "budget_layers": "chosen on other images",
    "budget_ms": "chosen on other images, with times measured on one machine",
}
_BATCH = 32  # images that enter together when times are measured


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Expected:
    """What a policy does to the held-out images, with 95 % intervals.

    Where the same images took part in choosing the policy (max_drop, min_agreement) the intervals
    describe these images; the guarantee is the certificate's.

    Attributes:
        accuracy: top-1, percent; None without labels. Clopper-Pearson.
        drop: points of accuracy lost to the full model; None without labels. `bounds.drop_interval`.
        agreement: percent of answers that are the full model's. Clopper-Pearson.
        layers: mean exit layer. Bootstrap.
        ms: milliseconds an image; None without `costs`. Bootstrap of the images, not of the clock.
    """

    accuracy: Estimate | None
    drop: Estimate | None
    agreement: Estimate
    layers: Estimate
    ms: Estimate | None

    def __str__(self) -> str:
        rows = [
            ("accuracy", self.accuracy, " %"),
            ("drop", self.drop, " points"),
            ("agreement", self.agreement, " %"),
            ("layers", self.layers, ""),
            ("time", self.ms, " ms an image"),
        ]
        return "\n".join(
            f"{name:10} {found.value:6.2f} [{found.low:.2f}, {found.high:.2f}]{unit}"
            for name, found, unit in rows
            if found is not None
        )


@dataclass(frozen=True)
class Calibration:
    """A policy, what is certified of it, and what else was tried.

    Attributes:
        policy: the boldest policy shown to keep the goal, or the best within the budget.
        certificate: what was shown.
        expected: what the policy does to the held-out images.
        curve: the candidates on the held-out images, from cautious to bold; the first lets no image
            leave early.
    """

    policy: Policy
    certificate: Certificate
    expected: Expected
    curve: tuple[Point, ...]

    def __str__(self) -> str:
        return f"{self.policy}\n{self.certificate}\n{self.expected}"


def calibrate(
    recording: Recording | LGViT,
    data: Any = None,
    *,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    budget_layers: float | None = None,
    budget_ms: float | None = None,
    costs: Costs | None = None,
    confidence: float = 0.95,
    kind: str = "confidence",
    seed: int = 0,
    weights: str | None = None,
) -> Calibration:
    """The boldest policy of a kind that keeps a goal with a given confidence.

    Exactly one goal. The guarantee holds over draws of the images: if they are independent draws from
    what the model will meet, the true drop (or disagreement) of the policy exceeds the goal with
    probability at most 1 - `confidence`. It says nothing of other images (docs/calibration.md).

    Args:
        recording: of images that took no part in training, or the model in eval mode.
        data: with a model: its images; a loader of `[B, channels, height, width]` or of pairs with
            their targets `[B]`, or a `data.Source`.
        max_drop: points of accuracy, in (0, 100), that may be lost to the full model; needs targets.
        min_agreement: percent of answers, in (0, 100), that must be the full model's; needs none.
        budget_layers: the mean exit layer may be this. Certifies nothing of the accuracy.
        budget_ms: an image may take this many milliseconds, by `costs`. Likewise.
        costs: `measure_costs` of the model; measured now if a model is given.
        confidence: in (0, 1).
        kind: "confidence", "entropy", "patience", "patient_confident" or "learned".
        seed: of the split into halves.
        weights: `fingerprint` of the model that made the recording, for the certificate; taken from
            the model if one is given.

    Raises:
        ValueError: no goal or several, one out of range, a kind that cannot be certified, no targets
            where they are needed or all of one class, fewer than 20 images, NaN or +inf logits, a
            budget that no policy keeps, or a goal that so few images could not show of any policy.
    """
    goals = {
        "max_drop": max_drop,
        "min_agreement": min_agreement,
        "budget_layers": budget_layers,
        "budget_ms": budget_ms,
    }
    goal, limit = _one_goal(goals)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r}, expected a number between 0 and 1")
    model = recording if isinstance(recording, LGViT) else None
    if isinstance(recording, LGViT):
        if data is None:
            raise ValueError("data is None, expected images to calibrate the model on")
        recording = record(recording, _batches(data))
    elif not isinstance(recording, Recording):
        raise ValueError(
            f"recording is a {type(recording).__name__}, expected a Recording or LGViT"
        )
    _require_sound(recording, goal)
    if goal == "budget_ms" and costs is None:
        if model is None:
            raise ValueError(
                "budget_ms needs costs, as measure_costs(model, batch_size) gives them"
            )
        costs = measure_costs(model, _BATCH)
    if costs is not None and len(costs.blocks) != len(recording.layers):
        raise ValueError(
            f"costs are of {len(costs.blocks)} segments, the recording has {len(recording.layers)}"
        )

    selection, held_out = recording.split(seed)
    level, note = 1 - confidence, ""
    # A learned rule is fitted to what the goal asks: with targets, to losing no accuracy.
    fitting = replace(selection, targets=None) if goal == "min_agreement" else selection
    candidates = family(kind, fitting)
    scores = candidates.scores(selection)
    path = scores.path(recording.layers)
    tested = candidates.scores(held_out)
    if goal in ("max_drop", "min_agreement"):
        require_enough(goal, limit, level, len(held_out))
        chosen = walk(Outcomes.of(held_out, tested), path, goal, limit, level)
        if not chosen:
            note = _what_it_would_take(Outcomes.of(selection, scores), path, goal, limit, level)
    else:
        chosen = _within(selection, candidates, scores, path, goal, limit, costs)

    never = measure(held_out, Confidence(1.0))
    curve = [never] + [
        _point(held_out, candidates.make(threshold), tested, threshold) for threshold in path
    ]
    point = curve[chosen]
    certified = {"max_drop": limit if chosen else 0.0, "min_agreement": limit if chosen else 100.0}
    saved = policies.to_dict(point.policy)
    assert saved is not None
    certificate = Certificate(
        goal=goal,
        limit=limit,
        bound=certified.get(goal),
        confidence=confidence,
        policy=saved,
        layers=recording.layers,
        num_classes=recording.num_classes,
        images=len(held_out),
        selection_images=len(selection),
        method=_METHODS[goal],
        seed=seed,
        exit_counts=tuple(round(share * point.images) for share in point.shares),
        data=recording.digest,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=weights if model is None else fingerprint(model.state_dict()),
        note=note,
        path=_certified(curve[1 : chosen + 1]) if goal in certified else (),
    )
    return Calibration(
        point.policy, certificate, _expected(point, recording.layers, costs, seed), tuple(curve)
    )


def _certified(points: Sequence[Point]) -> tuple[float, ...]:
    """What tells the policies of a path apart."""
    return tuple(
        policy.patience if isinstance(policy, Patience) else policy.threshold  # type: ignore[attr-defined]
        for policy in (point.policy for point in points)
    )


@dataclass(frozen=True)
class Outcomes:
    """What leaving at each exit does to each image, beside the scores that decide it.

    Attributes:
        scores: the scores.
        losses: `[E + 1, n]` bool, only the full model is right; all False without labels.
        gains: `[E + 1, n]` bool, only the answer there is right; likewise.
        others: `[E + 1, n]` bool, the answer there is not the full model's.
    """

    scores: Scores
    losses: Tensor
    gains: Tensor
    others: Tensor

    @classmethod
    def of(cls, recording: Recording, scores: Scores) -> Outcomes:
        """The outcomes of a recording."""
        others = scores.predictions != scores.predictions[-1]
        if recording.targets is None:
            return cls(scores, torch.zeros_like(others), torch.zeros_like(others), others)
        right = scores.predictions == recording.targets
        return cls(scores, right[-1] & ~right, right & ~right[-1], others)

    def counts(self, path: Sequence[float]) -> list[tuple[int, int, int]]:
        """Losses, gains and answers that are not the full model's, under each threshold."""
        if not path:
            return []
        exits = torch.stack([self.scores.exits(threshold) for threshold in path])
        parts = (self.losses, self.gains, self.others)
        losses, gains, others = (part.gather(0, exits).sum(1).tolist() for part in parts)
        return list(zip(losses, gains, others, strict=True))


def walk(outcomes: Outcomes, path: Sequence[float], goal: str, limit: float, level: float) -> int:
    """How many candidates of a path, from the first on, are shown to keep the goal.

    Args:
        outcomes: of images that had no part in making the path.
        path: thresholds from cautious to bold.
        goal: "max_drop" or "min_agreement".
        limit: points or percent.
        level: of each test, and so of the whole walk.
    """
    images = outcomes.losses.shape[1]
    for place, (losses, gains, others) in enumerate(outcomes.counts(path)):
        if goal == "max_drop":
            p_value = drop_p_value(losses, gains, images, limit / 100, level)
        else:
            p_value = rate_p_value(others, images, 1 - limit / 100)
        if p_value > level:
            return place
    return len(path)


def _one_goal(goals: dict[str, float | None]) -> tuple[str, float]:
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        named = ", ".join(f"{name}={value!r}" for name, value in given.items()) or "none"
        raise ValueError(f"goals given: {named}; expected exactly one of {', '.join(goals)}")
    ((goal, limit),) = given.items()
    top = math.inf if goal.startswith("budget") else 100
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < top:
        expected = "above 0" if top == math.inf else "between 0 and 100"
        raise ValueError(f"{goal}={limit!r}, expected a number {expected}")
    return goal, float(limit)


def _batches(data: Any) -> Iterable[Any]:
    """What a model's images come in."""
    if hasattr(data, "__getitems__") and hasattr(data, "__len__"):
        return Loader(data, Batches(len(data), 64, training=False)).epoch()
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise ValueError(
            f"data is a {type(data).__name__}, expected a loader or a source of images"
        )
    return data


def _require_sound(recording: Recording, goal: str) -> None:
    if len(recording) < FEWEST_IMAGES:
        raise ValueError(f"{len(recording)} images, expected at least {FEWEST_IMAGES}")
    broken = recording.logits.logsumexp(-1).isnan() | recording.logits.isnan().any(-1)
    broken |= (recording.logits == torch.inf).any(-1)
    if broken.any():
        count = int(broken.any(0).sum())
        raise ValueError(f"logits of {count} of {len(recording)} images hold NaN or +inf")
    if recording.targets is None:
        if goal == "max_drop":
            raise ValueError("max_drop needs targets; min_agreement needs none")
    elif len(recording.targets.unique()) == 1 and recording.num_classes > 1:
        raise ValueError(
            f"all targets are class {int(recording.targets[0])}, expected images of several classes"
        )


def _p_value_without_faults(goal: str, limit: float, level: float, images: int) -> float:
    if goal == "max_drop":
        return drop_p_value(0, 0, images, limit / 100, level)
    return rate_p_value(0, images, 1 - limit / 100)


def _fewest_images(goal: str, limit: float, level: float) -> int:
    """Held-out images that could show the goal of a policy without a fault among them."""
    images = 1
    while _p_value_without_faults(goal, limit, level, images) > level:
        images = math.ceil(1.02 * images + 1)
    return images


def require_enough(goal: str, limit: float, level: float, images: int) -> None:
    """Raise ValueError if so many held-out images could not show the goal of any policy."""
    if _p_value_without_faults(goal, limit, level, images) > level:
        needed = 2 * _fewest_images(goal, limit, level)
        raise ValueError(
            f"{goal}={limit:g} cannot be shown of any policy with {images} held-out images at"
            f" {100 * (1 - level):g} % confidence; it takes about {needed} images in all, of which half"
            " are held out, even for one without a fault among them"
        )


def _what_it_would_take(
    selection: Outcomes, path: Sequence[float], goal: str, limit: float, level: float
) -> str:
    """A note for when no candidate passed, with the images that one would need, by the selection."""
    rates = np.array(selection.counts(path), dtype=float)
    images = selection.losses.shape[1]
    losses, gains, others = ((rates + 0.5) / (images + 1)).T if len(path) else np.empty((3, 0))
    if goal == "max_drop":
        room, spread = limit / 100 - (losses - gains), np.sqrt(losses + gains)
    else:
        room, spread = 1 - limit / 100 - others, np.sqrt(others)
    quantile = -_normal_quantile(level)
    takes = (quantile * spread[room > 0] / room[room > 0]) ** 2
    note = "No policy that lets images leave early could be shown to keep the goal"
    if not len(takes):
        return f"{note}, and none kept it on the images the candidates were made from."
    needed = 2 * max(float(takes.min()), _fewest_images(goal, limit, level))
    return f"{note}; about {math.ceil(needed / 100) * 100} images in all might show one."


def _normal_quantile(probability: float) -> float:
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))


def _within(
    selection: Recording,
    candidates: Family,
    scores: Scores,
    path: Sequence[float],
    goal: str,
    limit: float,
    costs: Costs | None,
) -> int:
    """The most accurate candidate within a budget on the selection half, by its place on the curve."""
    points = [measure(selection, Confidence(1.0))] + [
        _point(selection, candidates.make(threshold), scores, threshold) for threshold in path
    ]
    spent = [
        selection.layers[-1] / point.layer_ratio
        if goal == "budget_layers" or costs is None
        else 1000 * costs.per_image(point.shares)
        for point in points
    ]
    affordable = [place for place, price in enumerate(spent) if price <= limit]
    if not affordable:
        raise ValueError(f"{goal}={limit:g}, but the boldest policy takes {min(spent):.3g}")

    def worth(place: int) -> tuple[float, float]:
        point = points[place]
        value = point.agreement if point.accuracy is None else point.accuracy
        return value, -spent[place]

    return max(affordable, key=worth)


def _point(recording: Recording, policy: Policy, scores: Scores, threshold: float) -> Point:
    exits = scores.exits(threshold)
    predictions = scores.predictions.gather(0, exits[None])[0]
    return summarise(recording, policy, exits, predictions)


def _expected(
    point: Point, layers: tuple[int, ...], costs: Costs | None, seed: int, draws: int = 400
) -> Expected:
    """The figures of a policy on the held-out images."""
    shares = np.array(point.shares)
    resampled = np.random.default_rng(seed).multinomial(point.images, shares / shares.sum(), draws)

    def spread(value: float, resamples: Iterable[float]) -> Estimate:
        low, high = np.quantile(np.fromiter(resamples, float), (0.025, 0.975))
        return Estimate(value, float(low), float(high))

    def percent(value: float | None, interval: tuple[float, float] | None) -> Estimate | None:
        if value is None or interval is None:
            return None
        return Estimate(100 * value, 100 * interval[0], 100 * interval[1])

    agreement = percent(point.agreement, point.agreement_interval)
    assert agreement is not None
    ms = None
    if costs is not None:
        times = (1000 * costs.per_image(counts.tolist()) for counts in resampled)
        ms = spread(1000 * costs.per_image(point.shares), times)
    return Expected(
        accuracy=percent(point.accuracy, point.accuracy_interval),
        drop=percent(point.drop, point.drop_interval),
        agreement=agreement,
        layers=spread(layers[-1] / point.layer_ratio, resampled @ np.array(layers) / point.images),
        ms=ms,
    )

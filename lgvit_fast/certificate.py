"""What a calibration vouches for, and whether images in use still look like those it saw.

Plain data and arithmetic: imports neither torch nor timm, so a deployed model can carry it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lgvit_fast.policies import Patience, Policy, from_dict

__all__ = ["Certificate", "Check"]

GOALS = ("max_drop", "min_agreement", "budget_layers", "budget_ms")
_SPREADS = (1.0, 10.0, 100.0, 1000.0, 10000.0)  # of the alternatives in `check`, in images


@dataclass(frozen=True)
class Check:
    """Whether images leave where the calibration images left.

    Attributes:
        alike: False once the evidence against it has reached `needed`.
        evidence: e-value: at most 1 on average while the images are alike.
        needed: evidence at which an alarm is raised.
        expected: share in [0, 1] of the calibration images that left at each exit, E + 1 numbers.
        found: the same of the images that were counted.
        images: how many were counted.
    """

    alike: bool
    evidence: float
    needed: float
    expected: tuple[float, ...]
    found: tuple[float, ...]
    images: int

    def __str__(self) -> str:
        if self.alike:
            return (
                f"{self.images} images leave where the calibration images left (no evidence else)"
            )
        gaps = [found - share for found, share in zip(self.found, self.expected, strict=True)]
        exit = max(range(len(gaps)), key=lambda place: abs(gaps[place]))
        where = "at the final classifier" if exit == len(gaps) - 1 else f"at exit {exit}"
        return (
            f"{self.images} images leave elsewhere than the calibration images: {where}"
            f" {100 * self.found[exit]:.1f} %, in calibration {100 * self.expected[exit]:.1f} %;"
            " the certificate no longer speaks of them"
        )


@dataclass(frozen=True)
class Certificate:
    """What was shown of a policy, on which images, and how.

    Attributes:
        goal: one of "max_drop", "min_agreement", "budget_layers", "budget_ms".
        limit: what was asked for: points of accuracy, percent of answers, mean layers, or ms an image.
        bound: what holds of the policy with the confidence given: at most so many points lost, or at
            least so many percent of answers the full model's. None for a budget, which bounds nothing.
        confidence: in (0, 1): over draws of the calibration images.
        policy: the policy, as `policies.to_dict` gives it.
        layers: blocks after which the model's classifiers sit, from 1; E + 1 numbers.
        num_classes: K.
        images: held-out images that the bound rests on.
        selection_images: images that the candidates were made from; no test saw them.
        method: the test, with its source.
        seed: of the split into the two.
        exit_counts: held-out images that left at each exit, E + 1 numbers.
        data: SHA-256 of the recorded logits and targets.
        date: when, ISO 8601 in UTC.
        model: SHA-256 of the weights, or None if only a recording was at hand.
        note: what else must be said, such as that the goal could not be reached; may be empty.
        path: thresholds (of a patience policy: exits in a row) from cautious to bold, the last one the
            policy's own, that all passed the test: with the confidence given, the bound holds of every
            one of them. Empty where nothing is certified.
    """

    goal: str
    limit: float
    bound: float | None
    confidence: float
    policy: Mapping[str, Any]
    layers: tuple[int, ...]
    num_classes: int
    images: int
    selection_images: int
    method: str
    seed: int
    exit_counts: tuple[int, ...]
    data: str
    date: str
    model: str | None = None
    note: str = ""
    path: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"goal={self.goal!r}, expected one of {', '.join(GOALS)}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence!r}, expected a number between 0 and 1")
        if len(self.exit_counts) != len(self.layers) or not sum(self.exit_counts):
            raise ValueError(
                f"exit_counts={self.exit_counts}, expected {len(self.layers)} counts of images,"
                f" for the classifiers after blocks {self.layers}"
            )
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in self.path):
            raise ValueError(f"path={self.path}, expected finite numbers")

    def __str__(self) -> str:
        sure = f"With {100 * self.confidence:g} % confidence"
        if self.bound is None:
            unit = "layers" if self.goal == "budget_layers" else "ms an image"
            claim = (
                f"Chosen for at most {self.limit:g} {unit} on {self.selection_images} images; nothing"
                " is certified of its accuracy"
            )
        else:
            claim = (
                f"{sure} it loses at most {self.bound:g} points of accuracy to the full model"
                if self.goal == "max_drop"
                else f"{sure} at least {self.bound:g} % of its answers are the full model's"
            )
            claim += (
                f", on images like the {self.images} it was tested on ({self.method}; candidates from"
                f" {self.selection_images} other images)"
            )
        return f"{claim}. {self.date[:10]}. {self.note}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        """As json types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Certificate:
        """The certificate that `to_dict` described.

        Raises:
            ValueError: a field is missing, unknown or out of range.
        """
        try:
            values = dict(saved)
            for name in ("layers", "exit_counts"):
                values[name] = tuple(values[name])
            values["path"] = tuple(values.get("path", ()))
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a certificate: {type(error).__name__}: {error}") from None

    def policies(self) -> list[Policy]:
        """The policies that the bound holds of, from cautious to bold: one a place of `path`.

        Raises:
            ValueError: the path is not one of the policy's.
        """
        policy = from_dict(self.policy)
        field = "patience" if isinstance(policy, Patience) else "threshold"
        found = [dataclasses.replace(policy, **{field: value}) for value in self.path]  # type: ignore[type-var]
        if found and found[-1] != policy:
            raise ValueError(f"the certificate's path ends at {found[-1]}, its policy is {policy}")
        return found

    def require(self, policy: Any, layers: Sequence[int], num_classes: int) -> None:
        """Raise ValueError unless it speaks of this policy (as a dict), layers and classes."""
        if tuple(layers) != self.layers or num_classes != self.num_classes:
            raise ValueError(
                f"certificate is of a model with classifiers after blocks {list(self.layers)} and"
                f" {self.num_classes} classes, this one has {list(layers)} and {num_classes}"
            )
        if policy != self.policy:
            raise ValueError(f"certificate is of policy {self.policy}, the model's is {policy}")

    def check(self, counts: Sequence[int], confidence: float = 0.99) -> Check:
        """Whether images in use still leave where the calibration images left.

        Counts grow from one call to the next, and may be looked at as often as one likes: over the
        calibration images and everything that is ever counted, images that are alike raise an alarm
        with probability at most 1 - `confidence`. Half of that is spent on not knowing the true shares,
        which lie in a ball around the calibration images' shares, in relative entropy (Agrawal, IEEE
        Trans. Inf. Theory 2020, theorem 1.2). The evidence is the likelihood of the counts under a
        mixture of Dirichlet alternatives, over their largest likelihood in the ball: for each point
        of it a test martingale (Lindon & Malek, NeurIPS 2022; Ville's inequality). That the policy
        was chosen with the same images is not accounted for.

        Args:
            counts: images that left at each exit and at the final classifier under this policy, since
                counting began: E + 1 integers, such as `engine.report().left`.
            confidence: in (0, 1).

        Raises:
            ValueError: another number of counts, a negative one, or no whole number.
        """
        found = np.asarray(counts, dtype=float)
        if found.shape != (len(self.layers),) or (found < 0).any() or (found % 1).any():
            raise ValueError(
                f"counts={list(counts)}, expected {len(self.layers)} whole numbers: images that left"
                f" after blocks {list(self.layers)}"
            )
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence!r}, expected a number between 0 and 1")
        seen = np.asarray(self.exit_counts, dtype=float)
        needed = 2 / (1 - confidence)
        evidence = _evidence(found, seen, math.log(needed))
        images = int(found.sum())
        return Check(
            alike=evidence < math.log(needed),
            evidence=math.exp(min(evidence, 700.0)),
            needed=needed,
            expected=tuple((seen / seen.sum()).tolist()),
            found=tuple((found / max(images, 1)).tolist()),
            images=images,
        )


def _evidence(found: np.ndarray, seen: np.ndarray, log_needed: float) -> float:
    """Log of the mixture's likelihood over the largest one in the ball around `seen`."""
    if not found.sum():
        return 0.0
    center = (seen + 0.5) / (seen + 0.5).sum()
    alternatives = [_dirichlet_multinomial(found, spread * center) for spread in _SPREADS]
    best = max(alternatives)
    mixture = best + math.log(sum(math.exp(a - best) for a in alternatives) / len(alternatives))
    null = _most_likely(found, seen, _radius(len(seen) - 1, log_needed))
    here = found > 0
    return mixture - float(found[here] @ np.log(null[here]))


def _dirichlet_multinomial(counts: np.ndarray, prior: np.ndarray) -> float:
    """Log probability of a sequence with these counts under a Dirichlet prior."""
    total = math.lgamma(prior.sum()) - math.lgamma(prior.sum() + counts.sum())
    return total + sum(
        math.lgamma(a + c) - math.lgamma(a) for a, c in zip(prior, counts, strict=True)
    )


def _radius(freedom: int, log_needed: float) -> float:
    """N times the relative entropy that n images exceed with probability exp(-log_needed)."""
    if not freedom:
        return 0.0
    low, high = float(freedom), freedom + 10.0 * (freedom + log_needed)
    for _ in range(60):
        middle = (low + high) / 2
        if middle - freedom * (1 + math.log(middle / freedom)) < log_needed:
            low = middle
        else:
            high = middle
    return high


def _most_likely(found: np.ndarray, seen: np.ndarray, radius: float) -> np.ndarray:
    """Shares that make `found` most likely, among those within `radius` of `seen`.

    By Lagrange they are in proportion to found + weight * seen; the least weight that is close enough.
    """
    n, here = seen.sum(), seen > 0

    def shares(log_weight: float) -> np.ndarray:
        weight = math.exp(log_weight)
        shares: np.ndarray = (found + weight * seen) / (found.sum() + weight * n)
        return shares

    def distance(log_weight: float) -> float:
        return float(seen[here] @ np.log(seen[here] / n / shares(log_weight)[here]))

    low, high = -40.0, 40.0
    if distance(low) <= radius:
        return shares(low)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(middle) > radius else (low, middle)
    return shares(high)

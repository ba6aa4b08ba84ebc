"""Families of policies: one threshold, one score an exit, from cautious to bold.

An image leaves at the first exit whose score exceeds the threshold, so one pass over a recording says
where it leaves under every threshold at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lgvit_fast.evaluation.learning import fit_learned
from lgvit_fast.evaluation.recording import Recording
from lgvit_fast.ops.exit_step import ExitStep, apply_rule
from lgvit_fast.policies import (
    Confidence,
    Entropy,
    Learned,
    Patience,
    PatientConfident,
    Policy,
)

__all__ = ["CERTIFIED_KINDS", "Family", "Scores", "family"]

_STEP = 0.005  # mean layers between neighbours on a path, as part of all layers
_GRID = 4000  # thresholds that are looked at


@dataclass(frozen=True)
class Scores:
    """What decides at each exit of a recording, and what would be answered there.

    Attributes:
        values: `[E, n]` float32; an image leaves where its score first exceeds the threshold.
        predictions: `[E + 1, n]` int64 classes.
    """

    values: Tensor
    predictions: Tensor

    def exits(self, threshold: float) -> Tensor:
        """Where each image leaves: `[n]` int64, E for the final classifier."""
        return (self.values.cummax(0).values <= threshold).sum(0)

    def path(self, layers: tuple[int, ...]) -> list[float]:
        """Thresholds from cautious to bold, each some 0.5 % of the layers after the one before."""
        highest = self.values.cummax(0).values.double().numpy()
        finite = highest[np.isfinite(highest)]
        levels = np.unique(np.quantile(finite, np.linspace(0, 1, _GRID), method="lower"))[::-1]
        below_all = np.nextafter(np.float32(levels[-1]), np.float32(-np.inf))
        levels = np.append(levels, below_all)
        images = highest.shape[1]
        leave = [images - np.searchsorted(np.sort(row), levels, side="right") for row in highest]
        saved = np.diff(layers) @ np.stack(leave) / images
        thresholds, last = [], 0.0
        for threshold, now in zip(levels, saved, strict=True):
            if now >= last + _STEP * layers[-1]:
                thresholds.append(float(threshold))
                last = now
        return thresholds


@dataclass(frozen=True)
class Family:
    """Policies that differ in one threshold.

    Attributes:
        make: the policy of a threshold in the score's unit.
        scores: what decides on a recording.
    """

    make: Callable[[float], Policy]
    scores: Callable[[Recording], Scores]


def family(kind: str, selection: Recording) -> Family:
    """The family of a kind; what it learns, it learns from `selection`.

    Raises:
        ValueError: not one of `CERTIFIED_KINDS`.
    """
    if kind not in CERTIFIED_KINDS:
        raise ValueError(
            f"kind={kind!r} cannot be certified, expected one of {', '.join(CERTIFIED_KINDS)}"
        )
    return CERTIFIED_KINDS[kind](selection)


def _confidence(selection: Recording) -> Family:
    def scores(recording: Recording) -> Tensor:
        return _probabilities(recording).amax(-1)

    return _memoryless(lambda level: Confidence(min(max(level, 0.0), 1.0)), scores)


def _entropy(selection: Recording) -> Family:
    def scores(recording: Recording) -> Tensor:
        entropy: Tensor = torch.special.entr(_probabilities(recording)).sum(-1)
        return -entropy

    return _memoryless(lambda level: Entropy(max(-level, 0.0)), scores)


def _patience(selection: Recording) -> Family:
    """The score is the length of the run, so thresholds are whole numbers."""

    def scores(recording: Recording) -> Tensor:
        policy, rows = Patience(1), []
        state = policy.start(len(recording), torch.device("cpu"))
        for index in range(recording.num_exits):
            apply_rule(policy.rule(index), recording.logits[index], state)
            rows.append(state[:, 0].float())
        return torch.stack(rows)

    return _memoryless(lambda level: Patience(max(int(level) + 1, 1)), scores)


def _patient_confident(selection: Recording) -> Family:
    """Two exits in a row, as published, or the one there is."""
    count = min(2, selection.num_exits)

    def scores(recording: Recording) -> Tensor:
        entropy: Tensor = torch.special.entr(_probabilities(recording)).sum(-1)
        if count == 1:
            return -entropy
        first = torch.full_like(entropy[:1], -torch.inf)
        return torch.cat((first, -torch.maximum(entropy[1:], entropy[:-1])))

    return _memoryless(lambda level: PatientConfident(max(-level, 0.0), count), scores)


def _learned(selection: Recording) -> Family:
    fitted = fit_learned(selection)

    def scores(recording: Recording) -> Scores:
        state = fitted.start(len(recording), torch.device("cpu"))
        values, predictions = [], []
        for index in range(recording.num_exits):
            logits = recording.logits[index]
            step = ExitStep(logits, *apply_rule(fitted.rule(index), logits, state[:, :2]))
            together, score = fitted.score(step, state, index)
            values.append(score)
            predictions.append(together.to(logits.dtype).argmax(-1))
        return Scores(torch.stack(values), torch.stack((*predictions, _final(recording))))

    def make(level: float) -> Policy:
        return Learned(
            level, fitted.coefficients, fitted.mixture, fitted.sharpness, fitted.num_classes
        )

    return Family(make, scores)


CERTIFIED_KINDS: dict[str, Callable[[Recording], Family]] = {
    "confidence": _confidence,
    "entropy": _entropy,
    "patience": _patience,
    "patient_confident": _patient_confident,
    "learned": _learned,
}


def _memoryless(make: Callable[[float], Policy], scores: Callable[[Recording], Tensor]) -> Family:
    """A family whose answers are the exits' own."""
    return Family(make, lambda r: Scores(scores(r), r.logits.argmax(-1)))


def _probabilities(recording: Recording) -> Tensor:
    logits = recording.logits[:-1]
    return torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _final(recording: Recording) -> Tensor:
    return recording.logits[-1].argmax(-1)

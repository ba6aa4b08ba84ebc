"""Exit policies: when is an answer sure enough to leave.

A policy is one rule an exit and a few integers of state an image. The rule is plain data
(`ExitRule`) so that a kernel can apply it; the state travels with its image through compaction, so
an image gets the same answer alone or in any batch. Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lgvit_fast.evidence import INPUTS, as_type, evidence, log_softmax, where
from lgvit_fast.exit_rules import ExitRule, ExitStep, RuleKind

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "KINDS",
    "NEVER",
    "POLICIES",
    "Confidence",
    "Entropy",
    "Learned",
    "Patience",
    "PatientConfident",
    "Policy",
    "Replay",
    "from_dict",
    "to_dict",
]


class Policy:
    """Base of all policies; subclass and override `rule`, or `decide` for one beyond the rules."""

    def check(self, num_exits: int) -> None:
        """Raise ValueError unless the policy fits a model of `num_exits` exits."""

    def start(self, batch: int, device: torch.device) -> Tensor:
        """State of a fresh batch: `[B, 2]` int32, run length 0 and no last class (-1)."""
        import torch

        state = torch.full((batch, 2), -1, dtype=torch.int32, device=device)
        state[:, 0] = 0
        return state

    def start_array(self, batch: int) -> NDArray[np.int32]:
        """What `start` gives, as a NumPy array."""
        return np.tile(np.array([0, -1], np.int32), (batch, 1))

    def part(self, start: int, stop: int) -> Policy:
        """The policy as it stands for images `start` to `stop - 1` of a batch or stream."""
        return self

    def for_all_exits(self, asked: Sequence[int], num_exits: int) -> Policy:
        """The same policy for a model of `num_exits` exits of which only those `asked` are asked.

        Args:
            asked: their numbers from 0, increasing. A policy with one threshold for each of these gets
                one for each exit of the model; any other is given back as it is.
            num_exits: E.
        """
        threshold = getattr(self, "threshold", None)
        if not isinstance(threshold, Sequence) or len(threshold) != len(asked):
            return self
        spread = [threshold[0]] * num_exits  # those not asked are never compared with
        for place, value in zip(asked, threshold, strict=True):
            spread[place] = value
        return dataclasses.replace(self, threshold=spread)  # type: ignore[type-var]

    def rule(self, exit_index: int) -> ExitRule:
        """The rule of an exit, counted from 0."""
        return ExitRule(RuleKind.NEVER)

    def decide(self, step: ExitStep, state: Tensor, exit_index: int) -> ExitStep:
        """The step with who leaves, given what the rule said; by default just that.

        For what no rule says. An exported model calls it with NumPy arrays. On whole batches, each row
        by itself, without a wait for the
        device: so it gives the same in every backend, alone or in any batch, and in a CUDA graph.

        Args:
            step: logits `[B, K]` of the exit, who leaves by its rule, which logits are numbers.
            state: `[B, ...]`, as `start` made it; the rule has updated its first two columns.
            exit_index: the exit, from 0.
        """
        return step


NEVER = Policy()  # no image leaves before the final classifier


@dataclass(frozen=True)
class Confidence(Policy):
    """Leave when the largest softmax probability exceeds a threshold.

    Args:
        threshold: in [0, 1], one number or one per exit. Default: the published 0.865.
    """

    threshold: float | Sequence[float] = 0.865

    def __post_init__(self) -> None:
        _check_thresholds(self.threshold, upper=1.0)

    def check(self, num_exits: int) -> None:
        """Raise ValueError unless there is one threshold, or one for each of `num_exits` exits."""
        _check_length(self.threshold, num_exits)

    def rule(self, exit_index: int) -> ExitRule:
        """The rule of an exit, counted from 0."""
        return ExitRule(RuleKind.CONFIDENCE, _at(self.threshold, exit_index))


@dataclass(frozen=True)
class Entropy(Policy):
    """Leave when the entropy of the softmax falls below a threshold.

    Args:
        threshold: nats, not negative, one number or one per exit. Default: the published 0.6.
    """

    threshold: float | Sequence[float] = 0.6

    def __post_init__(self) -> None:
        _check_thresholds(self.threshold)

    def check(self, num_exits: int) -> None:
        """Raise ValueError unless there is one threshold, or one for each of `num_exits` exits."""
        _check_length(self.threshold, num_exits)

    def rule(self, exit_index: int) -> ExitRule:
        """The rule of an exit, counted from 0."""
        return ExitRule(RuleKind.ENTROPY, _at(self.threshold, exit_index))


@dataclass(frozen=True)
class Patience(Policy):
    """Leave when this many exits in a row predict the same class, the first one counting as 1.

    Args:
        patience: exits in a row, at least 1. Default: the published 7.
    """

    patience: int = 7

    def __post_init__(self) -> None:
        _check_patience(self.patience)

    def rule(self, exit_index: int) -> ExitRule:
        """The rule of an exit, counted from 0."""
        return ExitRule(RuleKind.PATIENCE, patience=self.patience)


@dataclass(frozen=True)
class PatientConfident(Policy):
    """Leave when this many exits in a row have an entropy below a threshold, whatever their classes.

    Args:
        threshold: nats, not negative, one number or one per exit. Default: the published 0.5.
        patience: exits in a row, at least 1. Default: the published 2.
    """

    threshold: float | Sequence[float] = 0.5
    patience: int = 2

    def __post_init__(self) -> None:
        _check_thresholds(self.threshold)
        _check_patience(self.patience)

    def check(self, num_exits: int) -> None:
        """Raise ValueError unless there is one threshold, or one for each of `num_exits` exits."""
        _check_length(self.threshold, num_exits)

    def rule(self, exit_index: int) -> ExitRule:
        """The rule of an exit, counted from 0."""
        threshold = _at(self.threshold, exit_index)
        return ExitRule(RuleKind.PATIENT_CONFIDENT, threshold, self.patience)


@dataclass(frozen=True)
class Learned(Policy):
    """Leave when a logistic model is sure enough that the full model would do no better.

    The exits answer together: the log-probabilities of an exit and of those before it, weighted and
    added up, are the logits of its answer. What travels with an image is that sum. The logistic model
    reads what this exit says, what the exits say together, and how long they have agreed
    (`evidence.INPUTS`). Fitted by `lgvit_fast.calibrate(kind="learned")`, for all exits of one model.

    Args:
        threshold: log-odds, any finite number; the higher, the later images leave.
        coefficients: for each exit a constant and one coefficient an input: E x 9.
        mixture: weight of each exit's log-probabilities in the sum, E numbers.
        sharpness: what the sum is multiplied by at each exit, E numbers.
        num_classes: K.
    """

    threshold: float
    coefficients: Sequence[Sequence[float]]
    mixture: Sequence[float]
    sharpness: Sequence[float]
    num_classes: int

    def __post_init__(self) -> None:
        exits, columns = len(self.coefficients), 1 + len(INPUTS)
        rows = (*self.coefficients, self.mixture, self.sharpness, [self.threshold])
        if not all(isinstance(x, int | float) and math.isfinite(x) for row in rows for x in row):
            raise ValueError("Learned holds a value that is no finite number")
        if not exits or any(len(row) != columns for row in self.coefficients):
            raise ValueError(f"coefficients={self.coefficients}, expected {columns} for each exit")
        if len(self.mixture) != exits or len(self.sharpness) != exits:
            raise ValueError(
                f"mixture has {len(self.mixture)} and sharpness {len(self.sharpness)} entries,"
                f" coefficients are for {exits} exits"
            )

    def __str__(self) -> str:
        return f"Learned({self.threshold:.4g}, {len(self.mixture)} exits)"

    def check(self, num_exits: int) -> None:
        """Raise ValueError unless it was fitted for `num_exits` exits."""
        if len(self.mixture) != num_exits:
            raise ValueError(
                f"policy is for {len(self.mixture)} exits, the model has {num_exits} exits"
            )

    def start(self, batch: int, device: torch.device) -> Tensor:
        """State: run length and last class, then the sum, whose float32 are kept as int32."""
        import torch

        zeros = torch.zeros((batch, self.num_classes), dtype=torch.int32, device=device)
        return torch.cat((super().start(batch, device), zeros), dim=1)

    def start_array(self, batch: int) -> NDArray[np.int32]:
        """What `start` gives, as a NumPy array."""
        zeros = np.zeros((batch, self.num_classes), np.int32)
        return np.concatenate((super().start_array(batch), zeros), axis=1)

    def rule(self, exit_index: int) -> ExitRule:
        """Counts the run of equal classes and lets no image leave."""
        return _COUNT_RUN

    def decide(self, step: ExitStep, state: Tensor, exit_index: int) -> ExitStep:
        """The logits of the exits together, and who leaves by the learned rule."""
        logits, score = self.score(step, state, exit_index)
        leave = (score > self.threshold) & step.valid
        return ExitStep(as_type(logits, step.logits), leave, step.valid)

    def score(self, step: ExitStep, state: Tensor, exit_index: int) -> tuple[Tensor, Tensor]:
        """Logits `[B, K]` of the exits together, and log-odds `[B]` float32 that they suffice.

        Adds the exit to the sum in `state`, as `inputs` does.
        """
        inputs, logits = self.inputs(step, state, exit_index)
        constant, *coefficients = self.coefficients[exit_index]
        score = constant + 0 * inputs[0]
        for coefficient, values in zip(coefficients, inputs, strict=True):
            score = score + coefficient * values
        return logits, score

    def inputs(self, step: ExitStep, state: Tensor, exit_index: int) -> tuple[list[Tensor], Tensor]:
        """The logistic model's inputs, each `[B]` float32, and the logits of the exits together.

        Raises:
            ValueError: the logits are of another number of classes.
        """
        if step.logits.shape[-1] != self.num_classes:
            raise ValueError(
                f"policy is for {self.num_classes} classes, the model has {step.logits.shape[-1]}"
            )
        own = log_softmax(step.logits)
        total = state[:, 2:].view(own.dtype)
        added = total + self.mixture[exit_index] * own
        total[...] = where(step.valid[:, None], added, total)
        logits = self.sharpness[exit_index] * total
        return evidence(own, log_softmax(logits), state[:, 0]), logits


_COUNT_RUN = ExitRule(RuleKind.PATIENCE, patience=2**31 - 1)


class Replay(Policy):
    """Scripts each image's exit by its place in the batch, whatever the logits say.

    For benchmarks and tests: a recorded distribution of exits without the weights that made it.

    Args:
        exit_index: `[B]` integers, the exit (from 0) at which each image leaves; a number not
            reached by the model's exits means the final classifier.

    Raises:
        ValueError: not one-dimensional, not integer, or negative.
    """

    def __init__(self, exit_index: Sequence[int] | NDArray[np.integer] | Tensor) -> None:
        given: Any = exit_index
        script = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
        if script.ndim != 1 or (script.size and not np.issubdtype(script.dtype, np.integer)):
            raise ValueError(
                f"exit_index has shape {script.shape} and dtype {script.dtype}, expected [B] integers"
            )
        if script.size and script.min() < 0:
            raise ValueError(f"exit_index holds {script.min()}, expected exits from 0 on")
        self.exit_index: NDArray[np.int32] = script.astype(np.int32)

    def __repr__(self) -> str:
        return f"Replay({self.exit_index.size} images)"

    def start(self, batch: int, device: torch.device) -> Tensor:
        """State: the scripted exit of each image."""
        import torch

        return torch.from_numpy(self.start_array(batch)).to(device)

    def start_array(self, batch: int) -> NDArray[np.int32]:
        """State: the scripted exit of each image."""
        if batch != self.exit_index.size:
            raise ValueError(f"Replay scripts {self.exit_index.size} images, the batch has {batch}")
        state = np.empty((batch, 2), np.int32)
        state[:] = self.exit_index[:, None]
        return state

    def part(self, start: int, stop: int) -> Replay:
        """The script of images `start` to `stop - 1`."""
        if start == 0 and stop == self.exit_index.size:
            return self
        return Replay(self.exit_index[start:stop])

    def decide(self, step: ExitStep, state: Tensor, exit_index: int) -> ExitStep:
        """The scripted exit, or one before it that was not asked."""
        return step._replace(leave=state[:, 0] <= exit_index)


# The policies that commands and sweeps choose from, by their names there.
KINDS: dict[str, type[Policy]] = {
    "confidence": Confidence,
    "entropy": Entropy,
    "patience": Patience,
    "patient_confident": PatientConfident,
}

# The policies that can be saved, by the name they are saved under.
POLICIES: dict[str, type[Policy]] = {
    kind.__name__: kind for kind in (Confidence, Entropy, Patience, PatientConfident, Learned)
}


def to_dict(policy: Policy) -> dict[str, Any] | None:
    """A policy as json types; None for one whose meaning lives in user code, and for `Replay`."""
    if POLICIES.get(type(policy).__name__) is not type(policy):
        return None
    numbers = dataclasses.asdict(policy)  # type: ignore[call-overload]
    return {"name": type(policy).__name__, **json.loads(json.dumps(numbers))}  # tuples as lists


def from_dict(saved: Mapping[str, Any]) -> Policy:
    """The policy that `to_dict` described.

    Raises:
        ValueError: an unknown name, an unknown or missing argument, or one out of range.
    """
    if not isinstance(saved, Mapping) or saved.get("name") not in POLICIES:
        raise ValueError(
            f"policy is {saved!r}, expected a name out of {', '.join(POLICIES)} with its arguments"
        )
    arguments = {key: value for key, value in saved.items() if key != "name"}
    try:
        return POLICIES[saved["name"]](**arguments)
    except TypeError as error:
        raise ValueError(f"policy is {saved!r}: {error}") from None


def _at(value: float | Sequence[float], index: int) -> float:
    return float(value[index]) if isinstance(value, Sequence) else float(value)


def _check_thresholds(value: float | Sequence[float], upper: float = math.inf) -> None:
    numbers = list(value) if isinstance(value, Sequence) else [value]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"threshold={value!r}, expected a number or one number per exit")
        if not 0 <= number <= upper or math.isinf(number):
            bounds = "0 or more" if math.isinf(upper) else f"between 0 and {upper:g}"
            raise ValueError(f"threshold={number!r}, expected {bounds}")
    if not numbers:
        raise ValueError("threshold is empty, expected a number or one number per exit")


def _check_length(value: float | Sequence[float], num_exits: int) -> None:
    if isinstance(value, Sequence) and len(value) != num_exits:
        raise ValueError(f"threshold has {len(value)} entries, the model has {num_exits} exits")


def _check_patience(value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"patience={value!r}, expected an integer of at least 1")

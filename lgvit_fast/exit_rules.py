"""Exit rules as plain data: what a policy asks of an exit, in the form every backend understands.

No torch here: an exported model applies the same rules where torch is not installed.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ExitRule", "ExitStep", "RuleKind"]


class RuleKind(IntEnum):
    """What an exit rule compares; the values are shared with the kernels."""

    NEVER = 0
    CONFIDENCE = 1  # max softmax > threshold
    ENTROPY = 2  # entropy in nats < threshold
    PATIENCE = 3  # `patience` exits in a row predict the same class
    PATIENT_CONFIDENT = 4  # `patience` exits in a row have entropy < threshold


class ExitRule(NamedTuple):
    """One exit's rule in the form every backend understands."""

    kind: RuleKind
    threshold: float = 0.0
    patience: int = 0


class ExitStep(NamedTuple):
    """An exit's answers: of tensors, or of NumPy arrays in an exported model."""

    logits: Tensor  # [B, K], compute dtype
    leave: Tensor  # [B] bool
    valid: Tensor  # [B] bool, False where the softmax is not a number

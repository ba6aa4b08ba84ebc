"""What follows a graph: the exit rules in NumPy, on the numbers that graphs give."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lgvit_fast.exit_rules import ExitRule, RuleKind
from lgvit_fast.runtimes.loaders import SegmentOutput

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["apply_rule", "checked"]


def apply_rule(
    rule: ExitRule, output: SegmentOutput, state: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Who leaves, `[n]` bool; updates `state` `[n, 2]` in place. `ops.exit_step.apply_rule` in NumPy.

    Comparisons are strict, and none with NaN holds, so an image that is not valid stays.
    """
    if rule.kind == RuleKind.NEVER:
        return np.zeros_like(output.valid)
    if rule.kind == RuleKind.CONFIDENCE:
        return output.confidence > np.float32(rule.threshold)
    run, last = state[:, 0], state[:, 1]
    if rule.kind == RuleKind.PATIENCE:
        agreed = np.where(output.prediction == last, run + 1, 1)
        run[:] = np.where(output.valid, agreed, 0)
        last[:] = np.where(output.valid, output.prediction, -1)
        return run >= rule.patience
    sure = output.entropy < np.float32(rule.threshold)
    if rule.kind == RuleKind.ENTROPY:
        return sure
    run[:] = np.where(sure, run + 1, 0)
    return run >= rule.patience


def checked(output: SegmentOutput, broken: NDArray[np.bool_] | None = None) -> SegmentOutput:
    """The output with NaN scores where it is not valid: no rule lets such an image leave.

    Args:
        output: of n images.
        broken: `[n]`, images known to hold no answer, whatever the graph says; their logits are NaN.
    """
    valid = output.valid if broken is None else output.valid & ~broken
    if valid.all():
        return output
    nan = np.float32(np.nan)
    logits = output.logits if broken is None else np.where(broken[:, None], nan, output.logits)
    return output._replace(
        logits=logits,
        confidence=np.where(valid, output.confidence, nan),
        entropy=np.where(valid, output.entropy, nan),
        valid=valid,
    )

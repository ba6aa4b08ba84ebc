"""What an exit knows of its answer, and what exits know together: the inputs of a learned rule.

Written once for torch tensors and NumPy arrays: names, arguments and results are the same in both.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

__all__ = ["INPUTS", "as_type", "evidence", "log_softmax", "where"]

_OWN = ("log-odds of the largest probability", "margin", "entropy")
INPUTS = (
    *_OWN,
    *(f"{name}, of all exits so far together" for name in _OWN),
    "log of the run length",
    "the exits together predict the same class",
)
_MOST = 16.0  # nats; float32 tells probabilities above 1 - 1e-7 from 1 no more


def log_softmax(logits: Any) -> Any:
    """Log-probabilities `[B, K]` float32; NaN in rows with a NaN or +inf logit."""
    xp = _namespace(logits)
    logits = xp.asarray(logits, dtype=xp.float32)
    logits = logits - xp.amax(logits, axis=-1, keepdims=True)
    return logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))


def as_type(values: Any, like: Any) -> Any:
    """`values` in the dtype of `like`."""
    return _namespace(values).asarray(values, dtype=like.dtype)


def where(condition: Any, chosen: Any, other: Any) -> Any:
    """`chosen` where the condition holds, else `other`."""
    return _namespace(chosen).where(condition, chosen, other)


def evidence(own: Any, together: Any, run: Any) -> list[Any]:
    """The inputs, each `[B]` float32, as `INPUTS` names them; nats where they are logarithms.

    Args:
        own: `[B, K]` log-probabilities of this exit.
        together: `[B, K]` log-probabilities of all exits so far.
        run: `[B]` how many exits in a row, this one included, have predicted the same class.
    """
    xp = _namespace(own)
    same = xp.argmax(own, axis=-1) == xp.argmax(together, axis=-1)
    return [
        *_certainty(xp, own),
        *_certainty(xp, together),
        xp.log(xp.clip(xp.asarray(run, dtype=xp.float32), 1, None)),
        xp.asarray(same, dtype=xp.float32),
    ]


def _certainty(xp: Any, log_p: Any) -> tuple[Any, Any, Any]:
    """Log-odds of the largest, the log of its ratio to the second largest (at most 16), entropy."""
    first = xp.amax(log_p, axis=-1, keepdims=True)
    second = xp.amax(xp.where(log_p < first, log_p, -np.inf), axis=-1)
    tied = xp.sum(log_p == first, axis=-1) > 1
    first = first[..., 0]
    limited = xp.clip(first, None, -float(np.exp(-_MOST)))
    odds = limited - xp.log(-xp.expm1(limited))
    margin = xp.where(tied, 0.0, xp.clip(first - second, 0.0, _MOST))
    entropy = -xp.sum(xp.exp(log_p) * xp.where(log_p > -np.inf, log_p, 0.0), axis=-1)
    return odds, margin, entropy


def _namespace(values: Any) -> Any:
    """The module that an array's functions come from: numpy, or torch where it is a tensor."""
    return np if isinstance(values, np.ndarray) else sys.modules["torch"]

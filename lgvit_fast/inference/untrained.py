"""A warning about exits that were never trained, once for each model."""

from __future__ import annotations

import logging
from weakref import WeakSet

from lgvit_fast.model import LGViT
from lgvit_fast.policies import Policy, Replay

__all__ = ["warn_if_untrained"]

_logger = logging.getLogger("lgvit_fast")
_warned: WeakSet[LGViT] = WeakSet()


def warn_if_untrained(model: LGViT, policy: Policy | None = None) -> None:
    """Log a warning that names the exits whose heads were never trained, unless it was said before.

    Under a `Replay` nothing depends on what the heads say, and nothing is said.
    """
    if isinstance(policy, Replay) or model in _warned:
        return
    layers = model.untrained_exits
    if not layers:
        return
    _warned.add(model)
    _logger.warning(
        "the exits after blocks %s were never trained: what leaves there is answered at random"
        " (train them, or use a policy under which no image leaves there)",
        ", ".join(map(str, layers)),
    )

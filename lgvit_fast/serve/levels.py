"""Under load: bolder thresholds, along the path that the certificate vouches for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lgvit_fast.certificate import Certificate
from lgvit_fast.policies import Policy

__all__ = ["Levels", "certified_policies"]

_MOST = 8  # policies of a path that are told apart
_CALM = 0.25  # of the time allowed: up to it, the most cautious policy
_SMOOTHING = 0.05  # weight of the latest image in a mean


def certified_policies(policy: Policy, certificate: Certificate | None) -> list[Policy]:
    """The policies that a certificate vouches for, from cautious to bold, the last `policy` itself.

    Raises:
        ValueError: there is no certificate, or one without a path.
    """
    if certificate is None or not certificate.path:
        raise ValueError(
            "slo_ms needs a model whose certificate has a path of thresholds: `lgvit-fast calibrate`"
            " with --max-drop or --min-agreement writes one"
        )
    path = certificate.policies()
    steps = min(_MOST, len(path))
    places = {round(i * (len(path) - 1) / max(steps - 1, 1)) for i in range(steps)}
    return [path[place] for place in sorted(places | {len(path) - 1})]


class Levels:
    """Which of several policies new images are accepted under.

    The time an image will take is expected from the images before it and from what an image has cost
    lately. From a quarter of the time allowed to all of it, the policies divide the range into equal
    bands; one stays until the expected time is out of its band and of the one below it. So a steady
    load settles at neighbouring policies. A rule that goes on stepping while the time is too long
    would swing from end to end: a policy shows its effect only when its images are run.

    Args:
        policies: from cautious to bold.
        slo: seconds from acceptance to answer; None stays at the last policy.
    """

    def __init__(self, policies: Sequence[Policy], slo: float | None) -> None:
        self.policies = tuple(policies)
        self._slo = slo
        self.level = 0 if slo is not None else len(self.policies) - 1
        self._cost: float | None = None  # seconds of the machine, an image

    def answered(self, seconds: float) -> None:
        """Note what an image has cost: its share of the runs it was part of."""
        before = seconds if self._cost is None else self._cost
        self._cost = before + _SMOOTHING * (seconds - before)

    def choose(self, waiting: int) -> int:
        """The policy's number for an image before which others wait."""
        if self._slo is not None and self._cost is not None:
            share = (self.expected(waiting + 1) / self._slo - _CALM) / (1 - _CALM)
            band = math.floor(share * len(self.policies))
            level = min(max(self.level, band), band + 1)
            self.level = min(max(level, 0), len(self.policies) - 1)
        return self.level

    def expected(self, waiting: int) -> float:
        """Seconds until so many images are answered, as far as is known."""
        return waiting * (self._cost or 0.0)

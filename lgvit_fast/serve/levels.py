"""Under load: bolder thresholds, along the path that the certificate vouches for."""

from __future__ import annotations

from collections.abc import Sequence

from lgvit_fast.certificate import Certificate
from lgvit_fast.policies import Policy

__all__ = ["Levels", "certified_policies"]

_MOST = 8  # policies of a path that are told apart
_CALM = 0.5  # of the time allowed: below it, thresholds become more cautious again
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
    lately. Above the time allowed the next one is accepted under a bolder policy, below half of it
    under a more cautious one; in between nothing changes, and never more than one step an image.

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
            expected = (waiting + 1) * self._cost
            if expected > self._slo:
                self.level = min(self.level + 1, len(self.policies) - 1)
            elif expected < _CALM * self._slo:
                self.level = max(self.level - 1, 0)
        return self.level

    def expected(self, waiting: int) -> float:
        """Seconds until so many images are answered, as far as is known."""
        return waiting * (self._cost or 0.0)

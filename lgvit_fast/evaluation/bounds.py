"""Exact tests and intervals for rates and for paired differences, from counts alone.

Every p-value here is valid at any number of images: under its null hypothesis it is at most `a` with
probability at most `a`.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

__all__ = ["drop_interval", "drop_p_value", "rate_interval", "rate_p_value"]

_NUISANCE = 0.1  # share of a test's level that is spent on bounding the rate of gains


def rate_p_value(count: int, n: int, limit: float) -> float:
    """P-value of "the rate is at least `limit`" against "it is lower": exact binomial.

    Args:
        count: how often it happened among `n` independent images.
        n: at least 1.
        limit: in [0, 1].
    """
    return float(_binomial_cdf(np.array(count), n, limit))


def rate_interval(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of a rate (Clopper & Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = special.betaincinv(count, n - count + 1, tail) if count else 0.0
    high = special.betaincinv(count + 1, n - count, 1 - tail) if count < n else 1.0
    return float(low), float(high)


def drop_p_value(losses: int, gains: int, n: int, limit: float, level: float) -> float:
    """P-value of "accuracy drops by at least `limit`" against "it drops by less", for paired answers.

    Each image is a loss (+1: right in full, wrong early), a gain (-1) or neither (0). The null leaves
    the rate q of gains open, so q is first bounded by its Clopper-Pearson limit u at confidence
    1 - `level` / 10, and the p-value is the largest tail over q <= u, plus `level` / 10 (Berger &
    Boos, JASA 1994). With loss rate q + limit the tail P(losses - gains <= s) grows with q by
    n (g(s + 1) - g(s)), g being the distribution of the difference among n - 1 images. Where
    sqrt(q) + sqrt(q + limit) <= 1 a difference is a sum of two independent Bernoulli variables less 1,
    so g rises up to the whole number below its mean (Darroch 1964) and the largest tail is the one at
    u. Elsewhere the tail is bounded by Hoeffding (JASA 1963, theorem 1).

    Args:
        losses: images that the full model alone answers rightly.
        gains: images that the early answer alone has right.
        n: images, at least 1.
        limit: in [-1, 1].
        level: at which the p-value will be compared; fixes the share spent on the nuisance.
    """
    difference, spent = losses - gains, level * _NUISANCE
    if difference >= n * limit:
        return 1.0
    bound = _hoeffding(difference / n, n, limit)
    most = float(special.betaincinv(gains + 1, n - gains, 1 - spent)) if gains < n else 1.0
    if most + limit < 0:  # no rate of gains up to `most` is as small as the null asks
        return min(bound, spent)
    separable = math.sqrt(most) + math.sqrt(most + limit) <= 1
    if separable and difference + 1 <= math.floor((n - 1) * limit - 1e-9):
        bound = min(bound, _tail(difference, n, most, most + limit) + spent)
    return min(bound, 1.0)


def drop_interval(losses: int, gains: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided interval in [-1, 1] of the drop in accuracy, by inverting `drop_p_value`."""
    level = (1 - confidence) / 2
    return -_drop_limit(gains, losses, n, level), _drop_limit(losses, gains, n, level)


def _drop_limit(losses: int, gains: int, n: int, level: float) -> float:
    """The smallest drop that is refuted at `level`, to 1e-5."""
    low, high = (losses - gains) / n, 1.0
    while high - low > 1e-5:
        middle = (low + high) / 2
        if drop_p_value(losses, gains, n, middle, level) <= level:
            high = middle
        else:
            low = middle
    return high


def _tail(difference: int, n: int, gain_rate: float, loss_rate: float) -> float:
    """P(losses - gains <= difference) among n images; what is left out is counted in."""
    reach = 9 * math.sqrt(n * gain_rate) + 12
    first = max(0, math.floor(n * gain_rate - reach))
    last = min(n, math.ceil(n * gain_rate + reach))
    gains = np.arange(first, last + 1)
    below = _binomial_cdf(np.arange(first - 1, last + 1), n, gain_rate)
    among_rest = _binomial_cdf(gains + difference, n - gains, loss_rate / (1 - gain_rate))
    return float(np.diff(below) @ among_rest + below[0] + 1 - below[-1])


def _binomial_cdf(count: np.ndarray, n: np.ndarray | int, rate: float) -> np.ndarray:
    """P(Binomial(n, rate) <= count)."""
    inside = np.clip(count, 0, np.maximum(np.asarray(n) - 1, 0))
    cdf = special.betainc(np.maximum(n - inside, 1), inside + 1, 1 - rate)
    return np.where(count < 0, 0.0, np.where(count >= n, 1.0, cdf))


def _hoeffding(mean: float, n: int, limit: float) -> float:
    """exp(-n kl((1 + mean) / 2, (1 + limit) / 2)), for a mean of values in [-1, 1] below `limit`."""
    seen, null = (1 + mean) / 2, (1 + limit) / 2
    if null >= 1:
        return 0.0
    divergence = special.rel_entr(seen, null) + special.rel_entr(1 - seen, 1 - null)
    return math.exp(-n * divergence)

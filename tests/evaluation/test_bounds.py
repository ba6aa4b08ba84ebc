"""Tests and intervals, checked by adding up every possible outcome."""

import math
from functools import cache

import numpy as np
import pytest
from scipy import stats

from lgvit_fast.evaluation.bounds import (
    drop_interval,
    drop_p_value,
    rate_interval,
    rate_p_value,
)


@cache
def p_values(n, limit, level):
    """`[n + 1, n + 1]` by losses and gains, NaN where they are more than n together."""
    table = np.full((n + 1, n + 1), math.nan)
    for losses in range(n + 1):
        for gains in range(n + 1 - losses):
            table[losses, gains] = drop_p_value(losses, gains, n, limit, level)
    return table


def outcome_probabilities(n, loss_rate, gain_rate):
    counts = np.arange(n + 1)
    gains = stats.binom.pmf(counts, n, gain_rate)
    rest = loss_rate / (1 - gain_rate)
    return np.stack([stats.binom.pmf(counts, n - g, rest) * gains[g] for g in counts], axis=1)


@pytest.mark.parametrize("n", [20, 61])
@pytest.mark.parametrize("limit", [0.03, 0.1, 0.3, -0.05])
@pytest.mark.parametrize("level", [0.05, 0.2])
def test_a_true_null_is_rejected_no_more_often_than_the_level(n, limit, level):
    rejected = p_values(n, limit, level) <= level
    worst = 0.0
    for gain_rate in np.linspace(max(0, -limit), (1 - limit) / 2, 40):
        for drop in (limit, limit + 0.02):
            loss_rate = gain_rate + drop
            if loss_rate + gain_rate <= 1 and gain_rate < 1:
                chance = outcome_probabilities(n, loss_rate, gain_rate)[rejected].sum()
                worst = max(worst, float(chance))
    assert worst <= level + 1e-12


def test_the_drop_test_is_nearly_as_strong_as_one_that_knows_the_rate_of_gains():
    n, level = 2000, 0.05
    margin = stats.norm.ppf(1 - level) * math.sqrt(n * (0.01 + 2 * 0.004))
    most = int(n * 0.01 - margin)  # the difference that a known rate of gains would let pass
    passed = max(
        d for d in range(-8, 20) if drop_p_value(8 + d, 8, n, 0.01, level) <= level
    )  # fmt: skip
    assert most - 4 <= passed <= most


def test_no_loss_in_299_images_shows_a_rate_below_one_percent():
    assert rate_p_value(0, 299, 0.01) <= 0.05 < rate_p_value(0, 298, 0.01)
    assert rate_p_value(5, 100, 0.1) == pytest.approx(stats.binom.cdf(5, 100, 0.1))


def test_many_discordant_images_fall_back_on_hoeffding():
    value = drop_p_value(500, 400, 1000, 0.3, 0.05)
    seen, null = 1.1 / 2, 1.3 / 2
    divergence = seen * math.log(seen / null) + (1 - seen) * math.log((1 - seen) / (1 - null))
    assert value == pytest.approx(math.exp(-1000 * divergence))


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5, 1.0])
def test_rate_intervals_cover(rate):
    n = 80
    chance = stats.binom.pmf(np.arange(n + 1), n, rate)
    inside = [low <= rate <= high for low, high in (rate_interval(k, n) for k in range(n + 1))]
    assert chance[inside].sum() >= 0.95 - 1e-12


@pytest.mark.parametrize(("loss_rate", "gain_rate"), [(0.1, 0.02), (0.3, 0.3), (0.0, 0.2)])
def test_drop_intervals_cover(loss_rate, gain_rate):
    n = 25
    chance = outcome_probabilities(n, loss_rate, gain_rate)
    covered = 0.0
    for losses, gains in zip(*np.nonzero(chance > 1e-6), strict=True):
        low, high = drop_interval(int(losses), int(gains), n)
        assert low <= (losses - gains) / n <= high
        covered += chance[losses, gains] * (low <= loss_rate - gain_rate <= high)
    assert covered >= 0.95 - 1e-3


def test_more_losses_or_fewer_gains_never_lower_the_p_value():
    table = p_values(61, 0.1, 0.05)
    falls = np.diff(table, axis=0)
    assert np.nanmin(falls) >= -1e-9
    assert np.nanmax(np.diff(table, axis=1)) < 1.0

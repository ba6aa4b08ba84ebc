"""Whether images in use look like the calibration images: false alarms counted, shifts found."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from lgvit_fast import Certificate

CERTIFICATE = Certificate(
    goal="max_drop",
    limit=1.0,
    bound=1.0,
    confidence=0.95,
    policy={"name": "Confidence", "threshold": 0.9},
    layers=(4, 6, 8, 12),
    num_classes=10,
    images=1000,
    selection_images=1000,
    method="a test",
    seed=0,
    exit_counts=(500, 250, 150, 100),
    data="0",
    date="2026-01-01T00:00:00+00:00",
)
SHARES = np.array([0.5, 0.25, 0.15, 0.1])
LOOKS = np.unique(np.geomspace(5, 20_000, 25).astype(int))


def alarms(shares_in_use, runs, confidence, seed=0):
    """Runs that raise an alarm at any of many looks; calibration images are drawn anew each time."""
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(runs):
        seen = tuple(int(n) for n in rng.multinomial(400, SHARES))
        certificate = dataclasses.replace(CERTIFICATE, exit_counts=seen)
        counts = np.zeros(4, dtype=int)
        for more in np.diff([0, *LOOKS]):
            counts += rng.multinomial(more, shares_in_use)
            if not certificate.check(counts.tolist(), confidence).alike:
                count += 1
                break
    return count


def test_alarms_are_rare_while_nothing_changes():
    count = alarms(SHARES, 150, confidence=0.7)
    print(f"{count} of 150 streams raised a false alarm, 45 allowed on average")
    assert count <= stats.binom.ppf(1 - 1e-6, 150, 0.3)


@pytest.mark.parametrize("shares", [(0.3, 0.25, 0.2, 0.25), (0.7, 0.2, 0.05, 0.05)], ids=str)
def test_a_shift_is_found(shares):
    assert alarms(shares, 20, confidence=0.99) == 20


def test_it_says_where():
    found = CERTIFICATE.check([200, 500, 200, 100])
    assert not found.alike and found.evidence > found.needed == pytest.approx(200)
    assert "at exit 0 20.0 %, in calibration 50.0 %" in str(found)
    assert found.images == 1000
    fine = CERTIFICATE.check([500, 250, 150, 100])
    assert fine.alike and fine.evidence < 1 and fine.found == fine.expected
    assert "leave where" in str(fine)


def test_nothing_counted_and_exits_nobody_left_at_are_fine():
    assert CERTIFICATE.check([0, 0, 0, 0]).alike
    rare = dataclasses.replace(CERTIFICATE, exit_counts=(1000, 0, 0, 0))
    assert rare.check([1000, 1, 0, 0]).alike
    assert not rare.check([500, 500, 0, 0]).alike


@pytest.mark.parametrize(
    "counts", [[1, 2, 3], [1, 2, 3, -1], [1, 2, 3, 0.5], [[1, 2, 3, 4]]], ids=str
)
def test_bad_counts(counts):
    with pytest.raises(ValueError, match="expected 4 whole numbers"):
        CERTIFICATE.check(counts)


def test_bad_confidence_and_fields():
    with pytest.raises(ValueError, match="confidence=99"):
        CERTIFICATE.check([1, 1, 1, 1], confidence=99)
    with pytest.raises(ValueError, match="goal='luck'"):
        dataclasses.replace(CERTIFICATE, goal="luck")
    with pytest.raises(ValueError, match="expected 4 counts"):
        dataclasses.replace(CERTIFICATE, exit_counts=(1, 2))


def test_in_words():
    assert "With 95 % confidence it loses at most 1 points" in str(CERTIFICATE)
    agreement = dataclasses.replace(CERTIFICATE, goal="min_agreement", bound=98.0)
    assert "at least 98 % of its answers" in str(agreement)
    budget = dataclasses.replace(CERTIFICATE, goal="budget_ms", bound=None, limit=5.0)
    assert "at most 5 ms an image" in str(budget) and "nothing is certified" in str(budget)

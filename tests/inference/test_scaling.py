"""The simulation in benchmarks/ against cases that can be worked out by hand."""

import pytest

from benchmarks.simulate_scaling import Outcome, simulate, simulate_calls, split, table
from lgvit_fast.bench.traces import Trace
from lgvit_fast.inference import Costs

TRACE = Trace("three", (1, 2, 3), (2, 1, 1))


def costs(*seconds, head=0.0):
    """Segments of so many seconds an image, at any batch size."""
    line = tuple((s, 16 * s) for s in seconds)
    return Costs((1, 16), (0.0, 0.0), line, ((head, 16 * head),) * len(seconds))


def test_one_device_is_never_idle_and_runs_each_row_once():
    exits = TRACE.exits(64)
    outcome = simulate(costs(1.0, 2.0, 3.0, head=0.5), exits, 4, [range(3)])
    expected = 64 * 1.5 + 32 * 2.5 + 16 * 3.5
    assert outcome == Outcome(pytest.approx(expected), pytest.approx(1.0))


def test_two_devices_in_a_row():
    """Everybody goes to the end; the second device starts one batch later."""
    halves = [range(1), range(1, 2)]
    outcome = simulate(costs(1.0, 1.0), [1] * 8, 2, halves)
    assert outcome.seconds == pytest.approx(2 * (4 + 1))
    slowed = simulate(costs(1.0, 1.0), [1] * 8, 2, halves, transfer=0.5)
    assert slowed.seconds == pytest.approx(2 + 4 * 3)


def test_partial_batches_wait_for_those_still_on_their_way():
    """Two leave each batch of four: the second segment runs twice with four, not four times."""
    fixed = Costs((1, 4), (0.0, 0.0), ((1.0, 1.0), (1.0, 1.0)), ((0.0, 0.0), (0.0, 0.0)))
    outcome = simulate(fixed, [0, 1, 0, 1] * 4, 4, [range(2)])
    assert outcome.seconds == pytest.approx(4 + 2)


def test_batches_that_stay_together():
    """Batches of two: 3 + 1 and 3 + 3 seconds, 3 for the last; two devices share them 7 : 6."""
    exits = [0, 1, 1, 1, 0, 0]
    fixed = Costs((1, 2), (0.0, 0.0), ((3.0, 3.0), (1.0, 3.0)), ((0.0, 0.0), (0.0, 0.0)))
    assert simulate_calls(fixed, exits, 2, 1) == pytest.approx(4 + 6 + 3)
    assert simulate_calls(fixed, exits, 2, 2) == pytest.approx(4 + 3)


def test_a_split_balances_the_work():
    assert split(costs(2.0, 2.0, 2.0), TRACE, 4, 2, parts=2) == [range(1), range(1, 3)]
    assert split(costs(9.0, 2.0, 4.0), TRACE, 4, 4, parts=2) == [range(1)] * 3 + [range(1, 3)]
    assert split(costs(1.0, 1.0, 1.0), TRACE, 4, 1) == [range(3)]


def test_the_table_scales():
    rows = table(costs(1.0, 2.0, 3.0), TRACE, 4, 4096, transfer=0.0)
    assert rows[0]["replicas"] == rows[0]["split"] == 1
    assert rows[1]["replicas"] == pytest.approx(2, rel=0.02)
    assert all(row["replicas"] <= row["devices"] * 1.001 for row in rows)
    assert all(0 < row["split_efficiency"] <= 1.001 for row in rows)

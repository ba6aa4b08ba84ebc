from itertools import chain, combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lgvit_fast
from lgvit_fast.inference import Costs, Engine, measure_costs, plan_exits
from tests.helpers import images, tiny_model

LAYERS = [2, 3, 5]


@pytest.fixture(scope="module")
def model():
    return tiny_model(exits=LAYERS)


def linear_costs(block, head):
    """A model of three exits with parts that cost so many seconds an image."""
    batches = (1, 16)
    parts = [(2 * block, head), (block, head), (2 * block, head), (block, 0.0)]
    return Costs(
        batches,
        (0.0, 0.0),
        tuple((a, 16 * a) for a, _ in parts),
        tuple((b, 16 * b) for _, b in parts),
    )


def brute_force(costs, histogram, batch):
    """The cheapest seconds of an image over all subsets of exits, counted image by image."""
    last, total = len(LAYERS), sum(histogram)
    best = None
    subsets = chain.from_iterable(combinations(range(last), n) for n in range(last + 1))
    for kept in subsets:
        leaves = [min([k for k in (*kept, last) if k >= exit]) for exit in range(last + 1)]
        seconds = costs.at(costs.embed, batch)
        for place in range(last + 1):
            asked = next(k for k in (*kept, last) if k >= place)
            there = sum(n for exit, n in enumerate(histogram) if leaves[exit] >= asked)
            rows = batch * there / total
            seconds += costs.at(costs.blocks[place], rows)
            if place == asked:
                seconds += costs.at(costs.heads[place], rows)
        best = min(seconds / batch, best if best is not None else seconds / batch)
    return best


positive = st.floats(0.001, 10.0)


@settings(max_examples=100, deadline=None)
@given(
    histogram=st.lists(st.integers(0, 50), min_size=4, max_size=4).filter(any),
    seconds=st.lists(st.tuples(positive, positive), min_size=9, max_size=9),
    batch=st.sampled_from([1, 3, 16]),
)
def test_the_plan_is_the_best_of_all_subsets(model, histogram, seconds, batch):
    ordered = [tuple(sorted(pair)) for pair in seconds]
    costs = Costs((1, 16), ordered[0], tuple(ordered[1:5]), tuple(ordered[5:9]))
    plan = plan_exits(model, histogram, batch, costs=costs)
    assert plan.seconds == pytest.approx(brute_force(costs, histogram, batch))
    assert plan.seconds <= min(plan.seconds_with_all, plan.seconds_dense) + 1e-9
    assert set(plan.exits) <= set(LAYERS)


def test_free_heads_are_kept_and_dear_ones_dropped(model):
    histogram = [10, 10, 10, 10]
    assert plan_exits(model, histogram, costs=linear_costs(1.0, 0.0)).exits == (2, 3, 5)
    assert plan_exits(model, histogram, costs=linear_costs(1.0, 100.0)).exits == ()


def test_an_exit_nobody_leaves_at_is_dropped(model):
    assert plan_exits(model, [10, 0, 10, 10], costs=linear_costs(1.0, 0.1)).exits == (2, 5)


def test_predictions_of_fixed_layouts(model):
    plan = plan_exits(model, [8, 0, 4, 4], 16, costs=linear_costs(1.0, 0.25))
    assert plan.seconds_dense == pytest.approx(6.0)
    blocks, heads = 2 + 0.5 * 1 + 0.5 * 2 + 0.25 * 1, 0.25 * (1 + 0.5 + 0.5)
    assert plan.seconds_with_all == pytest.approx(blocks + heads)


def test_measured_costs_and_the_engine_that_follows_the_plan(model):
    costs = measure_costs(model, 6, rounds=1)
    assert costs.batches == (1, 2, 4, 6)
    assert len(costs.blocks) == len(costs.heads) == 4
    assert all(second > 0 for part in (*costs.blocks, *costs.heads) for second in part)
    plan = plan_exits(model, [5, 0, 0, 5], 6, costs=costs)
    assert set(plan.exits) <= {2, 3, 5}
    result = Engine(model, exits=plan.exits)(images(4), lgvit_fast.Replay([0, 1, 2, 3]))
    assert set(result.exit_layer.tolist()) <= {*plan.exits, 6}


def test_an_engine_can_be_given(model):
    plan = plan_exits(Engine(model, 4), torch.tensor([1, 2, 3, 4]), costs=linear_costs(1.0, 0.0))
    assert plan.exits == (2, 3, 5)


@pytest.mark.parametrize("histogram", [[1, 2, 3], [0, 0, 0, 0], [1, 2, 3, -1], [[1, 2, 3, 4]]])
def test_bad_histograms(model, histogram):
    with pytest.raises(ValueError, match="expected 4 numbers"):
        plan_exits(model, histogram, costs=linear_costs(1.0, 1.0))
